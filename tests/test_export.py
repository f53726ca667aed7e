"""Exports, read by other programs."""

import json

import pytest
import torch
from conftest import shake

import models
from data import improve_prompt


@pytest.mark.parametrize("merge", [False, True])
def test_exports_answer_as_ours_under_plain_peft_and_transformers(lm, tmp_path, merge):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    messages = improve_prompt(
        [{"role": "user", "content": "Where does each look in the end? Ann north: left."}],
        "Now Ann west: north.",
    )
    lm.add("pit_rl1")
    shake(lm, "pit_rl1", 0.1)  # so that its answer is another than the base's
    ours = lm.generate("pit_rl1", [lm.encode_prompt(messages)], 12, temperature=0)
    lm.activate("blank")
    blank = lm.generate("blank", [lm.encode_prompt(messages)], 12, temperature=0)
    assert ours.ids.tolist() != blank.ids.tolist()
    (tmp_path / "out").mkdir()
    models.export(lm, "pit_rl1", tmp_path / "out", merge)

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
    assert tokenizer.eos_token_id == lm.eos != tokenizer.pad_token_id


@pytest.mark.parametrize("own_eos", ["<|pad|>", "<|end|>"])
def test_an_export_knows_where_to_stop(lm, tmp_path, own_eos):
    """Whatever the tokenizer of the base calls EOS."""
    from transformers import AutoTokenizer, GenerationConfig

    lm.add("pit_rl1")
    lm.tokenizer.eos_token = own_eos
    models.export(lm, "pit_rl1", tmp_path, merge=True)
    assert AutoTokenizer.from_pretrained(tmp_path).eos_token_id == lm.eos
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == lm.eos
