"""Beyond one GPU: PIT's round 0 by TRL's GRPO, with the gap of a finished run as the reward.

    pip install trl==1.16.0
    python examples/grpo_trl.py runs/tiny
    torchrun --nproc_per_node 2 examples/grpo_trl.py runs/tiny

GRPO samples a group of answers to each (x, y_ref), and those with the larger gaps win. Options are the
run's: as many answers as its own round 0. TRL adds what we leave out: many GPUs, DeepSpeed, vLLM.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import datasets  # on Windows it must be imported before torch
import torch
from accelerate import PartialState
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer

import data
import pit
from evaluate import compare
from judges import judges_by_name
from models import export, load_model
from reward import gaps

run = pit.open_run(Path(sys.argv[1]))
cfg, out = run.config, run.path.with_name(run.path.name + "-grpo")
lm = pit.load_base(cfg)
for role in ("policy_rl", "pit_sft", "pit_rl0", "reward_gap"):
    run.load_trained(lm, role)
parts = data.load_parts(cfg, lm, *data.load_pairs(cfg.data, cfg.pairs, cfg.seed, cfg.skip_bad))

# round 0 starts as M_PIT^SFT; the first process writes that as a whole model
start = out / "pit_sft"
with PartialState().local_main_process_first():
    if not start.exists():
        export(pit.load_base(cfg, bits=16), "pit_sft", run.adapter("pit_sft"), start, merge=True)

rows = []
for pair in parts["rl"]:
    for y_ref in (pair.rejected, pair.chosen):  # Eq. 4
        prompt = data.improve_prompt(pair.prompt, y_ref)
        rows.append({"prompt": prompt, "x": pair.prompt, "y_ref": y_ref})


def gap(completions, x, y_ref, **other_columns):
    """TRL's form of a reward: a float per completion; the columns of `rows` come by name."""
    return gaps(lm, x, [turns[0]["content"] for turns in completions], y_ref, cfg).tolist()


minibatches = cfg.rl_batch // cfg.minibatch
settings = GRPOConfig(
    output_dir=str(out),
    per_device_train_batch_size=cfg.minibatch // int(os.environ.get("WORLD_SIZE", 1)),
    steps_per_generation=minibatches,
    num_iterations=cfg.epochs,
    max_steps=cfg.rl_steps * cfg.epochs * minibatches,
    num_generations=8,
    max_completion_length=cfg.max_response,
    learning_rate=cfg.rl_lr,
    beta=cfg.kl,
    bf16=torch.cuda.is_available(),
    save_strategy="no",
    logging_steps=cfg.epochs * minibatches,
)
lora = LoraConfig(r=cfg.lora_r, lora_alpha=cfg.lora_alpha, target_modules=cfg.target_modules)
dataset = datasets.Dataset.from_list(rows)
trainer = GRPOTrainer(str(start), gap, settings, dataset, peft_config=lora)
trainer.train()
trainer.save_model()

# judge as `python pit.py eval` does: who beats the policy's answers to held-out prompts?
if trainer.accelerator.is_main_process:
    grpo = load_model(str(start), 16, cfg.lora_r, cfg.lora_alpha, cfg.target_modules)
    grpo.load("grpo", out)
    judge = next(iter(judges_by_name([], lm, cfg).values()))
    prompts = [pair.prompt for pair in parts["held_out"][: cfg.eval_n]]
    originals = lm.answer("policy_rl", prompts, cfg)
    chats = [data.improve_prompt(x, y) for x, y in zip(prompts, originals)]
    for model, role in ((lm, "pit_sft"), (lm, "pit_rl0"), (grpo, "grpo")):
        scores = judge.score(prompts, model.answer(role, chats, cfg))
        print(role, compare(scores, judge.score(prompts, originals), judge.margin))
