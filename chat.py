"""Using PIT: a conversation, a file of rows, samples during training.

Run: python pit.py infer --run runs/tiny "..."                                  one prompt
     python pit.py infer --run runs/tiny                                        a conversation
     python pit.py infer --run runs/tiny --input rows.jsonl --output out.jsonl  a file
"""

import json
import os
import zlib
from difflib import SequenceMatcher
from pathlib import Path
from tempfile import gettempdir
from textwrap import fill

from filelock import FileLock, Timeout
from safetensors.torch import save

import task
from data import shorten, talk
from errors import UserError
from files import Request, is_prompt
from infer import POLICY, end_of, goes_on, improve, improve_rounds
from run import crc_of, progress, read_text, seed_all, write_text

OTHER_TASK = """This run knows the built-in task only, and the names in task.py. Try:
Where does each look in the end? Ann north: left left back. Ben west: right left
right. Eva south: left back right."""


# ---- in the terminal ---------------------------------------------------------------------------


def answer(lm, cfg, settings, turns, response=None):
    """Answer one prompt, or take `response`, and show each improvement -> the last text."""
    if cfg.data == "synthetic" and turns:  # that task has no follow-up questions
        # text from samples.md may come with the line breaks that it has there
        question = " ".join(turns[-1]["content"].split())
        turns = [{"role": "user", "content": question}]
        response = response and " ".join(response.split())
    prompts = fit_prompts(lm, cfg, [Request({}, turns, response, "the prompt")])
    seed_all(settings.seed, "infer")
    rounds = improve_rounds(lm, cfg, settings, prompts, [response])
    # y_0
    (text,), _ = next(rounds)
    print(f"\noriginal\n{text}", flush=True)
    # y_k, until the stop rule ends the rounds
    best = "the original"
    for k, ((better,), (gap,)) in enumerate(rounds, 1):
        if not goes_on(settings.stop, text, better, gap):
            why = "changed nothing" if settings.stop == "same" else "was no better"
            print(f"\nRound {k} {why}, so {best} is the answer (--stop {settings.stop}).")
            break
        print(f"\nround {k}, gap {gap:+.2f}\n{mark_changes(text, better)}", flush=True)
        text = better
        best = f"round {k}"
    return text


def is_other_task(question, response):
    """Whether a question is not of the built-in task, or a response has no line of an answer."""
    people = task.read(question)
    try:
        task.solve(people)
    except (ValueError, KeyError):  # other words for directions or turns
        return True
    known = people and question == task.ask(people) and people.keys() <= set(task.NAMES)
    return not known or (response is not None and not task.read(response))


def mark_changes(old, new):
    """`new` with *stars* around the words that are not in `old` at that place."""
    old = old.split(" ")
    new = new.split(" ")
    words = []
    for what, _, _, start, end in SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        for word in new[start:end]:
            words.append(word if what == "equal" or not word else f"*{word}*")
    return " ".join(words)


def converse(lm, cfg, settings):
    """Ask and answer until the input ends."""
    print("Ask, and see the answer improve. Empty line: start over. Ctrl-D: stop.")
    turns = []
    while True:
        try:
            said = input("\nyou: ").strip()
        except EOFError:
            print()
            return
        if not said:
            turns = []
            continue
        asked = [*turns, {"role": "user", "content": said}]
        try:
            turns = talk(asked, answer(lm, cfg, settings, asked))
        except UserError as error:
            print(error)


# ---- whole files -------------------------------------------------------------------------------


