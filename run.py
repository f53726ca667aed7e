"""A run's folder: what was asked, what was measured, what was learned. Nothing here knows how anything is learned.

runs/NAME/config.json          everything needed to repeat the run
runs/NAME/adapters/ROLE/       one trained role; the folder exists only when it is complete
runs/NAME/checkpoints/STAGE/N  the stage in progress after N steps: what is in training, and all that its next step depends on
runs/NAME/metrics.jsonl        one line per optimiser step or PPO iteration
runs/NAME/samples.md           the same few prompts, answered after every stage that trains a writer
runs/NAME/answers.json         the texts that the evaluation has sampled, kept until their writer changes
runs/NAME/results.json         every number of the report; report.md and the figures are drawn from it

Nothing is lost, whenever the process dies: files and folders are written beside their place and renamed, so that the old state
or the new one is there, never half of one. Folders carry the SHA-256 of their files, so that damage is noticed later. A stage
starts again from its newest whole checkpoint, and goes on to the very numbers that it would have reached without the stop.
"""

import hashlib
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
from safetensors.torch import load, save
from tqdm import tqdm

from errors import UserError, finite, same_command

FILES = """adapters checkpoints metrics.jsonl samples.md .answers.json.copy answers.json report.md curves.png result.png
fig2.png fig3.png fig4.png rounds.png stops.png .results.json.copy results.json .config.json.copy config.json"""
FREE = (
    "save_every",
    "micro_batch",
    "vram",
)  # may change within a run: results do not depend on them, but for rounding
WAYS_OUT = (
    "Repeat the old ones to continue it, give a new --run, or --overwrite to start this one anew."
)


