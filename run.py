"""A run's folder: its options, what was measured, what was learned.

runs/NAME/config.json          the options: all that is needed to repeat the run
runs/NAME/adapters/ROLE/       one trained role; the folder exists only once it is complete
runs/NAME/checkpoints/ROLE/N   the stage in progress after N steps: all that its next step needs
runs/NAME/metrics.jsonl        one line per optimiser step or PPO iteration
runs/NAME/samples.md           the same few prompts, answered after each stage that trains a writer
runs/NAME/answers.json         the texts of every side, kept until what wrote them changes
runs/NAME/answers.jsonl        the texts of the evaluation and their scores, one line per prompt
runs/NAME/votes.jsonl          what people and language models said of them
runs/NAME/results.json         every number of the report; report.md and figures are drawn from it
runs/NAME/.replaced            the run that --overwrite replaces, until there is a new adapter

Whenever the process dies, at most the steps since the last checkpoint are done again. Files and
folders are written beside their place and then renamed: the old state is there, or the new one,
never half of one. Folders carry the SHA-256 of their files, so that damage is noticed. A stage
resumes from its newest intact checkpoint and ends with exactly the numbers of an uninterrupted run.

torch takes seconds to import. So the functions that need it import it, and a mistyped --run fails
at once.
"""

import hashlib
import io
import json
import math
import os
import platform
import shutil
import signal
import sys
import time
import zlib
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

from filelock import FileLock, Timeout
from tqdm import tqdm

from errors import UserError, command_line, explained, to_continue, typed

# all that a run writes: nothing else in its folder is ever moved or deleted
RUN_FILES = """adapters checkpoints metrics.jsonl samples.md answers.json answers.jsonl votes.jsonl
results.json report.md curves.png result.png fig2.png fig3.png fig4.png stops.png
config.json""".split()
REPLACED = ".replaced"
# options that may change within a run: results do not depend on them, except for rounding
FREE = ("save_every", "micro_batch", "vram")
# what config.json holds besides options and data
FACTS = ("versions", "command", "checksum")
MAY_MOVE = ("model", "data")  # options whose paths may be edited in config.json
MINIATURE = 5  # PPO iterations: a run of fewer is a smoke run, whose numbers mean nothing
WAYS_OUT = "Use its settings to continue it, give a new --run, or --overwrite to replace it."
OF_RL = "rl_steps rl_batch rl_lr critic_lr kl epochs minibatch temperature"
# Options that matter only to adapters whose names begin like this. The others matter to all.
ONLY = {
    "sft_steps sft_lr sft_batch": ("policy", "pit", "ablate"),
    "rm_steps rm_lr rm_batch": ("reward", "judge", "policy_rl", "pit_rl", "ablate"),
    OF_RL: ("policy_rl", "pit_rl", "ablate"),
    "rounds": ("pit_rl", "ablate"),
    "eval_n": (),  # matters to no adapter
}


