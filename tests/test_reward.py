"""The losses of stage 2."""

import itertools
import math

import pytest
import torch

import reward


def test_bradley_terry_at_a_tie_is_log_2():
    assert math.isclose(reward.bradley_terry(torch.tensor(3.0), torch.tensor(3.0)).item(), math.log(2), rel_tol=1e-6)


def test_bradley_terry_is_minus_the_log_probability_of_the_preference():
    loss = reward.bradley_terry(torch.tensor(2.0), torch.tensor(0.5)).item()
    assert math.isclose(loss, -math.log(1 / (1 + math.exp(-1.5))), rel_tol=1e-6)


def test_eq_2_by_hand_and_only_its_five_terms():
    r = {"wl": 1.7, "ww": 0.4, "ll": -0.3, "lw": -1.1}
    published = {("wl", "ww"), ("wl", "ll"), ("wl", "lw"), ("ww", "lw"), ("ll", "lw")}
    by_hand = sum(math.log(1 + math.exp(r[b] - r[a])) for a, b in published)
    tensors = {k: torch.tensor(v, dtype=torch.float64, requires_grad=True) for k, v in r.items()}
    loss = reward.gap_loss(*(tensors[name] for name in reward.NAMES))
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
    wl, lw = torch.tensor(1.0), torch.tensor(-1.0)
    losses = {m: reward.gap_loss(wl, torch.tensor(m), torch.tensor(m), lw).item() for m in (-0.6, -0.3, 0.0, 0.3, 0.6)}
    assert min(losses, key=losses.get) == 0.0
    assert reward.gap_loss(wl + 5, torch.tensor(5.0), torch.tensor(5.0), lw + 5).item() == pytest.approx(losses[0.0])


def test_four_transcripts_hold_candidate_and_reference_in_their_places(lm, pairs):
    pair = pairs[0]
    for (y, y_ref), (prompt, response) in zip(reward.FOUR, reward.gap_transcripts(lm, pair)):
        assert lm.decode([response]) == [getattr(pair, y)]
        assert getattr(pair, y_ref) in lm.tokenizer.decode(prompt)
    letter = {"chosen": "w", "rejected": "l"}
    assert reward.NAMES == [letter[y] + letter[y_ref] for y, y_ref in reward.FOUR]


def test_scores_do_not_depend_on_the_micro_batch(lm, pairs):
    lm.add("role", head=True)
    parts = [reward.score_pairs(lm, "role", reward.gap_transcripts, pairs, size) for size in (1, 5, 12)]
    for a, b in itertools.combinations(parts, 2):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
