"""pit.py's stages with everything they call replaced: who gets which pairs, roles and options."""

from collections import Counter
from types import SimpleNamespace

import pytest
from conftest import FakeRun

import chat
import curriculum
import data
import evaluate
import infer
import models
import pit
import report
import reward
import votes
import words

PARTS = {name: [name] for name in data.PARTS}  # each part of the pairs is its own name


def shared(**options):
    """The base, the run and the parts of its pairs, as pit.prepare gives them."""
    return None, FakeRun(rounds="annotated,policy", **options), PARTS


def test_the_base_gets_the_options_of_the_run(monkeypatch):
    seen = {}
    monkeypatch.setattr(models, "load_model", lambda **options: seen.update(options))
    cfg = dict(bits=16, lora_r=4, lora_alpha=5, target_modules="x", seed=6)
    run = SimpleNamespace(config=SimpleNamespace(model="m", **cfg), check=lambda roles: None)
    pit.load_base(run)
    assert seen == cfg | {"name": "m"}


def test_samples_answer_held_out_prompts(monkeypatch):
    seen = []
    monkeypatch.setattr(chat, "show_samples", lambda lm, run, role, pairs: seen.append(pairs))
    pit.show(*shared(), "policy_sft")
    assert seen == [["held_out"]]


def test_the_evaluation_asks_held_out_prompts_of_the_last_round(monkeypatch):
    seen = {}

    def evaluated(lm, run, pairs, last, judges, lasts):
        seen.update(pairs=pairs, last=last)

    def measured(lines, pairs, judge):
        seen.update(training=pairs, judge=judge)

    monkeypatch.setattr(evaluate, "evaluate", evaluated)
    monkeypatch.setattr(words, "measure", measured)
    monkeypatch.setattr(votes, "read_answers", lambda run: [])
    monkeypatch.setattr(report, "write_report", lambda run: None)
    pit.eval_stage(*shared(), {"first": 1, "second": 2})
    training = ["sft", "rm", "rl"]
    assert seen == dict(pairs=["held_out"], last="pit_rl1", judge=1, training=training)


def test_what_ablate_trains_on_what_and_for_how_long(monkeypatch):
    trained = []
    trained_for = Counter()
    steps_of = {}
    evaluated = []

    def train_pit_round(lm, run, pairs, role, source, start, steps):
        curriculum_of = role.rpartition("_")[0]
        trained_for[curriculum_of] += steps
        steps_of[role] = steps

    monkeypatch.setattr(
        pit, "open_to_judge", lambda run, judge: (*shared(rl_steps=3, last_steps=5), {})
    )
    monkeypatch.setattr(pit, "eval_stage", lambda *shared: evaluated.append(shared[-1]))
    monkeypatch.setattr(pit, "show", lambda *_: None)
    monkeypatch.setattr(reward, "train_gap_reward", lambda lm, run, *how: trained.append(how))
    monkeypatch.setattr(curriculum, "train_pit_round", train_pit_round)
    pit.ablate("run")
    assert trained == [
        (["rm"], ["held_out"], "reward_gap2", reward.gap_loss),
        (["rm"], ["held_out"], "reward_gap3", reward.three_terms),
    ]
    # every curriculum has as many iterations as the two rounds of the run, which keep their own
    assert len(trained_for) == len(curriculum.CURRICULA)
    assert set(trained_for.values()) == {3 + 5}
    assert [steps_of[f"ablate_annotated-policy_{k}"] for k in (0, 1)] == [3, 5]
    assert [steps_of[f"ablate_policy-annotated_{k}"] for k in (0, 1)] == [4, 4]
    (lasts,) = evaluated
    assert list(lasts) == curriculum.CURRICULA
    assert lasts["annotated,policy"] == "ablate_annotated-policy_1"


@pytest.mark.parametrize("stop", ["same", "gap"])
def test_infer_does_as_it_is_told(monkeypatch, stop):
    seen = []
    cfg = SimpleNamespace(rounds="annotated,policy", temperature=1.0, seed=0)
    run = SimpleNamespace(config=cfg)
    monkeypatch.setattr(pit, "open_run", lambda path: run)
    monkeypatch.setattr(pit, "load_base", lambda run, roles: None)
    monkeypatch.setattr(chat, "converse", lambda lm, cfg, settings: seen.append(settings))
    pit.infer_command("run", rounds=2, temperature=0.3, seed=7, stop=stop)
    assert seen == [infer.Settings("pit_rl1", 2, 0.3, stop, 7)]
