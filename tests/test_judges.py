"""Who decides by a score: rules, adapters, reward models."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing
from transformers import Qwen2Config, Qwen2ForSequenceClassification

import judges
import pit
from errors import UserError
from run import Run

ROOT = Path(__file__).parent.parent
BUILT_IN = SimpleNamespace(data="synthetic", micro_batch=4, max_response=30)


def score_file(tmp_path, code, prompt="2 + 2?", answer="4"):
    """What a judge from a file with this code says of one answer."""
    (tmp_path / "rule.py").write_text(code)
    judge = judges.judges_by_name([str(tmp_path / "rule.py")], None, BUILT_IN)
    (judge,) = judge.values()
    return judge.score([[{"role": "user", "content": prompt}]], [answer])[0]


def test_each_text_is_scored_once():
    asked = []

    def ask(prompts, texts):
        asked.extend(zip(prompts, texts))
        return [len(text) for text in texts]

    judge = judges.Judge(ask)
    assert judge.score(["x", "x", "z"], ["a", "a", "bb"]).tolist() == [1, 1, 2]
    assert judge.score(["z", "x"], ["bb", "ccc"]).tolist() == [2, 3]
    assert asked == [("x", "a"), ("z", "bb"), ("x", "ccc")]


def test_without_names_the_exact_rule_decides_where_there_is_one():
    assert judges.default_judges(BUILT_IN) == ["quality", "judge"]
    assert judges.default_judges(SimpleNamespace(data="mine.jsonl")) == ["judge"]


def test_a_name_that_no_judge_can_have_is_refused(tmp_path):
    (tmp_path / "rule.py").write_text("")
    good = ["quality", "judge", str(tmp_path), str(tmp_path / "rule.py"), "owner/reward-1.5B"]
    judges.check_names(good, BUILT_IN)
    bad = ["qualitty", "Judge", "rule.py", "rules/rule.py", "./nowhere", "https://hub/owner/name"]
    for name in bad:
        with pytest.raises(UserError, match=f"--judge {name}: there is no such judge"):
            judges.check_names(["judge", name], BUILT_IN)
    with pytest.raises(UserError, match="built-in task only"):
        judges.check_names(["quality"], SimpleNamespace(data="mine.jsonl"))


def test_a_judge_of_yours_does_without_the_runs(tmp_path, monkeypatch):
    needed = []

    def prepare(run, roles):
        needed[:] = roles
        return None, run, {}

    run = SimpleNamespace(
        path=tmp_path,
        config=SimpleNamespace(data="synthetic", rounds="annotated"),
        trained_by=lambda: Run.trained_by(run),
    )
    monkeypatch.setattr(pit, "open_run", lambda path: run)
    monkeypatch.setattr(pit, "prepare", prepare)
    (tmp_path / "rule.py").write_text("def quality(prompt, answer): return 1")
    for names, needs_judge in ((None, True), (["judge"], True), ([f"{tmp_path}/rule.py"], False)):
        pit.open_to_judge("runs/tiny", names)
        assert ("judge" in needed) == needs_judge and "reward_gap" in needed
    # a name that has voted judges nothing else
    vote = dict(judge=f"{tmp_path}/rule.py", question="0123", vote=1)
    (tmp_path / "votes.jsonl").write_text(json.dumps(vote))
    with pytest.raises(UserError, match="has a voter of that name"):
        pit.open_to_judge("runs/tiny", [f"{tmp_path}/rule.py"])


def test_names_are_checked_before_torch_is_imported():
    code = (
        "import sys, types, judges; cfg = types.SimpleNamespace(data='hh'); "
        "judges.check_names(['judge'], cfg); print('torch' in sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert said.stdout == "False\n"


def test_each_role_is_scored_by_its_own_head(lm, pairs):
    lm.add("judge", head=True)
    lm.add("reward_policy", head=True)
    prompts = [pair.prompt for pair in pairs]
    texts = [pair.chosen for pair in pairs]
    by_judge, by_reward = (
        judges.adapter_judge(lm, role, BUILT_IN).score(prompts, texts)
        for role in ("judge", "reward_policy")
    )
    assert np.abs(by_judge - by_reward).min() > 0  # heads are drawn at random
    again = judges.judges_by_name(["judge"], lm, BUILT_IN)["judge"].score(prompts, texts)
    np.testing.assert_allclose(again, by_judge, rtol=1e-5)


def test_a_rule_of_your_own(tmp_path):
    assert (
        score_file(tmp_path, "def quality(prompt, answer): return len(prompt) + len(answer)") == 7
    )
    assert score_file(tmp_path, "def quality(prompt, answer): return answer == '4'") == 1.0
    numpy = "import numpy as np\ndef quality(prompt, answer): return np.bool_(True)"
    assert score_file(tmp_path, numpy) == 1.0
    (tmp_path / "beside.py").write_text("SCORE = 3")
    assert score_file(tmp_path, "import beside\ndef quality(*_): return beside.SCORE") == 3


@pytest.mark.parametrize(
    "code, said",
    [
        ("def quality(prompt, answer):\n    x = 1\n    return x / 0", "line 3: ZeroDivisionError"),
        ("def quality(prompt, answer): return float('nan')", "returned nan for the answer '4'"),
        ("def quality(prompt, answer): return -float('inf')", "returned -inf for the answer '4'"),
        ("def quality(prompt, answer): return 'good'", "returned 'good'"),
        ("def quality(prompt, answer): return [1.0, 2.0]", r"returned \[1.0, 2.0\]"),
        ("def quality(prompt, answer): return None", "returned None"),
        ("def quality(prompt, answer): return 10**400", "line|OverflowError"),
        ("def quality(prompt): return 1", "TypeError"),
        ("quality = 3", "no function quality"),
        ("x = 1\nimport nowhere", "line 2: ModuleNotFoundError"),
        ("def quality(:", "SyntaxError.*line 1"),
        ("import sys; sys.exit(3)", "line 1: SystemExit: 3"),
    ],
)
def test_a_bad_rule_gets_one_line(tmp_path, code, said):
    with pytest.raises(UserError, match=said) as error:
        score_file(tmp_path, code)
    assert len(str(error.value).splitlines()) == 1 and "rule.py" in str(error.value)


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory):
    """The folder of a small reward model."""
    folder = tmp_path_factory.mktemp("reward")
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1)
    heads = dict(num_attention_heads=2, num_key_value_heads=1, num_labels=1, pad_token_id=0)
    config = Qwen2Config(vocab_size=600, **sizes, **heads)
    Qwen2ForSequenceClassification(config).save_pretrained(folder)
    return folder


def test_a_reward_model_from_a_folder_judges(reward_model, lm, pairs):
    lm.tokenizer.save_pretrained(reward_model)
    judge = judges.hub_judge(str(reward_model), "cpu")
    prompt = pairs[0].prompt
    text = pairs[0].chosen
    model = Qwen2ForSequenceClassification.from_pretrained(reward_model)
    chat = [*prompt, {"role": "assistant", "content": text}]
    ids = lm.tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=True)["input_ids"]
    expected = model(ids).logits.item()
    assert judge.score([prompt], [text])[0] == pytest.approx(expected, abs=1e-5)
    with pytest.raises(UserError, match="no-such"):
        judges.hub_judge(str(reward_model / "no-such"), "cpu")


def test_a_judge_never_runs_code_of_its_own(tmp_path, lm, monkeypatch):
    """Without `trust_remote_code=False` transformers asks, and this user says yes."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    lm.tokenizer.save_pretrained(tmp_path)
    code = {"AutoConfig": "own.Config", "AutoModelForSequenceClassification": "own.Model"}
    config = {"model_type": "own", "auto_map": code, "num_labels": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    with pytest.raises(UserError, match="Give quality"):
        judges.hub_judge(str(tmp_path), "cpu")
    assert not (tmp_path / "ran").exists()


TALK = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "ho"},
    {"role": "user", "content": "hey"},
]