class Run:
    """An open run folder. `config` holds the options it was started with, as attributes."""

    def __init__(self, path, held=None):
        self.path = Path(path)
        options = read_json(self.path / "config.json")
        if not options:
            raise UserError(
                f"There is no run in {self.path}. Start one with: python pit.py all --run {self.path}"
            )
        self.config = SimpleNamespace(**options)
        self.in_step, self.stop_signal, self.held = False, 0, held

    @classmethod
    def start(cls, path, options, overwrite=False):
        """Open the run in `path` and keep others out. A new one gets `options`; one that has learned must have had them."""
        path = Path(path)
        held = hold(path)
        old = read_json(path / "config.json")
        if old and len(old.keys() & options.keys()) < len(options) / 2:
            raise UserError(
                f"{path / 'config.json'} belongs to something else than a run. Give another --run."
            )
        if overwrite:
            for name in (
                FILES.split()
            ):  # what was learned first, so that it is never there without its settings
                remove(path / name)
        if not old and any(
            (path / name).exists() for name in FILES.split()
        ):  # a run's that lost them, or somebody else's
            raise UserError(
                f"{path} holds files, but not the settings of a run. Give a new --run, or --overwrite."
            )
        if (path / "adapters").exists() or (path / "checkpoints").exists():
            differs = [
                f"{k}={old.get(k)!r} (now {v!r})"
                for k, v in options.items()
                if k not in FREE and old.get(k) != v
            ]
            if differs:
                raise UserError(
                    f"{path} holds a run with other settings: {', '.join(differs)}.\n{WAYS_OUT}"
                )
            options = old | options
        write_json(path / "config.json", options | {"versions": versions()})
        return cls(path, held)

    def hold(self):
        """Keep other processes from training in this folder, and let Ctrl-C and SIGTERM wait for the end of a step."""
        self.held = self.held or hold(self.path)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.on_signal)

    def on_signal(self, number, frame):
        """At the first signal the step in progress ends and is saved; outside a step, or at a second one, all ends here."""
        if self.in_step and not self.stop_signal:
            self.stop_signal = number
            os.write(
                2, b"\nStopping after this step, which may take a while. Once more: stop at once.\n"
            )
            return
        os.write(2, f"\nStopped. To go on: {same_command()}\n".encode())
        os._exit(
            128 + number
        )  # as harmless as a kill: whatever was being written is not in its place yet

    def pin(self, name, value):
        """Note a fact about the run, such as a fingerprint of its data, or complain when it is not what it was."""
        if getattr(self.config, name, value) != value:
            raise UserError(
                f"{self.path}: the {name} is not what it was when this run was started.\n{WAYS_OUT}"
            )
        setattr(self.config, name, value)
        write_json(self.path / "config.json", vars(self.config))

    def adapter(self, role):
        return self.path / "adapters" / role

    def done(self, role):
        """Whether `role` has been trained. A damaged one is named, and has not: training again gives the same adapter."""
        folder = self.adapter(role)
        return folder.is_dir() and is_whole(folder)

    def need(self, role, command):
        """Complain unless `role` has been trained; `command` trains it."""
        if not self.done(role):
            raise UserError(
                f"{self.path} has no {role} yet. First run: python pit.py {command} --run {self.path}"
            )

    def load_trained(self, lm, role):
        """Whether this run has trained `role` already, or `lm` holds it; loads it into `lm` if need be."""
        if role in lm.roles:
            return True
        if not self.done(role):
            return False
        lm.load(role, self.adapter(role))
        return True

    def keep(self, lm, role):
        """Save the trained `role` as an adapter of this run."""
        with self.new_adapter(role) as folder:
            lm.save(role, folder)

    @contextmanager
    def new_adapter(self, role):
        """A folder to write `role` into; it becomes the run's own in one step, when the block ends without an error."""
        with new_folder(self.adapter(role)) as folder:
            yield folder
            self.add_seconds()  # before the folder has its name: what is trained always has its time
        remove(self.path / "checkpoints" / role)

    def save(self, step, optimizers, numbers):
        """Write the checkpoint after `step` steps. The one before it is kept, should this one turn out damaged."""
        tensors = {}
        for place, p, state in in_training(optimizers):
            tensors |= {
                f"{place} {name}": x.contiguous()
                for name, x in {"value": p.detach(), **state}.items()
            }
        folder = self.path / "checkpoints" / self.name
        with new_folder(folder / f"{step:06d}") as new:
            (new / "training.safetensors").write_bytes(save(tensors))
            write_text(
                new / "numbers.json",
                json.dumps({"numbers": numbers, "seconds": time.perf_counter() - self.started}),
            )
        for old in sorted(folder.iterdir())[:-2]:
            remove(old)

    def restore(self, optimizers, numbers):
        """Put back the newest whole checkpoint of this stage, in place -> the number of steps done; 0 where there is none."""
        folders = sorted((self.path / "checkpoints" / self.name).glob("[0-9]*"), reverse=True)
        folder = next(filter(is_whole, folders), None)
        if folder is None:
            return 0
        tensors = load((folder / "training.safetensors").read_bytes())
        for place, p, state in in_training(optimizers):
            p.data.copy_(tensors[f"{place} value"])
            for name in (
                "step",
                "exp_avg",
                "exp_avg_sq",
            ):  # AdamW's; it counts its steps on the CPU
                if (
                    f"{place} {name}" in tensors
                ):  # it has none of a parameter that never had a gradient
                    state[name] = tensors[f"{place} {name}"].to(
                        "cpu" if name == "step" else p.device
                    )
        stored = json.loads((folder / "numbers.json").read_text(encoding="utf-8"))
        numbers.update(stored["numbers"])
        self.started -= stored["seconds"]
        print(f"  going on after step {int(folder.name)}", flush=True)
        return int(folder.name)

    def log(self, **metrics):
        """Append one line to metrics.jsonl: the stage, the step within it, and numbers by name. The bar shows the first few."""
        metrics = {name: round(float(value), 6) for name, value in finite(**metrics).items()}
        with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"stage": self.name, "step": self.step} | metrics) + "\n")
        self.bar.set_postfix_str(
            "  ".join(f"{name} {value:.3g}" for name, value in list(metrics.items())[:4])
        )

    def metrics(self):
        """All lines of metrics.jsonl, a dict each, the oldest first."""
        path, metrics = self.path / "metrics.jsonl", []
        for number, line in enumerate(path.read_bytes().splitlines() if path.exists() else [], 1):
            try:
                row = json.loads(line)
                row["stage"], int(row["step"])  # a damaged one has no such thing
                metrics.append(row)
            except (ValueError, TypeError, KeyError):
                print(f"{path}, line {number}: damaged, and left out.")
        return metrics

    def forget(self, stage, step):
        """Drop the lines of a stage that goes on at `step`, so that none is there twice; and a last line that was cut off."""
        lines = [
            json.dumps(line) + "\n"
            for line in self.metrics()
            if line["stage"] != stage or line["step"] < step
        ]
        write_text(self.path / "metrics.jsonl", "".join(lines))

    def warn(self, text):
        """Say once a stage that something looks wrong, and what to try."""
        if text not in self.warned:
            self.warned.add(text)
            tqdm.write(f"  Warning: {text}")

    def results(self):
        return read_json(self.path / "results.json")

    def add_results(self, **parts):
        write_json(self.path / "results.json", self.results() | parts)

    def add_seconds(self):
        seconds = round(time.perf_counter() - self.started, 1)
        self.add_results(time_s=self.results().get("time_s", {}) | {self.name: seconds})

    @contextmanager
    def stage(self, name, why):
        """Announce a stage, and add the seconds it took to results.json when it is through."""
        print(f"\n{name}: {why}", flush=True)
        self.name, self.step, self.warned, self.started = name, 0, set(), time.perf_counter()
        seed_all(self.config.seed, name, "start")
        try:
            yield
        except FloatingPointError as error:
            again = "The last checkpoint is kept, but the same settings would end here again: take a new --run or --overwrite."
            raise UserError(f"{name}, step {self.step}: {error}\n{again}") from None
        self.add_seconds()

    def steps(self, total, optimizers, numbers=None):
        """The steps of the present stage that are still to do, up to total - 1, under a progress bar.

        A checkpoint holds the parameters in `optimizers`, AdamW's moments, and `numbers`, a dict. Nothing else has to be
        stored: what a step draws, and its place in the data, follow from (seed, stage, step) alone.
        """
        numbers = {} if numbers is None else numbers
        first = self.restore(optimizers, numbers)
        self.forget(self.name, first)
        self.bar = progress(range(first, total), initial=first, total=total)
        for step in self.bar:
            self.step = step
            seed_all(self.config.seed, self.name, step)
            self.in_step = True
            yield step
            if (step + 1) % self.config.save_every == 0 or step + 1 == total or self.stop_signal:
                self.save(step + 1, optimizers, numbers)
            self.in_step = False
            if self.stop_signal:
                self.bar.close()
                print(
                    f"Saved {self.name} after step {step + 1} of {total}. To go on: {same_command()}",
                    file=sys.stderr,
                )
                sys.exit(128 + self.stop_signal)


