"""Stage 3: what each problem asks, by which reward, held to what, and in which order."""

from types import SimpleNamespace

import pytest
import torch
from conftest import FakeRun, equal, shake, weights
from hypothesis import given
from hypothesis import strategies as st

import curriculum
import infer
import reward
from data import improve_prompt
from errors import UserError
from run import shuffled_batch

OPTIONS = dict(rl_batch=8, rl_steps=3, micro_batch=3, max_prompt=48, max_response=30)


@pytest.fixture
def calls(lm, monkeypatch):
    """What reaches ppo.train: (arguments, options), one for each stage that is trained."""
    seen = []
    monkeypatch.setattr(curriculum, "train", lambda *args, **options: seen.append((args, options)))
    torch.manual_seed(0)
    for role in ("policy_sft", "pit_sft", "pit_rl0", "reward_policy", "reward_gap"):
        lm.add(role, head=role.startswith("reward"))
        shake(lm, role)
    return seen


def train_round(lm, pairs, source, start="pit_sft", role="pit_rl1"):
    run = FakeRun(**OPTIONS)
    curriculum.train_pit_round(lm, run, pairs, role=role, source=source, start=start, steps=4)


def problem_of(calls):
    (_, options), *_ = calls
    return options["problem"]


def triples_of(pairs, size, step=0):
    return shuffled_batch(pairs, size, step, 0)


def test_the_policy_answers_prompts_for_r_p_and_is_held_to_sft(lm, pairs, calls):
    curriculum.train_policy_rl(lm, FakeRun(**OPTIONS), pairs)
    (args, options), *_ = calls
    problem = options.pop("problem")
    assert args[2] == "policy_rl"
    assert options == dict(steps=3, reference="policy_sft", reward_role="reward_policy")
    assert equal(weights(lm, "policy_rl"), weights(lm, "policy_sft"))
    first, _ = problem(0)
    second, score = problem(1)
    # x after x of D_RL, in the order of the pass
    asked = list(dict.fromkeys(map(tuple, first + second)))
    chosen = triples_of(pairs, len(asked), step=0)
    assert asked == [tuple(lm.encode_prompt(pair.prompt)) for pair in chosen]
    # R_P, from the states of R_P
    lm.activate("reward_policy")
    tokens = lm.collate(second, [lm.encode_response("Now.")] * len(second))
    with torch.no_grad():
        assert torch.equal(score(tokens, lm.hidden(tokens)), lm.scores(tokens))


@pytest.mark.parametrize("source, start", [("annotated", "pit_sft"), ("policy", "pit_rl0")])
def test_a_round_starts_where_it_is_told_and_is_held_to_pit_sft(lm, pairs, calls, source, start):
    train_round(lm, pairs, source, start)
    (args, options), *_ = calls
    del options["problem"]
    assert args[2] == "pit_rl1"
    assert equal(weights(lm, "pit_rl1"), weights(lm, start))
    assert options == dict(steps=4, reference="pit_sft", reward_role="reward_gap")


def test_annotated_triples_are_improved_from_both_of_their_answers(lm, pairs, calls):
    train_round(lm, pairs, "annotated")
    prompts, _ = problem_of(calls)(1)
    triples = triples_of(pairs, 4, step=1)
    chats = [improve_prompt(pair.prompt, pair.rejected) for pair in triples]
    chats += [improve_prompt(pair.prompt, pair.chosen) for pair in triples]
    assert prompts == [lm.encode_prompt(chat) for chat in chats]


@pytest.mark.parametrize("source, writer", [("policy", "policy_rl"), ("sft", "policy_sft")])
def test_later_rounds_improve_what_a_policy_writes(lm, pairs, calls, monkeypatch, source, writer):
    asked = []

    def answer(role, chats, cfg, temperature=1.0):
        asked.append((role, chats, temperature))
        return [f"text {number}" for number in range(len(chats))]

    monkeypatch.setattr(lm, "answer", answer)
    train_round(lm, pairs, source)
    prompts, _ = problem_of(calls)(1)
    chats = [pair.prompt for pair in triples_of(pairs, 8, step=1)]
    assert asked == [(writer, chats, 1.0)]
    expected = [improve_prompt(x, f"text {number}") for number, x in enumerate(chats)]
    assert prompts == [lm.encode_prompt(chat) for chat in expected]


