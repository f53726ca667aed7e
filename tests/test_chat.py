"""The conversation, files of prompts, and prompts that do not fit."""

import io
import json
import sys
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
from conftest import shake

import chat
import files
import infer
from errors import UserError

CFG = SimpleNamespace(max_prompt=200, max_response=12, rl_batch=2, micro_batch=2, data="mine")
PEOPLE = ["Ann north: left.", "Ben west: right left.", "Eva east: back. Tim south: left."]
PEOPLE += ["Zoe south: right.", "Jim north: back."]
ROWS = [{"prompt": f"Where does each look in the end? {x}", "id": i} for i, x in enumerate(PEOPLE)]
ROWS[1]["response"] = "Now Ben west: north west."


def settings(rounds=2, stop="rounds"):
    return infer.Settings("pit_rl1", rounds, 1.0, stop, seed=0)


@pytest.fixture
def able(lm):
    lm.add("policy_rl")
    lm.add("pit_rl1")
    shake(lm, "pit_rl1", 0.02)
    lm.add("reward_gap", head=True)
    lm.heads["reward_gap"].weight.data *= 100  # no gap is small: the file rounds to three digits
    return lm


def test_changed_words_are_marked():
    old = "Ann north: west south.\n\nBen west: back."
    assert chat.mark_changes(old, old) == old
    new = "Ann south: west south.\n\nBen west: back again."
    assert chat.mark_changes(old, new) == "Ann *south:* west south.\n\nBen west: *back* *again.*"
    assert chat.mark_changes("a b c", "a c") == "a c"
    assert chat.mark_changes("a b", "a  b") == "a  b"


# ---- the conversation --------------------------------------------------------------------------


def converse(lm, cfg, monkeypatch, typed):
    """Let the lines `typed` be asked -> the prompts that the policy answered."""
    prompts = []
    answer = lm.answer

    def remember(role, chats, *more):
        if role == infer.POLICY:
            prompts.extend(chats)
        return answer(role, chats, *more)

    monkeypatch.setattr(lm, "answer", remember)
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(typed) + "\n"))
    chat.converse(lm, cfg, settings(1))
    return [[turn["content"] for turn in prompt] for prompt in prompts]


def test_a_conversation_remembers_until_an_empty_line(able, monkeypatch, capsys):
    first, second, third = converse(able, CFG, monkeypatch, ["Hello.", "And you?", "", "Again."])
    assert (first, third) == (["Hello."], ["Again."])
    assert len(second) == 3 and second[0] == "Hello." and second[2] == "And you?"
    out = capsys.readouterr().out
    assert out.count("you: ") == 5 and out.count("round 1, gap ") == 3


def test_a_conversation_survives_what_it_cannot_answer_and_says_what_is_cut(
    able, monkeypatch, capsys
):
    cfg = SimpleNamespace(**vars(CFG) | {"max_prompt": 20})
    prompts = converse(able, cfg, monkeypatch, ["x" * 200, "north " * 60 + "ends here."])
    assert len(prompts) == 1 and prompts[0][0].endswith("ends here.")
    out = capsys.readouterr().out
    assert "even after cutting" in out and "cut to the last 20 tokens" in out


@pytest.mark.parametrize(
    "prompt, response, told",
    [
        (ROWS[0]["prompt"], None, False),
        (ROWS[0]["prompt"].replace("? ", "?\n  "), None, False),  # as samples.md wraps it
        (ROWS[0]["prompt"], ROWS[1]["response"], False),
        ("What is the capital of France?", None, True),
        (ROWS[0]["prompt"].replace("Ann", "Alice"), None, True),
        ("Where does each look in the end?", None, True),  # about nobody
        (ROWS[0]["prompt"].replace("north:", "nroth:"), None, True),
        (ROWS[0]["prompt"].replace("left", "lft"), None, True),
        (ROWS[0]["prompt"], "<|end|>", True),
    ],
)
def test_the_built_in_task_is_told_from_other_questions(able, capsys, prompt, response, told):
    cfg = SimpleNamespace(**vars(CFG) | {"data": "synthetic"})
    turns = [{"role": "user", "content": prompt}]
    refused = pytest.raises(UserError, match="built-in task only") if told else nullcontext()
    with refused:
        chat.answer(able, cfg, settings(1), turns, response)
    assert ("gap " in capsys.readouterr().out) != told


def test_a_response_of_the_built_in_task_may_come_with_line_breaks(able, capsys):
    cfg = SimpleNamespace(**vars(CFG) | {"data": "synthetic"})
    response = ROWS[1]["response"]
    turns = [{"role": "user", "content": ROWS[0]["prompt"]}]
    chat.answer(able, cfg, settings(1), turns, response.replace(": ", ":\n  ") + "\n")
    assert f"\noriginal\n{response}\n" in capsys.readouterr().out


# ---- prompts that do not fit -------------------------------------------------------------------


