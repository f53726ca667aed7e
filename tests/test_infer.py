"""Using a result: rounds and stop rules."""

from types import SimpleNamespace

import pytest
import torch

import infer
from data import improve_prompt

CFG = SimpleNamespace(max_prompt=200, max_response=12, rl_batch=2, micro_batch=2, data="mine")


def settings(rounds=2, stop="rounds", temperature=1.0):
    return infer.Settings("pit_rl1", rounds, temperature, stop, seed=0)


@pytest.mark.parametrize("stop, texts", [("rounds", "abbcd"), ("same", "ab"), ("gap", "ab")])
def test_stop_rules(stop, texts):
    assert infer.end_of(stop, "abbcd", [0.5, 0.0, -0.5, 0.5]) == len(texts) - 1


def test_the_gap_rule_ends_at_a_text_that_is_no_better_or_the_same():
    assert [infer.goes_on("gap", "a", "b", gap) for gap in (0.5, 0.0, -0.5)] == [True, False, False]
    assert not infer.goes_on("gap", "a", "a", 0.5)


def test_each_round_improves_and_is_measured_against_the_text_before_it(monkeypatch):
    asked = []
    measured = []

    def answer(role, chats, cfg, temperature):
        asked.append((role, chats, temperature))
        return ["y" if len(chat) == 1 else chat[-2]["content"] + "+" for chat in chats]

    def gaps(lm, prompts, answers, references, cfg):
        measured.append((prompts, answers, references))
        return torch.ones(len(answers))

    monkeypatch.setattr(infer, "gaps", gaps)
    lm = SimpleNamespace(answer=answer)
    x = [{"role": "user", "content": "x"}]
    how = settings(2, temperature=0.7)
    rounds = list(infer.improve_rounds(lm, CFG, how, [x, x], [None, "z"]))
    texts = [["y", "z"], ["y+", "z+"], ["y++", "z++"]]
    assert rounds == [(texts[0], None), (texts[1], [1.0, 1.0]), (texts[2], [1.0, 1.0])]
    assert asked[0] == ("policy_rl", [x], 0.7)
    for call, before in zip(asked[1:], texts):
        assert call == ("pit_rl1", [improve_prompt(x, y_ref) for y_ref in before], 0.7)
    assert measured == [([x, x], texts[1], texts[0]), ([x, x], texts[2], texts[1])]
