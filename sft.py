"""Stage 1, supervised fine-tuning: teach one base to answer, and to improve an answer.

policy     M_P^SFT     x         -> y_w       L = - sum log M_P(y_w | x)
PIT        M_PIT^SFT   x, y_l    -> y_w       L = - sum log M_PIT(y_w | x, y_l)

The paper mentions an unlikelihood loss besides, without a formula. Ours, off by default (alpha = 1, beta = gamma = 0):

    L = - sum [ alpha log M(y_w | x, y_l) + beta log M(y_w | x, y_w) + gamma log(1 - M(y_l | x, y_w)) ]
                improve the worse           keep the better            never make it worse

`python sft.py` makes the built-in base (the folder tiny/): it pretrains a small Qwen2 on the language of the synthetic task.
"""

import random

import torch

import data
import task
from models import TINY, adamw, take_step
from run import finite, progress, shuffled_batch


def train_policy(lm, run, pairs):
    """M_P^SFT from D_SFT -> adapter policy_sft."""
    examples = [(lm.encode_prompt(pair.prompt), lm.encode_response(pair.chosen)) for pair in pairs]
    train(lm, run, "policy_sft", [(1.0, log_likelihood, examples)])


def train_pit(lm, run, pairs):
    """M_PIT^SFT from D_SFT -> adapter pit_sft."""
    cfg = run.config
    prompt = {  # (x, y_ref) by what y_ref is
        which: [lm.encode_prompt(data.improve_prompt(pair.prompt, getattr(pair, which))) for pair in pairs]
        for which in ("chosen", "rejected")
    }
    answer = {which: [lm.encode_response(getattr(pair, which)) for pair in pairs] for which in ("chosen", "rejected")}
    terms = [
        (1.0, log_likelihood, list(zip(prompt["rejected"], answer["chosen"]))),
        (cfg.keep_better, log_likelihood, list(zip(prompt["chosen"], answer["chosen"]))),
        (cfg.unlikelihood, log_unlikelihood, list(zip(prompt["chosen"], answer["rejected"]))),
    ]
    train(lm, run, "pit_sft", [term for term in terms if term[0] > 0])


def train(lm, run, role, terms):
    """Maximise the weighted sum of `terms`: (weight, objective, examples); examples are (prompt ids, response ids)."""
    cfg = run.config
    lm.add(role)
    optimizer = adamw(lm.parameters(role), cfg.sft_lr)
    for step in run.steps(cfg.sft_steps, [optimizer]):
        rows = shuffled_batch(len(terms[0][2]), cfg.sft_batch, step, cfg.seed)
        loss = 0.0
        lm.activate(role, train=True)
        for weight, objective, examples in terms:
            n_tokens = sum(len(examples[row][1]) for row in rows)
            for start in range(0, len(rows), cfg.micro_batch):
                tokens = lm.collate(*zip(*(examples[row] for row in rows[start : start + cfg.micro_batch])))
                # divided by the whole batch's tokens, so that the micro-batch size does not change the gradient
                part = -weight * objective(lm.logprobs(tokens), tokens.response_mask) / n_tokens
                part.backward()
                loss += part.item()
        finite("Lower --sft-lr, or look for odd texts in the data.", loss=loss)
        norm = take_step(optimizer, cfg.sft_lr * (1 - step / cfg.sft_steps))
        run.log(loss=loss, grad_norm=norm)
    with run.new_adapter(role) as folder:
        lm.save(role, folder)


def log_likelihood(logprobs, mask):
    """sum log M(y | .) over a batch; both arguments (B, R)."""
    return (logprobs * mask).sum()


def log_unlikelihood(logprobs, mask):
    """sum log(1 - M(y | .)) over a batch, M being the probability of the whole sequence; both arguments (B, R).

    log(1 - e^s) loses all digits where e^s is near 0 or 1; log1p(-e^s) and log(-expm1(s)) are exact there (Maechler, 2012).
    """
    s = (logprobs * mask).sum(1).clamp(max=-1e-6)  # (B,) log-probability of each answer
    near_zero = s < -0.693
    far = torch.log1p(-torch.exp(torch.where(near_zero, s, -1.0)))  # each branch sees only values where its gradient is finite
    near = torch.log(-torch.expm1(torch.where(near_zero, -0.1, s)))
    return torch.where(near_zero, far, near).sum()


# ---- the built-in base ---------------------------------------------------------------------------------------------------


