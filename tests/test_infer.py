"""Using a result: files of prompts, and exports that other programs load."""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import shake

import files
import infer
import models
import pit
from data import improve_prompt
from errors import UserError
from models import load_model

CFG = SimpleNamespace(max_prompt=200, max_response=12, rl_batch=2, micro_batch=2)
ROWS = [
    {"prompt": f"Where does each look in the end? {people}", "id": i}
    for i, people in enumerate(
        [
            "Ann north: left.",
            "Ben west: right left.",
            "Eva east: back. Tim south: left.",
            "Zoe south: right.",
            "Jim north: back.",
        ]
    )
]
ROWS[1]["response"] = "Now Ben west: north west."


def work(lm, rows, path, stop="rounds"):
    infer.improve_file(lm, "policy_rl", "pit_rl1", rows, path, CFG, 2, 1.0, seed=0, stop=stop)
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def able(lm):
    lm.add("policy_rl")
    lm.add("pit_rl1")
    shake(lm, "pit_rl1", 0.02)
    lm.add("reward_gap", head=True)
    lm.heads["reward_gap"].weight.data *= 100  # no gap is small: the file has them to three digits
    return lm


def test_a_file_is_answered_in_order_and_continued_where_it_stopped(able, tmp_path):
    source, path = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(map(json.dumps, ROWS)))
    rows = files.read_rows(source)
    whole = work(able, rows, path)
    assert [row["id"] for row in whole] == [0, 1, 2, 3, 4]
    assert whole[1]["versions"][0] == ROWS[1]["response"] and all(
        len(row["versions"]) == 3 for row in whole
    )
    assert all(row["improved"] == row["versions"][-1] and len(row["gaps"]) == 2 for row in whole)
    complete = path.read_bytes()
    path.write_bytes(
        b"".join(complete.splitlines(True)[:2]) + b'{"improved": "Li'
    )  # killed within the third line
    assert infer.rows_done(path, rows, 2) == 2
    work(able, rows, path)
    assert path.read_bytes() == complete
    work(able, rows, path)
    assert path.read_bytes() == complete
    with pytest.raises(
        UserError, match="not the beginning of this work"
    ):  # of other answers, or of more rounds
        infer.rows_done(path, [(row | {"response": "x"}, *rest) for row, *rest in rows], 2)
    with pytest.raises(UserError, match="not the beginning of this work"):
        infer.rows_done(path, rows, 3)
    for row in work(able, rows, tmp_path / "new" / "gap.jsonl", "gap"):
        gains = [
            gap > 0 and new != old
            for gap, old, new in zip(row["gaps"], row["versions"], row["versions"][1:])
        ]
        assert row["improved"] == row["versions"][0 if not gains[0] else 1 if not gains[1] else 2]


def test_output_is_plain_text_and_not_called_gz(tmp_path):
    with pytest.raises(UserError, match="Leave out .gz"):
        pit.check_request(None, None, tmp_path / "in.jsonl", tmp_path / "out.jsonl.gz", "gap")


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
def test_a_file_of_somebody_else_is_never_written_to(able, tmp_path, content):
    source, path = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(map(json.dumps, ROWS)))
    path.write_text(content)
    with pytest.raises(UserError, match="is there already"):
        work(able, files.read_rows(source), path)
    assert path.read_text() == content


@pytest.mark.parametrize(
    "row",
    [
        '{"response": "x"}',
        '{"question": "x"}',
        '{"prompt": " "}',
        "[",
        '{"prompt": 3}',
    ],
)
def test_a_bad_row_is_named_before_any_work(tmp_path, row):
    (tmp_path / "in.jsonl").write_text('{"prompt": "x"}\n' + row)
    with pytest.raises(UserError, match="line 2"):
        files.read_rows(tmp_path / "in.jsonl")


def test_columns_that_are_there_already_do_not_hide_ours(able, tmp_path):
    row = ROWS[1] | {"improved": "by somebody else", "gaps": "of teeth", "note": "half \ud800"}
    (tmp_path / "in.jsonl").write_text(json.dumps(row))
    (line,) = work(able, files.read_rows(tmp_path / "in.jsonl"), tmp_path / "out.jsonl")
    assert line["improved"] == line["versions"][-1] and len(line["gaps"]) == 2
    assert {name: line[name] for name in ("prompt", "response", "note")} == {
        k: row[k] for k in ("prompt", "response", "note")
    }


def test_a_prompt_is_cut_to_what_the_run_was_trained_on_or_refused(lm):
    cfg = SimpleNamespace(max_prompt=40, max_response=8)
    long = [{"role": "user", "content": "north " * 100 + "Where does Ann look in the end?"}]
    (cut,) = infer.fit_prompt(lm, long, None, cfg, "the prompt")
    assert cut["content"].endswith("in the end?") and len(lm.encode_prompt([cut])) <= 40
    with pytest.raises(UserError, match="row 3: no cut"):
        infer.fit_prompt(lm, [{"role": "user", "content": "x" * 200}], None, cfg, "row 3")
    with pytest.raises(UserError, match="turns of user"):
        infer.fit_prompt(lm, [{"role": "assistant", "content": "x"}], None, cfg, "the prompt")
    with pytest.raises(UserError, match="response is longer than the 8"):
        infer.fit_prompt(lm, long, "north " * 9, cfg, "the prompt")


@pytest.mark.parametrize("merge", [False, True])
def test_exports_answer_as_ours_under_plain_peft_and_transformers(able, tmp_path, merge):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    messages = improve_prompt(
        [{"role": "user", "content": ROWS[0]["prompt"]}], "Now Ann west: north."
    )
    shake(able, "pit_rl1", 0.1)  # so that its answer is another than the base's
    ours = able.generate("pit_rl1", [able.encode_prompt(messages)], 12, temperature=0)
    able.activate("blank")
    blank = able.generate("blank", [able.encode_prompt(messages)], 12, temperature=0)
    assert ours.ids.tolist() != blank.ids.tolist()
    able.save("pit_rl1", tmp_path)
    (tmp_path / "out").mkdir()
    models.export(load_model("tiny", bits=16), "pit_rl1", tmp_path, tmp_path / "out", merge)

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    if merge:
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    else:
        base = json.loads((tmp_path / "out" / "adapter_config.json").read_text())[
            "base_model_name_or_path"
        ]
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        model = PeftModel.from_pretrained(model, tmp_path / "out")
    encoded = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(
        **encoded, max_new_tokens=12, do_sample=False, eos_token_id=tokenizer.eos_token_id
    )
    assert out.tolist() == ours.ids.tolist()
    assert tokenizer.eos_token_id == able.eos != tokenizer.pad_token_id


def test_texts_written_at_one_time_follow_lengths_and_rl_batch():
    long, short = (
        SimpleNamespace(max_prompt=384, max_response=128),
        SimpleNamespace(max_prompt=48, max_response=30),
    )
    for cfg, rl_batch, rows in ((long, 64, 49), (long, 8, 32), (short, 64, 256), (long, 1, 4)):
        cfg.rl_batch = rl_batch
        assert models.rows_at_a_time(cfg) == rows
