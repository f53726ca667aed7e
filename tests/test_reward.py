"""Stage 2: the losses, what the reward models learn, and what they say of texts."""

import math

import pytest
import torch
from conftest import FakeRun, equal, shake, weights

import reward
from data import improve_prompt

ORDER = ["ww", "lw", "wl", "ll"]  # the scores of y_w and y_l after (x, y_w), then after (x, y_l)
OPTIONS = dict(rm_steps=10, rm_batch=8, rm_lr=3e-3, max_response=30)


# ---- the losses --------------------------------------------------------------------------------


def test_bradley_terry_is_minus_the_log_probability_of_the_preference():
    loss = reward.bradley_terry(torch.tensor([2.0, 3.0]), torch.tensor([0.5, 3.0])).tolist()
    assert loss == pytest.approx([math.log(1 + math.exp(-1.5)), math.log(2)])


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


def test_the_ablation_has_the_first_three_terms_only():
    r = {"wl": 1.7, "ww": 0.4, "ll": -0.3, "lw": -1.1}
    by_hand = sum(math.log(1 + math.exp(r[b] - r["wl"])) for b in ("ww", "ll", "lw"))
    loss = reward.three_terms(*(torch.tensor(r[name]) for name in ORDER)).item()
    assert loss == pytest.approx(by_hand)


def test_eq_2_ignores_a_common_shift_and_is_least_with_the_middles_halfway():
    def loss(middle, shift=0.0):
        r = {"wl": 1.0, "ww": middle, "ll": middle, "lw": -1.0}
        return reward.gap_loss(*(torch.tensor(r[name] + shift) for name in ORDER)).item()

    assert min((-0.6, -0.3, 0.0, 0.3, 0.6), key=loss) == 0.0
    assert loss(0.0, shift=5.0) == pytest.approx(loss(0.0))


def test_centring_holds_no_change_at_0_where_eq_2_has_lost_its_pull():
    # far apart: the sigmoids of Eq. 2 are flat
    r = {"wl": 20.0, "ww": 6.0, "ll": -3.0, "lw": -20.0}
    for loss_of, pull in ((reward.gap_loss, 0.0), (reward.centred_gap_loss, 2 * reward.CENTRE)):
        tensors = {name: torch.tensor(value, requires_grad=True) for name, value in r.items()}
        loss_of(*(tensors[name] for name in ORDER)).backward()
        for name in r:
            # only the two scores of "no change" are held
            expected = pull * r[name] if name in ("ww", "ll") else 0.0
            assert tensors[name].grad.item() == pytest.approx(expected, abs=1e-4)


def test_with_noisy_labels_the_minimum_of_eq_2_is_not_the_probability():
    """What `gap_loss` says: sigma(gap) = 0.75 where annotators agree on 0.8."""
    gap = torch.linspace(0, 3, 3001)
    zero = torch.zeros(())
    by_truth = reward.gap_loss(zero, -gap, gap, zero)  # w is better: r^wl = gap, r^lw = -gap
    by_mistake = reward.gap_loss(zero, gap, -gap, zero)
    best = gap[(0.8 * by_truth + 0.2 * by_mistake).argmin()]
    assert torch.sigmoid(best).item() == pytest.approx(0.75, abs=1e-3)


# ---- training ----------------------------------------------------------------------------------


def test_r_p_and_the_judge_start_from_the_base_and_r_pit_from_r_p(lm, pairs, monkeypatch):
    for role in ("policy_sft", "pit_sft"):
        lm.add(role)
        shake(lm, role)
    starts = {}

    def train(lm, run, role, pairs, **losses):
        starts[role] = weights(lm, role)
        shake(lm, role)
        starts[f"{role}, trained"] = weights(lm, role)

    monkeypatch.setattr(reward, "train", train)
    run = FakeRun(**OPTIONS)
    reward.train_policy_reward(lm, run, pairs, pairs)
    reward.train_policy_reward(lm, run, pairs, pairs, role="judge")
    reward.train_gap_reward(lm, run, pairs, pairs)
    adapters_only = len(weights(lm, "blank"))
    for role in ("reward_policy", "judge"):
        assert equal(starts[role][:adapters_only], weights(lm, "blank"))
        assert len(starts[role]) > adapters_only  # and a head
    assert equal(starts["reward_gap"], starts["reward_policy, trained"])
    assert run.kept == ["reward_policy", "judge", "reward_gap"]


