"""A run's folder: its options, what was measured, what was learned.

runs/NAME/config.json          the options: all that is needed to repeat the run
runs/NAME/adapters/ROLE/       one trained role; the folder exists only once it is complete
runs/NAME/checkpoints/ROLE/N   the stage in progress after N steps: all that its next step needs
runs/NAME/metrics.jsonl        one line per optimiser step or PPO iteration
runs/NAME/samples.md           the same few prompts, answered after each stage that trains a writer
runs/NAME/results.json         every number of the report; report.md and figures are drawn from it

Nothing is lost, whenever the process dies. Files and folders are written beside their place and
then renamed: the old state is there, or the new one, never half of one. Folders carry the SHA-256
of their files, so that damage is noticed. A stage resumes from its newest intact checkpoint and
ends in the very numbers that it would have reached without the stop.
"""

import hashlib
import io
import json
import os
import platform
import shutil
import signal
import sys
import time
import zlib
from contextlib import contextmanager, suppress
from importlib import metadata, util
from pathlib import Path
from types import SimpleNamespace

import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

from errors import UserError, check_finite, first_line, out_of_memory, same_command

# all that a run writes: nothing else in its folder is ever moved or deleted
RUN_FILES = """adapters checkpoints metrics.jsonl samples.md answers.json answers.jsonl votes.jsonl
results.json report.md curves.png result.png fig2.png fig3.png fig4.png rounds.png stops.png
config.json"""
# options that may change within a run: results do not depend on them, except for rounding
FREE = ("save_every", "micro_batch", "vram")
# what config.json holds besides the options
FACTS = ("versions", "replaces", "checksum")
WAYS_OUT = "Repeat the old ones to continue it, or give a new --run, or --overwrite to replace it."

# options that only some adapters depend on, in groups; all adapters depend on all others
GROUPS = {
    "sft": "sft_steps sft_lr sft_batch",
    "pit": "keep_better unlikelihood",
    "reward": "rm_steps rm_lr rm_batch",
    "rl": "rl_steps rl_batch rl_lr critic_lr kl target_kl epochs minibatch temperature",
    "rounds": "rounds",
    "eval": "eval_n",
}
# the groups that an adapter depends on, by how its name begins
DEPENDS_ON = {
    "policy_sft": "sft",
    "pit_sft": "sft pit",
    "reward": "reward",
    "judge": "reward",
    "policy_rl": "sft reward rl",
    "pit_rl": "sft pit reward rl rounds",
}


