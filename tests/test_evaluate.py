"""Statistics against plain references, and every table made again from stored texts."""

import json
import shutil
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import baselines
import data
import evaluate
import infer
import judges
import reward
import task
from baselines import ORIGINAL, Key
from models import load_model
from run import Run

# ---- win, lose, delta --------------------------------------------------------------------------


def test_compare_counts_wins_losses_and_ties():
    row = evaluate.compare([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [0.0, 3.0, 3.0, 3.0, 4.0, 7.0])
    shares = (row["n"], row["win"], row["lose"], row["tie"], row["delta"])
    assert shares == pytest.approx((6, 3 / 6, 2 / 6, 1 / 6, 1 / 6))


def test_a_margin_makes_near_scores_a_tie():
    row = evaluate.compare([1.0, 1.0, 1.0], [0.95, 1.2, 0.5], margin=0.1)
    assert (row["win"], row["lose"], row["tie"]) == pytest.approx((1 / 3,) * 3)


def test_the_interval_is_a_paired_bootstrap_over_prompts():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 40))
    a += b  # far closer to each other than two prompts are
    row = evaluate.compare(a, b)
    draws = np.random.default_rng(1).integers(40, size=(2000, 40))
    deltas = []
    for draw in draws:
        wins = sum(a[i] > b[i] for i in draw)
        losses = sum(a[i] < b[i] for i in draw)
        deltas.append((wins - losses) / 40)
    deltas.sort()
    assert row["ci95"] == pytest.approx([deltas[50], deltas[1949]], abs=1 / 40)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    truth = 0.2
    covered = 0
    for _ in range(300):
        outcome = rng.choice([1, 0, -1], p=[0.4, 0.4, 0.2], size=100)
        low, high = evaluate.compare(outcome, np.zeros(100))["ci95"]
        covered += low <= truth <= high
    assert covered / 300 == pytest.approx(0.95, abs=0.035)


def wilson(k, n, z=1.96):
    """Wilson's interval of a share of k in n, by the textbook."""
    p = k / n
    middle = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return middle - half, middle + half


@pytest.mark.parametrize("n", [5, 100])
def test_where_all_outcomes_are_the_same_the_interval_is_wilsons(n):
    wins = evaluate.compare(np.ones(n), np.zeros(n))["ci95"]
    share = wilson(n, n)[0]  # of wins, at least; the others may all be losses
    assert wins == pytest.approx([share - (1 - share), 1])
    losses = evaluate.compare(np.zeros(n), np.ones(n))["ci95"]
    assert losses == pytest.approx([-wins[1], -wins[0]])
    ties = evaluate.compare(np.ones(n), np.ones(n) + 1e-7)
    assert ties["tie"] == 1 and ties["ci95"] == pytest.approx([share - 1, 1 - share])
    assert evaluate.interval(np.ones(n), bounds=(0, 1)) == pytest.approx(wilson(n, n))
    assert evaluate.interval(np.full(n, 0.3)) == pytest.approx([0.3, 0.3])  # no bounds, no edge


# ---- Elo ---------------------------------------------------------------------------------------


def plain_elo(scores, margin=1e-4):
    """The likeliest Elo ratings, by Newton's method on the log-likelihood."""
    K = len(scores)
    wins = np.full((K, K), 0.25) - 0.25 * np.eye(K)
    for i, j in combinations(range(K), 2):
        for a, b in zip(scores[i], scores[j]):
            point = 0.5 if abs(a - b) < margin else float(a > b)
            wins[i, j] += point
            wins[j, i] += 1 - point
    theta = np.zeros(K)
    games = wins + wins.T
    for _ in range(200):
        p = 1 / (1 + np.exp(theta[None] - theta[:, None]))  # P(i beats j)
        slope = (wins - games * p).sum(1)
        curve = games * p * (1 - p)
        curve = np.diag(curve.sum(1)) - curve
        step = np.linalg.lstsq(curve, slope, rcond=None)[0]
        theta += step / max(1, np.abs(step).max())
    assert np.abs(slope).max() < 1e-8
    return 1000 + 400 * (theta - theta[0]) / np.log(10)


