"""The baselines and stop rules: what they read, what they cost, when they end."""

from types import SimpleNamespace

import pytest
import torch

import baselines
import infer
from models import LM


class Scribe:
    """A language model that writes a number: how often it was asked. It records who was asked what."""

    def __init__(self):
        self.calls = []

    def encode_prompt(self, chat):
        return chat

    def encode_response(self, text):
        return [*text.split(), "EOS"]

    def generate(self, role, chats, max_tokens, temperature):
        self.calls += [(role, chat) for chat in chats]
        return SimpleNamespace(
            responses=[f"{role} wrote {torch.randint(1000, (1,)).item()}" for _ in chats]
        )

    def decode(self, texts):
        return texts

    answer = LM.answer


@pytest.fixture
def run(tmp_path):
    for role in ("policy_sft", "policy_rl", "pit_sft", "pit_rl0", "pit_rl1"):
        (tmp_path / role).mkdir()
        (tmp_path / role / "adapter_model.safetensors").write_bytes(role.encode())
    cfg = SimpleNamespace(model="some-model", max_prompt=32, max_response=8, rl_batch=64, seed=0)
    return SimpleNamespace(path=tmp_path, config=cfg, adapter=lambda role: tmp_path / role)


@pytest.fixture(autouse=True)
def first_is_best(monkeypatch):
    monkeypatch.setattr(baselines, "best_of_n", lambda lm, prompts, candidates, cfg: candidates[0])


def all_sides(run, pairs):
    lm = Scribe()
    return lm, *baselines.write_sides(
        baselines.Answers(lm, run, [pair.prompt for pair in pairs]), pairs, "pit_rl1"
    )


def test_generations_and_tokens_are_counted_exactly(run, pairs):
    lm, sides, refusal = all_sides(run, pairs)
    assert refusal is None
    expected = {
        "y_w": 0,
        "original": 1,
        "second_sample": 1,
        "pit": 2,
        "pit_sft": 2,
        "best_of_2": 2,
        "best_of_3": 3,
        "self_refine": 3,
        "self_refine_sft": 3,
        "pit#5": 6,
        "self_refine#5": 11,
        "pit@0.4": 2,
    }
    assert {name: sides[name].generations for name in expected} == expected
    assert set(sides["self_refine"].tokens) == {3 * 4}  # three texts of three words and an EOS
    assert set(sides["pit#5"].tokens) == {6 * 4} and set(sides["y_w"].tokens) == {0}
    # 4 samples of policies, PIT after each stage, its 6 other temperatures and 4 more rounds; Self-Refine's with 2 each; by SFT
    assert len(lm.calls) == len(pairs) * (4 + 3 + 6 + 4 + 2 * (1 + 6 + 4) + 2)


def test_a_second_look_samples_nothing_unless_an_adapter_changed(run, pairs):
    _, before, _ = all_sides(run, pairs)
    lm, again, _ = all_sides(run, pairs)
    assert not lm.calls and {k: s.texts for k, s in again.items()} == {
        k: s.texts for k, s in before.items()
    }
    (run.path / "pit_rl1" / "adapter_model.safetensors").write_bytes(b"another")
    lm, again, _ = all_sides(run, pairs)
    assert {role for role, _ in lm.calls} == {"pit_rl1"} and again["original"].texts == before[
        "original"
    ].texts
    (run.path / "answers.json").unlink()  # from the seed alone
    assert all_sides(run, pairs)[1]["pit"].texts == again["pit"].texts


def test_self_refine_reads_the_answer_then_its_own_feedback(run, pairs):
    lm, sides, _ = all_sides(run, pairs)
    kept = baselines.Answers(lm, run, []).kept
    chat = next(
        chat
        for role, chat in lm.calls
        if role == "policy_rl" and chat[-1]["content"] == baselines.REFINE
    )
    said = [turn["content"] for turn in chat]
    assert said[:1] == [pairs[0].prompt[0]["content"]]
    assert said[1:] == [
        sides["original"].texts[0],
        baselines.FEEDBACK,
        kept["self_refine feedback"]["texts"][0],
        baselines.REFINE,
    ]


def test_self_refine_does_not_apply_to_models_that_cannot_follow(run, pairs, monkeypatch):
    run.config.model = "tiny"
    _, sides, refusal = all_sides(run, pairs)
    assert "built-in base" in refusal and not any(name.startswith("self_refine") for name in sides)
    run.config.model = "parrot"
    monkeypatch.setattr(
        Scribe,
        "generate",
        lambda self, role, chats, *_: SimpleNamespace(responses=["" for _ in chats]),
    )
    (run.path / "answers.json").unlink()
    _, sides, refusal = all_sides(run, pairs)
    assert "0%" in refusal and "self_refine" not in sides


@pytest.mark.parametrize(
    "stop, texts, rounds",
    [("rounds", "abbcd", 4), ("same", "abb", 2), ("gap", "ab", 2), ("time", "ab", 1)],
)
def test_stop_rules(monkeypatch, stop, texts, rounds):
    gaps = [0.5, 0.0, -0.5, 0.5]
    assert infer.end_of(stop, "abbcd", gaps, range(5), budget=0.0) == (len(texts) - 1, rounds)
    drafts, gap_of = iter("bbcd"), iter(gaps)
    monkeypatch.setattr(infer, "improve", lambda *_: [next(drafts)])
    monkeypatch.setattr(infer, "gaps", lambda *_: torch.tensor([next(gap_of)]))
    written = [
        text
        for text, _ in infer.iterate(
            None, "", "", [], None, 4, 1.0, response="a", stop=stop, budget=0.0
        )
    ]
    assert "".join(written) == texts
