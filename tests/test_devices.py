"""What a GPU would see: a base in bf16, and no operation that mixes two devices.

Neither needs a GPU. The stand-in device lives in ordinary memory: a tensor belongs to it if it was
made with its `device`, or from a tensor that does. An operation on tensors of both devices
raises an error, as it would on a GPU.
"""

import shutil

import pytest
import torch
from conftest import MINIATURE, keep_signals
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

import curriculum
import models
import ppo
import reward
import sft
from data import split, synthetic_pairs
from infer import improve
from run import Run

ACCELERATOR = torch.device("cuda", 0)
CPU = torch.device("cpu")
OPTIONS = MINIATURE | dict(max_prompt=48, max_response=8, sft_steps=1, rm_steps=1, rl_steps=1)
OPTIONS |= dict(sft_lr=1e-3, rm_lr=1e-3, rl_lr=1e-3, critic_lr=1e-2, kl=0.1, epochs=1)
OPTIONS |= dict(rl_batch=4, minibatch=2, save_every=1, rounds="annotated,policy")
READS = {torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.__bool__, torch.Tensor.__int__}
READS |= {torch.Tensor.__float__, torch.Tensor.numpy}
INDEXING = {torch.Tensor.__getitem__, torch.Tensor.__setitem__}  # a CPU index may select anywhere


class Accelerator(TorchFunctionMode):
    """While active, `ACCELERATOR` is a device, and mixing it with the CPU is an error."""

    def __init__(self):
        super().__init__()
        # by the address of a storage; the weak reference keeps the address from being used again
        self.storages = {}

    def holds(self, tensor):
        return tensor.untyped_storage()._cdata in self.storages

    def take(self, tensor):
        storage = tensor.untyped_storage()
        self.storages[storage._cdata] = StorageWeakRef(storage)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        with torch._C.DisableTorchFunction():
            tensors = list(tensors_in([args, kwargs]))
            here = [tensor for tensor in tensors if self.holds(tensor)]
            if func == torch.Tensor.device.__get__:
                return ACCELERATOR if here else CPU
            if func == torch.Tensor.is_cuda.__get__:
                return bool(here)
            # the device that the call asks for, if it asks
            target = kwargs.get("device")
            if func in (torch.Tensor.to, torch.Tensor.cpu):
                target = CPU if func is torch.Tensor.cpu else target
                for value in args[1:]:
                    if isinstance(value, (torch.device, str)):
                        target = value
                    if isinstance(value, torch.Tensor):
                        target = ACCELERATOR if self.holds(value) else CPU
            elif func is not torch.Tensor.copy_ and here:
                others = [t for t in tensors if t.dim() > 0 and not self.holds(t)]
                if others and not (func in INDEXING and self.holds(args[0])):
                    raise RuntimeError(
                        f"{func.__name__} mixes devices: {others[0].shape} is on the CPU"
                    )
            args = [CPU if isinstance(value, torch.device) else value for value in args]
            if "device" in kwargs:
                kwargs["device"] = CPU
            result = func(*args, **kwargs)
            if func in READS:
                return result
            on_accelerator = bool(here) if target is None else torch.device(target) != CPU
            for tensor in tensors_in([result]):
                if on_accelerator:
                    self.take(tensor)
            if here and not on_accelerator:  # a copy, as between real devices
                return result.clone()
            return result


def tensors_in(values):
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, dict):
            yield from tensors_in(value.values())
        elif isinstance(value, (list, tuple)):
            yield from tensors_in(value)


def begin(folder):
    run = Run.start(folder, OPTIONS)
    run.begin()
    return run


def train_all(lm, folder):
    """Every stage, one after another; then an answer is improved."""
    run = begin(folder)
    pairs = synthetic_pairs(100, seed=0)
    pairs = split(pairs, [pair.prompt for pair in pairs], seed=0)
    sft.train_policy(lm, run, pairs["sft"])
    sft.train_pit(lm, run, pairs["sft"])
    reward.train_policy_reward(lm, run, pairs["rm"], pairs["held_out"])
    reward.train_gap_reward(lm, run, pairs["rm"], pairs["held_out"])
    curriculum.train_policy_rl(lm, run, pairs["rl"])
    for role, source, start, steps in curriculum.rounds(["annotated", "policy"], [1, 1], "pit_rl"):
        how = dict(role=role, source=source, start=start, steps=steps)
        curriculum.train_pit_round(lm, run, pairs["rl"], **how)
    prompts = [pair.prompt for pair in pairs["held_out"]]
    answers = lm.answer("policy_rl", prompts, run.config)
    improved = improve(lm, "pit_rl1", prompts, answers, run.config)
    return run, reward.gaps(lm, prompts, improved, answers, run.config)


@pytest.fixture
def on_accelerator(monkeypatch):
    """The tiny base on the stand-in device, and the mode in which it exists."""
    lm = models.load_model("tiny", bits=16)
    mode = Accelerator()
    for tensor in [*lm.peft.parameters(), *lm.peft.buffers()]:
        mode.take(tensor)
    lm.device = ACCELERATOR
    with keep_signals(), mode:
        yield lm


def test_no_stage_mixes_devices(on_accelerator, tmp_path):
    run, gaps = train_all(on_accelerator, tmp_path / "run")
    assert torch.isfinite(gaps).all()


def test_a_planted_mix_is_caught(on_accelerator, tmp_path, monkeypatch):
    """`device=` forgotten once, in each of the places where training makes a tensor."""
    lm = on_accelerator
    pairs = synthetic_pairs(12, seed=0)
    for role in ("policy_sft", "pit_sft", "reward_policy", "reward_gap"):
        lm.add(role, head=role.startswith("reward"))

    def policy_rl():
        curriculum.train_policy_rl(lm, begin(tmp_path / "policy"), pairs)

    def pit_round():
        run = begin(tmp_path / "pit")
        how = dict(role="pit_rl0", source="annotated", start="pit_sft", steps=1)
        curriculum.train_pit_round(lm, run, pairs, **how)

    planted = [
        (ppo, "zero_head", lambda size, device: torch.nn.Linear(size, 1), policy_rl),
        (curriculum, "rewards", lambda lm, role, chats, *_: torch.ones(len(chats)), pit_round),
    ]
    for module, name, broken, work in planted:
        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="mixes devices"):
            patch.setattr(module, name, broken)
            work()


def test_all_stages_run_on_a_base_in_bf16(tmp_path, monkeypatch):
    """What a card with bf16 gets with --bits 16: adapters, heads and log-probs stay in fp32."""
    monkeypatch.setattr(models, "best_device", lambda: ("cpu", torch.bfloat16))
    shutil.copytree(models.TINY, tmp_path / "base")
    lm = models.load_model(str(tmp_path / "base"), bits=16)
    assert lm.lm_head.weight.dtype == torch.bfloat16
    with keep_signals():
        run, gaps = train_all(lm, tmp_path / "run")
    assert torch.isfinite(gaps).all()
    assert all(p.dtype == torch.float32 for p in lm.parameters("reward_gap"))
    # bf16 rounds: the first ratio is near 1, not 1
    kl_at_start = next(row["kl"] for row in run.metrics() if row["stage"] == "policy_rl")
    assert kl_at_start == pytest.approx(0, abs=0.5)