def test_a_prompt_is_cut_to_what_the_run_was_trained_on_or_refused(lm, capsys):
    cfg = SimpleNamespace(data="hh", max_prompt=40, max_response=8)
    long = [{"role": "user", "content": "north " * 100 + "Where does Ann look in the end?"}]
    (cut,) = chat.fit_prompts(lm, cfg, [({}, long, None, "the prompt")])
    assert cut[0]["content"].endswith("in the end?") and len(lm.encode_prompt(cut)) <= 40
    assert "Prompts cut to the last 40 tokens (--max-prompt): 1." in capsys.readouterr().out
    for turns, response, said in (
        ([{"role": "user", "content": "x" * 200}], None, "row 3: even after cutting"),
        ([{"role": "assistant", "content": "x"}], None, "row 3: user and assistant"),
        (long, "north " * 9, "row 3: the response is longer than 8"),
    ):
        with pytest.raises(UserError, match=said):
            chat.fit_prompts(lm, cfg, [({}, turns, response, "row 3")])


# ---- files -------------------------------------------------------------------------------------


def work(lm, rows, path, stop="rounds"):
    chat.improve_file(lm, CFG, settings(stop=stop), rows, path)
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def rows(tmp_path):
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    return files.read_rows(tmp_path / "in.jsonl")


def test_a_file_is_answered_in_order_and_continued_where_it_stopped(able, rows, tmp_path):
    path = tmp_path / "out.jsonl"
    whole = work(able, rows, path)
    assert [row["id"] for row in whole] == [0, 1, 2, 3, 4]
    assert whole[1]["versions"][0] == ROWS[1]["response"]
    for row in whole:
        assert len(row["versions"]) == 3 and len(row["gaps"]) == 2
        assert row["improved"] == row["versions"][-1]
    complete = path.read_bytes()
    lines = complete.splitlines(True)
    # killed after so many lines, and so many bytes of the next: whole batches of two are kept
    for n, cut, kept in ((2, 0, 2), (2, 3, 2), (2, 25, 2), (3, 0, 2), (1, 9, 0), (5, 0, 5)):
        path.write_bytes(b"".join(lines[:n]) + b"".join(lines[n : n + 1])[:cut])
        assert chat.rows_done(path, lines[0][:20], total=5, batch=2) == kept
        work(able, rows, path)
        assert path.read_bytes() == complete
    work(able, rows, path)
    assert path.read_bytes() == complete


def test_two_processes_do_not_write_one_output(able, rows, tmp_path, monkeypatch):
    path = tmp_path / "out.jsonl"
    seen = []

    def at_work(*args, **kwargs):
        with pytest.raises(UserError, match="being written by another process"):
            chat.improve_file(able, CFG, settings(), rows, path)
        seen.append(path)
        raise KeyboardInterrupt

    monkeypatch.setattr(chat, "improve_rounds", at_work)
    with pytest.raises(KeyboardInterrupt):
        work(able, rows, path)
    assert seen


def test_an_output_of_other_rows_settings_or_weights_is_not_continued(able, rows, tmp_path):
    path = tmp_path / "out.jsonl"
    work(able, rows, path)
    complete = path.read_bytes()
    other_answers = [request._replace(row=request.row | {"response": "x"}) for request in rows]
    for wanted, change in (
        (other_answers, {}),
        (rows[:4], {}),
        (rows, {"rounds": 3}),
        (rows, {"temperature": 0.5}),
        (rows, {"stop": "gap"}),
        (rows, {"seed": 1}),
    ):
        with pytest.raises(UserError, match="exists, and was made with other rows, settings"):
            chat.improve_file(able, CFG, replace(settings(), **change), wanted, path)
    shake(able, "pit_rl1")  # another run
    with pytest.raises(UserError, match="exists"):
        work(able, rows, path)
    assert path.read_bytes() == complete


def test_the_stop_rule_chooses_each_answer_of_a_file(able, rows, tmp_path):
    for row in work(able, rows, tmp_path / "new" / "gap.jsonl", "gap"):
        best = 0
        for gap, old, new in zip(row["gaps"], row["versions"], row["versions"][1:]):
            if gap <= 0 or new == old:
                break
            best += 1
        assert row["improved"] == row["versions"][best]


@pytest.mark.parametrize(
    "content",
    [
        "notes of mine",
        "{}\n",
        '{"improved": \n',
        '{"improved": "x", "prompt": "another"}\n',
        "\n",
        '{"a": 1}',
    ],
)
def test_a_file_of_somebody_else_is_never_written_to(able, rows, tmp_path, content):
    path = tmp_path / "out.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match="exists"):
        chat.improve_file(able, CFG, settings(), rows, path)
    assert path.read_text() == content