def improve_file(lm, cfg, settings, requests, path):
    """Append each row to the JSONL file `path` with its improved text, all versions and their gaps.

    A batch of rows goes through all rounds at once. Then the stop rule chooses each answer.
    """
    originals = [request.row for request in requests]
    responses = [request.response for request in requests]
    weights = zlib.crc32(save(lm.weights(settings.pit)))
    stamp = crc_of((settings, weights, originals))
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(Path(gettempdir(), f"pit-{zlib.crc32(bytes(path.resolve()))}.lock"))
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise UserError(f"--output {path} is being written by another process.") from None
    done = rows_done(path, f'{{"made_with": {stamp}, '.encode(), len(requests), cfg.rl_batch)
    prompts = fit_prompts(lm, cfg, requests)
    # backslashreplace: half a character (a lone surrogate) in a row goes out as it came in
    with open(path, "a", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
        for start in progress(range(done, len(requests), cfg.rl_batch)):
            batch = slice(start, start + cfg.rl_batch)
            seed_all(settings.seed, "infer", start)
            rounds = list(improve_rounds(lm, cfg, settings, prompts[batch], responses[batch]))
            for i, row in enumerate(originals[batch]):
                versions = [texts[i] for texts, _ in rounds]
                gaps = [of_round[i] for _, of_round in rounds[1:]]
                best = end_of(settings.stop, versions, gaps)
                ours = dict(
                    improved=versions[best],
                    versions=versions,
                    made_with=stamp,
                    gaps=[round(gap, 3) for gap in gaps],
                )
                # "made_with" stands here twice: once so that the line begins with it, once so that
                # it wins over a column of that name
                line = {"made_with": stamp, **row, **ours}
                file.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")
            file.flush()
    print(f"{path}: {len(requests):,} rows, {done:,} of them done before.")


def rows_done(path, begin, total, batch):
    """How many rows an earlier run of this command wrote to `path`; half a batch is cut off.

    begin: what each line begins with: a checksum of the settings, PIT's weights and all rows.
    """
    text = path.read_bytes() if path.exists() else b""
    *lines, cut_off = text.split(b"\n")  # cut_off: what a kill left of a line, or nothing
    whole = all(line.startswith(begin) for line in lines)
    part = begin.startswith(cut_off) or cut_off.startswith(begin)  # either may be the longer one
    if not (whole and part):
        raise UserError(
            f"--output {path} exists, and was made with other rows, settings or weights. "
            "Give another --output."
        )
    done = len(lines)
    if done < total:  # a batch that is rewritten as a whole draws the same numbers
        done -= done % batch
    if text:
        os.truncate(path, sum(len(line) + 1 for line in lines[:done]))
    return done


def fit_prompts(lm, cfg, requests):
    """Check each Request -> their prompts, cut where they are too long."""
    prompts = []
    cut = 0
    for _, turns, response, place in requests:
        # is it one that this run can answer?
        if not is_prompt(turns):
            raise UserError(
                f"{place}: user and assistant must take turns, the user first and last."
            )
        if cfg.data == "synthetic" and is_other_task(turns[-1]["content"], response):
            raise UserError(f"{place}: {OTHER_TASK}")
        # are prompt and answer as long as those of its training, at most?
        prompt = shorten(turns, lm, cfg.max_prompt)
        if prompt is None:
            raise UserError(
                f"{place}: even after cutting, the prompt is longer than {cfg.max_prompt} tokens, "
                "the --max-prompt of this run."
            )
        # + 1: an answer that was cut off has max_response tokens, and gets its EOS only here
        if response and len(lm.encode_response(response)) > cfg.max_response + 1:
            raise UserError(
                f"{place}: the response is longer than {cfg.max_response} tokens, the "
                "--max-response of this run."
            )
        prompts.append(prompt)
        if prompt != turns:
            cut += 1
    if cut:
        print(f"Prompts cut to the last {cfg.max_prompt} tokens (--max-prompt): {cut:,}.")
    return prompts


# ---- while training ----------------------------------------------------------------------------


def show_samples(lm, run, stage, pairs):
    """Answer a few prompts after a stage, and improve the answers once PIT can -> samples.md."""
    path = run.path / "samples.md"
    title = f"\n## after {stage}\n"
    page = read_text(path, errors="replace")
    if title in page:  # looked up each time: a kill may come between a stage and its samples
        return
    # 1. the policy's answers
    prompts = [pair.prompt for pair in pairs]
    policy = POLICY if POLICY in lm.roles else "policy_sft"
    seed_all(run.config.seed, "samples")
    answers = lm.answer(policy, prompts, run.config)
    if all(len(lm.encode_response(text)) > run.config.max_response for text in answers):
        print(f"  Warning: {policy} writes without end. Has it learned to stop? Try a higher")
        print("  --max-response, more --sft-steps, or a base that knows chats (-Instruct).")
    texts = {"prompt": [prompt[-1]["content"] for prompt in prompts], policy: answers}
    # 2. the same answers, improved
    if not stage.startswith("policy"):  # PIT's rounds, also those of `ablate`
        texts[stage] = improve(lm, stage, prompts, answers, run.config)
    # 3. prompt by prompt, on the console and in the file
    samples = ""
    for row in zip(*texts.values()):
        samples += "\n"
        for who, text in zip(texts, row):
            samples += fill(f"- {who}: {text}", 80, subsequent_indent="  ") + "\n"
    print(samples)
    write_text(path, page + title + samples)