class Run:
    """An open run folder. `config` holds its options as attributes."""

    plan = None  # a plan.Plan, where the time left is to be shown
    lock_file = None
    replace = False  # whether `begin` is to move an old run aside
    source = None  # another run, whose adapters `begin` is to take over
    in_step = False
    stop_signal = None
    time_left = ""

    def __init__(self, path, config=None):
        """Open the run in `path`. `start` gives the config of a run that has yet to begin."""
        self.path = Path(path)
        self.begun = config is None
        config = config or read_config(self.path)
        if config is None:
            raise UserError(f"There is no run in {self.path}. For a list: python pit.py runs")
        self.config = SimpleNamespace(**config)

    # ---- start and end -------------------------------------------------------------------------

    @classmethod
    def start(cls, path, options, overwrite=False, source=None):
        """Lock the folder `path` for a run with `options`: a new run, or the one there, continued.

        overwrite: replace the run that is there. source: the folder of a run to take adapters from.
        Nothing is written, moved or deleted before `begin`.
        """
        path = Path(path)
        lock_file = lock_folder(path)
        try:
            old = read_config(path)
            config = options | {"versions": versions()}
            if old is None:
                check_free(path)
            elif not overwrite and learned(path):
                check_same(path, old, options)
                config = old | config
            run = cls(path, {"replaces": old and old.get("replaces")} | config)
            run.source = source and Run(source)
            if source and run.source.path.resolve() == path.resolve():
                raise UserError(f"{path} cannot take over its own adapters. Give a new --run.")
        except UserError:
            lock_file.release()
            raise
        run.lock_file = lock_file
        run.replace = overwrite and old is not None
        return run

    def begin(self):
        """Write config.json, now that options, model and data are known to be good."""
        if self.begun:
            return
        self.begun = True
        if self.replace:
            self.move_aside()
        self.write_config()
        if self.source and not self.adapter("").exists():
            take_over(self, self.source)
        self.drop_replaced()

    def lock(self):
        """Keep other processes out, and let Ctrl-C and SIGTERM wait for the end of a step."""
        self.lock_file = self.lock_file or lock_folder(self.path)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.on_signal)

    def close(self):
        """Let other processes in, as the end of this one does too."""
        if self.lock_file:
            self.lock_file.release()
            self.lock_file = None

    def on_signal(self, number, frame):
        """Stop after the step in progress; outside a step, or at a second signal, at once."""
        if self.in_step and not self.stop_signal:
            self.stop_signal = number
            say("\nStopping after this step, which may take a while. Again: stop at once.\n")
            return
        say(f"\nStopped. To continue: {same_command()}\n")
        # as harmless as a kill: whatever was being written is not in its place yet
        os._exit(128 + number)

    def old_run(self):
        """Where the run that this one replaces is kept, until there is a new adapter."""
        return Path(f"{self.path.resolve()}.old")

    def move_aside(self):
        """Move the run that is to be replaced out of the way, file by file."""
        if self.old_run().exists() and not self.config.replaces:
            raise UserError(f"--overwrite keeps the old run in {self.old_run()}. Move that away.")
        self.old_run().mkdir(exist_ok=True)
        for name in RUN_FILES.split():
            if self.config.replaces:
                # this run has no adapter yet; the one that it replaces is worth more
                remove(self.path / name)
            elif (self.path / name).exists():
                os.replace(self.path / name, self.old_run() / name)
        self.config.replaces = True

    def drop_replaced(self):
        """Delete the run that this one replaces, once there is an adapter in its stead."""
        if getattr(self.config, "replaces", None) and any(self.adapter("").glob("[!.]*")):
            for name in RUN_FILES.split():
                remove(self.old_run() / name)
            with suppress(OSError):  # somebody has put a file there
                self.old_run().rmdir()
            self.config.replaces = None
            self.write_config()

    # ---- options and results -------------------------------------------------------------------

    def write_config(self):
        self.config.checksum = checksum(vars(self.config))
        write_json(self.path / "config.json", vars(self.config))

    def pin(self, name, value):
        """Note a fact about the run, such as a fingerprint of its data; UserError if it changed."""
        if getattr(self.config, name, value) != value:
            raise UserError(f"{self.path}: the {name} has changed since the start.\n{WAYS_OUT}")
        setattr(self.config, name, value)
        if self.begun:
            self.write_config()

    def results(self):
        return read_json(self.path / "results.json", "Delete it, then evaluate again.")

    def add_results(self, **parts):
        write_json(self.path / "results.json", self.results() | parts)

    def add_seconds(self):
        seconds = round(time.perf_counter() - self.started, 1)
        self.add_results(time_s=self.results().get("time_s", {}) | {self.name: seconds})
        return seconds

    # ---- adapters ------------------------------------------------------------------------------

    def adapter(self, role):
        return self.path / "adapters" / role

    def done(self, role):
        """Whether `role` has been trained. A damaged one is reported, and counts as untrained."""
        problem = damage(self.adapter(role), role)
        if problem and self.adapter(role).exists():
            print(f"{self.adapter(role)} is damaged: {problem}.")
        return not problem

    def need(self, role, command):
        """UserError unless `role` has been trained; `command` trains it."""
        if not self.done(role):
            what = "damaged" if self.adapter(role).exists() else "not there yet"
            raise UserError(
                f"{self.adapter(role)} is {what}. First run: "
                f"python pit.py {command} --run {self.path}"
            )

    def load_trained(self, lm, role):
        """Whether `role` has been trained already, or `lm` has it; loads it if need be."""
        self.begin()
        if role in lm.roles:
            return True
        if not self.done(role):
            return False
        self.load(lm, role)
        return True

    def load(self, lm, role):
        """Load the trained `role` into `lm`; UserError if it does not fit."""
        try:
            lm.load(role, self.adapter(role))
            if (role in lm.heads) != role.startswith(("reward", "judge")):
                raise ValueError("a reward model has a head, a model that writes has none")
        except Exception as error:  # files, names, shapes: all kinds
            if out_of_memory(error):
                raise
            raise UserError(
                f"{self.adapter(role)} does not fit {self.config.model} with rank "
                f"{self.config.lora_r}: {first_line(error)}\n"
                "Undo what was changed in this run, or delete the adapter to train it again."
            ) from None

    def keep(self, lm, role):
        """Save the trained `role` as an adapter of this run."""
        with self.new_adapter(role) as folder:
            lm.save(role, folder)

    @contextmanager
    def new_adapter(self, role):
        """A folder to write `role` into, which becomes the adapter when the block ends well."""
        with new_folder(self.adapter(role), role) as folder:
            yield folder
            self.add_seconds()  # first, so that what is trained always has its time
        remove(self.path / "checkpoints" / role)
        self.drop_replaced()

    # ---- checkpoints ---------------------------------------------------------------------------

    def save(self, step, optimizers, numbers):
        """Write the checkpoint after `step` steps. The one before it stays, in case of damage."""
        state = {
            "parameters": [p.detach() for p in in_training(optimizers)],
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            "numbers": numbers,
            "seconds": time.perf_counter() - self.started,
        }
        file = io.BytesIO()  # torch.save to a file would not say that a disk is full
        torch.save(state, file)
        folder = self.path / "checkpoints" / self.name
        with new_folder(folder / f"{step:06d}", self.name) as new:
            (new / "state.pt").write_bytes(file.getbuffer())
        for old in sorted(folder.iterdir())[:-2]:
            remove(old)

    def restore(self, optimizers, numbers):
        """Put back the newest intact checkpoint of this stage -> the number of steps done, or 0."""
        files = (self.path / "checkpoints" / self.name).glob("[0-9]*/state.pt")
        for file in sorted(files, reverse=True):
            if problem := damage(file.parent, self.name):
                print(f"{file.parent} is damaged: {problem}.")
                continue
            state = torch.load(file, map_location="cpu", weights_only=True)
            for p, value in zip(in_training(optimizers), state["parameters"]):
                p.data.copy_(value)
            for optimizer, its_state in zip(optimizers, state["optimizers"]):
                optimizer.load_state_dict(its_state)
            numbers.update(state["numbers"])
            self.started -= state["seconds"]
            print(f"  continuing after step {int(file.parent.name)}", flush=True)
            return int(file.parent.name)
        return 0

    # ---- metrics -------------------------------------------------------------------------------

    def log(self, **metrics):
        """Append a line to metrics.jsonl: stage, step, numbers by name. The bar shows the first."""
        metrics = {name: round(float(value), 6) for name, value in metrics.items()}
        check_finite(metrics)  # before a checkpoint is written
        with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"stage": self.name, "step": self.step} | metrics) + "\n")
        shown = [f"{name} {value:.3g}" for name, value in list(metrics.items())[:3]]
        self.bar.set_postfix_str("  ".join([*shown, self.time_left]))

    def metrics(self):
        """All lines of metrics.jsonl, a dict each, the oldest first."""
        path, rows = self.path / "metrics.jsonl", []
        content = path.read_bytes() if path.exists() else b""
        # what follows the last line end was cut off by a kill: its step is done again
        for number, line in enumerate(content.split(b"\n")[:-1], 1):
            try:
                row = json.loads(line)
                row["stage"], int(row["step"])  # every line has them
            except (ValueError, TypeError, KeyError):
                raise UserError(
                    f"{path}, line {number}: damaged. Delete this line; only the curves need it."
                ) from None
            rows.append(row)
        return rows

    def forget(self, stage, step):
        """Drop a stage's lines from `step` on, where it continues: no step is to be there twice."""
        rows = [row for row in self.metrics() if row["stage"] != stage or row["step"] < step]
        write_lines(self.path / "metrics.jsonl", rows)

    def warn(self, text):
        """Say, once a stage, that something looks wrong, and what to try."""
        if text not in self.warned:
            self.warned.add(text)
            tqdm.write(f"  Warning: {text}")

    # ---- stages and steps ----------------------------------------------------------------------

    @contextmanager
    def stage(self, name, why):
        """Announce a stage; its seconds go to results.json at the end."""
        self.begin()
        number = self.plan.number(name) if self.plan else ""
        print(f"\n{number}{name}: {why}", flush=True)
        self.name, self.step = name, 0
        self.warned = set()
        self.started = time.perf_counter()
        seed_all(self.config.seed, name, "start")
        try:
            yield
        except FloatingPointError as error:
            raise UserError(
                f"{name}, step {self.step}: {error}\nThe last checkpoint is kept, but the same "
                "options would end here again: give a new --run, or --overwrite."
            ) from None
        seconds = self.add_seconds()
        if self.plan:
            self.plan.end_stage(name, seconds)

    def steps(self, total, optimizers, numbers=None):
        """Yield the steps of this stage that are still to do, under a progress bar.

        A checkpoint holds the parameters in `optimizers`, the optimisers' state, and the dict
        `numbers`. It needs no more: what a step draws, and its place in the data, follow from
        (seed, stage, step) alone.
        """
        numbers = {} if numbers is None else numbers
        first = self.restore(optimizers, numbers)
        self.forget(self.name, first)
        self.bar = progress(range(first, total), initial=first, total=total)
        for step in self.bar:
            started = time.perf_counter()
            self.step = step
            seed_all(self.config.seed, self.name, step)
            self.in_step = True
            yield step
            done = step + 1
            if done % self.config.save_every == 0 or done == total or self.stop_signal:
                self.save(done, optimizers, numbers)
                if self.bar.disable:  # no terminal
                    print(f"  step {done} of {total}  {self.bar.postfix}".rstrip(), flush=True)
            self.in_step = False
            if self.plan:
                seconds = time.perf_counter() - started
                self.time_left = self.plan.end_step(self.name, done, total, seconds)
            if self.stop_signal:
                self.bar.close()
                say(f"Saved {self.name} after step {done} of {total}.\n")
                say(f"To continue: {same_command()}\n")
                sys.exit(128 + self.stop_signal)


