"""The built-in base: `python make_tiny.py` pretrains a 1M-parameter Qwen2 on the language of task.py -> the folder tiny/.

It stands for any base model from a hub: it has read a lot of the language that the task is written in, good texts and bad ones,
and nobody has told it which are better. Nothing else in the project needs this file.
"""

import random

import datasets  # noqa: F401  on Windows it must be imported before torch
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from data import IMPROVE
from models import TINY, take_step
from run import progress
from task import LOOKS, ask, draw_people, solve, spoil, tell


def check(people, lines):
    """What can be said of an answer, line by line: is the end right, each turn, and the number of turns?"""
    words, perfect = [], solve(people)
    for name, (end, way) in lines.items():
        start, turns = people[name]
        right = [solve({name: (look, [turn])})[name][0] for look, turn in zip([start, *way], turns)]
        marks = ["right" if look == other else "wrong" for look, other in zip(way, right)]
        marks += ["short"] * (len(way) < len(turns))
        words.append(
            f"{name} {'right' if end == perfect[name][0] else 'wrong'}: {' '.join(marks)}."
        )
    return " ".join(
        [
            "Seen",
            *words,
            "Missing:",
            *([name for name in people if name not in lines] or ["nobody"]),
        ]
    )


CHECK = "Check it turn by turn."
EDITS = {
    "Add who is missing.": lambda perfect, lines: {
        name: lines.get(name, perfect[name]) for name in perfect
    },
    "Tell each way again.": lambda perfect, lines: {
        name: (end, perfect[name][1]) for name, (end, _) in lines.items()
    },
    "Read each end off its way.": lambda perfect, lines: {
        name: (way[-1], way) for name, (_, way) in lines.items()
    },
    "Say it again.": lambda perfect, lines: lines,
}


def dialogue(rng):
    """What the base has read: somebody asks, gets an answer of any quality, and talks about it -> chat messages, flawed or not.

    Following turns, copying, editing on request and telling right from wrong are all in there, as they are in the texts of real
    base models. What is not: that any of this is better. After "Please improve your answer." anything may follow, for better or
    for worse. And half of the ends of first answers are guessed: a base that read right ones alone bent the way to its end.
    """
    people, flaws = draw_people(rng), rng.choice([0, 0, 0, 0, 1, 2, 3, 4])
    perfect = solve(people)
    guessed = {
        name: (rng.choice([end, rng.choice(LOOKS)]), way) for name, (end, way) in perfect.items()
    }
    lines = spoil(guessed, flaws, rng)
    turns = [ask(people), tell(lines)]
    more = 2 if flaws else rng.choice([0, 0, 1])
    for request in rng.choices([CHECK, IMPROVE, *EDITS], weights=[3, 3, 1, 1, 1, 1], k=more):
        if request == CHECK:
            turns += [CHECK, check(people, lines)]
        elif request == IMPROVE:
            change = rng.choice([*EDITS.values(), lambda perfect, lines: spoil(lines, 1, rng)])
            turns += [request, tell(change(perfect, lines))]
        else:
            lines = EDITS[request](perfect, lines)
            turns += [request, tell(lines)]
    return [
        {"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)
    ], flaws > 0


def make_tiny(steps=1700, batch=32, lr=3e-3, seed=1):
    """Pretrain the built-in base: a 1M-parameter Qwen2 on the language of the synthetic task -> the folder tiny/.

    initializer_range is large on purpose: on lists told three times over, copying appeared within 200 steps; with the usual
    0.02 there was no sign of it after 300.
    """
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
    config = Qwen2Config(
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
    )
    model = Qwen2ForCausalLM(config)
    model.set_attn_implementation("eager")  # on a CPU, faster than SDPA at this size
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.05)
    tokenizer.padding_side = "right"
    bar = progress(range(steps))
    for step in bar:
        dialogues = [dialogue(rng) for _ in range(batch)]
        encoded = tokenizer(
            [tokenizer.apply_chat_template(messages, tokenize=False) for messages, _ in dialogues],
            return_tensors="pt",
            padding=True,
        )
        labels = encoded["input_ids"].masked_fill(encoded["attention_mask"] == 0, -100)
        for row, (messages, flawed) in zip(labels, dialogues):
            if flawed:  # an answer to read, not one to learn to write
                start, end = (
                    len(tokenizer.apply_chat_template(messages[:n])["input_ids"]) for n in (1, 2)
                )
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