def test_a_rule_reads_the_last_message_and_is_exact():
    asked = []

    def quality(prompt, answer):
        asked.append(prompt)
        return 1.0

    judge = judges.function_judge(quality)
    judge.score([TALK], ["y"])
    assert asked == ["hey"] and judge.margin == judges.SAME


def test_a_score_that_is_no_number_is_told():
    judge = judges.Judge(lambda prompts, texts: [float("nan")])
    with pytest.raises(UserError, match="not a finite number"):
        judge.score([TALK], ["y"])


def test_without_a_template_prompt_and_answer_are_two_texts():
    read = judges.classifier_input(SimpleNamespace(chat_template=None), TALK, "y")
    assert read == {"text": "hi\n\nho\n\nhey", "text_pair": "y"}


def test_a_template_gets_no_second_bos(reward_model, lm, tmp_path):
    # the same model, with a tokenizer that begins each text with a BOS, as Llama's do
    shutil.copytree(reward_model, tmp_path / "bos")
    bos = ("<|user|>", lm.tokenizer.convert_tokens_to_ids("<|user|>"))
    begin = TemplateProcessing("<|user|> $A", special_tokens=[bos])
    lm.tokenizer.backend_tokenizer.post_processor = begin
    lm.tokenizer.save_pretrained(tmp_path / "bos")
    said = judges.hub_judge(str(tmp_path / "bos"), "cpu").score([TALK], ["y"])[0]
    text = lm.tokenizer.apply_chat_template(
        [*TALK, {"role": "assistant", "content": "y"}], tokenize=False
    )
    ids = lm.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    model = Qwen2ForSequenceClassification.from_pretrained(reward_model)
    assert said == pytest.approx(model(ids).logits.item(), abs=1e-5)