def in_training(optimizers):
    """Every parameter that is being trained."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            yield from group["params"]


# ---- other runs --------------------------------------------------------------------------------


def take_over(run, source):
    """Start a run with all adapters of the run `source` that its options would give, too."""
    taken = []
    for folder in sorted(source.adapter("").glob("[!.]*")):
        differs = differing_options(folder.name, vars(source.config), vars(run.config))
        if differs:
            print(f"{folder} is not taken over: {', '.join(differs)} differ.")
        elif source.done(folder.name):
            print(f"{folder} is taken over.")
            taken.append(folder)
    # the numbers first: an adapter that is there has its curves, its accuracy and its time
    roles = [folder.name for folder in taken]
    rows = [row for row in source.metrics() if row["stage"] in roles]
    write_lines(run.path / "metrics.jsonl", rows)
    for part in ("reward", "time_s"):
        measured = source.results().get(part, {})
        run.add_results(**{part: {role: measured[role] for role in roles if role in measured}})
    with new_folder(run.adapter("")) as new:
        for folder in taken:
            shutil.copytree(folder, new / folder.name)


def differing_options(role, old, new):
    """The options that differ between two configs and that adapter `role` depends on."""
    skipped = [*FACTS, *FREE]
    for start, groups in DEPENDS_ON.items():
        if role.startswith(start):
            for group, options in GROUPS.items():
                skipped += options.split() if group not in groups.split() else []
    return [name for name in new if name not in skipped and old.get(name) != new[name]]


def list_runs(folder):
    """The runs in `folder` -> dicts: run, model, data, seed, stage (the last that ended), delta.

    delta: how often PIT beats the policy's own answers, less how often it loses; None: unknown.
    """
    rows = []
    for file in sorted(folder.glob("*/metrics.jsonl")):
        row = dict(run=file.parent, model="", data="", seed="", stage="none yet", delta=None)
        try:
            run = Run(file.parent)
            row |= {name: getattr(run.config, name) for name in ("model", "data", "seed")}
            results = run.results()
            for stage in results.get("time_s", {}):
                row["stage"] = stage
            for line in results.get("table1", []):
                if (line["a"], line["b"], line["judge"]) == ("pit", "original", results["main"]):
                    row["delta"] = line["delta"]
        except UserError:
            row["stage"] = "damaged"
        rows.append(row)
    return rows


# ---- checks of a folder ------------------------------------------------------------------------


def read_config(path):
    """The config of the run in `path`; None where there is none, UserError where it is no run's."""
    file = path / "config.json"
    config = read_json(file, "Put back a copy of it, or give another --run.")
    if not config:
        return None
    if "versions" not in config:
        raise UserError(f"{file} is not of a run. Give another --run.")
    if config.get("checksum", checksum(config)) != checksum(config):
        raise UserError(
            f"{file} was edited by hand. Undo that, or start a new --run.\n"
            'Where a model or a data file has moved, edit its path and delete "checksum".'
        )
    return config


