"""Comparisons and their intervals."""

import numpy as np
import pytest

import evaluate


def test_compare_counts_wins_losses_and_ties():
    row = evaluate.compare([1.0, 2.0, 3.0, 4.0], [0.0, 3.0, 3.0, 3.0])
    assert (row["n"], row["win"], row["lose"], row["tie"], row["delta"]) == (4, 0.5, 0.25, 0.25, 0.25)
    assert row["ci95"][0] <= 0.25 <= row["ci95"][1]


def test_a_side_against_itself_is_all_ties():
    row = evaluate.compare([0.3, 0.7] * 8, [0.3, 0.7 + 1e-7] * 8)
    assert row["tie"] == 1 and row["ci95"] == [0, 0]


def test_the_interval_covers_the_truth_as_often_as_it_says():
    rng, truth, covered = np.random.default_rng(0), 0.2, 0
    for trial in range(300):
        outcome = rng.choice([1, 0, -1], p=[0.4, 0.4, 0.2], size=100)
        low, high = evaluate.compare(outcome, np.zeros(100), resamples=400, seed=trial)["ci95"]
        covered += low <= truth <= high
    assert covered / 300 == pytest.approx(0.95, abs=0.035)
