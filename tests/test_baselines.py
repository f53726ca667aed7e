"""The sides of a comparison: what they read, what they cost, and that they are written once."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import shake

import baselines
import judges
from baselines import ORIGINAL, Answers, Key, Side, cool
from data import improve_prompt
from errors import UserError
from models import LM


class Scribe:
    """A language model that writes a number, and records who was asked what."""

    def __init__(self):
        self.calls = []

    def encode_prompt(self, chat):
        return chat

    def encode_response(self, text):
        return [*text.split(), "EOS"]

    def generate(self, role, chats, max_tokens, temperature):
        self.calls += [(role, chat) for chat in chats]
        numbers = [torch.randint(1000, (1,)).item() for _ in chats]
        return SimpleNamespace(responses=[f"{role} wrote {number}" for number in numbers])

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


def all_sides(run, pairs):
    """Write every side -> the language model, which knows its calls, and the answers."""
    lm = Scribe()
    no_matter = judges.Judge(lambda prompts, texts: [0.0] * len(texts))
    answers = Answers(lm, run, pairs, "pit_rl1", no_matter)
    for key in baselines.all_keys(["pit", "self_refine"], "pit_rl1"):
        answers.side(key)
    return lm, answers


def texts_of(answers):
    return {key: side.texts for key, side in answers.sides.items()}


def test_generations_and_tokens_are_counted_exactly(run, pairs):
    lm, answers = all_sides(run, pairs)
    expected = {
        Key("y_w"): 0,
        Key("y_l"): 0,
        ORIGINAL: 1,
        Key("second_sample"): 1,
        Key("pit"): 2,
        Key("pit_sft"): 2,
        Key("best_of_2"): 2,
        Key("best_of_3"): 3,
        Key("self_refine"): 3,
        Key("self_refine_base"): 3,
        Key("pit", round=5): 6,
        Key("self_refine", round=5): 11,
        Key("pit", temperature=0.4): 2,
    }
    # a text is three words and an EOS
    for key, generations in expected.items():
        side = answers.side(key)
        assert len(side.written) == generations
        assert np.unique(side.spent).tolist() == [4 * generations]
    # policies 4, the base and PIT after each stage 4, at 6 more temperatures, in 4 more rounds;
    # Self-Refine the same with 2 texts each, and by the SFT policy; and 5 texts that are cool
    assert len(lm.calls) == len(pairs) * (4 + 4 + 6 + 4 + 2 * (1 + 6 + 4) + 2 + 5)


def test_an_answer_that_was_cut_off_has_no_eos(run, pairs):
    run.config.max_response = 3
    answers = Answers(Scribe(), run, pairs)
    assert answers.lengths(["a b", "a b c", "a b c d"]).tolist() == [3, 3, 3]


def test_each_improvement_reads_the_side_before_it(run, pairs):
    lm, answers = all_sides(run, pairs)
    texts = texts_of(answers)
    read = [(role, chat[-2]["content"]) for role, chat in lm.calls if len(chat) == 3]
    n = len(pairs)
    assert read.count(("pit_sft", texts[ORIGINAL][0])) == 1
    assert read.count(("pit_rl0", texts[ORIGINAL][0])) == 1
    # of the last round's model: round 1, six temperatures, and one of a cool draft
    by_last = [text for role, text in read if role == "pit_rl1"]
    assert len(by_last) == n * (1 + 6 + 4 + 1) and by_last.count(texts[ORIGINAL][0]) == 7
    for role in ("pit_sft", "pit_rl0", "pit_rl1"):
        assert read.count((role, texts[cool("original")][0])) == 1
    for k in range(1, 5):
        assert texts[Key("pit", round=k)][0] in by_last


def test_a_second_look_samples_nothing_unless_an_adapter_changed(run, pairs):
    _, before = all_sides(run, pairs)
    lm, again = all_sides(run, pairs)
    assert not lm.calls and texts_of(again) == texts_of(before)
    (run.path / "pit_rl1" / "adapter_model.safetensors").write_bytes(b"another")
    lm, again = all_sides(run, pairs)
    assert {role for role, _ in lm.calls} == {"pit_rl1"}
    assert again.side(ORIGINAL).texts == before.side(ORIGINAL).texts
    (run.path / "answers.json").unlink()
    _, anew = all_sides(run, pairs)  # from the seed alone
    assert texts_of(anew) == texts_of(again)


def test_a_damaged_cache_gets_one_error(run, pairs):
    (run.path / "answers.json").write_text("not JSON")
    with pytest.raises(UserError, match="answers.json is damaged.*\nDelete it"):
        Answers(Scribe(), run, pairs)


def test_each_side_is_sampled_by_itself_at_its_own_temperature(run, pairs):
    asked = []

    class Thermometer(Scribe):
        def generate(self, role, chats, max_tokens, temperature):
            asked.append(temperature)
            return super().generate(role, chats, max_tokens, temperature)

    no_matter = judges.Judge(lambda prompts, texts: [0.0] * len(texts))
    answers = Answers(Thermometer(), run, pairs, "pit_rl1", no_matter)
    for T in (1.0, 0.4):
        answers.side(Key("pit", temperature=T))
    assert asked == [1.0, 1.0, 0.4]  # the first is the original
    answers.side(cool("pit"))
    assert asked[3:] == [0.4, 0.4]  # this draft is cool, too
    assert answers.side(Key("second_sample")).texts != answers.side(ORIGINAL).texts


@pytest.mark.parametrize(
    "name, role", [("self_refine", "policy_rl"), ("self_refine_base", "blank")]
)
def test_self_refine_reads_the_answer_then_its_own_feedback(run, pairs, name, role):
    lm = Scribe()
    answers = Answers(lm, run, pairs)
    answers.side(Key(name))
    feedback = answers.kept[f"{name} feedback"]["texts"]
    by, chat = lm.calls[-len(pairs)]  # the rewrite of the first answer
    assert by == role and feedback[0].startswith(role)
    assert [(turn["role"], turn["content"]) for turn in chat] == [
        ("user", pairs[0].prompt[0]["content"]),
        ("assistant", answers.side(ORIGINAL).texts[0]),
        ("user", baselines.FEEDBACK),
        ("assistant", feedback[0]),
        ("user", baselines.REFINE),
    ]


def test_best_of_n_takes_the_sample_that_r_p_scores_highest(lm, pairs, tmp_path):
    lm.add("reward_policy", head=True)
    shake(lm, "reward_policy")
    cfg = SimpleNamespace(micro_batch=5, max_response=30, seed=0)
    run = SimpleNamespace(path=tmp_path, config=cfg)
    r_p = judges.adapter_judge(lm, "reward_policy", cfg)
    answers = Answers(lm, run, pairs, reward_policy=r_p)
    samples = [[p.chosen for p in pairs], [p.rejected for p in pairs], ["north"] * len(pairs)]
    for method, texts in zip(("original", "second_sample", "third_sample"), samples):
        spent = np.array([len(lm.encode_response(text)) for text in texts])
        answers.sides[Key(method)] = Side(texts, [spent])
    lm.activate("reward_policy")
    taken = set()
    for n in (2, 3):
        side = answers.side(Key(f"best_of_{n}"))
        for i, pair in enumerate(pairs):
            candidates = [texts[i] for texts in samples[:n]]
            scores = []
            for text in candidates:
                prompt = lm.encode_prompt(pair.prompt)
                response = lm.encode_response(text)
                scores.append(lm.scores(lm.collate([prompt], [response])).item())
            best = candidates[int(np.argmax(scores))]
            taken.add(int(np.argmax(scores)))
            assert side.texts[i] == best
            assert side.spent[i] == sum(len(lm.encode_response(text)) for text in candidates)
    assert len(taken) > 1  # else it could be the first by chance
    # a cool best of 2 takes cool samples
    answers.sides[cool("original")] = answers.sides[cool("second_sample")] = Side(["cool"], [1])
    answers.prompts = answers.prompts[:1]
    assert answers.side(cool("best_of_2")).texts == ["cool"]


def test_given_answers_are_a_side_and_pit_improves_them(run, pairs):
    """With --rounds annotated,given, and only then."""
    for sources, is_there in ((["annotated", "given"], True), (["annotated", "policy"], False)):
        keys = baselines.all_keys(["pit"], "pit_rl1", sources)
        assert (Key("pit_given") in keys) == is_there
    given = [replace(pair, given=f"given {i}") for i, pair in enumerate(pairs)]
    answers = Answers(Scribe(), run, given, "pit_rl1")
    texts = [f"given {i}" for i in range(len(pairs))]
    assert answers.side(Key("given")).texts == texts
    expected = [improve_prompt(pair.prompt, text) for pair, text in zip(pairs, texts)]
    assert answers.to_improve(Key("pit_given")) == expected
    assert answers.side(Key("pit_given")).texts[0].startswith("pit_rl1 wrote")


def test_no_side_is_named_twice():
    keys = baselines.all_keys(["pit", "self_refine"], "pit_rl1", ["given"])
    keys += [cool("pit")._replace(round=2), Key("pit", temperature=0.4, round=2)]
    assert len(keys) == len(set(map(str, keys)))


def test_who_writes_the_answers_to_the_prompt_alone(run, pairs):
    _, answers = all_sides(run, pairs)
    writers = {
        "original": "policy_rl",
        "second_sample": "policy_rl",
        "third_sample": "policy_rl",
        "policy_sft": "policy_sft",
    }
    for name, role in writers.items():
        assert answers.side(Key(name)).texts[0].startswith(f"{role} wrote"), name


def test_who_improves_the_original(run, pairs):
    _, answers = all_sides(run, pairs)
    improvers = dict(base="blank", pit_sft="pit_sft", pit_rl0="pit_rl0", pit="pit_rl1")
    for name, role in improvers.items():
        assert answers.side(Key(name)).texts[0].startswith(f"{role} wrote"), name


def test_another_seed_writes_other_answers(run, pairs):
    before = all_sides(run, pairs)[1].side(ORIGINAL).texts
    (run.path / "answers.json").unlink()
    run.config.seed = 1
    assert all_sides(run, pairs)[1].side(ORIGINAL).texts != before


def test_improvements_of_originals_that_changed_are_written_again(run, pairs):
    class Other(Scribe):
        def decode(self, texts):
            return [text + "!" for text in texts]

    all_sides(run, pairs)
    (run.path / "policy_rl" / "adapter_model.safetensors").write_bytes(b"another")
    lm = Other()
    Answers(lm, run, pairs, "pit_rl1").side(Key("pit"))
    assert {role for role, _ in lm.calls} == {"policy_rl", "pit_rl1"}
