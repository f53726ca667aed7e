"""Judges from outside, who say which of two answers is better: a language model, or a person.

They need only a run's answers.jsonl and results.json, no model. Each vote is a line of votes.jsonl,
written as it comes and never asked for again: a stopped session resumes where it stopped.
evaluate.add_votes turns votes into rows of Table 1.

    python pit.py judge --run RUN --by http://localhost:8000/v1 --llm NAME
    python pit.py judge --run RUN --by me
"""

import hashlib
import json
import os
import re
import time
from collections import defaultdict
from contextlib import suppress
from functools import partial
from textwrap import fill
from threading import Lock
from typing import NamedTuple

from tqdm.contrib.concurrent import thread_map

from data import talk
from errors import UserError, explained, first_line
from run import read_text

# What they are asked: rows of the paper's Table 1, and PIT against two samples and the annotators
ROWS = [
    ("original", "y_w"),
    ("pit", "original"),
    ("self_refine", "original"),
    ("pit", "self_refine"),
    ("pit", "best_of_2"),
    ("pit", "y_w"),
]
ME = "me"  # the person's name among the judges
FILE_LOCK = Lock()  # held by the thread that writes to votes.jsonl


# ---- questions and votes -----------------------------------------------------------------------


class Question(NamedTuple):
    """Which is better: the answer of side a, or that of side b?"""

    line: int  # of answers.jsonl, from 0
    sides: tuple  # a, b
    prompt: str
    texts: tuple  # their answers

    def id(self):
        """A hash of all that is shown: no vote outlives its texts."""
        texts = json.dumps([self.prompt, *self.texts])
        return hashlib.sha256(texts.encode()).hexdigest()[:16]

    def is_tie(self):
        """Whether both answers are the same text: nobody has to be asked."""
        return len(set(self.texts)) == 1


def read_answers(run):
    """The lines of answers.jsonl, a dict each."""
    path = run.path / "answers.jsonl"
    again = f"Write it with: {run.command('eval')}"
    with explained(path, again), open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def questions_about(lines):
    """All questions about these lines of answers.jsonl."""
    questions = []
    for number, line in enumerate(lines):
        turns = [f"{turn['role'].capitalize()}: {turn['content']}" for turn in line["prompt"]]
        answers = line["answers"]
        for a, b in ROWS:
            if a in answers and b in answers:
                texts = answers[a], answers[b]
                questions.append(Question(number, (a, b), "\n\n".join(turns), texts))
    return questions


def questions_left(run, judge, n):
    """What `judge` has not said yet about the first n prompts -> a list of questions.

    Sorted by their hashes: an order that says nothing, and is the same again after a break.
    """
    votes = read_votes(run)[judge]
    questions = {question.id(): question for question in questions_about(read_answers(run)[:n])}
    return [questions[key] for key in sorted(questions) if key not in votes]


def read_votes(run):
    """votes.jsonl -> {judge: {id of the question: line}}; later lines override earlier ones.

    A line's vote: 1, side a is better; -1, side b is; 0, a tie; null, taken back.
    """
    path = run.path / "votes.jsonl"
    votes = defaultdict(dict)
    for line in read_text(path).split("\n"):
        with suppress(ValueError, KeyError, TypeError):  # empty, cut off by a kill, or not a vote
            vote = json.loads(line)
            cast = votes[vote["judge"]]
            if vote["vote"] is None:
                del cast[vote["question"]]
            else:
                cast[vote["question"]] = vote
    # a judge may have taken back all that it said
    return defaultdict(dict, {judge: cast for judge, cast in votes.items() if cast})


def add_vote(run, judge, question, vote, **more):
    """Append a vote to votes.jsonl."""
    a, b = question.sides
    line = dict(
        judge=judge, question=question.id(), prompt=question.line, a=a, b=b, vote=vote, **more
    )
    with FILE_LOCK, open(run.path / "votes.jsonl", "a", encoding="utf-8") as file:
        # a new line first: a kill may have cut the last one off
        file.write("\n" + json.dumps(line))


# ---- a language model --------------------------------------------------------------------------

KEY = "JUDGE_API_KEY"  # the environment variable with the key, which is written nowhere
WORKERS = 8  # pairs at a time
PAUSES = (0, 1, 2, 4, 8, 16)  # seconds before each attempt at a request
TIMEOUT = 120  # seconds for a reply
REPLY = 8  # tokens
ASK = """Here is a prompt, and two answers to it.

The prompt:
{}

Answer A:
{}

Answer B:
{}

"""
FORM = "Which answer is better? Reply with A, B or TIE, and nothing else."
REPLIES = {"a": 1, "b": -1, "tie": 0}


