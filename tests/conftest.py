"""Fixtures of all tests: the built-in base, batches in its language, and a run in miniature."""

import contextlib
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

# before the libraries read them: no test needs a hub; and models this small are no faster on two
# threads, while two processes of two threads each (pytest -n 2) slow one another
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch  # noqa: E402

from data import improve_prompt, synthetic_pairs  # noqa: E402
from models import load_model  # noqa: E402

torch.cpu.get_capabilities = dict  # numbers of tests are in fp32, also where the CPU has bf16

# every stage, in fp32
MINIATURE = dict(
    seed=0,
    bits=16,
    pairs=160,
    max_response=24,
    sft_steps=2,
    sft_batch=4,
    rm_steps=2,
    rm_batch=4,
    rl_steps=2,
    rl_batch=6,
    minibatch=4,
    micro_batch=3,
    temperature=1.2,
)


@pytest.fixture
def lm():
    """The tiny base, unquantised: exact arithmetic in fp32. Loading is faster than copying."""
    return load_model("tiny", bits=16)


@pytest.fixture
def lm4():
    """The tiny base in 4-bit, as every run uses it."""
    return load_model("tiny", bits=4)


@pytest.fixture(scope="session")
def pairs():
    return synthetic_pairs(12, seed=0)


@pytest.fixture(scope="session")
def miniature(tmp_path_factory):
    """The folder of a run that has trained every stage, two or three steps each."""
    folder = tmp_path_factory.mktemp("miniature") / "run"
    run_miniature(folder)
    return folder


@pytest.fixture
def rates(monkeypatch):
    """The learning rate of every optimiser step, in a list that grows as steps are taken."""
    taken = []
    step = torch.optim.AdamW.step

    def noted(self, *args, **kwargs):
        taken.append(self.param_groups[0]["lr"])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", noted)
    return taken


class FakeRun:
    """A run that has trained nothing yet, draws on, and keeps what is logged in memory."""

    name = "fake"

    def __init__(self, **options):
        self.config = SimpleNamespace(**dict(seed=0, micro_batch=64) | options)
        self.lines = []
        self.kept = []
        self.warnings = []
        self.measured = {}

    def load_trained(self, lm, role):
        return False

    def stage(self, name, why):
        return contextlib.nullcontext()

    def steps(self, total, optimizers, numbers=None):
        yield from range(total)

    def log(self, **metrics):
        self.lines.append({name: float(value) for name, value in metrics.items()})

    def warn(self, text):
        self.warnings.append(text)

    def results(self):
        return self.measured

    def add_results(self, **parts):
        self.measured |= parts

    def keep(self, lm, role):
        self.kept.append(role)


def run_miniature(folder):
    """Train every stage in `folder`, without samples and evaluation.

    Texts are drawn so that other processors draw the same -> how close the closest draw was.
    """
    import chat
    import pit

    closest = [1.0]

    def draw(probs, num_samples):
        """torch.multinomial by inversion, from torch.rand.

        Its numbers are the same on all processors; torch.multinomial's on x86 are Intel's.
        """
        cumulative = probs.double().cumsum(-1)  # (B, V)
        u = torch.rand(len(probs), 1, dtype=torch.float64)
        closest[0] = min(closest[0], (cumulative - u).abs().min().item())
        return (cumulative < u).sum(-1, keepdim=True).clamp(max=probs.shape[-1] - 1)

    with pytest.MonkeyPatch.context() as patch, keep_signals():
        patch.setattr(torch, "multinomial", draw)
        patch.setattr(chat, "show_samples", lambda *args: None)
        patch.setattr(pit, "eval_stage", lambda lm, run, parts: None)
        pit.run_all(run=folder, **MINIATURE)
    return closest[0]


@contextlib.contextmanager
def keep_signals():
    """Ctrl-C ends the tests at once, though a run that they train has other plans with it."""
    numbers = signal.SIGINT, signal.SIGTERM
    handlers = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, handlers):
        signal.signal(number, handler)


def batch(lm, pairs):
    """Prompts and answers of unequal lengths, so that both sides are padded."""
    prompts = [
        lm.encode_prompt(p.prompt if i % 2 else improve_prompt(p.prompt, p.rejected))
        for i, p in enumerate(pairs)
    ]
    return lm.collate(prompts, [lm.encode_response(p.chosen)[i % 3 :] for i, p in enumerate(pairs)])


def weights(lm, role):
    """A copy of what `role` consists of: its A and B, and its head where it has one."""
    return [p.detach().clone() for p in lm.parameters(role)]


def equal(some, others):
    return all(torch.equal(a, b) for a, b in zip(some, others))


def shake(lm, role, scale=0.05):
    """Move an adapter off its zero start, so that it matters."""
    with torch.no_grad():
        for p in lm.parameters(role):
            p.add_(scale * torch.randn_like(p))
