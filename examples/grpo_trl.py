"""Beyond one GPU: PIT's round 0 by TRL's GRPO, with the gap and the options of a finished run.

pip install trl==1.16.0
python examples/grpo_trl.py runs/tiny
torchrun --nproc_per_node 2 examples/grpo_trl.py runs/tiny
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from datasets import Dataset  # isort: skip  (on Windows it must be imported before torch)
import torch
from accelerate import PartialState
from trl import GRPOConfig, GRPOTrainer

import pit
from data import improve_prompt, load_pairs, load_parts
from evaluate import compare
from judges import default_judges, judges_by_name
from models import export
from reward import gaps
from run import new_folder

# first of all: it gives each process its GPU; without `cpu`, processes on a CPU would not meet
state = PartialState(cpu=not torch.cuda.is_available())
run = pit.open_run(Path(sys.argv[1]))
cfg, out = run.config, run.path.with_name(run.path.name + "-grpo")
lm = pit.load_base(run, ["policy_rl", "pit_sft", "pit_rl0", "reward_gap"])
parts = load_parts(cfg, lm, load_pairs(cfg.data, cfg.pairs, cfg.seed, cfg.skip_bad, cfg.columns))

# round 0 starts as M_PIT^SFT; the first process writes that as a whole model
start = out / "pit_sft"
with state.local_main_process_first():
    if not start.exists():
        unquantised = pit.load_base(run, ["pit_sft"], bits=16)
        with new_folder(start) as folder:
            export(unquantised, "pit_sft", folder, merge=True)

rows = []
for pair in parts["rl"]:
    for y in (pair.rejected, pair.chosen):  # as y_ref (Eq. 4)
        rows.append({"prompt": improve_prompt(pair.prompt, y), "x": pair.prompt, "y_ref": y})


def gap(completions, x, y_ref, **others):  # TRL hands over the columns of `rows` by name
    return gaps(lm, x, [turns[0]["content"] for turns in completions], y_ref, cfg).tolist()


settings = GRPOConfig(
    output_dir=str(out),
    per_device_train_batch_size=cfg.minibatch // state.num_processes,
    steps_per_generation=cfg.rl_batch // cfg.minibatch,
    num_iterations=cfg.epochs,
    max_steps=cfg.rl_steps * cfg.epochs * cfg.rl_batch // cfg.minibatch,
    num_generations=8,
    max_completion_length=cfg.max_response,
    learning_rate=cfg.rl_lr,
    beta=cfg.kl,
    use_cpu=not torch.cuda.is_available(),
    bf16=torch.cuda.is_available(),
    save_strategy="no",
)
trainer = GRPOTrainer(str(start), gap, settings, Dataset.from_list(rows), peft_config=lm.lora)
trainer.train()
trainer.save_model()

# judge as `python pit.py eval` does: who beats the policy's answers to held-out prompts?
if state.is_main_process:
    cfg.model = str(start)  # to load the base that GRPO has trained on
    grpo = pit.load_base(run, bits=16)
    grpo.load("grpo", out)
    judge = next(iter(judges_by_name(default_judges(cfg), lm, cfg).values()))
    prompts = [pair.prompt for pair in parts["held_out"][: cfg.eval_n]]
    originals = lm.answer("policy_rl", prompts, cfg)
    chats = [improve_prompt(x, y) for x, y in zip(prompts, originals)]
    for model, role in ((lm, "pit_sft"), (lm, "pit_rl0"), (grpo, "grpo")):
        scores = judge.score(prompts, model.answer(role, chats, cfg))
        print(role, compare(scores, judge.score(prompts, originals), judge.margin))
