"""The RL problems of PIT: what is to be improved, by which reward, and in which order."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from conftest import shake

import curriculum
from data import improve_prompt
from errors import UserError

CFG = SimpleNamespace(rl_batch=8, seed=0, micro_batch=3, max_prompt=48, max_response=12)


class FakeRun:
    """A run in which nothing was trained yet."""

    config = CFG

    def load_trained(self, lm, role):
        return False

    def stage(self, name, why):
        return nullcontext()


@pytest.fixture
def problem_of(lm, pairs, monkeypatch):
    """A function: source of y_ref -> the problem that PPO gets to solve, and its other arguments."""
    monkeypatch.setattr(curriculum, "train", lambda *args, **options: calls.append((args, options)))
    calls = []
    for role in ("policy_rl", "pit_sft", "reward_gap"):
        lm.add(role, head=role == "reward_gap")
        shake(lm, role)

    def get(source):
        curriculum.train_pit_round(lm, FakeRun(), pairs, "pit_rl0", source, "pit_sft", 4)
        (_, _, _, problem, _), options = calls[-1]
        return problem, options.pop("reference"), options.pop("reward_role"), options

    return get


def test_round_0_improves_each_triple_from_both_of_its_answers(lm, pairs, problem_of):
    problem, reference, reward_role, options = problem_of("annotated")
    assert (reference, reward_role, options) == ("pit_sft", "reward_gap", {"shift": 0.0})
    prompts, _ = problem(0)
    triples = {
        tuple(
            tuple(lm.encode_prompt(improve_prompt(pair.prompt, y_ref)))
            for y_ref in (pair.rejected, pair.chosen)
        )
        for pair in pairs
    }
    assert (
        len(prompts) == 8
        and {(tuple(a), tuple(b)) for a, b in zip(prompts[:4], prompts[4:])} <= triples
    )


def test_the_reward_of_an_answer_is_its_gap_and_of_an_unchanged_one_0(lm, pairs, problem_of):
    problem, *_ = problem_of("annotated")
    prompts, score = problem(0)
    lm.activate("reward_gap")
    by_prompt = {
        tuple(lm.encode_prompt(improve_prompt(pair.prompt, y_ref))): (y_ref, other)
        for pair in pairs
        for y_ref, other in ((pair.rejected, pair.chosen), (pair.chosen, pair.rejected))
    }
    answers = [
        [lm.encode_response(by_prompt[tuple(prompt)][which]) for prompt in prompts]
        for which in (0, 1)
    ]
    with torch.no_grad():
        same, other = (lm.collate(prompts, texts) for texts in answers)
        gaps = [score(tokens, lm.hidden(tokens)) for tokens in (same, other)]
        expected = lm.scores("reward_gap", other) - lm.scores("reward_gap", same)
    torch.testing.assert_close(gaps[0], torch.zeros(8), atol=1e-4, rtol=0)
    torch.testing.assert_close(gaps[1], expected, atol=1e-4, rtol=1e-4)
    assert expected.abs().max() > 0.01


def test_round_1_improves_what_the_policy_writes(lm, pairs, problem_of, monkeypatch):
    writers = []
    generate = lm.generate
    monkeypatch.setattr(
        lm, "generate", lambda role, *args: writers.append(role) or generate(role, *args)
    )
    prompts, _ = problem_of("policy")[0](0)
    assert writers == ["policy_rl"] and len(prompts) == 8


def test_rounds_follow_each_other_and_share_out_all_iterations():
    plan = curriculum.rounds(["annotated", "sft", "policy"], 32, "pit_rl")
    assert [start for _, _, start, _ in plan] == ["pit_sft", "pit_rl0", "pit_rl1"]
    assert sum(steps for *_, steps in plan) == 32 and all(steps in (10, 11) for *_, steps in plan)
    with pytest.raises(UserError, match="human"):
        curriculum.parse("annotated,human")
