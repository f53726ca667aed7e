"""The plan of a run: what is counted, and how well what is measured tells what is to come."""

from types import SimpleNamespace

import pytest

import plan
from baselines import BEST_OF, all_keys
from data import IMPROVE_TOKENS, synthetic_pairs
from errors import UserError

CFG = dict(
    model="tiny",
    vram=None,
    max_prompt=48,
    max_response=30,
    sft_steps=60,
    sft_batch=32,
    rm_steps=100,
    rm_batch=32,
    rounds="annotated,policy",
    rl_steps=16,
    last_steps=None,
    rl_batch=64,
    epochs=2,
    micro_batch=64,
    minibatch=32,
    eval_n=256,
)
PARTS = dict(held_out=1200, judge=1800, sft=3000, rm=3000, rl=3000)
# seconds of a whole run of these options, on one thread of a busy machine
MEASURED = dict(
    policy_sft=13.8,
    pit_sft=20.5,
    reward_policy=34.3,
    reward_gap=94.5,
    judge=32.9,
    policy_rl=27.3,
    pit_rl0=49.3,
    pit_rl1=58.5,
)


def stages(**changes):
    return plan.plan_stages(SimpleNamespace(**CFG | changes), x=33, y=24, pairs=PARTS)


def test_tokens_and_passes_are_those_of_the_options():
    by_name = {stage.name: stage for stage in stages()}
    assert list(by_name) == [*MEASURED, "eval"]
    sft = by_name["policy_sft"]
    rl = by_name["pit_rl1"]
    assert sft.rows * sft.trained == 60 * 32 * (33 + 24) and sft.passes == 60 * 32 / 3000
    assert rl.rows * rl.written == 2 * 16 * 64 * 30  # y_ref is written too
    assert rl.passes == 16 * 64 / 3000
    assert by_name["pit_rl0"].passes == rl.passes / 2  # there, each pair serves twice
    # an answer is judged after x, and its gap after x, y_ref and the request to improve it
    assert by_name["eval"].read == (33 + 24) + (33 + 24 + IMPROVE_TOKENS + 24)
    # a longer last round, and nothing else
    longer = {stage.name: stage for stage in stages(last_steps=48)}
    assert [longer[name].rows / by_name[name].rows for name in MEASURED] == [1] * 7 + [3]
    assert longer["pit_rl1"].passes == 3 * rl.passes
    # given answers are not written, but evaluated: one text more
    given = {stage.name: stage for stage in stages(rounds="annotated,given")}
    assert given["pit_rl1"].written == 30
    assert given["eval"].rows == by_name["eval"].rows / plan.EVAL_TEXTS * (plan.EVAL_TEXTS + 1)
    names = [stage.name for stage in stages(rounds="policy")]
    assert "pit_rl0" in names and "pit_rl1" not in names


def test_the_plan_counts_what_the_evaluation_writes():
    keys = all_keys(["pit", "self_refine"], "pit_rl1")
    refined = [key for key in keys if key.method.startswith("self_refine")]
    chosen = [key for key in keys if key.method in ["y_w", "y_l", *BEST_OF]]  # nothing new
    assert plan.SELF_REFINE_TEXTS == 2 * len(refined)  # feedback, then the text
    assert plan.EVAL_TEXTS == len(keys) - len(refined) - len(chosen)


def test_the_first_stage_tells_the_time_of_the_others_within_30_percent():
    known = plan.Plan(stages())
    known.stages[0].seconds = MEASURED["policy_sft"]
    for stage in known.stages[1:-1]:
        assert known.expect(stage) == pytest.approx(MEASURED[stage.name], rel=0.3)
    everything = sum(known.expect(stage) for stage in known.stages[:-1])
    assert everything == pytest.approx(sum(MEASURED.values()), rel=0.15)