def nearly_separable():
    """Two groups of sides: a coin decides within each, and the second group nearly always wins."""
    scores = np.random.default_rng(0).integers(2, size=(6, 100)).astype(float)
    scores[3:] += 10
    scores[0, 0] = 20
    return scores


@pytest.mark.parametrize(
    "scores",
    [np.random.default_rng(0).normal(size=(4, 60)).round(1), nearly_separable(), np.eye(3)[:, :2]],
)
def test_elo_is_the_likeliest_fit_however_slowly_it_converges(scores):
    ratings = evaluate.elo(scores)
    np.testing.assert_allclose(ratings, plain_elo(scores), atol=0.01)


def test_elo_recovers_known_strengths_whatever_the_order():
    rng = np.random.default_rng(0)
    truth = np.array([1000.0, 1100.0, 950.0, 1250.0])
    # Gumbel noise makes P(i beats j) the logistic function of the difference: Bradley-Terry exactly
    scores = (truth * np.log(10) / 400)[:, None] + rng.gumbel(size=(4, 4000))
    ratings = evaluate.elo(scores)
    np.testing.assert_allclose(ratings, truth, atol=25)
    shuffled = evaluate.elo(scores[:, rng.permutation(4000)])
    np.testing.assert_allclose(shuffled, ratings)


def test_elo_of_equal_sides_and_of_one_that_always_wins():
    assert evaluate.elo(np.full((3, 40), 0.5)) == pytest.approx([1000] * 3)
    low, high = evaluate.elo([[0.0] * 40, [1.0] * 40])
    assert low == 1000 and 1400 < high < 2500