def checksum(config):
    """Of the options and of what was pinned."""
    kept = [(name, config[name]) for name in sorted(config) if name not in FACTS]
    return zlib.crc32(json.dumps(kept).encode())


def learned(path):
    return (path / "adapters").exists() or (path / "checkpoints").exists()


def check_free(path):
    """UserError where a folder has no config.json, but files that look like a run's."""
    for name in RUN_FILES.split():
        if (path / name).exists():
            raise UserError(
                f"{path} holds {name}, but no config.json of a run. It may be somebody else's and "
                "is left alone. Give a new --run."
            )


def check_same(path, old, options):
    """UserError where a run that has learned something is to go on with other options."""
    differs = []
    for name, value in options.items():
        if name not in FREE and old.get(name) != value:
            differs.append(f"{name}={old.get(name)!r} (now {value!r})")
    if differs:
        differs = ", ".join(differs)
        raise UserError(f"{path} holds a run with other settings: {differs}.\n{WAYS_OUT}")


def versions():
    """The versions of Python and some libraries, for people: a run goes on with others too."""
    found = {"python": platform.python_version()}
    for name in ("torch", "transformers", "peft", "bitsandbytes"):
        if util.find_spec(name):
            found[name] = metadata.version(name)
    return found


# ---- files and folders, whole or absent --------------------------------------------------------