def test_a_plan_learns_from_steps_and_from_stages(capsys, monkeypatch):
    now = 0.0
    monkeypatch.setattr(plan.time, "perf_counter", lambda: now)
    made = plan.Plan(stages())
    assert made.begin("pit_sft") == "[2 of 9] "
    assert "00:" not in made.table()  # no time before something was measured
    assert max(map(len, made.table().splitlines())) <= 80
    made.begin("policy_sft")
    now = 99.0
    assert made.end_step(1, 60) == ""  # a first step is no measure
    assert "reward_gap" not in capsys.readouterr().out
    now = 99.2
    left = made.end_step(2, 60)
    table = capsys.readouterr().out
    assert made.stages[0].seconds == pytest.approx(12)
    assert "reward_gap" in table and "00:12" in table and left.startswith("all: 0")
    # reward models turn out to be three times as slow as SFT says
    judge = next(stage for stage in made.stages if stage.name == "judge")
    before = made.expect(judge)
    made.begin("reward_policy")
    made.end_stage(3 * before)
    assert f"of {plan.clock(made.total())} for all stages" in capsys.readouterr().out
    assert made.expect(judge) > 2 * before
    for stage in made.stages:
        made.begin(stage.name)
        made.end_stage(10)
    assert "took 00:10 of 01:30 for all stages" in capsys.readouterr().out


def made_for(lm, done, seconds, commands=("sft", "reward", "rl", "eval")):
    """The plan of a run that has trained the roles `done`, some of them in `seconds`."""
    run = SimpleNamespace(
        config=SimpleNamespace(**CFG),
        results=lambda: {"time_s": seconds},
        done=lambda role: role in done,
    )
    parts = {name: synthetic_pairs(8, seed=0) for name in PARTS}
    return plan.make_plan(lm, run, parts, commands)


def test_a_plan_knows_what_is_done_and_what_was_taken_over(lm, capsys):
    # the judge took this run no time
    made = made_for(lm, ["policy_sft", "judge"], {"policy_sft": 10.0, "an ablation": 5.0})
    out = capsys.readouterr().out
    assert "GiB" in out and "00:10" in out and "judge" not in out
    assert made.left() == pytest.approx(sum(made.expect(s) for s in made.stages[1:]))


def test_what_is_to_be_done_again_counts_as_left(lm):
    made = made_for(lm, done=list(MEASURED)[:-1], seconds=MEASURED | {"eval": 100.0})
    again = [stage for stage in made.stages if stage.name in ("pit_rl1", "eval")]
    assert made.left() == pytest.approx(sum(map(made.expect, again))) and made.left() > 0


def test_no_more_prompts_are_evaluated_than_are_held_out():
    few = plan.plan_stages(SimpleNamespace(**CFG), x=33, y=24, pairs=PARTS | {"held_out": 10})
    assert few[-1].rows == stages(eval_n=10)[-1].rows


def test_a_damaged_adapter_that_was_taken_over_is_in_the_plan(lm):
    made = made_for(lm, done=list(MEASURED)[1:], seconds={})  # policy_sft is damaged
    assert [stage.name for stage in made.stages] == ["policy_sft", "eval"]
    made.begin("policy_sft")
    for step in (1, 2):
        said = made.end_step(step, 60)
    assert said.startswith("all: ")


def test_a_plan_ends_with_the_last_stage_that_is_to_run(lm):
    made = made_for(lm, done=[], seconds={}, commands=["sft"])
    assert [stage.name for stage in made.stages] == ["policy_sft", "pit_sft"]


def test_memory_is_held_against_what_is_free(lm, monkeypatch, capsys):
    cfg = SimpleNamespace(**CFG)
    assert plan.free_memory() > 0
    monkeypatch.setattr(plan, "free_memory", lambda: 64.0)
    plan.plan_memory(lm, cfg)
    assert "too much" not in capsys.readouterr().out
    assert not lm.peft.get_base_model().is_gradient_checkpointing
    monkeypatch.setattr(plan, "free_memory", lambda: 0.01)
    plan.plan_memory(lm, cfg)
    assert "Lower --micro-batch" in capsys.readouterr().out
    assert lm.peft.get_base_model().is_gradient_checkpointing
    monkeypatch.setattr(plan, "free_memory", lambda: 64.0)
    cfg.vram = 32
    plan.plan_memory(lm, cfg)
    assert "of 32.0 GiB" in capsys.readouterr().out
    # PIT's own texts fit, those of Self-Refine do not
    cfg.max_prompt = 1024 - 2 * cfg.max_response - 16
    with pytest.raises(UserError, match="lower --max-prompt"):
        plan.plan_memory(lm, cfg)
