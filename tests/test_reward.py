"""The losses of stage 2."""

import math

import pytest
import torch
from conftest import shake

import reward
from data import improve_prompt
from run import Run

ORDER = [
    "ww",
    "lw",
    "wl",
    "ll",
]  # of the scores of a pair: y_w and y_l after (x, y_w), then after (x, y_l)


def test_bradley_terry_at_a_tie_is_log_2():
    assert math.isclose(
        reward.bradley_terry(torch.tensor(3.0), torch.tensor(3.0)).item(), math.log(2), rel_tol=1e-6
    )


def test_bradley_terry_is_minus_the_log_probability_of_the_preference():
    loss = reward.bradley_terry(torch.tensor(2.0), torch.tensor(0.5)).item()
    assert math.isclose(loss, -math.log(1 / (1 + math.exp(-1.5))), rel_tol=1e-6)


def test_eq_2_by_hand_and_only_its_five_terms():
    r = {"wl": 1.7, "ww": 0.4, "ll": -0.3, "lw": -1.1}
    published = {("wl", "ww"), ("wl", "ll"), ("wl", "lw"), ("ww", "lw"), ("ll", "lw")}
    by_hand = sum(math.log(1 + math.exp(r[b] - r[a])) for a, b in published)
    tensors = {k: torch.tensor(v, dtype=torch.float64, requires_grad=True) for k, v in r.items()}
    loss = reward.gap_loss(*(tensors[name] for name in ORDER))
    assert math.isclose(loss.item(), by_hand, rel_tol=1e-12)
    # a sixth term, such as ww against ll, would show in the gradients
    loss.backward()
    for name in r:
        slope = 0.0
        for a, b in published:
            p = 1 / (1 + math.exp(r[a] - r[b]))
            slope += p * ((name == b) - (name == a))
        assert math.isclose(tensors[name].grad.item(), slope, rel_tol=1e-9)


def test_eq_2_ignores_a_common_shift_and_is_least_with_the_middles_halfway():
    def loss(middle, shift=0.0):
        r = {"wl": 1.0, "ww": middle, "ll": middle, "lw": -1.0}
        return reward.gap_loss(*(torch.tensor(r[name] + shift) for name in ORDER)).item()

    assert min((-0.6, -0.3, 0.0, 0.3, 0.6), key=loss) == 0.0
    assert loss(0.0, shift=5.0) == pytest.approx(loss(0.0))


def test_centring_holds_no_change_at_0_where_eq_2_has_lost_its_pull():
    r = {
        "wl": 20.0,
        "ww": 6.0,
        "ll": -3.0,
        "lw": -20.0,
    }  # far apart: the sigmoids of Eq. 2 are flat
    for loss_of, pull in ((reward.gap_loss, 0.0), (reward.centred_gap_loss, 2 * reward.CENTRE)):
        tensors = {name: torch.tensor(value, requires_grad=True) for name, value in r.items()}
        loss_of(*(tensors[name] for name in ORDER)).backward()
        for name in r:
            expected = (
                pull * r[name] if name in ("ww", "ll") else 0.0
            )  # only the two scores of "no change" are held
            assert tensors[name].grad.item() == pytest.approx(expected, abs=1e-4)


def test_scores_of_a_pair_are_those_of_its_transcripts_one_by_one(lm, pairs):
    lm.add("role", head=True)
    shake(lm, "role")
    together = reward.score_pairs(lm, "role", reward.gap_contexts, pairs, 5)
    by_name = {"w": "chosen", "l": "rejected"}
    for scores, name in zip(together, ORDER):
        y, y_ref = ([getattr(pair, by_name[letter]) for pair in pairs] for letter in name)
        prompts = [
            lm.encode_prompt(improve_prompt(pair.prompt, text)) for pair, text in zip(pairs, y_ref)
        ]
        with torch.no_grad():
            alone = lm.scores("role", lm.collate(prompts, [lm.encode_response(text) for text in y]))
        torch.testing.assert_close(scores, alone, atol=1e-4, rtol=1e-4)


def test_candidates_that_share_a_prompt_have_the_gradients_of_separate_ones(lm, pairs):
    lm.add("role", head=True)
    shake(lm, "role")
    parameters = lm.parameters("role")
    prompts = [lm.encode_prompt(pair.prompt) for pair in pairs]
    candidates = [
        [lm.encode_response(pair.chosen), lm.encode_response(pair.rejected)] for pair in pairs
    ]
    shared = lm.scores_of_candidates("role", prompts, candidates)
    alone = torch.stack(
        [lm.scores("role", lm.collate(prompts, list(texts))) for texts in zip(*candidates)], 1
    )
    torch.testing.assert_close(shared, alone, atol=1e-4, rtol=1e-4)
    weights = torch.randn_like(shared)
    for a, b in zip(
        *(torch.autograd.grad((scores * weights).sum(), parameters) for scores in (shared, alone))
    ):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)


def test_training_learns_to_prefer_the_better_answers(lm, pairs, tmp_path):
    run = Run.start(
        tmp_path / "run",
        dict(seed=0, rm_steps=12, rm_batch=12, rm_lr=3e-3, micro_batch=12, save_every=100),
    )
    lm.add("reward", head=True)
    with run.stage("reward", "which answer is better?"):
        reward.train(lm, run, "reward", reward.answer_contexts, reward.bradley_terry, pairs)
    losses = [line["loss"] for line in run.metrics()]
    assert losses[-1] < 0.6 * losses[0]