def lock_folder(path):
    """Lock a run's folder -> the lock, which ends with the process at the latest."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock_file = FileLock(path / ".lock")
        lock_file.acquire(blocking=False)
        return lock_file
    except Timeout:
        raise UserError(f"{path} is in use by another process. Give another --run.") from None
    except OSError as error:
        raise UserError(f"Cannot write to {path}: {error.strerror}. Give another --run.") from None


@contextmanager
def new_folder(path, role=None):
    """A folder to fill; when the block ends well, it gets its place at `path`, with checksums."""
    beside = path.with_name(f".{path.name}.part")
    remove(beside)
    beside.mkdir(parents=True)
    yield beside
    write_text(beside / "sha256.json", json.dumps(checksums(beside) | {"role": role}))
    for file in filter(Path.is_file, beside.iterdir()):
        with open(file, "rb+") as opened:
            # onto the disk before the folder gets its name: a power cut could leave it empty
            os.fsync(opened.fileno())
    remove(path)
    os.replace(beside, path)


def checksums(folder):
    """The SHA-256 of each file in `folder`, by name."""
    sums = {}
    for file in sorted(filter(Path.is_file, folder.iterdir())):
        sums[file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
    sums.pop("sha256.json", None)
    return sums


def damage(folder, role):
    """What is wrong with a folder that `new_folder` made for `role`, in words; None if nothing is.

    Files beside its own (a .DS_Store) do no harm. Folders of older versions do not name their role.
    """
    try:
        stored = json.loads((folder / "sha256.json").read_bytes())
        owner = stored.pop("role", role)
        if not stored or not stored.items() <= checksums(folder).items():
            return "its files do not match their checksums"
    except (OSError, ValueError, AttributeError, TypeError):
        return "its checksums are missing"
    if owner != role:
        return f"it is {owner} under another name"
    return None


def remove(path):
    """Delete a file or a folder, whether it is there or not."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_text(path, text):
    """Write a whole file or nothing: beside its place first, then renamed."""
    beside = path.with_name(f".{path.name}.part")
    with open(beside, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        # onto the disk before it gets its name: a power cut could leave an empty file
        os.fsync(file.fileno())
    os.replace(beside, path)


def write_lines(path, rows):
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def write_json(path, value):
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path, remedy="Delete it, and repeat the command."):
    """What `write_json` wrote, a dict; an empty one where there is no such file."""
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {first_line(error)}. {remedy}") from None


# ---- order and chance --------------------------------------------------------------------------


def seed_all(*key):
    """Seed torch from any values, such as (seed, "pit_rl0", step): no draw depends on others."""
    torch.manual_seed(zlib.crc32(repr(key).encode()))


def shuffled_batch(n, size, step, seed):
    """The rows of batch `step` when n things are visited pass after pass -> `size` ints in [0, n).

    The order of a pass depends on the seed and the number of the pass alone: all stages that train
    on the same pairs see them in the same order.
    """
    orders, rows = {}, []
    for visit in range(step * size, (step + 1) * size):
        number, place = divmod(visit, n)
        if number not in orders:
            generator = torch.Generator().manual_seed(zlib.crc32(repr((seed, number)).encode()))
            orders[number] = torch.randperm(n, generator=generator).tolist()
        rows.append(orders[number][place])
    return rows


def progress(steps, **kwargs):
    """A progress bar over an iterable, with the time gone and the time left; none in a file."""
    form = "  {percentage:3.0f}% {bar:10} {n_fmt}/{total_fmt} {elapsed}<{remaining}{postfix}"
    return tqdm(steps, ncols=80, bar_format=form, disable=None, **kwargs)


def say(text):
    """Write to stderr, at once."""
    os.write(2, text.encode(errors="surrogateescape"))
