"""The command line, end to end at miniature size, and what it says to bad input."""

import inspect
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from filelock import FileLock

import baselines
import curriculum
import evaluate
import pit as command_line
import plan
import run as run_module
from errors import UserError
from run import Run

ROOT = Path(__file__).parent.parent
MINI = """--bits 16 --pairs 100 --eval-n 8 --sft-steps 2 --sft-batch 4 --rm-steps 2 --rm-batch 4
--rl-steps 1 --rl-batch 4 --minibatch 2""".split()
ROLES = "policy_sft pit_sft reward_policy reward_gap judge policy_rl pit_rl0 pit_rl1".split()
FIGURES = "curves.png result.png fig2.png fig3.png stops.png".split()
PROMPT = "Where does each look in the end? Ann north: left back."


def pit(*words, stdin=""):
    """What `python pit.py WORDS` does, in this process -> (exit code, stdout, stderr)."""
    streams = {name: io.TextIOWrapper(io.BytesIO()) for name in ("stdout", "stderr")}
    streams["stdin"] = io.TextIOWrapper(io.BytesIO(stdin.encode()))
    runs = []
    init = Run.__init__

    def remember(self, *args, **kwargs):
        init(self, *args, **kwargs)
        runs.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["pit.py", *map(str, words)])
        patch.setattr(signal, "signal", lambda number, handler: None)
        patch.setattr(os, "fsync", lambda file: None)
        patch.setattr(Run, "__init__", remember)
        for name, stream in streams.items():
            patch.setattr(sys, name, stream)
        try:
            with pytest.raises(SystemExit) as end:
                command_line.main()
        finally:
            for run in runs:
                run.lock_file.release()
    texts = []
    for name in ("stdout", "stderr"):
        streams[name].flush()
        texts.append(streams[name].buffer.getvalue().decode())
    return end.value.code or 0, *texts


def works(*words, stdin=""):
    """The same, for what must work -> stdout."""
    code, out, err = pit(*words, stdin=stdin)
    assert code == 0, out + err
    return out