def test_given_answers_are_improved_where_every_pair_has_one(lm, pairs, calls):
    given = [SimpleNamespace(prompt=pair.prompt, given=f"a {i}") for i, pair in enumerate(pairs)]
    curriculum.check_given(["given"], given)
    with pytest.raises(UserError, match="response"):
        curriculum.check_given(["given"], [*given, SimpleNamespace(given=None)])
    train_round(lm, given, "given")
    prompts, _ = problem_of(calls)(1)
    expected = [improve_prompt(pair.prompt, pair.given) for pair in triples_of(given, 8, step=1)]
    assert prompts == [lm.encode_prompt(chat) for chat in expected]


def test_training_evaluation_and_infer_measure_the_same_gap(lm, pairs, calls, monkeypatch):
    cfg = FakeRun(**OPTIONS).config
    triples = triples_of(pairs, 4)
    better = [pair.chosen for pair in triples]
    worse = [pair.rejected for pair in triples]
    chats = [pair.prompt for pair in triples] * 2
    y_ref = worse + better
    y = better + worse

    def read(texts):
        prompts = [lm.encode_prompt(improve_prompt(x, ref)) for x, ref in zip(chats, y_ref)]
        tokens = lm.collate(prompts, [lm.encode_response(text) for text in texts])
        return tokens, lm.hidden(tokens)

    def near(gaps, expected):
        torch.testing.assert_close(gaps, expected, atol=1e-4, rtol=1e-4)

    # by definition: r(x, y, y_ref) - r(x, y_ref, y_ref)
    lm.activate("reward_gap")
    with torch.no_grad():
        changed = read(y)
        copied = read(y_ref)
        of_changed, of_copied = (lm.scores_from_states(*both) for both in (changed, copied))
    expected = of_changed - of_copied
    assert expected.abs().max() > 0.01
    # evaluation
    near(reward.gaps(lm, chats, y, y_ref, cfg), expected)
    # training
    train_round(lm, pairs, "annotated")
    _, score = problem_of(calls)(0)
    near(score(*changed), expected)
    near(score(*copied), torch.zeros(8))
    # infer
    monkeypatch.setattr(lm, "answer", lambda role, chats, cfg, temperature: y)
    settings = infer.Settings("pit_rl1", 1, temperature=1.0, stop="rounds", seed=0)
    (texts, _), (better, gaps) = infer.improve_rounds(lm, cfg, settings, chats, y_ref)
    assert texts == y_ref and better == y
    near(torch.tensor(gaps), expected)


def test_rounds_follow_each_other():
    plan = list(curriculum.rounds(["annotated", "sft", "policy"], [4, 5, 6], "pit_rl"))
    assert plan == [
        ("pit_rl0", "annotated", "pit_sft", 4),
        ("pit_rl1", "sft", "pit_rl0", 5),
        ("pit_rl2", "policy", "pit_rl1", 6),
    ]


@given(st.integers(1, 500), st.integers(1, 6))
def test_iterations_are_shared_out_to_the_last_and_equally(total, n):
    shares = curriculum.share_out(total, n)
    assert len(shares) == n and sum(shares) == total
    assert max(shares) - min(shares) <= 1


def test_only_the_last_round_has_iterations_of_its_own():
    cfg = SimpleNamespace(rounds="annotated,sft,policy", rl_steps=12, last_steps=48)
    assert curriculum.round_steps(cfg) == [12, 12, 48]
    cfg.last_steps = None
    assert curriculum.round_steps(cfg) == [12, 12, 12]
    cfg.rounds = "policy"
    assert curriculum.round_steps(cfg) == [12]
