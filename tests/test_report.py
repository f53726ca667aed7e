"""The scorecard's verdicts, the tables' text, and a page with all that it must have."""

import json
import re

import numpy as np
import pytest

import report
from run import Run, checksum

CURRICULA = ["annotated", "policy", "annotated,policy"]


def compared(delta, half=0.05, **names):
    """A comparison of 100 prompts, with an interval of delta +- half."""
    win = max(delta, 0)
    lose = max(-delta, 0)
    numbers = {"n": 100, "win": win, "lose": lose, "tie": 1 - win - lose, "delta": delta}
    return names | numbers | {"ci95": [delta - half, delta + half]}


def table1_rows(judge, deltas):
    """Rows of Table 1 by one judge; deltas: {(a, b): delta}."""
    return [compared(d, judge=judge, a=a, b=b) for (a, b), d in deltas.items()]


def results():
    """What evaluate.py might measure: all forms of rows, few of each, by two judges."""
    deltas = {
        ("original", "y_w"): -0.6,
        ("pit", "original"): 0.5,
        ("pit", "y_w"): -0.2,
        ("pit", "pit_sft"): 0.02,
        ("pit_sft", "original"): 0.3,
    }
    one_round = dict(elo=1100, mean=0.9, mean_ci95=[0.8, 1.0])
    gap = dict(model="reward_gap", accuracy=0.9)
    one_side = dict(length=12.0, tokens=24.0, texts=2, unchanged=0.1, scores={"judge": 0.5})
    sides = ["original", "y_w", "pit", "pit_sft"]
    scores = np.linspace(-1, 1, 20).tolist()
    return {
        "main": "judge",
        "judges": {"judge": {"accuracy": 0.9, "margin": 0.1}},
        "table1": [
            *table1_rows("judge", deltas),
            *table1_rows("me", {("pit", "original"): 0.01}),
        ],
        "sides": dict.fromkeys(sides, one_side),
        "cool": {
            "rows": table1_rows("judge", {("pit", "original"): 0.25}),
            "sides": {"pit": one_side | {"unchanged": 0.4}},
        },
        "fig3": [
            compared(0.5, method="pit", temperature=0.1) | {"04_over_it": compared(-0.1)},
            compared(0.5, method="pit", temperature=0.4),
            compared(0.4, method="pit", temperature=1.0) | {"04_over_it": compared(0.1)},
        ],
        "table3": [
            one_round | {"method": "original", "round": 0, "mean": 0.6},
            one_round | {"method": "pit", "round": 1, "over_original": compared(0.5)},
            one_round
            | {"method": "pit", "round": 2, "over_original": compared(0.03)}
            | {"over_previous": compared(-0.3)},
        ],
        "stops": [
            dict(stop=stop, limit=k, mean=0.9, ci95=[0.8, 1.0], tokens=20.0 * k)
            for stop in ("rounds", "gap")
            for k in (1, 2)
        ],
        "fig2": dict.fromkeys(["wl", "ww", "ll", "lw"], scores),
        "eq2": [
            compared(0.8, 0.15, **gap, pairs="annotated"),
            compared(0.0, 0.2, **gap, pairs="written by models"),
        ],
        "reward": {"reward_gap": {"accuracy": 0.9}},
        "table2": [
            {"curriculum": c, "over_original": compared(0.2), "both_over_it": compared(0.1)}
            | {"judge": "judge"}
            for c in CURRICULA
        ],
        "words": learned_words(),
        "votes": {"me": ["agrees with judge on 80% of 50 pairs."]},
        "few_votes": [dict(a="pit", b="y_w", judge="me") | compared(0.1)],
        "time_s": {"pit_sft": 30.0, "eval": 90.0},
    }


def learned_words():
    texts = {"pit": 63, "original": 35, "y_w": 113, "y_l": 0}
    word = {"feature": "indeed", "z": 4.2, "texts": texts, "without": compared(0.16, 0.17)}
    ending = {"feature": "ends with !", "z": 2.5, "texts": texts}
    return {"answers": 100, "pairs": 1000, "delta": compared(0.39, 0.16), "rows": [word, ending]}


