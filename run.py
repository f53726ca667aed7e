"""A run's folder: what was asked, what was measured, what was learned. Nothing here knows how anything is learned.

runs/NAME/config.json      everything needed to repeat the run
runs/NAME/adapters/ROLE/   one trained role; the folder exists only when it is complete
runs/NAME/metrics.jsonl    one line per optimiser step or PPO iteration
runs/NAME/samples.md       the same few prompts, answered after every stage
runs/NAME/results.json     every number of the report

Whatever must not be half there is written beside its place and renamed, so that a kill leaves the old state or the new one.
"""

import json
import os
import shutil
import time
import zlib
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch
from tqdm import tqdm


class UserError(Exception):
    """Something the user can mend. pit.py prints it as one or two lines, without a traceback, and exits with code 2."""


class Run:
    """An open run folder. `config` holds the options it was started with, as attributes."""

    def __init__(self, path):
        self.path = Path(path)
        try:
            options = json.loads((self.path / "config.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"There is no run in {self.path}. Start one with: python pit.py all --run {self.path}") from None
        except ValueError:
            raise UserError(f"{self.path / 'config.json'} is damaged. Start again with another --run.") from None
        self.config = SimpleNamespace(**options)

    @classmethod
    def start(cls, path, options):
        """Open the run in `path`. A new one gets `options` as its configuration; one with adapters must have had them."""
        config = Path(path) / "config.json"
        if config.exists() and (Path(path) / "adapters").exists():
            run = cls(path)
            old = vars(run.config)
            differs = [f"{k}={old.get(k)!r} (now {v!r})" for k, v in options.items() if old.get(k) != v]
            if differs:
                raise UserError(
                    f"{path} holds a run with other settings: {', '.join(differs)}.\n"
                    "Give a new --run, repeat the old settings to continue it, or delete the folder."
                )
            return run
        config.parent.mkdir(parents=True, exist_ok=True)
        write_text(config, json.dumps(options, indent=2) + "\n")
        return cls(path)

    def adapter(self, role):
        return self.path / "adapters" / role

    def done(self, role):
        return self.adapter(role).is_dir()

    def need(self, role, command):
        """Complain unless `role` has been trained; `command` trains it."""
        if not self.done(role):
            raise UserError(f"{self.path} has no {role} yet. First run: python pit.py {command} --run {self.path}")

    @contextmanager
    def new_adapter(self, role):
        """A folder to write `role` into; it becomes the run's own in one step, when the block ends without an error."""
        beside = self.path / "adapters" / f".{role}.part"
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        yield beside
        os.replace(beside, self.adapter(role))

    def log(self, **metrics):
        """Append one line to metrics.jsonl: the stage, the step within it, and numbers by name. The bar shows the first few."""
        metrics = {name: round(float(value), 6) for name, value in metrics.items()}
        with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"stage": self.name, "step": self.step} | metrics) + "\n")
        self.bar.set_postfix_str("  ".join(f"{name} {value:.3g}" for name, value in list(metrics.items())[:4]))

    def metrics(self):
        """All lines of metrics.jsonl, a dict each, the oldest first."""
        path = self.path / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        return [json.loads(line) for line in lines]

    def forget(self, stage):
        """Drop the lines of a stage that is about to start over."""
        lines = [json.dumps(line) + "\n" for line in self.metrics() if line["stage"] != stage]
        write_text(self.path / "metrics.jsonl", "".join(lines))

    def results(self):
        path = self.path / "results.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def add_results(self, **parts):
        write_text(self.path / "results.json", json.dumps(self.results() | parts, indent=2) + "\n")

    @contextmanager
    def stage(self, name, why):
        """Announce a stage, and add the seconds it took to results.json when it is through."""
        print(f"\n{name}: {why}", flush=True)
        self.name = name
        self.forget(name)
        seed_all(self.config.seed, name, "start")
        started = time.perf_counter()
        yield
        seconds = self.results().get("time_s", {}) | {name: round(time.perf_counter() - started, 1)}
        self.add_results(time_s=seconds)

    def steps(self, total):
        """The steps of the present stage, 0 to total - 1, under a progress bar. Each step is seeded by itself."""
        self.bar = progress(range(total))
        for step in self.bar:
            self.step = step
            seed_all(self.config.seed, self.name, step)
            yield step


def write_text(path, text):
    """Write a whole file or nothing: beside its place first, then renamed."""
    beside = path.with_name(f".{path.name}.part")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def seed_all(*key):
    """Seed torch's sampling from any values, such as (seed, "pit_rl0", step).

    Every step of every stage seeds itself: what it draws depends on the key alone, not on what ran before it.
    """
    torch.manual_seed(zlib.crc32(repr(key).encode()))


def shuffled_batch(n, size, step, seed):
    """The indices of batch `step` when n things are visited in passes, each pass in its own order: `size` ints in [0, n)."""
    indices = []
    for position in range(step * size, (step + 1) * size):
        epoch, place = divmod(position, n)
        if place == 0 or not indices:
            order = torch.randperm(
                n, generator=torch.Generator().manual_seed(zlib.crc32(repr((seed, epoch)).encode()))
            ).tolist()
        indices.append(order[place])
    return indices


def progress(steps, **kwargs):
    """A progress bar over an iterable, with the time gone and the time left."""
    return tqdm(
        steps,
        ncols=100,
        bar_format="  {percentage:3.0f}% {bar:16} {n_fmt}/{total_fmt} {elapsed}<{remaining}{postfix}",
        **kwargs,
    )