class Run:
    """An open run folder. `config` holds its options as attributes."""

    plan = None  # a plan.Plan, where the time left is to be shown
    replace = False  # whether `begin` is to move an old run aside
    source = None  # another run, whose adapters `begin` is to take over
    in_step = False
    stop_signal = None
    # `stage` sets name, warned and started; `steps` sets step and bar

    def __init__(self, path, config=None):
        """Open the run in `path`. `start` gives the config of a run that has yet to begin."""
        self.path = Path(path)
        self.lock_file = FileLock(self.path / ".lock")
        config = config or read_config(self.path)
        if not config:
            raise UserError(f"There is no run in {path}. To list yours: python pit.py runs")
        self.config = SimpleNamespace(**config)

    # ---- start and end -------------------------------------------------------------------------

    @classmethod
    def start(cls, path, options, overwrite=False, source=None):
        """A run with `options` in the folder `path`: a new one, or the one there, continued.

        overwrite: replace the run that is there. source: the folder of a run to take adapters from.
        Nothing is written, moved or deleted before `begin`.
        """
        old = read_config(path)
        if not old:
            check_free(path)
        elif learned(path) and not overwrite:
            changes = [
                f"{name}={old.get(name)!r} (now {options[name]!r})"
                for name in differing(old, options)
            ]
            if changes:
                told = ", ".join(changes)
                raise UserError(f"{path} holds a run with other settings: {told}.\n{WAYS_OUT}")
            options = old | options  # with what was pinned, such as the fingerprint of the data
        run = cls(path, options)
        run.replace = overwrite and bool(old)
        if source:
            run.source = Run(source)
            if source.resolve() == path.resolve():
                raise UserError(f"{path} cannot take over its own adapters. Give a new --run.")
        return run

    def begin(self):
        """Write config.json, now that options, model and data are known to be good."""
        self.path.mkdir(parents=True, exist_ok=True)
        config = vars(self.config)  # no copy: what is added below is added to self.config
        # a kill may have stopped an --overwrite halfway
        halfway = (self.path / REPLACED).exists() and not learned(self.path)
        if self.replace or halfway:
            self.move_aside()
        elif learned(self.path) and differing(config, read_config(self.path)):
            raise UserError(f"{self.path} was begun by another process meanwhile. {WAYS_OUT}")
        config |= {"versions": versions(), "command": typed()}
        config["checksum"] = checksum(config)
        write_json(self.path / "config.json", config)
        if self.source:
            take_over(self, self.source)

    def lock(self):
        """Keep other processes out, and let Ctrl-C and SIGTERM wait for the end of a step.

        The lock is held as long as this process lives.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            self.lock_file.acquire(blocking=False)
        except Timeout:
            used = f"{self.path} is in use by another process. Wait for it, or stop it."
            raise UserError(used) from None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.on_signal)

    def on_signal(self, number, frame):
        """Stop after the step in progress; outside a step, or at a second signal, at once."""
        if self.in_step and not self.stop_signal:
            self.stop_signal = number
            say("\nStopping after this step, which may take a while. Repeat to stop now.\n")
            return
        say(f"\nStopped. {to_continue()}\n")
        # as harmless as a kill: whatever was being written is not in its place yet
        os._exit(128 + number)

    def move_aside(self):
        """Move the files of the run that is to be replaced out of the way."""
        aside = self.path / REPLACED
        aside.mkdir(exist_ok=True)
        for name in RUN_FILES:
            file = self.path / name
            kept = aside / name
            # keep what is already there: that run had an adapter, this one has none yet
            if file.exists() and not kept.exists():
                os.replace(file, kept)
            remove(file)
        print(f"The old run is kept in {aside} until there is a new adapter.")

    # ---- options and results -------------------------------------------------------------------

    def pin_data(self, fingerprint):
        """Record the fingerprint of the data in the config; UserError if it has changed."""
        if vars(self.config).setdefault("data fingerprint", fingerprint) != fingerprint:
            raise UserError(
                f"{self.config.data} no longer holds the data that {self.path} began with.\n"
                "Put back the old data to continue, or give a new --run, or --overwrite."
            )

    def command(self, name):
        """A command for this run, to be copied from a message."""
        return command_line(["python", "pit.py", name, "--run", str(self.path)])

    def results(self):
        """What results.json holds, a dict."""
        remedy = f"Delete it, then run: {self.command('eval')}"
        return read_json(self.path / "results.json", remedy)

    def add_results(self, **parts):
        write_json(self.path / "results.json", self.results() | parts)

    def gain(self):
        """The row of Table 1 on PIT over the policy's own answers, by the main judge; or None."""
        results = self.results()
        for row in results.get("table1", []):
            if (row["a"], row["b"], row["judge"]) == ("pit", "original", results["main"]):
                return row

    def summary(self):
        """For people: model, data, seed, the last stage that ended, PIT's delta, and its judge.

        delta: how often PIT beats the policy's own answers, less how often it loses.
        """
        config = self.config
        gain = self.gain()
        ended = [*self.results().get("time_s", {})]  # in the order in which they ended
        stage = ended[-1] if ended else "none yet"
        if is_smoke(config):
            stage += " (smoke)"
        delta = f"{100 * gain['delta']:+.1f} ({gain['judge']})" if gain else ""
        return config.model, config.data, str(config.seed), stage, delta

    def add_seconds(self):
        seconds = round(time.perf_counter() - self.started, 1)
        times = self.results().get("time_s", {})
        times.pop(self.name, None)  # a stage that is done again is the last one
        self.add_results(time_s=times | {self.name: seconds})
        return seconds

    # ---- adapters ------------------------------------------------------------------------------

    def adapter(self, role):
        return self.path / "adapters" / role

    def roles(self):
        """The roles that have an adapter, intact or not, by name."""
        return sorted(folder.name for folder in (self.path / "adapters").glob("[!.]*"))

    def done(self, role):
        """Whether `role` has been trained. A damaged one is reported, and counts as untrained."""
        return is_intact(self.adapter(role), role)

    def trained_by(self):
        """{role: the command that trains it}, without those of `ablate`."""
        roles = dict(
            policy_sft="sft",
            pit_sft="sft",
            reward_policy="reward",
            reward_gap="reward",
            judge="reward",
            policy_rl="rl",
        )
        for k in range(len(self.config.rounds.split(","))):
            roles[f"pit_rl{k}"] = "rl"
        return roles

    def check(self, roles):
        """UserError where one of these roles has not been trained."""
        for role in roles:
            if not self.done(role):
                first = self.command(self.trained_by().get(role, "ablate"))
                raise UserError(f"{self.adapter(role)} is missing or damaged. First run: {first}")

    def load_trained(self, lm, role):
        """Whether `lm` has the trained `role` now; loads it if need be."""
        if role not in lm.roles and self.done(role):
            self.load(lm, role)
        return role in lm.roles

    def load(self, lm, role):
        """Load the trained `role` into `lm`; UserError if it does not fit."""
        folder = self.adapter(role)
        what = f"{folder} does not fit {self.config.model}, rank {self.config.lora_r}"
        advice = "Undo what was changed in this run, or delete the adapter to train it again."
        with explained(what, advice):
            lm.load(role, folder)

    def keep(self, lm, role):
        """Save the trained `role` as an adapter of this run."""
        with new_folder(self.adapter(role), role) as folder:
            lm.save(role, folder)
            # before the folder is renamed, so that no adapter is ever without its seconds
            self.add_seconds()
        remove(self.path / "checkpoints" / role)
        remove(self.path / REPLACED)

    # ---- checkpoints ---------------------------------------------------------------------------

    def save(self, step, optimizers, numbers):
        """Write the checkpoint after `step` steps. The one before it stays, in case of damage."""
        import torch

        state = {
            "parameters": [p.detach() for p in in_training(optimizers)],
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            "numbers": numbers,
            "seconds": time.perf_counter() - self.started,
        }
        file = io.BytesIO()  # torch.save to a file would not report a full disk
        torch.save(state, file)
        folder = self.path / "checkpoints" / self.name
        with new_folder(folder / f"{step:06d}", self.name) as new:
            (new / "state.pt").write_bytes(file.getbuffer())
        for old in sorted(folder.iterdir())[:-2]:
            remove(old)

    def restore(self, optimizers, numbers):
        """Put back the newest intact checkpoint of this stage -> the number of steps done, or 0."""
        import torch

        folders = (self.path / "checkpoints" / self.name).glob("[0-9]*")
        for folder in sorted(folders, reverse=True):
            if not is_intact(folder, self.name):
                continue
            state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
            for p, value in zip(in_training(optimizers), state["parameters"]):
                p.data.copy_(value)
            for optimizer, its_state in zip(optimizers, state["optimizers"]):
                optimizer.load_state_dict(its_state)
            if numbers is not None:
                numbers.update(state["numbers"])
            self.started -= state["seconds"]
            print(f"  continuing after step {int(folder.name)}", flush=True)
            return int(folder.name)
        return 0

    # ---- metrics -------------------------------------------------------------------------------

    def log(self, **metrics):
        """Append a line to metrics.jsonl: stage, step, numbers by name. The bar shows three."""
        metrics = {name: round(float(value), 6) for name, value in metrics.items()}
        for name, value in metrics.items():
            if not math.isfinite(value):  # stop before a checkpoint can hold it
                raise UserError(
                    f"{self.name}, step {self.step}: {name} is {value}. The last checkpoint is "
                    "kept, but the same options would end here again.\nLook for odd texts in the "
                    "data, or give a new --run with a lower learning rate for this stage."
                )
        with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"stage": self.name, "step": self.step} | metrics) + "\n")
        self.bar.set_postfix(list(metrics.items())[:3])

    def metrics(self):
        """All lines of metrics.jsonl, a dict each, the oldest first."""
        path = self.path / "metrics.jsonl"
        # what follows the last newline was cut off by a kill: that step is done again
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        rows = []
        for number, line in enumerate(lines, 1):
            damage = f"{path} is damaged in line {number}"
            with explained(damage, "Delete that line; only the curves need it."):
                rows.append(json.loads(line))
        return rows

    def forget(self, step):
        """Drop the lines of this stage from `step` on, so that no step appears twice."""
        rows = [row for row in self.metrics() if row["stage"] != self.name or row["step"] < step]
        write_lines(self.path / "metrics.jsonl", rows)

    def warn(self, text):
        """Say, once per stage, that something looks wrong, and what to try."""
        if text not in self.warned:
            self.warned.add(text)
            tqdm.write(f"  Warning: {text}")

    # ---- stages and steps ----------------------------------------------------------------------

    @contextmanager
    def stage(self, name, why):
        """Announce a stage; its seconds go to results.json at the end."""
        number = self.plan.begin(name) if self.plan else ""
        print(f"\n{number}{name}: {why}", flush=True)
        self.name = name
        self.warned = set()
        self.started = time.perf_counter()
        seed_all(self.config.seed, name, "start")
        yield
        seconds = self.add_seconds()
        if self.plan:
            self.plan.end_stage(seconds)

    def steps(self, total, optimizers, numbers=None):
        """Yield the steps of this stage that are still to do, under a progress bar.

        A checkpoint holds the parameters in `optimizers`, the optimisers' state, and the dict
        `numbers`. It needs no more: what a step draws, and its place in the data, follow from
        (seed, stage, step) alone.
        """
        first = self.restore(optimizers, numbers)
        self.forget(first)
        self.bar = progress(range(first, total), initial=first, total=total)
        for step in self.bar:
            self.step = step
            seed_all(self.config.seed, self.name, step)
            self.in_step = True
            yield step
            done = step + 1
            left = self.plan.end_step(done, total) if self.plan else ""
            self.bar.set_description_str(left)
            if done % self.config.save_every == 0 or done == total or self.stop_signal:
                self.save(done, optimizers, numbers)
                if self.bar.disable:  # no terminal
                    print(f"  step {done} of {total}: {self.bar.postfix}  {left}", flush=True)
            self.in_step = False
            if self.stop_signal:
                self.bar.close()
                say(f"Saved {self.name} after step {done} of {total}. {to_continue()}\n")
                sys.exit(128 + self.stop_signal)


