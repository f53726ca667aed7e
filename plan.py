"""How much memory a run takes, by arithmetic: said before any training, and the reason to checkpoint layers or not.

README.md has the table for Qwen2-0.5B's shape; tests/bench.py --memory measures beside it.
"""

from curriculum import parse
from data import max_length
from errors import UserError
from models import LOGIT_CHUNK, PREFILL, rows_at_a_time


def estimate_memory(lm, cfg):
    """Peak memory by arithmetic -> {kind of work: {part: GiB}}.

    N layers of width D, a feed-forward of W, size bytes a number; LoRA and its optimiser are in fp32. For the backward pass a
    layer keeps, of each token: its input and what the second norm reads, both normed, q, k and v, the attention's output and a
    copy, a spare (10 D); gate, silu(gate), up and their product (4 W). Writing reads PREFILL tokens of each prompt
    at a time, and keeps of each no more than 5 D and 2 W, and 2 W in LoRA's fp32.
    """
    base, size = lm.peft.get_base_model(), lm.lm_head.weight.element_size()
    c = base.config.get_text_config()  # the model itself, where it only writes
    D, N, W = (
        c.hidden_size,
        c.num_hidden_layers,
        getattr(c, "intermediate_size", None) or 4 * c.hidden_size,
    )
    for_lora = (
        4 * (6 * D + W) if size < 4 else 0
    )  # the inputs of the seven matrices once more, in LoRA's fp32
    cache = (
        2
        * size
        * N
        * D
        * (getattr(c, "num_key_value_heads", None) or c.num_attention_heads)
        // c.num_attention_heads
    )
    length = max_length(cfg)
    rows = max(cfg.rl_batch, rows_at_a_time(cfg))
    lora = sum(p.numel() for name, p in lm.peft.named_parameters() if ".blank." in name)

    def activations(tokens):
        layer = tokens * (size * (10 * D + 4 * W) + for_lora)
        return tokens * N * D * size + layer if base.is_gradient_checkpointing else N * layer

    always = {
        "weights": sum(
            p.numel() * p.element_size()
            for name, p in lm.peft.named_parameters()
            if "lora" not in name
        ),
        "adapters": (7 + len(parse(cfg.rounds)))
        * 4
        * lora,  # blank, two of SFT, three reward models, policy_rl; PIT's rounds
        "optimiser, gradients": 3 * 4 * lora,
    }
    work = {
        "SFT, PPO update": {  # in logits: themselves, their log-softmax, its gradient, in fp32
            "activations": activations(cfg.micro_batch * length),
            "logits": 3 * 4 * LOGIT_CHUNK * c.vocab_size,
        },
        # both contexts of R_PIT, (x, y_w) and (x, y_l), each with both answers, in one row or in two
        "reward models": {
            "activations": activations(
                2 * cfg.micro_batch * (length + cfg.max_response if lm.shared_row else 2 * length)
            )
        },
        "sampling": {
            "activations": rows
            * min(PREFILL, length - cfg.max_response)
            * (size * (5 * D + 2 * W) + 2 * 4 * W),
            "keys and values": rows * length * cache,
        },
    }
    return {
        name: {part: number / 2**30 for part, number in (always | parts).items()}
        for name, parts in work.items()
    }


def plan_memory(lm, cfg):
    """Say what training will take, and checkpoint the layers where --vram, less what a desktop needs, would not hold it."""

    def most():
        return max(estimate_memory(lm, cfg).items(), key=lambda work: sum(work[1].values()))

    if sum(most()[1].values()) > cfg.vram - 0.75:
        lm.checkpoint_layers()
    name, parts = most()
    print(
        f"memory: about {sum(parts.values()):.1f} GiB, in {name}: "
        + ", ".join(f"{k} {v:.2f}" for k, v in parts.items())
    )
    if sum(parts.values()) > cfg.vram:
        rl_batch = max(
            1, rows_at_a_time(cfg) // 8
        )  # half of the rows: a run writes up to four batches at one time
        print(
            f"  That is above --vram {cfg.vram:g}. Lower --micro-batch; in sampling, --rl-batch to {rl_batch}."
        )
    context = getattr(
        lm.peft.get_base_model().config.get_text_config(), "max_position_embeddings", None
    )
    if context and max_length(cfg) > context:
        needs = f"{cfg.model} reads {context} tokens, and PIT needs {max_length(cfg)}"
        raise UserError(f"{needs}: lower --max-prompt or --max-response.")