@pytest.mark.parametrize("contexts_of", [reward.answer_contexts, reward.gap_contexts])
def test_one_step_by_hand(lm, pairs, monkeypatch, contexts_of):
    """Loss, accuracy and gradient in micro-batches, against transcripts one by one."""
    pairs = pairs[:5]
    lm.add("role", head=True)
    shake(lm, "role")
    seen = []

    def take_step(optimizer, lr):
        seen.extend(p.grad for p in optimizer.param_groups[0]["params"])
        return 0.0

    monkeypatch.setattr(reward, "take_step", take_step)
    run = FakeRun(**OPTIONS | dict(rm_steps=1, rm_batch=5, micro_batch=2))
    loss_of = reward.bradley_terry
    if contexts_of == reward.gap_contexts:
        loss_of = reward.centred_gap_loss
    reward.train(lm, run, "role", pairs, contexts_of=contexts_of, loss_of=loss_of)

    losses = []
    right = []
    for pair in pairs:
        prompts = [pair.prompt]
        if contexts_of == reward.gap_contexts:
            prompts = [improve_prompt(pair.prompt, y) for y in (pair.chosen, pair.rejected)]
        r = []  # in the order of ORDER
        for prompt in prompts:
            for y in (pair.chosen, pair.rejected):
                alone = lm.collate([lm.encode_prompt(prompt)], [lm.encode_response(y)])
                r.append(lm.scores(alone)[0])
            right.append(float(r[-2] > r[-1]))
        losses.append(loss_of(*r))
    loss = sum(losses) / len(losses)
    expected = torch.autograd.grad(loss, lm.parameters("role"))
    assert run.lines[0]["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert run.lines[0]["accuracy"] == pytest.approx(sum(right) / len(right))
    for ours, plain in zip(seen, expected):
        torch.testing.assert_close(ours, plain, atol=1e-4, rtol=1e-3)


def test_trained_on_pairs_both_models_know_which_text_is_better(lm, pairs, rates):
    """Through the functions that RL, evaluation and `infer` use."""
    run = FakeRun(**OPTIONS)
    chats = [pair.prompt for pair in pairs]
    better = [pair.chosen for pair in pairs]
    worse = [pair.rejected for pair in pairs]

    reward.train_policy_reward(lm, run, pairs, pairs)
    scores = [
        reward.rewards(lm, "reward_policy", chats, texts, run.config) for texts in (better, worse)
    ]
    assert (scores[0] > scores[1]).float().mean() > 0.7
    assert (scores[0] - scores[1]).mean() > 1
    # two steps to warm up, which is WARMUP of ten, then down to 0
    schedule = [0.5, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]
    assert rates == pytest.approx([3e-3 * share for share in schedule])

    reward.train_gap_reward(lm, run, pairs, pairs)
    up, down, copy = (
        reward.gaps(lm, chats, answers, references, run.config)
        for answers, references in ((better, worse), (worse, better), (worse, worse))
    )
    assert (up > 0).float().mean() > 0.7 and (down < 0).float().mean() > 0.7
    assert up.mean() > 1 and down.mean() < -1
    assert copy.tolist() == [0.0] * len(pairs)

    # what is stored of the held-out pairs is what these texts show
    held_out = run.results()["reward"]
    accuracy = (scores[0] > scores[1]).float().mean().item()
    assert held_out["reward_policy"]["accuracy"] == pytest.approx(accuracy)
    accuracy = torch.cat([up > 0, down < 0]).float().mean().item()
    assert held_out["reward_gap"]["accuracy"] == pytest.approx(accuracy)


def test_held_out_measures_by_hand():
    # the first pair is in order; each other one breaks one of the four comparisons
    ww = torch.tensor([1.0, 2.0, 0.0, -1.0, 1.0])
    lw = torch.tensor([-2.0, -1.0, -1.0, 0.0, 0.0])
    wl = torch.tensor([3.0, 1.0, 1.0, 2.0, 2.0])
    ll = torch.tensor([0.0, 0.0, 2.0, 1.0, -1.0])
    measured = reward.held_out_metrics(torch.stack([ww, lw, wl, ll]).unflatten(0, (2, 2)))
    assert measured["order"] == pytest.approx(1 / 5)
    assert measured["accuracy"] == pytest.approx(8 / 10)  # not in the third and the fourth
    assert measured["middle"] == pytest.approx((3 - 2) / (9 + 4))
    assert measured["no_change"] == pytest.approx(5 / 10)
    assert measured["no_change_std"] == pytest.approx(math.sqrt(10.5 / 9))


def test_an_answer_that_was_cut_off_is_scored_without_an_end(lm, pairs):
    """RL sees it so: evaluation and `infer` must not reward an EOS that nobody wrote."""
    cfg = FakeRun(max_response=5).config
    ids = lm.encode_response(pairs[0].chosen)
    for n, scored in ((5, ids[:5]), (4, [*ids[:4], lm.eos])):
        (text,) = lm.decode(torch.tensor([ids[:n]]))
        assert reward.encode_written(lm, text, cfg) == scored


def test_a_judge_scores_by_its_own_adapter(lm, pairs):
    for role in ("reward_policy", "judge"):
        lm.add(role, head=True)
        shake(lm, role)
    chats = [pair.prompt for pair in pairs]
    texts = [pair.chosen for pair in pairs]
    prompts = [lm.encode_prompt(chat) for chat in chats]
    tokens = lm.collate(prompts, [lm.encode_response(text) for text in texts])
    lm.activate("judge")
    with torch.no_grad():
        expected = lm.scores(tokens)
    cfg = FakeRun(max_response=30, micro_batch=5).config
    scores = reward.rewards(lm, "judge", chats, texts, cfg)
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("accuracy, is_told", [(0.45, True), (0.52, True), (0.54, False)])
def test_an_accuracy_within_two_standard_errors_of_chance_is_told(
    lm, monkeypatch, accuracy, is_told
):
    chosen = torch.arange(1000) < 1000 * accuracy
    scores = torch.stack([chosen.float(), torch.full((1000,), 0.5)])[None]
    monkeypatch.setattr(reward, "score_pairs", lambda *_: scores)
    run = FakeRun()
    reward.finish(lm, run, "judge", reward.answer_contexts, [None] * 1000)
    told = ["judge may be no better than chance on 1000 pairs. More --rm-steps, or --pairs?"]
    assert run.warnings == (told if is_told else [])
