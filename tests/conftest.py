"""Fixtures of all tests: the built-in base, and batches of its own language."""

import os
import sys
from pathlib import Path

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test needs a hub
sys.path.insert(0, str(Path(__file__).parent.parent))

from data import improve_prompt, synthetic_pairs  # noqa: E402
from models import load_model  # noqa: E402


@pytest.fixture
def lm():
    """The tiny base, unquantised: exact arithmetic in fp32."""
    torch.manual_seed(0)
    return load_model("tiny", bits=16)


@pytest.fixture
def lm4():
    """The tiny base in 4-bit, as every run uses it."""
    torch.manual_seed(0)
    return load_model("tiny", bits=4)


@pytest.fixture(scope="session")
def pairs():
    return synthetic_pairs(12, seed=0)


def batch(lm, pairs):
    """Prompts and answers of unequal lengths, so that both sides are padded."""
    prompts = [
        lm.encode_prompt(p.prompt if i % 2 else improve_prompt(p.prompt, p.rejected))
        for i, p in enumerate(pairs)
    ]
    return lm.collate(prompts, [lm.encode_response(p.chosen)[i % 3 :] for i, p in enumerate(pairs)])


def shake(lm, role, scale=0.05):
    """Move an adapter off its zero start, so that it matters."""
    with torch.no_grad():
        for p in lm.parameters(role):
            p.add_(scale * torch.randn_like(p))