def metrics():
    """A few steps of every kind of stage."""
    lines = []
    for step in range(10):
        lines.append({"stage": "pit_sft", "step": step, "loss": 0.3})
        lines.append({"stage": "reward_gap", "step": step, "accuracy": 0.8})
        for stage in ("policy_rl", "pit_rl0", "pit_rl1"):
            rl = dict(score=1.0, kl=0.5, length=12.0, eos=1.0, explained_variance=0.2)
            lines.append({"stage": stage, "step": step} | rl)
        lines += [gap_line("annotated", 0, step, 0.0), gap_line("policy", 0, step, -0.5)]
        lines.append(gap_line("annotated,policy", step // 5, step % 5, 1.0))
    return lines


def gap_line(curriculum, number, step, gap):
    return {"stage": f"ablate_{curriculum.replace(',', '-')}_{number}", "step": step, "score": gap}


def answer_lines():
    """Nine prompts on which PIT gains -4, -3, ... 4 points by the judge."""
    lines = []
    for gain in range(-4, 5):
        prompt = [{"role": "user", "content": f"the prompt of gain {gain}"}]
        answers = {"original": "so " * 200, "pit": f"the answer of gain {gain}"}
        scores = {"judge": {"original": 1.0, "pit": 1.0 + gain}}
        lines.append({"prompt": prompt, "answers": answers, "scores": scores})
    return lines


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A run's files, made by hand, and the report drawn from them -> the folder."""
    path = tmp_path_factory.mktemp("runs") / "by_hand"
    path.mkdir()
    config = dict(
        model="tiny",
        bits=4,
        lora_r=16,
        data="pairs.jsonl",
        pairs=2000,
        seed=7,
        rl_steps=10,
        eval_n=100,
        max_response=30,
        rounds="annotated,policy",
        versions={"machine": "Linux x86_64, 2 cores", "torch": "2.13"},
        command="python pit.py all --data pairs.jsonl",
    )
    config["checksum"] = checksum(config)
    (path / "config.json").write_text(json.dumps(config))
    (path / "results.json").write_text(json.dumps(results()))
    for name, lines in (("metrics.jsonl", metrics()), ("answers.jsonl", answer_lines())):
        (path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    report.write_report(Run(path))
    return path


# ---- verdicts ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ends, expected",
    [
        ([0.01, 0.5], "holds"),
        ([0.0, 0.5], "cannot tell"),
        ([-0.1, 0.1], "cannot tell"),
        ([-0.1, 0.0], "cannot tell"),
        ([-0.5, -0.1], "does not hold"),
    ],
)
def test_a_claim_holds_where_the_whole_interval_is_above_0(ends, expected):
    assert report.verdict([{"delta": 0.0, "ci95": ends}])["verdict"] == expected


def test_a_claim_of_several_comparisons_stands_with_the_lowest_numbers():
    sure = compared(0.5)
    unsure = compared(0.01, 0.2)
    wrong = compared(-0.1)
    assert report.verdict([sure, sure])["verdict"] == "holds"
    assert report.verdict([unsure, sure])["verdict"] == "cannot tell"
    # one that fails decides, whatever the others leave open
    line = report.verdict([sure, compared(0.0, 0.9), wrong])
    assert line == {"verdict": "does not hold", "ours": "-10 [-90, -5]"}


def test_the_verdicts_of_a_run_by_hand():
    card = {line["claim"]: line for line in report.scorecard(results(), "judge")}
    verdicts = {claim: line["verdict"] for claim, line in card.items()}
    assert verdicts == {  # what was not measured is left out
        "PIT beats the original": "holds",
        "PIT beats y_w": "does not hold",
        "PIT beats PIT after SFT only": "cannot tell",
        "temperature 0.4 beats 1": "holds",
        "0.4 is the best temperature": "does not hold",  # 0.1 is better
        "each round beats the original": "cannot tell",
        "round 2 beats round 1": "does not hold",
        "two rounds beat round 0 alone": "holds",
        "two rounds beat round 1 alone": "holds",
        "R_PIT ranks: annotated": "holds",
        "R_PIT ranks: written by models": "cannot tell",
    }
    assert card["PIT beats the original"]["ours"] == "+50 [+45, +55]"
    assert card["R_PIT ranks: annotated"]["ours"] == "+80 [+65, +95]"
    by_me = report.scorecard(results(), "me")
    assert [line["claim"] for line in by_me] == ["PIT beats the original"]


def test_curricula_are_claims_of_the_judge_that_compared_them():
    found = results()
    for row in found["table2"]:
        row["judge"] = "quality"  # then `eval --judge judge` made another one the main judge
    assert not any("two rounds" in line["claim"] for line in report.scorecard(found, "judge"))


def test_a_vote_after_an_evaluation_that_was_cut_short_has_a_page(drawn):
    """The words come last: without them the page has no such section."""
    found = results()
    del found["words"]
    page = page_of(Run(drawn), found)
    assert "## Table 1" in page and "What did it learn" not in page


# ---- text --------------------------------------------------------------------------------------


def page_of(run, found):
    """The page of a run with these results."""
    return report.PAGE.render(run=run, results=found)


def test_table_1_by_hand(drawn):
    found = results()
    found["table1"] = table1_rows("judge", {("pit", "original"): 0.5, ("original", "y_w"): -1.0})
    assert (
        "Does a beat b? In percent of n held-out prompts, judged by the run's judge:\n\n"
        "| a | b | n | win | lose | tie | delta = win - lose |\n"
        "|---|---|--:|--:|--:|--:|--:|\n"
        "| pit | original | 100 | 50 | 0 | 50 | +50.0 [+45.0, +55.0] |\n"
        "| original | y_w | 100 | 0 | 100 | 0 | -100.0 [-105.0, -95.0] |\n"
    ) in page_of(Run(drawn), found)


def test_judges_whose_names_differ_in_case_alone_have_a_table_each(drawn):
    found = results()
    for voter in ("GPT-4", "gpt-4"):
        found["table1"] += table1_rows(voter, {("pit", "original"): 0.5})
    page = page_of(Run(drawn), found)
    assert "Judged by GPT-4" in page and "Judged by gpt-4" in page


def test_an_answer_that_ends_in_a_bar_breaks_no_table(drawn):
    run = Run(drawn)
    found = results()
    found["words"]["rows"][1]["feature"] = "ends with |"
    assert "| ends with \\| | 2.5 | 63 | 35 | 113 | 0 | - |" in page_of(run, found)


def test_the_best_stop_rule_is_named(drawn):
    assert "`--stop rounds`, at most 1 round." in (drawn / "report.md").read_text()
    found = results()
    found["table3"][0]["mean"] = 9.0
    assert "No rule has a higher mean score than the original." in page_of(Run(drawn), found)


def test_a_word_that_wins_more_than_a_third_of_delta_is_warned_of():
    words = results()["words"]
    row = words["rows"][0]
    assert report.alarms({"words": words}) == [row]
    row["without"] = compared(0.27)  # 0.39 - 0.12: less than a third is gone
    assert report.alarms({"words": words}) == []
    # nearly half is gone
    words["delta"] = compared(0.2)
    row["without"] = compared(0.11)
    assert report.alarms({"words": words}) == [row]
    # hardly anything was won
    words["delta"] = compared(0.04)
    row["without"] = compared(0.0)
    assert report.alarms({"words": words}) == []
    # SmolLM2's "I'd": a gain whose interval holds 0, and a loss without the word
    words["delta"] = compared(0.165)
    row["without"] = compared(-0.144)
    assert report.alarms({"words": words}) == [row]


def test_the_page_has_all_that_it_must(drawn):
    page = (drawn / "report.md").read_text()
    for figure in ("result", "curves", "fig2", "fig3", "fig4", "stops"):
        assert f"]({figure}.png)" in page
        assert (drawn / f"{figure}.png").stat().st_size > 10_000
    # what, by which command, on which machine, how long
    assert "```sh\npython pit.py all --data pairs.jsonl\n```" in page
    for fact in ("tiny, 4-bit", "pairs.jsonl, at most 2,000 pairs", "| 7 ", "2.13", "2 min"):
        assert fact in page
    assert "Linux x86_64, 2 cores" in page
    # the largest gain, the median and the largest loss, in this order
    places = [page.index(f"the answer of gain {gain}") for gain in (4, 0, -4)]
    assert places == sorted(places) and "the answer of gain 3" not in page
    # the words
    assert "| indeed | 4.2 | 63 | 35 | 113 | 0 | +16.0 [-1.0, +33.0] |" in page
    assert 'Warning: without the word "indeed"' in page
    assert "smoke run" not in page
    # the scorecard, what is missing from it, and what a person said
    for line in report.scorecard(results(), "judge"):
        assert f"| {line['claim']} | {line['paper']} | {line['ours']} | {line['verdict']} |" in page
    assert "Judged by me:" in page and "Without Self-Refine: the built-in base" in page
    assert "- me: agrees with judge on 80% of 50 pairs." in page


def test_no_stop_rule_is_left_out_and_both_rounds_share_a_scale(drawn, monkeypatch):
    figures = []
    monkeypatch.setattr(report.plt, "close", figures.append)
    run = Run(drawn)
    found = results()
    found["stops"] += [row | {"stop": "a rule of yours"} for row in found["stops"][:2]]
    report.plot_stops(run, found)
    report.plot_result(run, found, metrics())
    stops, result = figures
    _, labels = stops.axes[0].get_legend_handles_labels()
    rules = ["after a number of rounds", "when the gap is not above 0", "a rule of yours"]
    assert labels == ["the original", *rules]
    # from the bottom to the top, in the order of LABELS from the last to the first
    sides = [text.get_text() for text in result.axes[0].get_yticklabels()]
    assert sides == [name for name in reversed(report.LABELS.values()) if name in sides] != []
    _, labels = result.axes[1].get_legend_handles_labels()
    assert labels == ["round 0, over annotated answers", "round 1, over policy answers"]


def test_a_role_has_one_color_in_all_panels(drawn, monkeypatch):
    figures = []
    monkeypatch.setattr(report.plt, "close", figures.append)
    report.plot_curves(Run(drawn), metrics())
    for role in ("policy_rl", "pit_rl0", "pit_rl1"):
        colors = set()
        for ax in figures[0].axes:
            colors |= {line.get_color() for line in ax.lines if line.get_label() == role}
        assert colors == {report.COLOR_OF.get(role, "C0")}


def test_tables_and_samples_fit_80_columns(drawn, capsys):
    page = (drawn / "report.md").read_text().splitlines()
    assert [line for line in page if len(line) > 80 and not line.startswith("![")] == []
    report.print_tables(Run(drawn), results(), "judge")
    console = capsys.readouterr().out.replace(str(drawn), "").splitlines()
    assert [line for line in console if len(line) > 80] == []


def test_the_console_has_table_1_and_2_with_what_to_know_of_them(drawn, capsys):
    run = Run(drawn)
    for judge, name in (("judge", "the run's judge"), ("me", "me")):
        report.print_tables(run, results(), judge)
        said = " ".join(capsys.readouterr().out.split())
        assert re.findall(r"judged by ([^:]*):", said) == [name]
        assert "Without Self-Refine" in said and 'Warning: without the word "indeed"' in said
        assert "me: agrees with judge on 80% of 50 pairs." in said
        assert "me: pit over y_w +10.0 [+5.0, +15.0] points, by " in said
        assert "annotated,policy +20.0 [+15.0, +25.0] +10.0 [+5.0, +15.0]" in said
        assert "smoke run" not in said
        assert said.endswith(f"All tables and figures: {drawn / 'report.md'}")
    # who has quit without a vote, or with too few of them
    report.print_tables(run, results(), "somebody else")
    assert "judged by" not in capsys.readouterr().out


def test_a_smoke_run_says_so_and_has_no_verdicts(drawn, capsys):
    run = Run(drawn)
    run.config.rl_steps = 2
    run.config.last_steps = 20
    assert "> A smoke run" not in page_of(run, results())
    run.config.last_steps = None
    page = page_of(run, results())
    assert "> A smoke run" in page and "| smoke run |" in page
    assert "| holds |" not in page and "| cannot tell |" not in page
    report.print_tables(run, results(), "judge")
    assert "A smoke run" in capsys.readouterr().out


def test_claims_are_about_what_they_say():
    found = results()
    annotated = found["table2"][0]
    assert annotated["curriculum"] == "annotated"
    annotated["both_over_it"] = compared(-0.3)
    found["table1"] += table1_rows("judge", {("pit", "best_of_2"): 0.5, ("pit", "best_of_3"): -0.5})
    card = {line["claim"]: line["verdict"] for line in report.scorecard(found, "judge")}
    assert card["two rounds beat round 0 alone"] == "does not hold"
    assert card["PIT beats best of 2, same cost"] == "holds"


def test_the_gain_of_a_run_is_that_over_the_original(drawn):
    gain = Run(drawn).gain()
    assert (gain["a"], gain["b"], gain["judge"], gain["delta"]) == ("pit", "original", "judge", 0.5)


def test_figure_2_labels_its_distributions(drawn, monkeypatch):
    seen = []

    def violinplot(self, scores, **_):
        seen.append(scores)

    monkeypatch.setattr(report.plt.Axes, "violinplot", violinplot)
    four = {"ww": [1], "lw": [2], "wl": [3], "ll": [4]}  # the order of reward.score_batch
    report.plot_fig2(Run(drawn), {"fig2": four})
    assert seen == [[[2], [4], [1], [3]]]  # worst first, from the bottom to the top


def test_the_page_compares_cool_sides(drawn):
    page = (drawn / "report.md").read_text()
    after = page.split("all written at 0.4")[1].splitlines()
    (row,) = [line for line in after[:8] if line.startswith("| pit | original |")]
    assert "+25.0 [" in row
    assert "| pit | 12.0 | 40% | 0.500 |" in after
