"""Judges from outside, who say which of two answers is better: a language model, or a person.

They need a run's answers.jsonl alone, and no model. Each vote is a line of votes.jsonl, written as
it comes and never asked for again: a stopped session goes on where it was. evaluate.add_votes turns
votes into rows of Table 1.

    python pit.py judge --run RUN --by http://localhost:8000/v1 --llm NAME
    python pit.py judge --run RUN --by me
"""

import hashlib
import json
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from textwrap import fill
from typing import NamedTuple

from errors import UserError, first_line
from run import progress

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


# ---- questions and votes -----------------------------------------------------------------------


class Question(NamedTuple):
    """Which is better: the answer of side a, or that of side b?"""

    line: int  # of answers.jsonl, from 0
    a: str
    b: str
    prompt: str
    text_a: str
    text_b: str

    def id(self):
        """A hash of all that is shown: no vote outlives its texts."""
        texts = json.dumps([self.prompt, self.text_a, self.text_b])
        return hashlib.sha256(texts.encode()).hexdigest()[:16]


def read_answers(run):
    """The lines of answers.jsonl, a dict each."""
    path = run.path / "answers.jsonl"
    try:
        with open(path, encoding="utf-8") as file:  # splitlines() would split at U+2028 too
            return [json.loads(line) for line in file]
    except (OSError, ValueError):
        again = f"python pit.py eval --run {run.path}"
        raise UserError(f"{path} is missing or damaged. Write it with: {again}") from None


def questions_about(lines):
    """All questions about these lines of answers.jsonl."""
    questions = []
    for number, line in enumerate(lines):
        turns = [f"{turn['role'].capitalize()}: {turn['content']}" for turn in line["prompt"]]
        answers = line["answers"]
        for a, b in ROWS:
            if a in answers and b in answers:
                questions.append(Question(number, a, b, "\n\n".join(turns), answers[a], answers[b]))
    return questions


def read_votes(run):
    """votes.jsonl -> {(judge, id of the question): line}; a later line overrides an earlier one.

    A line's vote: 1, side a is better; -1, side b is; 0, a tie; null, taken back.
    """
    path, votes = run.path / "votes.jsonl", {}
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    for line in text.splitlines():
        with suppress(ValueError):  # a line that a kill cut off
            vote = json.loads(line)
            votes[vote["judge"], vote["question"]] = vote
    return {key: vote for key, vote in votes.items() if vote["vote"] is not None}


def add_vote(run, judge, question, vote, **more):
    """Append a vote to votes.jsonl."""
    line = {"judge": judge, "question": question.id(), "prompt": question.line}
    line |= {"a": question.a, "b": question.b, "vote": vote, **more}
    with open(run.path / "votes.jsonl", "a", encoding="utf-8") as file:
        # a new line first: a kill may have cut the last one off
        file.write("\n" + json.dumps(line))


# ---- a language model --------------------------------------------------------------------------

KEY = "JUDGE_API_KEY"  # the environment variable with the key, which is written nowhere
WORKERS = 8  # pairs at a time
ATTEMPTS = 6  # of a request that is refused for now: again after 1, 2, 4, 8 and 16 seconds
PAUSE = 1.0
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

    if not url.startswith(("http://", "https://")):
        raise UserError(f"--by {url}: give me, or an address that starts with http:// or https://.")
    # HF_HUB_OFFLINE makes the client refuse every address, but this one is not the hub's
    constants.HF_HUB_OFFLINE = False
    # without any key the client would send the user's token for the hub
    client = InferenceClient(base_url=url, api_key=os.environ.get(KEY) or "none", timeout=TIMEOUT)
    votes = read_votes(run)
    questions = questions_about(read_answers(run)[:n])
    new = {q.id(): q for q in questions if (llm, q.id()) not in votes}
    with ThreadPoolExecutor(WORKERS) as pool:
        asked = {pool.submit(ask_both_orders, client, llm, q): q for q in new.values()}
        try:
            for done in progress(as_completed(asked), total=len(asked)):
                add_vote(run, llm, asked[done], **done.result())
        finally:  # after an error, or Ctrl-C: ask no more
            pool.shutdown(cancel_futures=True)