def check(people, lines):
    """What can be said of an answer, line by line: is the end right, each turn, and the number of turns?"""
    words, perfect = [], task.solve(people)
    for name, (end, way) in lines.items():
        start, turns = people[name]
        right = [task.solve({name: (look, [turn])})[name][0] for look, turn in zip([start, *way], turns)]
        marks = ["right" if look == other else "wrong" for look, other in zip(way, right)]
        marks += ["short"] * (len(way) < len(turns))
        words.append(f"{name} {'right' if end == perfect[name][0] else 'wrong'}: {' '.join(marks)}.")
    return " ".join(["Seen", *words, "Missing:", *([name for name in people if name not in lines] or ["nobody"])])


CHECK = "Check it turn by turn."
EDITS = {
    "Add who is missing.": lambda perfect, lines: {name: lines.get(name, perfect[name]) for name in perfect},
    "Tell each way again.": lambda perfect, lines: {name: (end, perfect[name][1]) for name, (end, _) in lines.items()},
    "Read each end off its way.": lambda perfect, lines: {name: (way[-1], way) for name, (_, way) in lines.items()},
    "Say it again.": lambda perfect, lines: lines,
}


def dialogue(rng):
    """What the base has read: somebody asks, gets an answer of any quality, and talks about it -> chat messages, flawed or not.

    Following turns, copying, editing on request and telling right from wrong are all in there, as they are in the texts of real
    base models. What is not: that any of this is better. After "Please improve your answer." anything may follow, for better or
    for worse. And half of the ends of first answers are guessed: a base that read right ones alone bent the way to its end.
    """
    people, flaws = task.draw_people(rng), rng.choice([0, 0, 0, 0, 1, 2, 3, 4])
    perfect = task.solve(people)
    guessed = {name: (rng.choice([end, rng.choice(task.LOOKS)]), way) for name, (end, way) in perfect.items()}
    lines = task.spoil(guessed, flaws, rng)
    turns = [task.ask(people), task.tell(lines)]
    more = 2 if flaws else rng.choice([0, 0, 1])
    for request in rng.choices([CHECK, data.IMPROVE, *EDITS], weights=[3, 3, 1, 1, 1, 1], k=more):
        if request == CHECK:
            turns += [CHECK, check(people, lines)]
        elif request == data.IMPROVE:
            change = rng.choice([*EDITS.values(), lambda perfect, lines: task.spoil(lines, 1, rng)])
            turns += [request, task.tell(change(perfect, lines))]
        else:
            lines = EDITS[request](perfect, lines)
            turns += [request, task.tell(lines)]
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)], flaws > 0


def make_tiny(steps=1700, batch=32, lr=3e-3, seed=1):
    """Pretrain the built-in base: a 1M-parameter Qwen2 on the language of the synthetic task -> the folder tiny/.

    initializer_range is large on purpose: on lists told three times over, copying appeared within 200 steps; with the usual
    0.02 there was no sign of it after 300.
    """
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

    rng = random.Random(seed)
    torch.manual_seed(seed)
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(
        (turn["content"] for _ in range(4000) for turn in dialogue(rng)[0]),
        600,  # every word of the task becomes one token; any other text is spelled in bytes
        new_special_tokens=["<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"],
    )
    tokenizer.add_special_tokens({"pad_token": "<|pad|>", "eos_token": "<|end|>"})
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            initializer_range=0.08,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )  # fmt: skip
    )
    model.set_attn_implementation("eager")  # on a CPU, faster than SDPA at this size
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.05)
    tokenizer.padding_side = "right"
    bar = progress(range(steps))
    for step in bar:
        dialogues = [dialogue(rng) for _ in range(batch)]
        encoded = tokenizer(
            [tokenizer.apply_chat_template(messages, tokenize=False) for messages, _ in dialogues],
            return_tensors="pt", padding=True,
        )  # fmt: skip
        labels = encoded["input_ids"].masked_fill(encoded["attention_mask"] == 0, -100)
        for row, (messages, flawed) in zip(labels, dialogues):
            if flawed:  # an answer to read, not one to learn to write
                start, end = (len(tokenizer.apply_chat_template(messages[:n])["input_ids"]) for n in (1, 2))
                row[start:end] = -100
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**encoded, labels=labels).loss
        loss.backward()
        take_step(optimizer, lr * min(1, (step + 1) / 100, 2 * (1 - step / steps)))
        bar.set_postfix_str(f"loss {loss.item():.3f}")
    model.half().save_pretrained(TINY)
    tokenizer.save_pretrained(TINY)


if __name__ == "__main__":
    make_tiny()