def test_columns_that_are_there_already_do_not_hide_ours(able, tmp_path):
    row = ROWS[1] | {"improved": "by somebody else", "gaps": "of teeth", "note": "half \ud800"}
    (tmp_path / "in.jsonl").write_text(json.dumps(row))
    (line,) = work(able, files.read_rows(tmp_path / "in.jsonl"), tmp_path / "out.jsonl")
    assert line["improved"] == line["versions"][-1] and len(line["gaps"]) == 2
    for name in ("prompt", "response", "note"):
        assert line[name] == row[name]


# ---- while training ----------------------------------------------------------------------------


def test_samples_are_improved_by_every_stage_of_pit(able, pairs, tmp_path):
    run = SimpleNamespace(path=tmp_path, config=SimpleNamespace(seed=0, **vars(CFG)))
    able.add("ablate_annotated_0")
    for stage in ("policy_rl", "pit_rl1", "ablate_annotated_0"):
        chat.show_samples(able, run, stage, pairs[:2])
    _, *parts = (tmp_path / "samples.md").read_text().split("## after ")
    assert [part.count("- policy_rl: ") for part in parts] == [2, 2, 2]
    improved = [part.count(f"- {part.split()[0]}: ") for part in parts[1:]]
    assert improved == [2, 2] and "- pit" not in parts[0]


def test_samples_that_do_not_end_are_a_warning(able, pairs, tmp_path, monkeypatch, capsys):
    run = SimpleNamespace(path=tmp_path, config=SimpleNamespace(seed=0, **vars(CFG)))
    text = "north " * CFG.max_response
    for texts, warns in ((["map", text], False), ([text, text], True)):
        monkeypatch.setattr(able, "answer", lambda *args, texts=texts: texts)
        chat.show_samples(able, run, "policy_rl", pairs[:2])
        assert ("policy_rl writes without end" in capsys.readouterr().out) == warns
        (tmp_path / "samples.md").unlink()


@pytest.mark.parametrize(
    "stop, rounds, why",
    [
        ("gap", ["tea", "tea please"], "Round 2 was no better, so round 1 is the answer"),
        ("same", ["tea", "tea please"], "Round 2 changed nothing, so round 1 is the answer"),
        ("gap", ["tea"], "Round 1 was no better, so the original is the answer"),
        ("rounds", ["tea", "tea please", "tea please", "milk"], ""),
    ],
)
def test_rounds_are_shown_until_the_stop_rule_ends_them(
    able, monkeypatch, capsys, stop, rounds, why
):
    """It ends a prompt as it goes where it ends one whose rounds are all there (infer.end_of)."""
    texts = ["tea", "tea please", "tea please", "milk"]
    gaps = [0.5, 0.0, -0.5]
    if len(rounds) == 1:
        gaps[0] = -0.5
    written = [([text], [gap]) for text, gap in zip(texts, [None, *gaps])]
    monkeypatch.setattr(chat, "improve_rounds", lambda *_: iter(written))
    said = chat.answer(able, CFG, settings(3, stop), [{"role": "user", "content": "Hello."}])
    assert said == rounds[-1] and infer.end_of(stop, texts, gaps) == len(rounds) - 1
    out = capsys.readouterr().out
    assert out.count("gap ") == len(rounds) - 1
    assert why in out and ("is the answer" in out) == bool(why)


def test_the_same_question_gets_the_same_answer(able, capsys):
    said = []
    for _ in range(2):
        chat.answer(able, CFG, settings(1), [{"role": "user", "content": "Hello."}])
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]


def test_each_batch_of_a_file_draws_anew(able, rows, tmp_path):
    same = [rows[0]._replace(row={"id": i}) for i in range(4)]
    lines = work(able, same, tmp_path / "out.jsonl")
    versions = [line["versions"] for line in lines]
    assert versions[:2] != versions[2:]


def test_an_answer_of_full_length_may_be_improved(lm):
    text = "north " * 8
    written = len(lm.encode_response(text)) - 1
    # as PIT writes them: all tokens used, no room for an EOS
    cfg = SimpleNamespace(data="hh", max_prompt=40, max_response=written)
    turns = [{"role": "user", "content": "x"}]
    assert chat.fit_prompts(lm, cfg, [files.Request({}, turns, text, "row")]) == [turns]


def test_each_stage_improves_the_same_originals_by_itself(able, pairs, tmp_path, monkeypatch):
    seen = []

    def improve(lm, role, prompts, answers, cfg):
        seen.append((role, answers))
        return answers

    monkeypatch.setattr(chat, "improve", improve)
    able.add("pit_rl0")
    run = SimpleNamespace(path=tmp_path, config=SimpleNamespace(seed=0, **vars(CFG)))
    for stage in ("pit_rl0", "pit_rl1"):
        chat.show_samples(able, run, stage, pairs[:2])
    assert [role for role, _ in seen] == ["pit_rl0", "pit_rl1"]
    assert seen[0][1] == seen[1][1]
