"""Comparisons and their intervals."""

import json

import numpy as np
import pytest
from transformers import Qwen2Config, Qwen2ForSequenceClassification

import baselines
import evaluate
import judges as judges_module
import report
from errors import UserError


def test_compare_counts_wins_losses_and_ties():
    row = evaluate.compare([1.0, 2.0, 3.0, 4.0], [0.0, 3.0, 3.0, 3.0])
    assert (row["n"], row["win"], row["lose"], row["tie"], row["delta"]) == (
        4,
        0.5,
        0.25,
        0.25,
        0.25,
    )
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


def test_elo_recovers_known_strengths_whatever_the_order():
    rng, truth = np.random.default_rng(0), np.array([1000.0, 1100.0, 950.0, 1250.0])
    # Gumbel noise makes P(i beats j) the logistic function of the difference of strengths: Bradley-Terry exactly
    scores = (truth * np.log(10) / 400)[:, None] + rng.gumbel(size=(4, 4000))
    ratings, intervals = evaluate.elo(scores, resamples=50)
    np.testing.assert_allclose(ratings, truth, atol=25)
    assert all(
        low - 25 <= t <= high + 25 and low < high
        for t, (low, high) in list(zip(truth, intervals))[1:]
    )
    shuffled, _ = evaluate.elo(scores[:, rng.permutation(4000)], resamples=1)
    np.testing.assert_allclose(shuffled, ratings)


def test_elo_of_equal_sides_and_of_one_that_always_wins():
    assert evaluate.elo(np.full((3, 40), 0.5), resamples=5)[0] == pytest.approx([1000] * 3)
    low, high = evaluate.elo([[0.0] * 40, [1.0] * 40], resamples=5)[0]
    assert low == 1000 and 1400 < high < 2500


def test_a_margin_makes_near_scores_a_tie():
    row = evaluate.compare([1.0, 1.0, 1.0], [0.95, 1.2, 0.5], margin=0.1)
    assert (row["win"], row["lose"], row["tie"]) == pytest.approx((1 / 3,) * 3)


def test_calibration_is_0_where_the_odds_are_right_and_large_where_they_are_not():
    rng = np.random.default_rng(0)
    gap = rng.normal(0, 2, 40_000)
    better = rng.random(40_000) < 1 / (1 + np.exp(-gap))
    right = np.where(better, gap, -gap)  # the gap of the better over the worse
    assert evaluate.calibration(np.stack([right, -right])) < 0.01
    assert evaluate.calibration(np.stack([5 * right, -5 * right])) > 0.1


def length(text):
    return len(text.split())


def longer(prompts, texts):
    return np.array([float(length(text)) for text in texts])


def test_a_judge_that_loves_length_is_seen_through(pairs):
    judges = {
        "loves length": judges_module.Judge(longer, 0.1),
        "quality": judges_module.Judge(judges_module.exact, judges_module.SAME),
    }
    rows = evaluate.judge_accuracy(judges, pairs, length)
    assert (
        rows["loves length"]["accuracy"]
        == rows["the longer wins"]["accuracy"]
        < rows["quality"]["accuracy"]
        == 1
    )
    texts = [pair.chosen for pair in pairs]
    n = [1] * len(pairs)
    sides = {
        "pit": baselines.Side([text + " and more" for text in texts], n, 2),
        "original": baselines.Side(texts, n, 1),
    }
    scores = {side: longer(None, s.texts) for side, s in sides.items()}
    row = evaluate.table1_row("pit", "original", "loves length", scores, 0.1, sides, length, None)
    assert row["delta"] == 1 and row["tokens_a"] == row["tokens_b"] + 2 and row["generations"] == 2


def test_a_side_that_does_not_apply_gets_a_reason_and_no_number():
    row = evaluate.table1_row(
        "pit", "self_refine", "quality", {}, 0.1, {"pit": None}, length, "cannot follow"
    )
    assert row["not_applicable"] == "cannot follow" and "delta" not in row
    assert " n/a |" in report.table([row])


def test_a_reward_model_from_a_folder_judges(tmp_path, lm, pairs):
    config = Qwen2Config(
        vocab_size=len(lm.tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_labels=1,
    )
    Qwen2ForSequenceClassification(config).save_pretrained(tmp_path)
    lm.tokenizer.save_pretrained(tmp_path)
    scores = judges_module.hub_judge(str(tmp_path), "cpu").score(
        [pair.prompt for pair in pairs], [pair.chosen for pair in pairs]
    )
    assert scores.shape == (len(pairs),) and len(set(scores)) > 1
    with pytest.raises(UserError, match="no-such"):
        judges_module.hub_judge(str(tmp_path / "no-such"), "cpu")


def test_a_judge_never_runs_code_of_its_own(tmp_path, lm, monkeypatch):
    """Without `trust_remote_code=False` transformers asks "run the custom code?", and this one would say yes."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    lm.tokenizer.save_pretrained(tmp_path)
    code = {"AutoConfig": "own.Config", "AutoModelForSequenceClassification": "own.Model"}
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "own", "auto_map": code, "num_labels": 1})
    )
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    with pytest.raises(UserError, match="Give quality, judge, or a reward model"):
        judges_module.hub_judge(str(tmp_path), "cpu")
    assert not (tmp_path / "ran").exists()