def test_enough_votes_say_something():
    low, high = evaluate.interval([1, -1] * (evaluate.ENOUGH // 2))
    assert high - low < 1.5


# ---- a whole evaluation, made again from its texts ---------------------------------------------


class Scores:
    """A model that knows its scores: {(candidate, y_ref): score}."""

    def __init__(self, known):
        self.known = known

    def score(self, contexts, texts):
        references = [context[-2]["content"] for context in contexts]
        return np.array([self.known[pair] for pair in zip(texts, references)])


QUESTION = [{"role": "user", "content": "x"}]


def test_gaps_of_pairs_are_measured_against_no_change_in_both_directions(monkeypatch):
    pair = data.Pair(QUESTION, "good", "bad")
    four = torch.tensor([[[0.5], [1.5]], [[3.0], [1.0]]])  # ww, lw; wl, ll
    monkeypatch.setattr(evaluate, "score_pairs", lambda *args: four)
    found = evaluate.gap_evidence(SimpleNamespace(roles={"reward_gap"}), [pair], [], cfg=None)
    assert found["fig2"] == {"ww": [0.5], "lw": [1.5], "wl": [3.0], "ll": [1.0]}
    # good over bad is 2 above "no change", bad over good is 1 above it: half right
    (row,) = found["eq2"]
    assert row["accuracy"] == 0.5
    assert (row["win"], row["lose"], row["tie"], row["delta"]) == (0, 0, 1, 0)


def test_the_gap_of_a_round_is_that_over_the_round_before():
    known = {("b", "a"): 2.0, ("a", "a"): 0.5}
    texts = {Key("pit", round=2): ["b"], Key("pit"): ["a"]}
    answers = SimpleNamespace(
        prompts=[QUESTION],
        side=lambda key: SimpleNamespace(texts=texts[key]),
        before=lambda key: SimpleNamespace(texts=texts[key.before()]),
    )
    answers.to_improve = lambda key: [data.improve_prompt(QUESTION, "a")]
    gaps = evaluate.View("gap", Scores(known), answers).gaps(Key("pit", round=2))
    assert gaps.tolist() == [1.5]


def test_pairs_by_models_are_in_the_order_of_the_judge():
    second = Key("second_sample")
    texts = {second: ["a", "b", "c"], ORIGINAL: ["d", "e", "f"]}
    scores = {second: np.array([2.0, 0.0, 1.0]), ORIGINAL: np.ones(3)}
    answers = SimpleNamespace(
        prompts=["x", "y", "z"], side=lambda key: SimpleNamespace(texts=texts[key])
    )
    view = SimpleNamespace(answers=answers, scores=scores.get, judge=SimpleNamespace(margin=0.1))
    pairs = [(pair.prompt, pair.chosen, pair.rejected) for pair in evaluate.written_pairs(view)]
    assert pairs == [("x", "a", "d"), ("y", "e", "b")]  # and a tie is no pair


def test_after_one_round_pit_rl0_has_no_rows_of_its_own():
    """It is PIT itself."""
    ones = np.ones(3)
    view = SimpleNamespace(
        name="by",
        compare=lambda a, b: evaluate.compare(ones, ones),
    )
    for last, is_there in (("pit_rl0", False), ("pit_rl1", True)):
        keys = baselines.all_keys(["pit", "self_refine"], last)
        rows = evaluate.table1([view], keys)
        sides = {name for row in rows for name in (row["a"], row["b"])}
        assert ("pit_rl0" in sides) == is_there


def test_a_real_base_has_self_refine_and_r_p_chooses_the_best(monkeypatch):
    seen = []

    class Enough(Exception):
        pass

    def all_keys(methods, last, sources):
        seen.append(methods)
        raise Enough

    monkeypatch.setattr(evaluate, "all_keys", all_keys)
    monkeypatch.setattr(evaluate, "adapter_judge", lambda lm, role, cfg: role)
    monkeypatch.setattr(evaluate, "Answers", lambda *args: seen.append(args[-1]))
    run = SimpleNamespace(config=SimpleNamespace(model="Qwen2-0.5B", eval_n=2, rounds="given"))
    with pytest.raises(Enough):
        evaluate.evaluate(None, run, [], "pit_rl1", {"by": None})
    assert seen == ["reward_policy", ["pit", "self_refine"]]


def test_table_3_compares_equal_rounds_and_has_the_judges_margin():
    view = SimpleNamespace(
        scores=lambda key: np.ones(3) + 0.01 * key.round,
        compare=lambda a, b: (a, b),
        judge=SimpleNamespace(margin=0.1),
    )
    rows = evaluate.rounds_table(view, ["pit", "self_refine"])
    assert [row["elo"] for row in rows] == pytest.approx([1000] * 11)
    for k, row in enumerate(rows[1:6], 1):
        assert row["over_self_refine"] == (Key("pit", round=k), Key("self_refine", round=k))


def test_near_scores_are_ties_in_agreement_too():
    line = {
        "prompt": [],
        "answers": {"pit": "a", "original": "b"},
        "scores": {"by": {"pit": 1.2, "original": 1.0}},
    }
    said = evaluate.all_verdicts({}, [line], {"by": {"margin": 0.5}})
    assert list(said["by"].values()) == [0]


# of each curriculum, the last adapter
LASTS = {"annotated,policy": "pit_rl1", "annotated": "pit_rl0", "policy": "pit_sft"}


@pytest.fixture(scope="module")
def measured(miniature, tmp_path_factory):
    """The miniature run, evaluated -> its folder, its base, its pairs, and what was scored."""
    folder = tmp_path_factory.mktemp("evaluation") / "run"
    shutil.copytree(miniature, folder)
    run = Run(folder)
    lm = load_model("tiny", bits=16)
    for adapter in sorted((folder / "adapters").iterdir()):
        lm.load(adapter.name, adapter)
    pairs = data.load_parts(run.config, lm, data.synthetic_pairs(run.config.pairs, seed=0))
    pairs = pairs["held_out"][:8]
    asked = []
    score = reward.rewards

    def noted(lm, role, prompts, texts, cfg):
        asked.extend((role, str(prompt), text) for prompt, text in zip(prompts, texts))
        return score(lm, role, prompts, texts, cfg)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reward, "rewards", noted)
        named = judges.judges_by_name(["quality", "judge"], lm, run.config)
        with run.stage("eval", "who beats whom"):
            evaluate.evaluate(lm, run, pairs, "pit_rl1", named, LASTS)
    return run, lm, pairs, asked


def written_tokens(run, lm, text):
    """With the EOS, if there was room for it."""
    return min(len(lm.encode_response(text)), run.config.max_response)


def stored_texts(run, pairs):
    """The texts of every side by its name in answers.json, y_w and y_l, and the best of samples."""
    kept = json.loads((run.path / "answers.json").read_text())
    texts = {name: entry["texts"] for name, entry in kept.items()}
    texts["y_w"] = [p.chosen for p in pairs]
    texts["y_l"] = [p.rejected for p in pairs]
    for line in (run.path / "answers.jsonl").read_text().splitlines():
        for name in ("best_of_2", "best_of_3"):
            texts.setdefault(name, []).append(json.loads(line)["answers"][name])
    return texts


def exact_scores(pairs, texts):
    return np.array([task.quality(p.prompt[0]["content"], y) for p, y in zip(pairs, texts)])


def delta_of(a, b, margin=1e-4):
    """Wins less losses, counted one by one."""
    wins = sum(x >= y + margin for x, y in zip(a, b))
    losses = sum(y >= x + margin for x, y in zip(a, b))
    return (wins - losses) / len(a)


def test_no_text_is_scored_twice(measured):
    *_, asked = measured
    assert len(asked) == len(set(asked)) > 60


def test_answers_jsonl_holds_the_texts_and_scores_of_table_1(measured):
    run, lm, pairs, _ = measured
    texts = stored_texts(run, pairs)
    lines = [json.loads(line) for line in (run.path / "answers.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == [pair.prompt for pair in pairs]
    for i, line in enumerate(lines):
        assert {"original", "y_w", "pit", "pit_rl0", "best_of_3"} <= line["answers"].keys()
        assert "self_refine" not in line["answers"]
        for name, text in line["answers"].items():
            assert text == texts[name][i]
            score = task.quality(pairs[i].prompt[0]["content"], text)
            assert line["scores"]["quality"][name] == pytest.approx(score)


def test_table_1_from_texts(measured):
    run, lm, pairs, _ = measured
    results = run.results()
    texts = stored_texts(run, pairs)
    prompts = [pair.prompt for pair in pairs]
    rows = {(r["judge"], r["a"], r["b"]): r for r in results["table1"]}
    # the built-in base cannot follow Self-Refine's prompts, and no answers are given
    missing = {"self_refine", "self_refine_base", "given"}
    possible = {sides for sides in evaluate.COMPARISONS if not missing & {*sides}}
    assert {(a, b) for _, a, b in rows} == possible
    scores = {}
    margins = {"quality": 1e-4, "judge": 0.1}
    for side in {side for sides in evaluate.COMPARISONS for side in sides if side in texts}:
        scores["quality", side] = exact_scores(pairs, texts[side])
        learned = reward.rewards(lm, "judge", prompts, texts[side], run.config)
        scores["judge", side] = learned.tolist()
    for (judge, a, b), row in rows.items():
        delta = delta_of(scores[judge, a], scores[judge, b], margins[judge])
        assert row["delta"] == pytest.approx(delta) == pytest.approx(row["win"] - row["lose"])
    for (judge, side), of_side in scores.items():
        row = results["sides"][side]
        lengths = [written_tokens(run, lm, text) for text in texts[side]]
        assert row["length"] == pytest.approx(np.mean(lengths))
        same = [y == y_0 or not y for y, y_0 in zip(texts[side], texts["original"])]
        assert row["unchanged"] == np.mean(same)
        assert row["scores"][judge] == pytest.approx(np.mean(of_side), abs=1e-5)
    pit = results["sides"]["pit"]
    spent = [written_tokens(run, lm, y) for y in texts["pit"] + texts["original"]]
    assert (pit["tokens"], pit["texts"]) == (pytest.approx(sum(spent) / len(pairs)), 2)


def test_cool_sides_from_texts(measured):
    """Every side at 0.4, its drafts as well: the same comparisons, of other texts."""
    run, lm, pairs, _ = measured
    found = run.results()["cool"]
    texts = stored_texts(run, pairs)
    names = ["original", "second_sample", "pit_sft", "pit_rl0", "pit"]
    of = {name: texts[f"{name}@0.4, drafts@0.4"] for name in names}
    assert of["original"] != texts["original"] and of["pit"] != texts["pit@0.4"]
    assert [*found["sides"]] == [*baselines.COOL_SIDES]
    for name, column in of.items():
        side = found["sides"][name]
        assert side["scores"]["quality"] == pytest.approx(exact_scores(pairs, column).mean())
        same = [y == y_0 or not y for y, y_0 in zip(column, of["original"])]
        assert side["unchanged"] == np.mean(same)
    rows = {(row["a"], row["b"]): row for row in found["rows"]}
    assert ("pit", "best_of_2") in rows and ("pit_sft", "original") in rows
    for a, b in (("pit", "original"), ("pit", "second_sample"), ("pit", "pit_rl0")):
        delta = delta_of(exact_scores(pairs, of[a]), exact_scores(pairs, of[b]))
        assert rows[a, b]["delta"] == pytest.approx(delta)


def test_accuracies_from_texts(measured):
    run, lm, pairs, _ = measured
    found = run.results()["judges"]
    longer = [
        len(lm.encode_response(p.chosen)) - len(lm.encode_response(p.rejected)) for p in pairs
    ]
    right = sum((d > 0) + (d == 0) / 2 for d in longer) / len(pairs)
    assert found["the longer wins"] == {"accuracy": pytest.approx(right), "margin": 0}
    assert found["quality"]["accuracy"] == 1 and found["judge"]["margin"] == 0.1


def test_figure_3_and_table_3_from_texts(measured):
    run, lm, pairs, _ = measured
    results = run.results()
    texts = stored_texts(run, pairs)
    scores = {name: exact_scores(pairs, column) for name, column in texts.items()}
    best = scores["pit@0.4"]
    for row in results["fig3"]:
        T = row["temperature"]
        at = scores["pit" if T == 1.0 else f"pit@{T}"]
        assert row["delta"] == pytest.approx(delta_of(at, scores["original"]))
        if T != 0.4:
            assert row["04_over_it"]["delta"] == pytest.approx(delta_of(best, at))
    assert len(results["fig3"]) == 7
    names = ["original", "pit", "pit#2", "pit#3", "pit#4", "pit#5"]
    elo = plain_elo([scores[name] for name in names])
    assert [row["elo"] for row in results["table3"]] == pytest.approx(elo.tolist(), abs=0.01)
    for k, row in enumerate(results["table3"]):
        assert (row["round"], row["mean"]) == (k, pytest.approx(scores[names[k]].mean()))
        assert row["over_original"]["delta"] == delta_of(scores[names[k]], scores["original"])
        delta = delta_of(scores[names[k]], scores[names[max(0, k - 1)]])
        assert row["over_previous"]["delta"] == pytest.approx(delta)


def test_what_rl_did_to_its_own_rewards_from_texts(measured):
    run, lm, pairs, _ = measured
    texts = stored_texts(run, pairs)
    prompts = [pair.prompt for pair in pairs]
    for name, side in run.results()["sides"].items():
        scores = reward.rewards(lm, "reward_policy", prompts, texts[name], run.config)
        assert side["scores"]["R_P"] == pytest.approx(scores.mean().item(), abs=1e-4)
        gaps = reward.gaps(lm, prompts, texts[name], texts["original"], run.config)
        assert side["scores"]["gap"] == pytest.approx(gaps.mean().item(), abs=1e-4)


def test_stop_rules_from_texts(measured):
    run, lm, pairs, _ = measured
    texts = stored_texts(run, pairs)
    prompts = [pair.prompt for pair in pairs]
    names = ["original", "pit", "pit#2", "pit#3", "pit#4", "pit#5"]
    scores = np.array([exact_scores(pairs, texts[name]) for name in names])
    tokens = np.array([[written_tokens(run, lm, y) for y in texts[name]] for name in names])
    gaps = []
    for old, new in zip(names, names[1:]):
        gaps.append(reward.gaps(lm, prompts, texts[new], texts[old], run.config).tolist())
    rows = {(row["stop"], row["limit"]): row for row in run.results()["stops"]}
    assert {stop for stop, _ in rows} == set(infer.STOPS)
    for stop, limit in rows:
        final = []
        spent = []
        for i in range(len(pairs)):
            answer = done = 0
            while done < limit:
                done += 1
                unchanged = texts[names[done]][i] == texts[names[answer]][i]
                if stop == "gap" and (unchanged or gaps[done - 1][i] <= 0):
                    break
                answer = done
                if stop == "same" and unchanged:
                    break
            final.append(scores[answer, i])
            spent.append(tokens[: done + 1, i].sum())
        assert rows[stop, limit]["mean"] == pytest.approx(np.mean(final))
        assert rows[stop, limit]["tokens"] == pytest.approx(np.mean(spent))


def test_figure_2_and_gap_models_from_texts(measured):
    run, lm, pairs, _ = measured
    results = run.results()
    cfg = run.config
    four = results["fig2"]
    for i, pair in enumerate(pairs[:4]):
        sides = {"w": pair.chosen, "l": pair.rejected}
        for name in ("ww", "lw", "wl", "ll"):
            context = data.improve_prompt(pair.prompt, sides[name[1]])
            score = reward.rewards(lm, "reward_gap", [context], [sides[name[0]]], cfg).item()
            assert four[name][i] == pytest.approx(score, abs=2e-3)
    texts = stored_texts(run, pairs)
    prompts = [pair.prompt for pair in pairs]
    rows = {(row["model"], row["pairs"]): row for row in results["eq2"]}
    chosen = reward.rewards(lm, "reward_policy", prompts, texts["y_w"], cfg)
    rejected = reward.rewards(lm, "reward_policy", prompts, texts["y_l"], cfg)
    right = (chosen > rejected).float().mean().item()
    assert rows["reward_policy", "annotated"]["accuracy"] == pytest.approx(right)
    # pairs that the models wrote: the exact rule says which is the better one, ties are left out
    above = exact_scores(pairs, texts["second_sample"]) - exact_scores(pairs, texts["original"])
    right = []
    for i in np.flatnonzero(above):
        better = texts["second_sample"][i]
        worse = texts["original"][i]
        if above[i] < 0:
            better, worse = worse, better
        over = reward.gaps(lm, [prompts[i]], [better], [worse], cfg).item()
        under = reward.gaps(lm, [prompts[i]], [worse], [better], cfg).item()
        right.append(((over > 0) + (under < 0)) / 2)
    row = rows["reward_gap", "written by models"]
    assert (row["n"], row["accuracy"]) == (len(right), pytest.approx(np.mean(right)))


def test_table_2_judges_the_last_adapter_of_each_curriculum(measured):
    run, lm, pairs, _ = measured
    texts = stored_texts(run, pairs)
    scores = {role: exact_scores(pairs, texts[role]) for role in LASTS.values()}
    original = exact_scores(pairs, texts["original"])
    assert [row["curriculum"] for row in run.results()["table2"]] == list(LASTS)
    for row in run.results()["table2"]:
        own = scores[LASTS[row["curriculum"]]]
        assert row["over_original"]["delta"] == pytest.approx(delta_of(own, original))
        assert row["both_over_it"]["delta"] == pytest.approx(delta_of(scores["pit_rl1"], own))