def ask_llm(run, url, llm, n=128):
    """Ask the language model `llm` behind an OpenAI-compatible address about the first n prompts.

    Several pairs at a time, each in both orders -> votes.jsonl.
    """
    from huggingface_hub import InferenceClient, constants

    # HF_HUB_OFFLINE makes the client refuse every address, but this one is not the hub's
    constants.HF_HUB_OFFLINE = False
    # without any key the client would send the user's token for the hub
    key = os.environ.get(KEY, "").strip() or "none"
    client = InferenceClient(base_url=url, api_key=key, timeout=TIMEOUT)
    ask_one = partial(ask_both_orders, run, client, llm)
    # ties last: a mistyped name ends at the first question, before any tie is recorded
    questions = sorted(questions_left(run, llm, n), key=Question.is_tie)
    if questions:
        ask_one(questions[0])
    # each vote goes to votes.jsonl as it comes; an error ends the loop, and asks no more
    thread_map(ask_one, questions[1:], max_workers=WORKERS, ncols=80, disable=None)


def ask_both_orders(run, client, llm, question):
    """Add the language model's vote to votes.jsonl: a tie if the order changes its mind."""
    if question.is_tie():
        add_vote(run, llm, question, 0)
        return
    a, b = question.texts
    forward = ask(client, llm, question.prompt, a, b)
    turned = ask(client, llm, question.prompt, b, a)
    unreadable = [forward, turned].count(None)
    order_decides = not unreadable and forward != -turned
    vote = 0 if unreadable or order_decides else forward
    add_vote(run, llm, question, vote, order_decides=order_decides, unreadable=unreadable)


def ask(client, llm, prompt, first, second):
    """1: the first answer is better, -1: the second, 0: a tie, None: no reply that can be read."""
    messages = [{"role": "user", "content": ASK.format(prompt, first, second) + FORM}]
    for _ in range(2):
        reply = send(client, llm, messages)
        letter = re.fullmatch(r"\W*(?:answer\W+)?(a|b|tie)\W*", reply.lower())
        if letter:
            return REPLIES[letter[1]]
        messages = talk(messages, reply, FORM)
    return None


def send(client, llm, messages):
    """The model's reply. Failures that may pass (429, 5xx) are tried again; a timeout, once."""
    timeouts = 0
    for pause in PAUSES:
        time.sleep(pause)
        try:
            reply = client.chat_completion(messages, model=llm, max_tokens=REPLY, temperature=0.0)
            return reply.choices[0].message.content or ""
        except Exception as error:  # HTTP, network, or a reply of another form
            failure = error
        status = getattr(getattr(failure, "response", None), "status_code", 0)
        if isinstance(failure, TimeoutError):
            timeouts += 1
            if timeouts == 2:
                break
        elif status != 429 and status < 500:
            break
    said = getattr(failure, "server_message", None) or first_line(failure)
    raise UserError(
        f"No verdict from {llm} at {client.model}: {said}\nCheck the address, the name and the key "
        f"in {KEY}. The same command then asks for the rest."
    )


# ---- a person ----------------------------------------------------------------------------------

WIDTH = 79
KEYS = {"1": 1, "2": -1, "t": 0}
KEYS_HELP = "Which is better? 1, 2, t (tie), u (undo), q (quit): "


def ask_person(run, n=128):
    """Let a person compare answers to the first n prompts in the terminal, blind -> votes.jsonl."""
    voted = []  # in this session, for undo
    while left := questions_left(run, ME, n):
        question = left[0]
        if question.is_tie():
            # recorded in order: a short session is not mostly ties
            add_vote(run, ME, question, 0)
            continue
        print(f"\n{'=' * WIDTH}\n{len(left)} pairs to go")
        turned = int(question.id(), 16) % 2 == 1  # a coin: b is shown first
        show(question, turned)
        key = read_key()
        if key == "q":
            break
        if key in KEYS:
            add_vote(run, ME, question, -KEYS[key] if turned else KEYS[key])
            voted.append(question)
        elif voted:  # undo: the question is the first one again
            add_vote(run, ME, voted.pop(), None)


def show(question, turned):
    """A prompt and its two answers, without names, in 80 columns."""
    texts = [question.prompt, *question.texts]
    if turned:
        texts[1:] = reversed(question.texts)
    for title, text in zip(("The prompt", "Answer 1", "Answer 2"), texts):
        print(f"\n--- {title}\n")
        for line in text.splitlines():
            printable = "".join(c if c.isprintable() else " " for c in line)  # moves no cursor
            print(fill(printable, WIDTH))
    print()


def read_key():
    """1, 2, t, u or q; the end of the input is q."""
    try:
        while (key := input(KEYS_HELP).strip().lower()) not in (*KEYS, "u", "q"):
            print("Please type 1, 2, t, u or q.")
    except EOFError:
        return "q"
    return key