def in_training(optimizers):
    """Every parameter that is being trained, as (its place, itself, what its optimiser keeps for it)."""
    for k, optimizer in enumerate(optimizers):
        for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
            yield f"{k} {i}", p, optimizer.state[p]


def versions():
    """For the reader of config.json alone: other versions may end in other last digits, but a run goes on all the same."""
    libraries = "torch transformers peft bitsandbytes".split()
    return {"python": platform.python_version()} | {
        name: metadata.version(name) for name in libraries if util.find_spec(name)
    }


def hold(path):
    """Lock a run's folder for this process -> what keeps it. The lock ends with the process, even when that is killed."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        return FileLock(path / ".lock").acquire(blocking=False)
    except Timeout:
        raise UserError(
            f"{path} is in use by another process. Wait for it to end, or give another --run."
        ) from None
    except OSError as error:
        raise UserError(f"Cannot write in {path}: {error.strerror}. Give another --run.") from None


@contextmanager
def new_folder(path):
    """A folder to write files into, which gets its place at `path` in one step, with their checksums, when the block ends."""
    beside = path.with_name(f".{path.name}.part")
    remove(beside)
    beside.mkdir(parents=True)
    yield beside
    write_text(beside / "sha256.json", json.dumps(checksums(beside)))
    for file in filter(Path.is_file, beside.iterdir()):
        with open(file, "rb+") as opened:
            os.fsync(
                opened.fileno()
            )  # on the disk before the folder gets its name, or a power cut could leave it empty
    remove(path)
    os.replace(beside, path)


def checksums(folder):
    files = sorted(
        file for file in folder.iterdir() if file.is_file() and file.name != "sha256.json"
    )
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def is_whole(folder):
    """Whether a folder holds what `new_folder` was given, and maybe more (a .DS_Store); says so where it does not."""
    with suppress(OSError, ValueError, AttributeError):
        stored = json.loads((folder / "sha256.json").read_bytes())
        if stored and stored.items() <= checksums(folder).items():
            return True
    print(f"{folder} is damaged: it does not match its checksums. It is left out.")
    return False


def remove(path):  # a file or a folder, whether it is there or not
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def write_text(path, text):
    """Write a whole file or nothing: beside its place first, then renamed."""
    beside = path.with_name(f".{path.name}.part")
    with open(beside, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(
            file.fileno()
        )  # on the disk before it gets its name, or a power cut could leave an empty file there
    os.replace(beside, path)


def write_json(path, value):
    """Write a small file, and its copy, which `read_json` turns to when the file is damaged."""
    for place in (path, path.with_name(f".{path.name}.copy")):
        write_text(place, json.dumps(value, indent=2) + "\n")


def read_json(path):
    """What `write_json` wrote, a dict; an empty one where there is no such file, or neither it nor its copy can be read."""
    places = path, path.with_name(f".{path.name}.copy")
    for place in places if any(place.exists() for place in places) else ():
        try:
            return dict(json.loads(place.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, RecursionError):
            print(f"{place} is damaged or missing.")
    return {}


def seed_all(*key):
    """Seed torch's sampling from any values, such as (seed, "pit_rl0", step): no draw depends on what ran before."""
    torch.manual_seed(zlib.crc32(repr(key).encode()))


def shuffled_batch(n, size, step, seed):
    """The indices of batch `step` when n things are visited in passes, each pass in its own order: `size` ints in [0, n)."""
    first, end = step * size, (step + 1) * size
    order = []  # of every pass that the batch has a part in, one after the other
    for epoch in range(first // n, (end - 1) // n + 1):
        generator = torch.Generator().manual_seed(zlib.crc32(repr((seed, epoch)).encode()))
        order += torch.randperm(n, generator=generator).tolist()
    return order[first % n :][:size]


def progress(steps, **kwargs):
    """A progress bar over an iterable, with the time gone and the time left."""
    form = "  {percentage:3.0f}% {bar:16} {n_fmt}/{total_fmt} {elapsed}<{remaining}{postfix}"
    return tqdm(steps, ncols=100, bar_format=form, **kwargs)