@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    """A whole run in miniature -> its folder, and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "mini"
    with pytest.MonkeyPatch.context() as patch:
        for module in (baselines, evaluate):  # fewer texts to write
            patch.setattr(module, "TEMPERATURES", (0.4, 1.0))
        patch.setattr(baselines, "ROUNDS", 2)
        yield folder, works("all", "--run", folder, *MINI)


# ---- whole runs --------------------------------------------------------------------------------


def test_every_stage_runs_and_leaves_its_files(mini):
    folder, out = mini
    for role in ROLES:
        scores = role.startswith("reward") or role == "judge"
        assert (folder / "adapters" / role / "adapter_model.safetensors").is_file()
        assert (folder / "adapters" / role / "head.safetensors").is_file() == scores
        assert role in out
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [(line["stage"], line["step"]) for line in lines]
    assert steps == [(role, step) for role in ROLES for step in range(1 if "rl" in role else 2)]
    assert set(json.loads((folder / "results.json").read_text())["time_s"]) == {*ROLES, "eval"}
    report = (folder / "report.md").read_text()
    for figure in FIGURES:
        assert (folder / figure).stat().st_size > 10_000
        assert f"]({figure})" in report
    assert (folder / "samples.md").read_text().count("## after") == 5


def test_samples_fit_80_columns_and_the_console_100(mini):
    folder, out = mini
    for text, limit in (((folder / "samples.md").read_text(), 80), (out, 100)):
        wide = [line for line in text.splitlines() if len(line) > limit]
        assert [line for line in wide if str(folder) not in line] == []


def test_a_finished_run_says_so_and_is_left_alone(mini):
    folder, _ = mini
    before = (folder / "metrics.jsonl").read_text()
    out = works("all", "--run", folder, *MINI)
    assert out.splitlines() == [f"{folder} is finished. Its report: {folder / 'report.md'}"]
    assert (folder / "metrics.jsonl").read_text() == before


def test_a_run_whose_results_were_lost_is_evaluated_again(mini, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(mini[0], folder)
    (folder / "results.json").write_text('{"time_s"')
    code, _, err = pit("all", "--run", folder, *MINI)
    assert code == 2 and f"Delete it, then run: python pit.py eval --run {folder}" in err
    (folder / "results.json").unlink()
    works("all", "--run", folder, *MINI)
    assert json.loads((folder / "results.json").read_text())["table1"]


def test_a_run_with_a_new_adapter_is_evaluated_again(mini, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(mini[0], folder)
    assert command_line.is_finished(Run(folder))
    results = json.loads((folder / "results.json").read_text())
    times = results["time_s"]
    for role, finished in (("ablate_policy_0", True), ("pit_rl1", False)):  # trained last
        times[role] = times.pop(role, 1.0)
        (folder / "results.json").write_text(json.dumps(results))
        assert command_line.is_finished(Run(folder)) == finished


@pytest.mark.parametrize("words", [[], ["--smoke"]])
def test_the_options_of_a_run_hold_in_one_from_it_in_miniature_too(mini, tmp_path, words):
    folder = tmp_path / "copy"
    shutil.copytree(mini[0], folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"seed": 5, "pairs": 99, "last_steps": 7}
    config["checksum"] = run_module.checksum(config)
    (folder / "config.json").write_text(json.dumps(config))
    filled = []

    def fill_in(options, smoke):
        filled.append(options)
        raise UserError("enough")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command_line, "fill_in", fill_in)
        pit("all", "--from", folder, "--run", tmp_path / "new", "--kl", 0.3, *words)
    assert filled[0]["seed"] == 5 and filled[0]["kl"] == 0.3
    assert filled[0]["pairs"] == (None if words else 99)  # of the preset
    assert filled[0]["last_steps"] == (None if words else 7)  # as --rl-steps, of the preset


def test_a_run_from_another_trains_only_what_differs(mini, tmp_path):
    folder, _ = mini
    # what is not typed is as in that run
    words = "--from", folder, "--run", tmp_path / "new", "--rl-lr", 0.002
    out = works("all", *words, "--until", "reward")
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    old = json.loads((folder / "config.json").read_text())
    changed = {name for name in old if config[name] != old[name]}
    assert changed == {"rl_lr", "command", "checksum"} and config["rl_lr"] == 0.002
    assert "pit_rl0" not in out.partition("stage          passes")[2]  # nor is more planned
    assert "\npolicy_sft:" not in out and not (tmp_path / "new" / "adapters" / "policy_rl").exists()
    for role in ROLES[:5]:
        file = Path("adapters") / role / "adapter_model.safetensors"
        assert (folder / file).read_bytes() == (tmp_path / "new" / file).read_bytes()


def test_a_run_without_adapters_has_none_to_export(mini, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(mini[0], folder)
    shutil.rmtree(folder / "adapters")
    words = "export", "--run", folder, "--adapter", "pit_rl1", "--to", tmp_path / "x"
    code, _, err = pit(*words)
    assert code == 2 and "the run has none yet" in err


def test_rl_does_without_the_judge(mini, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(mini[0], folder)
    shutil.rmtree(folder / "adapters" / "judge")
    works("rl", "--run", folder)
    shutil.rmtree(folder / "adapters" / "reward_gap")
    assert pit("rl", "--run", folder)[0] == 2


def test_ablate_compares_curricula_and_eval_keeps_them(mini, monkeypatch):
    folder, _ = mini
    monkeypatch.setattr(curriculum, "CURRICULA", ["policy", "annotated,policy"])
    works("ablate", "--run", folder)
    results = json.loads((folder / "results.json").read_text())
    assert [row["curriculum"] for row in results["table2"]] == ["policy", "annotated,policy"]
    assert {"reward_gap2", "reward_gap3"} <= {row["model"] for row in results["eq2"]}
    assert (folder / "fig4.png").stat().st_size > 10_000
    works("eval", "--run", folder, "--judge", "judge")
    results = json.loads((folder / "results.json").read_text())
    assert {row["judge"] for row in results["table1"]} == {"judge"}
    # an evaluation by another judge still has Table 2
    assert "](fig4.png)" in (folder / "report.md").read_text()


def test_runs_are_listed(mini, monkeypatch):
    monkeypatch.chdir(mini[0].parent.parent)
    monkeypatch.setenv("COLUMNS", "200")  # nothing is folded
    out = works("runs", mini[0].parent.name)
    assert f"{mini[0].parent.name}/mini" in out and "synthetic" in out and "(smoke)" in out
    assert f"{mini[0].parent.name}/mini" in works("runs", f"{mini[0].parent.name}/mini")
    # whose delta that is: other tests may have had it judged again
    assert re.search(r"[+-]\d+\.\d \((quality|judge)\)", out)


# ---- using a run -------------------------------------------------------------------------------


def test_infer_shows_the_original_and_each_round_with_its_gap(mini):
    folder, _ = mini
    words = "infer", "--run", folder, "--rounds", 2, "--stop", "rounds"
    out = works(*words, PROMPT)
    for label in ("original\n", "round 1, gap ", "round 2, gap "):
        assert label in out
    draft = "Now Ann west: west east."
    assert f"original\n{draft}\n" in works(*words, PROMPT, "--response", "-", stdin=draft + "\n")


def test_infer_without_a_prompt_is_a_conversation(mini):
    folder, _ = mini
    out = works("infer", "--run", folder, "--rounds", 1, stdin=f"{PROMPT}\nAnd then?\n{PROMPT}\n")
    assert out.count("you: ") == 4 and out.count("original\n") == 2
    assert out.count("the built-in task only") == 1


def test_a_file_is_improved(mini, tmp_path):
    folder, _ = mini
    rows = [{"prompt": PROMPT}, {"prompt": PROMPT, "response": "Now Ann east: west east."}]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    output = tmp_path / "out.jsonl"
    words = "--input", tmp_path / "in.jsonl", "--output", output, "--rounds", 1
    works("infer", "--run", folder, *words)
    assert json.loads(output.read_text().splitlines()[1])["response"] == "Now Ann east: west east."
    # the built-in base knows nothing else
    (tmp_path / "in.jsonl").write_text('{"prompt": "List."}')
    code, _, err = pit("infer", "--run", folder, *words[:2], "--output", tmp_path / "other.jsonl")
    assert code == 2 and "in.jsonl, row 1: This run knows" in err


def test_only_to_merge_an_export_needs_the_base_unquantised(mini, tmp_path, monkeypatch):
    asked = []

    def load_base(run, roles, bits):
        asked.append(bits)
        raise UserError("enough")

    monkeypatch.setattr("pit.load_base", load_base)
    words = "export", "--run", mini[0], "--adapter", "pit_rl1", "--to", tmp_path / "out"
    assert pit(*words)[0] == pit(*words, "--merge")[0] == 2
    assert asked == [None, 16]


def test_other_data_with_the_built_in_base_is_a_warning(tmp_path):
    words = "all", "--run", tmp_path / "new", "--data", "no-such-file.jsonl"
    assert "the built-in base knows the built-in task only" in pit(*words)[1]


def test_the_card_of_a_4_bit_run_says_so(mini, lm):
    run = command_line.open_run(mini[0])
    run.config.bits = 4
    card = command_line.card(lm, run, "pit_rl1", merge=True)
    assert "trained on the base in 4-bit" in card and "at temperature 1, on the base in 4-" in card
    run.lock_file.release()


def test_an_export_carries_a_card(mini, tmp_path):
    folder, _ = mini
    words = "export", "--run", folder, "--adapter", "pit_rl1", "--to", tmp_path / "whole"
    works(*words, "--merge")
    assert (tmp_path / "whole" / "model.safetensors").is_file()
    card = (tmp_path / "whole" / "README.md").read_text()
    assert "Please improve your answer." in card and "8 held-out prompts, by the" in card
    assert "license: apache-2.0\n" in card and "the built-in base `tiny`" in card
    assert "AutoModelForCausalLM.from_pretrained(folder)" in card
    assert "minus losses, at temperature 1.\n" in card and "4-bit" not in card
    code, _, err = pit(*words)
    assert code == 2 and "already exists" in err
    works(*words[:4], "policy_sft", "--to", tmp_path / "policy")
    assert "held-out prompts, by the" not in (tmp_path / "policy" / "README.md").read_text()


@pytest.mark.parametrize("is_listed", [True, False])
def test_an_export_without_its_weights_gets_a_line(mini, tmp_path, is_listed):
    """Whether the checksums list the lost weights, or not."""
    shutil.copytree(mini[0], tmp_path / "run")
    folder = tmp_path / "run" / "adapters" / "pit_rl1"
    (folder / "adapter_model.safetensors").unlink()
    if not is_listed:
        (folder / "sha256.json").write_text('{"role": "pit_rl1"}')
    words = "--adapter", "pit_rl1", "--to", tmp_path / "whole"
    code, _, err = pit("export", "--run", tmp_path / "run", *words)
    assert code == 2 and str(folder) in err and len(err.splitlines()) <= 2
    assert not (tmp_path / "whole").exists()


def test_with_stdin_closed_the_input_is_at_its_end(mini, monkeypatch):
    """As after <&-: Python then has no sys.stdin at all."""
    monkeypatch.setattr(sys, "stdin", None)
    monkeypatch.setattr(sys, "argv", ["pit.py", "runs", str(mini[0].parent)])
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    with pytest.raises(SystemExit):
        command_line.main()
    assert sys.stdin.read() == ""


def test_nobody_votes_while_another_process_has_the_run(mini):
    """Both would write results.json."""
    with FileLock(mini[0] / ".lock"):
        code, _, err = pit("judge", "--run", mini[0], "--by", "me")
    assert code == 2 and "in use by another process" in err


def test_a_language_model_may_not_have_the_name_of_a_judge(mini):
    for name in ("quality", "judge", "me"):
        words = "--by", "http://localhost:1/v1", "--llm", name
        code, _, err = pit("judge", "--run", mini[0], *words)
        assert code == 2 and "has that name" in err


def test_an_evaluation_that_was_cut_short_is_told_before_any_vote(mini, tmp_path):
    shutil.copytree(mini[0], tmp_path / "run")
    (tmp_path / "run" / "results.json").unlink()
    code, _, err = pit("judge", "--run", tmp_path / "run", "--by", "me")
    assert code == 2 and "python pit.py eval --run" in err


def test_a_missing_adapter_is_trained_by_its_own_command(mini, tmp_path, monkeypatch):
    """And said before the base takes its time to load."""
    monkeypatch.setattr("models.load_model", None)
    shutil.copytree(mini[0], tmp_path / "run")
    trained_by = {"pit_sft": "sft", "reward_gap": "reward", "pit_rl1": "rl"}
    for role, command in trained_by.items():
        (tmp_path / "run" / "adapters" / role / "sha256.json").unlink()
        words = "--adapter", role, "--to", tmp_path / "whole"
        err = pit("export", "--run", tmp_path / "run", *words)[2]
        assert f"First run: python pit.py {command} --run" in err
    for words in (["infer", "map"], ["rl"], ["eval"]):
        assert "First run: " in pit(*words, "--run", tmp_path / "run")[2]


# ---- what people are told ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, said",
    [
        # options
        ("all --bits 7", "--bits"),
        ("all --sft-lr inf", "--sft-lr"),
        ("all --kl nan", "--kl"),
        ("all --lora-r 100000", "--lora-r"),
        ("all --until lunch", "--until"),
        ("all --rounds annotated,magic", "magic"),
        ("infer --run {mini} hello --temperature 1e30", "--temperature"),
        ("infer --run {mini} hello --stop never", "--stop"),
        # empty values
        ("all --run ''", "--run ''"),
        ("all --data=", "--data="),
        ("infer --run {mini} '  '", "variable"),
        ("infer --run {mini} hello --response ''", "--response ''"),
        ("infer --run {mini} hello '--response= '", "hello '--response= '"),
        # runs
        ("infer --run {root}/tiny", "no run in"),
        ("rl --run nowhere", "no run in"),
        ("runs {root}/docs", "no runs in"),
        ("all --run {tmp}", "is not a run, but holds metrics.jsonl"),
        ("all --run {mini} --seed 5", "other settings"),
        ("all --run {root}", "is not a run, but holds pit.py"),
        ("all --run {tmp}/new --from {tmp}/nowhere", "no run in"),
        ("all --from {mini}", "--run NEW"),
        # models
        ("all --run {tmp}/new --model {mini}", "not a model"),
        ("all --run {tmp}/new --model ./nowhere", "no such folder"),
        ("all --run {tmp}/new --model {mini}/adapters/pit_rl1", "PEFT adapter"),
        ("all --run {tmp}/new --model no/such-model --data nowhere.jsonl", "no/such-model"),
        ("all --run {tmp}/new --pairs 100 --target-modules *_proj", "--target-modules *_proj"),
        ("eval --run {mini} --judge no/such-judge", "no/such-judge"),
        ("judge --run {mini}", "--by"),
        ("judge --run {mini} --by http://127.0.0.1:9", "--llm"),
        ("judge --run {mini} --by localhost:8000 --llm NAME", "--by http://"),
        ("judge --run {mini} --by me --llm NAME", "--by http://"),
        # data
        ("all --run {tmp}/new --data no-such-file.jsonl", "no-such-file.jsonl"),
        ("all --run {tmp}/new --columns prompt=a,chosen=b,rejected=c", "give that, too"),
        # prompts, files, exports
        ("infer --run {mini} 'What is the capital of France?'", "the built-in task only"),
        ("infer --run {mini} Where? --response -", "nothing came"),
        ("infer --run {mini} --response x", "the prompt too"),
        ("infer --run {mini} --input {tmp}/in.jsonl", "give both"),
        ("infer --run {mini} hello --input {tmp}/in.jsonl --output {tmp}/o", "not both"),
        ("infer --run {mini} --input /nowhere --output {tmp}/o", "does not exist"),
        ("infer --run {mini} --input {tmp}/in.jsonl --output /dev/null", "give a file"),
        ("infer --run {mini} --input {tmp}/in.jsonl --output {tmp}/o.csv", "FILE.jsonl"),
        ("export --run {mini} --adapter policy --to {tmp}/x", "policy_rl, policy_sft"),
        (
            "export --run {mini} --adapter ../adapters/pit_rl1 --to {tmp}/x",
            ": the run has ",
        ),
        ("export --run {mini} --adapter reward_gap --to {tmp}/x --merge", "leave out --merge"),
        (
            """infer --run {mini} '[{{"role": "user", "content": ""}}]'""",
            "the prompt: user and assistant must take turns",
        ),
        ("""infer --run {mini} '[{{"role": "tool", "content": "x"}}]'""", "a turn by a tool"),
        ("all --run {root}/README.md", "is a file"),
    ],
)
def test_bad_input_gets_a_line_or_two_and_exit_code_2(mini, tmp_path, words, said):
    (tmp_path / "in.jsonl").write_text('{"prompt": "x"}')
    (tmp_path / "metrics.jsonl").write_text("notes of mine")
    words = words.format(mini=mini[0], tmp=tmp_path, root=ROOT)
    code, out, err = pit(*shlex.split(words))
    assert code == 2, out + err
    assert said in err and "Traceback" not in err
    if err.startswith("Error"):
        assert len(err.splitlines()) <= 3
    assert not (tmp_path / "new" / "config.json").exists()


def python(code, **options):
    """A process of its own, which may close or change its streams."""
    words = [sys.executable, *code]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, **options)


@pytest.mark.parametrize(
    "words",
    [
        "--help",
        "al",
        "all --rounds annotated,magic",
        "all --run tiny",
        "rl --run nowhere",
        "infer --run tiny hello",
        "infer --run tiny hello --stop never",
        "export --run tiny --adapter policy --to x",
        "runs nowhere",
    ],
)
def test_help_and_typos_are_answered_before_anything_slow_is_imported(words):
    code = "import atexit, pit, sys; atexit.register(lambda: print('torch' in sys.modules)); "
    done = python(["-c", f"{code}sys.argv = {['pit.py', *words.split()]}; pit.main()"])
    assert done.returncode == (0 if words == "--help" else 2) and "Traceback" not in done.stderr
    assert done.stdout.endswith("False\n"), done.stderr


@pytest.mark.parametrize(
    "command", sorted(command_line.typer.main.get_command(command_line.app).commands)
)
def test_every_command_shows_an_example(command):
    assert f"Example: python pit.py {command}" in " ".join(works(command, "--help").split())


@pytest.mark.parametrize("redirect", ["<&-", ">&-", "<&- >&- 2>&-", "2>&-"])
def test_closed_streams_end_without_a_traceback(redirect):
    done = python(["-c", f"import os; os.system('{sys.executable} pit.py all --kl x {redirect}')"])
    assert "Traceback" not in done.stdout + done.stderr


def test_a_path_that_is_not_utf8_is_refused():
    command = [sys.executable, "pit.py", "all", "--run", b"/tmp/\xff"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, env=os.environ | {"LC_ALL": "C"})
    assert done.returncode == 2 and b"UTF-8" in done.stderr and b"Traceback" not in done.stderr


# ---- the configuration -------------------------------------------------------------------------


def options(**given):
    """The options of `all` as they are stored."""
    parameters = inspect.signature(command_line.run_all).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.name not in command_line.NOT_STORED}
    return defaults | given


@pytest.mark.parametrize("model", ["tiny", "Qwen2-0.5B"])
@pytest.mark.parametrize("smoke", [False, True])
def test_presets_fill_in_every_number_and_what_is_given_holds(model, smoke):
    filled = command_line.fill_in(options(model=model, minibatch=3, rl_steps=9), smoke)
    assert filled["minibatch"] == 3 and curriculum.round_steps(SimpleNamespace(**filled)) == [9, 9]
    assert {name for name, value in filled.items() if value is None} <= {
        "vram",
        "columns",
        "last_steps",
    }


def test_the_curricula_of_table_2_are_sources_that_rounds_may_name():
    for name in curriculum.CURRICULA:
        assert command_line.check_rounds(name) == name


def test_presets_are_within_the_limits_of_the_options():
    parameters = inspect.signature(command_line.run_all).parameters
    for preset in command_line.PRESETS.values():
        for name, value in preset.items():
            limit = parameters[name].annotation.__metadata__[0].min
            assert limit is None or value >= limit, name


def test_with_little_memory_texts_are_shorter(monkeypatch):
    def filled(free, vram=None):
        monkeypatch.setattr(plan, "free_memory", lambda: free)
        return command_line.fill_in(options(model="Qwen2-0.5B", vram=vram), False)

    small = filled(free=4.04)
    large = filled(free=8)
    assert small["max_prompt"] < large["max_prompt"] and small["micro_batch"] < large["micro_batch"]
    assert small["vram"] == 4.0 and filled(free=8, vram=4) == small


@pytest.mark.parametrize("begun", [False, True])
def test_a_run_that_has_begun_keeps_its_presets_whatever_is_free_now(tmp_path, monkeypatch, begun):
    """One that has not may have been stopped to free memory."""

    def fill_in(options, smoke):
        raise UserError(options["vram"])  # and no further

    if begun:
        (tmp_path / "checkpoints").mkdir()
    monkeypatch.setattr(command_line, "fill_in", fill_in)
    monkeypatch.setattr(run_module, "read_config", lambda folder: {"vram": 5.5})
    kept = 5.5 if begun else None
    for words, vram in (({}, kept), ({"vram": 8.0}, 8.0), ({"overwrite": True}, None)):
        with pytest.raises(UserError) as error:
            command_line.run_all(run=tmp_path, **words)
        assert error.value.args == (vram,)


@pytest.mark.parametrize("begun", [False, True])
def test_a_run_that_has_begun_keeps_its_lengths_whatever_vram_is_now(tmp_path, begun):
    filled = []

    def fill_in(options, smoke):
        filled.append(options)
        raise UserError("enough")

    if begun:
        (tmp_path / "adapters").mkdir()
    old = {"vram": 8.0, "max_prompt": 384, "max_response": 128, "rl_batch": 64, "micro_batch": 8}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command_line, "fill_in", fill_in)
        patch.setattr(run_module, "read_config", lambda folder: old)
        with pytest.raises(UserError):
            command_line.run_all(run=tmp_path, vram=4.0, max_prompt=100)
    options = [filled[0][name] for name in ("max_prompt", "max_response", "rl_batch")]
    assert options == ([100, 128, 64] if begun else [100, None, None])
    assert filled[0]["micro_batch"] is None and filled[0]["vram"] == 4.0


def test_a_slash_at_the_end_of_a_folder_changes_nothing(tmp_path, monkeypatch):
    def fill_in(options, smoke):
        raise UserError(options["model"])

    monkeypatch.setattr(command_line, "fill_in", fill_in)
    for model in ("some/model", "some/model/"):
        with pytest.raises(UserError, match="^some/model$"):
            command_line.run_all(run=tmp_path, model=model)


def test_a_stage_without_its_inputs_names_the_command_to_run(mini, tmp_path):
    (tmp_path / "config.json").write_text((mini[0] / "config.json").read_text())
    for command in ("rl", "eval", "ablate"):
        code, _, err = pit(command, "--run", tmp_path)
        assert code == 2 and f"python pit.py sft --run {tmp_path}" in err


@pytest.mark.parametrize("option", ["critic_lr", "an_old_option"])
def test_a_run_of_another_version_gets_one_line(mini, tmp_path, option):
    config = json.loads((mini[0] / "config.json").read_text())
    if option in config:
        del config[option]
    else:
        config[option] = 1.0
    config["checksum"] = run_module.checksum(config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    for words in (
        ["sft"],
        ["ablate"],
        ["infer", "Hello"],
        ["export", "--adapter", "x", "--to", "y"],
    ):
        code, _, err = pit(*words, "--run", tmp_path)
        assert code == 2 and len(err.splitlines()) == 1 and "another version" in err
