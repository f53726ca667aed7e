"""The built-in base: pretrain a 1M-parameter Qwen2 on the language of task.py -> the folder tiny/.

It stands for any base model from a hub: it has read a lot of the language that the task is written
in, good texts and bad ones, and nobody has told it which are better. Nobody needs this file to read
or run the method.

Run: python tools/make_tiny.py          overwrites tiny/
"""

import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import datasets  # noqa: F401  on Windows it must be imported before torch
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from data import IMPROVE
from models import TINY, take_step
from run import progress
from task import LOOKS, ask, draw_people, solve, spoil, tell

SPECIAL = ["<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"]
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
VOCABULARY = 600  # every word of the task becomes one token; any other text is spelled in bytes
# Large on purpose: on texts that repeat each list three times, copying appeared within 200 steps
# with 0.08; with the usual 0.02 there was no sign of it after 300.
INITIALIZER_RANGE = 0.08

CHECK = "Check it turn by turn."


# ---- what people do with an answer: functions of (perfect lines, present lines) -> new lines ----


def add_missing(perfect, lines):
    return {name: lines.get(name, perfect[name]) for name in perfect}


def tell_ways_again(perfect, lines):
    return {name: (end, perfect[name][1]) for name, (end, _) in lines.items()}


def read_ends_off(perfect, lines):
    return {name: (way[-1], way) for name, (_, way) in lines.items()}


def say_again(perfect, lines):
    return lines


EDITS = {
    "Add who is missing.": add_missing,
    "Tell each way again.": tell_ways_again,
    "Read each end off its way.": read_ends_off,
    "Say it again.": say_again,
}


def check(people, lines):
    """What there is to say about an answer: is each end right, each turn, is anybody missing?"""
    perfect = solve(people)
    sentences = []
    for name, (end, way) in lines.items():
        start, turns = people[name]
        marks = []
        for before, after, turn in zip([start, *way], way, turns):
            right_look, _ = solve({name: (before, [turn])})[name]
            marks.append("right" if after == right_look else "wrong")
        if len(way) < len(turns):
            marks.append("short")
        verdict = "right" if end == perfect[name][0] else "wrong"
        sentences.append(f"{name} {verdict}: {' '.join(marks)}.")
    missing = [name for name in people if name not in lines] or ["nobody"]
    return " ".join(["Seen", *sentences, "Missing:", *missing])


def dialogue(rng):
    """What the base has read: a question, an answer, and talk about it -> chat messages, flawed?

    The answer is of any quality. Following turns, copying, editing on request and telling right
    from wrong are all in there, as they are in the texts of real base models. What is not in there:
    that any of this is better. After "Please improve your answer." anything may follow, for better
    or for worse. Half of the ends of first answers are guessed: a base that only read right ends
    bent the way to fit its end.
    """
    people = draw_people(rng)
    flaws = rng.choice([0, 0, 0, 0, 1, 2, 3, 4])
    perfect = solve(people)
    guessed = {}
    for name, (end, way) in perfect.items():
        guessed[name] = (rng.choice([end, rng.choice(LOOKS)]), way)
    lines = spoil(guessed, flaws, rng)

    texts = [ask(people), tell(lines)]
    more = 2 if flaws else rng.choice([0, 0, 1])
    for request in rng.choices([CHECK, IMPROVE, *EDITS], weights=[3, 3, 1, 1, 1, 1], k=more):
        if request == CHECK:
            texts += [CHECK, check(people, lines)]
        elif request == IMPROVE:
            change = rng.choice([*EDITS.values(), None])
            new = change(perfect, lines) if change else spoil(lines, 1, rng)
            texts += [request, tell(new)]
        else:
            lines = EDITS[request](perfect, lines)
            texts += [request, tell(lines)]
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    return messages, flaws > 0


# ---- pretraining -------------------------------------------------------------------------------


def make_tokenizer(rng):
    texts = (turn["content"] for _ in range(4000) for turn in dialogue(rng)[0])
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(
        texts, VOCABULARY, new_special_tokens=SPECIAL
    )
    tokenizer.add_special_tokens({"pad_token": "<|pad|>", "eos_token": "<|end|>"})
    tokenizer.chat_template = TEMPLATE
    tokenizer.padding_side = "right"
    return tokenizer


def make_model(tokenizer):
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        initializer_range=INITIALIZER_RANGE,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    model = Qwen2ForCausalLM(config)
    model.set_attn_implementation("eager")  # on a CPU, faster than SDPA at this size
    return model


def encode(tokenizer, dialogues):
    """Dialogues -> the model's inputs, and labels: all tokens but those of flawed first answers.

    A flawed answer is there to be read, not to be learned.
    """
    texts = [tokenizer.apply_chat_template(messages, tokenize=False) for messages, _ in dialogues]
    inputs = tokenizer(texts, return_tensors="pt", padding=True)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    for row, (messages, flawed) in zip(labels, dialogues):
        if flawed:
            start = len(tokenizer.apply_chat_template(messages[:1])["input_ids"])
            end = len(tokenizer.apply_chat_template(messages[:2])["input_ids"])
            row[start:end] = -100
    return inputs, labels


def main(steps=1700, batch=32, lr=3e-3, seed=1):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    tokenizer = make_tokenizer(rng)
    model = make_model(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.05)
    bar = progress(range(steps))
    for step in bar:
        inputs, labels = encode(tokenizer, [dialogue(rng) for _ in range(batch)])
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**inputs, labels=labels).loss
        loss.backward()
        # warm up for 100 steps, fall to 0 over the second half
        take_step(optimizer, lr * min(1, (step + 1) / 100, 2 * (1 - step / steps)))
        bar.set_postfix_str(f"loss {loss.item():.3f}")
    model.half().save_pretrained(TINY)
    tokenizer.save_pretrained(TINY)


if __name__ == "__main__":
    main()