def in_training(optimizers):
    """Every parameter that is being trained."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            yield from group["params"]


# ---- other runs --------------------------------------------------------------------------------


def take_over(run, source):
    """Copy the adapters of the run `source` that this run's options would also give.

    Those that this run already has, from a start that was cut short, are left alone.
    """
    # which roles: those with the same options
    roles = []
    for role in source.roles():
        folder = source.adapter(role)
        names = differing(vars(source.config), vars(run.config), role)
        if names:
            print(f"{folder} is not taken over: {', '.join(names)} differ.")
        elif source.done(role) and not run.done(role):
            print(f"{folder} is taken over.")
            roles.append(role)
    # the numbers first: so an adapter never lacks its curves and accuracy
    rows = [row for row in source.metrics() if row["stage"] in roles]
    rows += [row for row in run.metrics() if row["stage"] not in roles]
    write_lines(run.path / "metrics.jsonl", rows)
    measured = run.results().get("reward", {})
    for role, of_role in source.results().get("reward", {}).items():
        if role in roles:
            measured[role] = of_role
    run.add_results(reward=measured)
    # then the adapters
    for role in roles:
        with new_folder(run.adapter(role), role) as new:
            for file in filter(Path.is_file, source.adapter(role).iterdir()):
                shutil.copyfile(file, new / file.name)  # without its mode: it may be read-only
        remove(run.path / REPLACED)


def differing(old, new, role=None):
    """The options that differ between two configs, and on which results depend.

    role: of these, the options on which that adapter depends.
    """
    skipped = [*FACTS, *FREE]
    last = len(new.get("rounds", "").split(",")) - 1
    # --last-steps matters only to the last round, whichever that is
    only = ONLY | {"last_steps": (f"pit_rl{last}", "ablate")}
    for options, beginnings in only.items():
        if role and not role.startswith(beginnings):
            skipped += options.split()
    return [name for name in new if name not in skipped and old.get(name) != new[name]]


def is_smoke(config):
    """Whether these are the options of a smoke run."""
    last = getattr(config, "last_steps", None)  # runs of earlier versions have none
    return max(config.rl_steps, last or 0) < MINIATURE


# ---- checks of a folder ------------------------------------------------------------------------


def read_config(path):
    """The config of the run in `path`; nothing where there is no run."""
    file = path / "config.json"
    config = read_json(file, "Put back a copy of it, or give another --run.")
    if "versions" not in config:
        return {}
    are_paths = all(isinstance(config.get(name), str) for name in MAY_MOVE)
    if config.get("checksum") != checksum(config) or not are_paths:
        raise UserError(
            f"{file} was edited by hand, or is of another version. Undo that, or start a new "
            "--run.\nOnly the paths of a model or a data file that has moved may be edited."
        )
    return config


def checksum(config):
    """Of the options and of what was pinned."""
    kept = [item for item in sorted(config.items()) if item[0] not in (*FACTS, *MAY_MOVE)]
    return zlib.crc32(json.dumps(kept).encode())


def learned(path):
    return (path / "adapters").exists() or (path / "checkpoints").exists()


def check_free(path):
    """UserError if a folder is not a run, but has files named like those of a run, or this code."""
    for name in [*RUN_FILES, "pit.py"]:
        if (path / name).exists():
            raise UserError(
                f"{path} is not a run, but holds {name}. It may be somebody else's, and is left "
                "alone. Give a new --run."
            )


def versions():
    """The machine, Python and some libraries, for information: a run can continue with others."""
    import torch

    libraries = ("torch", "transformers", "peft", "bitsandbytes")
    found = {name: metadata.version(name) for name in libraries}
    if torch.cuda.is_available():
        processor = torch.cuda.get_device_name()
    else:
        processor = torch.cpu.get_capabilities().get("cpu_name", platform.machine())
    machine = f"{platform.system()}, {os.cpu_count()} cores, {processor}"
    return {"machine": machine, "python": platform.python_version()} | found


# ---- files and folders, whole or absent --------------------------------------------------------


@contextmanager
def new_folder(path, role=None):
    """A folder to fill; if the block succeeds, it is moved to `path`, with checksums.

    role: whose adapter or checkpoint it is.
    """
    beside = path.with_name(f".{path.name}.part")
    remove(beside)
    beside.mkdir(parents=True)
    yield beside
    write_json(beside / "sha256.json", checksums(beside, role))
    for file in filter(Path.is_file, beside.iterdir()):
        to_disk(file)
    remove(path)
    os.replace(beside, path)


def checksums(folder, role):
    """What sha256.json says of `folder`: its role, and the SHA-256 of each file, by name."""
    sums = {"role": role}
    for file in filter(Path.is_file, folder.iterdir()):
        if file.name != "sha256.json":
            sums[file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
    return sums


def is_intact(folder, role):
    """Whether a folder holds what `new_folder` wrote for `role`; reports a damaged one."""
    with suppress(OSError, ValueError, AttributeError):  # no checksums, or damaged ones
        stored = json.loads((folder / "sha256.json").read_bytes())
        # a subset: other files, such as a .DS_Store, do no harm
        if stored.items() <= checksums(folder, role).items():
            return True
    if folder.exists():
        print(f"{folder} is damaged, or another role's.")
    return False


def remove(path):
    """Delete a file or a folder, whether it is there or not."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_text(path, text):
    """Write a whole file or nothing: beside its place first, then renamed."""
    beside = path.with_name(f".{path.name}.part")
    beside.write_text(text, encoding="utf-8")
    to_disk(beside)
    os.replace(beside, path)


