"""Stage 3, reinforcement learning: the policy's problem, PIT's, and the order in which PIT's are solved.

policy    Eq. 3   x ~ D_RL, y ~ M_P           max R_P(x, y)          - beta KL(M_P^RL   || M_P^SFT)
round 0   Eq. 4   y_ref in {y_w, y_l}         max R_PIT(x, y, y_ref) - beta KL(M_PIT^RL || M_PIT^SFT)
round 1   Eq. 5   y_ref ~ M_P^RL(. | x)       the same, starting from round 0

Why rounds: answers of M_P^RL are already good, and improving them is hard to learn at once; the annotated answers leave more
to improve. A curriculum is a list of sources of y_ref: "annotated" (y_w and y_l), "policy" (M_P^RL) or "sft" (M_P^SFT).
That a round starts where the last one ended, and is held to M_PIT^SFT all along, is our reading of the paper.
"""

from functools import partial

from data import improve_prompt, max_length
from errors import UserError
from infer import SAMPLED
from models import LOGIT_CHUNK
from ppo import train
from reward import gap
from run import shuffled_batch

# Table 2 of the paper, and two curricula more; all start from M_PIT^SFT and share out the same number of PPO iterations
CURRICULA = ["annotated", "policy", "annotated,policy", "policy,annotated", "annotated,sft,policy"]
SOURCES = {"annotated": None, "policy": "policy_rl", "sft": "policy_sft"}  # who writes y_ref


def parse(curriculum):
    """ "annotated,policy" -> ["annotated", "policy"], checked."""
    sources = [source.strip() for source in curriculum.split(",")]
    for source in sources:
        if source not in SOURCES:
            raise UserError(f"--rounds {curriculum}: {source!r} is not one of {', '.join(SOURCES)}.")
    return sources


def train_policy_rl(lm, run, pairs):
    """Eq. 3 -> adapter policy_rl."""
    cfg = run.config

    def problem(step):
        rows = shuffled_batch(len(pairs), cfg.rl_batch, step, cfg.seed)
        return [lm.encode_prompt(pairs[row].prompt) for row in rows], partial(lm.scores, "reward_policy")

    lm.add("policy_rl", like="policy_sft")
    train(lm, run, "policy_rl", "policy_sft", "reward_policy", problem, cfg.rl_steps)


def rounds(sources, total, prefix):
    """Share out `total` PPO iterations: a round for each source -> [(role, source, role it starts from, iterations)]."""
    plan = []
    for number, source in enumerate(sources):
        start = plan[-1][0] if plan else "pit_sft"
        steps = total * (number + 1) // len(sources) - total * number // len(sources)
        plan.append((f"{prefix}{number}", source, start, steps))
    return plan


def train_pit_round(lm, run, pairs, role, source, start, steps):
    """One round of PIT (Eqs. 4 and 5): `steps` iterations on references by `source`, from adapter `start` -> adapter `role`."""
    cfg = run.config

    def problem(step):
        if SOURCES[source] is None:  # each triple twice: once from its worse, once from its better answer
            rows = [pairs[row] for row in shuffled_batch(len(pairs), cfg.rl_batch // 2, step, cfg.seed)]
            rows, references = rows + rows, [pair.rejected for pair in rows] + [pair.chosen for pair in rows]
        else:
            rows = [pairs[row] for row in shuffled_batch(len(pairs), cfg.rl_batch, step, cfg.seed)]
            written = lm.generate(SOURCES[source], [lm.encode_prompt(pair.prompt) for pair in rows], cfg.max_response)
            references = lm.decode(written.responses)
        prompts = [lm.encode_prompt(improve_prompt(pair.prompt, y_ref)) for pair, y_ref in zip(rows, references)]
        unchanged = [lm.encode_response(y_ref) for y_ref in references]

        def score(tokens, states):
            return gap(lm, lm.scores("reward_gap", tokens, states), prompts, unchanged, cfg.micro_batch)

        return prompts, score

    lm.add(role, like=start)
    # a gap of 0 is "no change": shift=0 keeps it so, and a positive reward means better than y_ref
    train(lm, run, role, "pit_sft", "reward_gap", problem, steps, shift=0.0)


# ---- the memory that stage 3, the largest, takes ---------------------------------------------------------------------------


def estimate_memory(lm, cfg):
    """Peak memory by arithmetic -> {kind of work: {part: GiB}}.

    N layers of width D, a feed-forward of W, size bytes a number; LoRA and its optimiser are in fp32. For the backward pass a
    layer keeps, of each token: its input and what the second norm reads, both normed, q, k and v, the attention's output and a
    copy, a spare (10 D); gate, silu(gate), up and their product (4 W). Writing keeps no more than two D and three W at a time.
    """
    base, size = lm.peft.get_base_model(), lm.lm_head.weight.element_size()
    c = base.config
    D, N, W = c.hidden_size, c.num_hidden_layers, getattr(c, "intermediate_size", None) or 4 * c.hidden_size
    for_lora = 4 * (6 * D + W) if size < 4 else 0  # the inputs of the seven matrices once more, in LoRA's fp32
    cache = 2 * size * N * D * (getattr(c, "num_key_value_heads", None) or c.num_attention_heads) // c.num_attention_heads
    length = max_length(cfg)
    rows = max(cfg.rl_batch, SAMPLED // length)
    lora = sum(p.numel() for name, p in lm.peft.named_parameters() if ".blank." in name)

    def activations(tokens):
        layer = tokens * (size * (10 * D + 4 * W) + for_lora)
        return tokens * N * D * size + layer if base.is_gradient_checkpointing else N * layer

    always = {
        "weights": sum(p.numel() * p.element_size() for name, p in lm.peft.named_parameters() if "lora" not in name),
        "adapters": (7 + len(parse(cfg.rounds))) * 4 * lora,
        "optimiser, gradients": 3 * 4 * lora,
    }
    work = {
        "SFT, PPO update": {  # in logits: themselves, their log-softmax, its gradient, in fp32
            "activations": activations(cfg.micro_batch * length),
            "logits": 3 * 4 * LOGIT_CHUNK * c.vocab_size,
        },
        # both contexts of R_PIT, (x, y_w) and (x, y_l), each with both answers
        "reward models": {"activations": activations(2 * cfg.micro_batch * (length + cfg.max_response))},
        "sampling": {
            "activations": rows * (length - cfg.max_response) * (2 * for_lora + size * (2 * D + 3 * W)),
            "keys and values": rows * length * cache,
        },
    }
    return {name: {part: number / 2**30 for part, number in (always | parts).items()} for name, parts in work.items()}


def plan_memory(lm, cfg):
    """Say what training will take, and checkpoint the layers where --vram, less what a desktop needs, would not hold it."""

    def most():
        return max(estimate_memory(lm, cfg).items(), key=lambda work: sum(work[1].values()))

    if sum(most()[1].values()) > cfg.vram - 0.75:
        lm.checkpoint_layers()
    name, parts = most()
    print(f"memory: about {sum(parts.values()):.1f} GiB, in {name}: " + ", ".join(f"{k} {v:.2f}" for k, v in parts.items()))
    context = getattr(lm.peft.get_base_model().config, "max_position_embeddings", None)
    if context and max_length(cfg) > context:
        needs = f"{cfg.model} reads {context} tokens, and PIT needs {max_length(cfg)}"
        raise UserError(f"{needs}: lower --max-prompt or --max-response.")