def ask_both_orders(client, llm, question):
    """The language model's vote, a tie if the order changes its mind -> the rest of its line."""
    if question.text_a == question.text_b:
        return {"vote": 0}
    votes, unreadable = [], 0
    for first, second in ((question.text_a, question.text_b), (question.text_b, question.text_a)):
        vote = ask(client, llm, ASK.format(question.prompt, first, second))
        unreadable += vote is None
        votes.append(vote or 0)
    forward, turned = votes
    same = forward == -turned
    return {"vote": forward if same else 0, "order_decides": not same, "unreadable": unreadable}


def ask(client, llm, question):
    """1: the first answer is better, -1: the second, 0: a tie, None: no reply that can be read."""
    messages = [{"role": "user", "content": question + FORM}]
    for _ in range(2):
        reply = send(client, llm, messages)
        letter = re.fullmatch(r"\W*(?:answer )?(a|b|tie)\W*", reply.lower())
        if letter:
            return REPLIES[letter[1]]
        messages.append({"role": "assistant", "content": reply})
        messages.append({"role": "user", "content": FORM})
    return None


def send(client, llm, messages):
    """The model's reply. Failures that may pass (429, 5xx, no reply in time) are tried again."""
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(PAUSE * 2 ** (attempt - 1))
        try:
            reply = client.chat_completion(messages, model=llm, max_tokens=REPLY, temperature=0.0)
            return reply.choices[0].message.content or ""
        except Exception as error:  # HTTP, network, or a reply of another form
            failure = error
        status = getattr(getattr(failure, "response", None), "status_code", 0)
        may_pass = status == 429 or status >= 500 or isinstance(failure, TimeoutError)
        if not may_pass:
            break
    raise UserError(explain_failure(failure, status, client.model, llm))


def explain_failure(error, status, url, llm):
    """Why a language model cannot be asked, in one line."""
    said = getattr(error, "server_message", None) or first_line(error)
    if status in (401, 403):
        return f"{url} refuses the key. Put the right one into the environment variable {KEY}."
    if status == 404:
        return f"{url} has no model {llm}, or is not the right address: {said}"
    if status:
        return f"{url} answers with error {status}: {said}"
    return f"No usable answer from {url}: {said}. Votes are kept; the same command goes on."


# ---- a person ----------------------------------------------------------------------------------

WIDTH = 79
KEYS = {"1": 1, "2": -1, "t": 0}
CHOICES = "Which is better? 1, 2, t (tie), u (undo), q (quit): "


def ask_person(run, n=128):
    """Let a person compare answers to the first n prompts in the terminal, blind -> votes.jsonl."""
    votes = read_votes(run)
    questions = {q.id(): q for q in questions_about(read_answers(run)[:n])}
    # by their hashes: an order that says nothing, and is the same again after a break
    left = [questions[key] for key in sorted(questions) if (ME, key) not in votes]
    voted = []  # in this session, for undo
    while left:
        question = left[0]
        if question.text_a == question.text_b:
            add_vote(run, ME, left.pop(0), 0)
            continue
        print(f"\n{'=' * WIDTH}\nPair {len(questions) - len(left) + 1} of {len(questions)}")
        turned = int(question.id(), 16) % 2  # a coin: b is shown first
        show(question, turned)
        key = read_key()
        if key == "q":
            break
        if key in KEYS:
            vote = -KEYS[key] if turned else KEYS[key]
            add_vote(run, ME, question, vote)
            voted.append(left.pop(0))
        elif voted:  # undo
            left.insert(0, voted.pop())
            add_vote(run, ME, left[0], None)


def show(question, turned):
    """A prompt and its two answers, without names, in 80 columns."""
    texts = [question.text_a, question.text_b]
    if turned:
        texts.reverse()
    for title, text in zip(("The prompt", "Answer 1", "Answer 2"), (question.prompt, *texts)):
        print(f"\n--- {title}\n")
        for line in text.splitlines():
            printable = "".join(c if c.isprintable() else " " for c in line)  # moves no cursor
            print(fill(printable, WIDTH))
    print()


def read_key():
    """1, 2, t, u or q; the end of the input is q."""
    key = ""
    while key not in (*KEYS, "u", "q"):
        try:
            key = input(CHOICES).strip().lower()
        except EOFError:
            return "q"
    return key