def to_disk(file):
    """Wait until a file is on the disk: renamed too early, it could be empty after a power cut."""
    with open(file, "rb+") as opened:
        os.fsync(opened.fileno())


def read_text(path, errors="strict"):
    """What a text file holds; nothing where there is no such file."""
    return path.read_text(encoding="utf-8", errors=errors) if path.exists() else ""


def write_lines(path, rows):
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def write_json(path, value):
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path, remedy):
    """What `write_json` wrote, a dict; an empty one where there is no such file."""
    if not path.exists():
        return {}
    with explained(f"{path} is damaged", remedy):
        return dict(json.loads(path.read_text(encoding="utf-8-sig")))


# ---- order and chance --------------------------------------------------------------------------


def crc_of(value):
    """A number that stands for any value, by what `repr` says of it: the same in every process."""
    return zlib.crc32(repr(value).encode())


def seed_all(*key):
    """Seed torch from any values, such as (seed, "pit_rl0", step): no draw depends on others."""
    import torch

    torch.manual_seed(crc_of(key))


def shuffled_batch(items, size, step, seed):
    """The `size` items of batch `step`, in pass after pass over all items.

    The order of a pass depends only on the seed and the number of the pass: all stages that train
    on the same pairs see them in the same order.
    """
    import torch

    n = len(items)
    rows = []
    number, place = divmod(step * size, n)  # the pass, and where in it the batch begins
    while len(rows) < place + size:
        generator = torch.Generator().manual_seed(crc_of((seed, number)))
        rows += torch.randperm(n, generator=generator).tolist()
        number += 1
    return [items[row] for row in rows[place : place + size]]


def progress(steps, **kwargs):
    """A progress bar over an iterable, with the time elapsed and the time left; none in a file."""
    form = "{desc}  {percentage:3.0f}% {bar:10} {n_fmt}/{total_fmt} {elapsed}<{remaining}{postfix}"
    return tqdm(steps, ncols=80, bar_format=form, disable=None, **kwargs)


def say(text):
    """Write to stderr, at once."""
    os.write(2, text.encode(errors="surrogateescape"))
