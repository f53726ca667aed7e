"""Using PIT: answer, improve, iterate, stop.

y_0 ~ M_P^RL(x)            y_{k+1} ~ M_PIT^RL(x, y_k)            gap_k = R_PIT(x, y_{k+1}, y_k) - R_PIT(x, y_k, y_k)

Run: python pit.py infer --run runs/tiny "..."
"""

import json
import os
import time
from textwrap import fill

from data import improve_prompt, shorten
from errors import UserError
from files import is_prompt
from reward import gaps
from run import progress, seed_all, write_text

STOPS = ("rounds", "same", "gap", "time")  # what ends the rounds of improvement, see `after_round`


def improve(lm, role, prompts, references, cfg, temperature=1.0):
    """One improvement by PIT model `role` of each reference (texts) -> texts."""
    chats = [improve_prompt(x, y_ref) for x, y_ref in zip(prompts, references)]
    return lm.answer(role, chats, cfg, temperature)


def after_round(stop, before, text, gap, seconds, budget):
    """What a round of improvement (texts before and after it, its gap, the seconds so far) calls for, by stop rule `stop`:

    "next" round; "stop", and take the new text; or go "back" to the text before, and stop.
    """
    if stop == "gap" and (
        gap <= 0 or text == before
    ):  # R_PIT holds the new text for no better than "no change"
        return "back"
    return (
        "stop"
        if (stop == "same" and text == before) or (stop == "time" and seconds >= budget)
        else "next"
    )


def end_of(stop, texts, gaps, spent, budget):
    """Where stop rule `stop` ends, of the texts y_0 ... y_K of one prompt -> (index of the answer, rounds that were made).

    gaps[k - 1] is that of texts[k] over the text before; spent[k]: seconds, or whatever unit `budget` has, after k rounds.
    """
    for k in range(1, len(texts)):
        then = after_round(stop, texts[k - 1], texts[k], gaps[k - 1], spent[k], budget)
        if then != "next":
            break
    return k - (then == "back"), k


def iterate(
    lm, policy, pit, prompt, cfg, rounds, temperature, response=None, stop="rounds", budget=60.0
):
    """Yield (text, gap over the text before) for one prompt: first the policy's answer, or `response`, with gap None.

    At most `rounds` improvements, fewer where the stop rule says so (budget: seconds, for "time"). The last text is the answer.
    """
    text = response.strip() if response else lm.answer(policy, [prompt], cfg, temperature)[0]
    yield text, None
    started = time.monotonic()
    for _ in range(rounds):
        better = improve(lm, pit, [prompt], [text], cfg, temperature)[0]
        gap = gaps(lm, [prompt], [better], [text], cfg).item()
        then = after_round(stop, text, better, gap, time.monotonic() - started, budget)
        if then != "back":
            yield better, gap
        if then != "next":
            return
        text = better


def fit_prompt(lm, turns, response, cfg, name):
    """A prompt, its oldest part cut off where it is longer than --max-prompt; complains, by name, of what no model has seen."""
    if not is_prompt(turns):
        raise UserError(
            f"{name}: a prompt is turns of user and assistant, the user's first and last."
        )
    short = shorten(turns, lambda turns: len(lm.encode_prompt(turns)), cfg.max_prompt)
    if short is None:
        raise UserError(
            f"{name}: no cut brings the prompt to the {cfg.max_prompt} tokens of this run's --max-prompt."
        )
    if response and len(lm.encode_response(response)) > cfg.max_response + 1:
        raise UserError(
            f"{name}: the response is longer than the {cfg.max_response} tokens of this run's --max-response."
        )
    return short


def rows_done(path, rows, rounds):
    """How many rows an earlier start has answered in the output `path`; a line that it left half-written is taken off."""
    text = path.read_bytes() if path.exists() else b""
    *lines, rest = text.split(b"\n")
    begin = b'{"improved": '
    try:
        done = [json.loads(line) for line in lines if line.startswith(begin)]
        done = [(line["prompt"], line.get("response"), len(line["gaps"])) for line in done]
    except (ValueError, KeyError, TypeError):
        done = None
    expected = [(row["prompt"], row.get("response"), rounds) for row, *_ in rows[: len(lines)]]
    if done != expected or not rest.startswith(begin[: len(rest)]):
        raise UserError(
            f"--output {path} is there already, and is not the beginning of this work. Give another --output."
        )
    if rest:
        os.truncate(path, len(text) - len(rest))
    return len(lines)


def improve_file(lm, policy, pit, rows, path, cfg, rounds, temperature, seed, stop="rounds"):
    """Append to the JSONL file `path` each row with its improved text, the texts of all rounds, and their gaps, in order.

    All rounds are made for a whole batch of rows at once; the stop rule chooses for each row which text is its answer.
    """
    done = rows_done(path, rows, rounds)
    fitting = [fit_prompt(lm, turns, response, cfg, name) for _, turns, response, name in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(
        path, "a", encoding="utf-8", errors="backslashreplace", newline="\n"
    ) as file:  # half a character as it came
        for start in progress(range(done, len(rows), cfg.rl_batch)):
            batch, prompts = (some[start : start + cfg.rl_batch] for some in (rows, fitting))
            seed_all(seed, "infer", start)
            written = iter(
                lm.answer(
                    policy,
                    [p for p, row in zip(prompts, batch) if row[2] is None],
                    cfg,
                    temperature,
                )
            )
            texts, steps = (
                [[text if text is not None else next(written) for _, _, text, _ in batch]],
                [],
            )
            for _ in range(rounds):
                texts.append(improve(lm, pit, prompts, texts[-1], cfg, temperature))
                steps.append(gaps(lm, prompts, texts[-1], texts[-2], cfg).tolist())
            for (row, *_), versions, worth in zip(batch, zip(*texts), zip(*steps)):
                kept, _ = end_of(stop, versions, worth, [0] * len(versions), 0)
                ours = {
                    "improved": versions[kept],
                    "versions": versions,
                    "gaps": [round(gap, 3) for gap in worth],
                }
                line = (
                    {"improved": None} | row | ours
                )  # "improved" first: that is how `rows_done` knows its lines
                file.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")
            file.flush()


def show_samples(lm, run, stage, pairs):
    """Answer the same prompts after each stage, and improve the answers once there is a PIT model -> samples.md, console."""
    path, page = run.path / "samples.md", f"\n## after {stage}\n"
    before = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    if page in before:  # asked each time: a kill may come between a stage and its samples
        return
    cfg, policy = run.config, "policy_rl" if "policy_rl" in lm.roles else "policy_sft"
    prompts = [pair.prompt for pair in pairs]
    seed_all(cfg.seed, "samples")
    answers = lm.answer(policy, prompts, cfg)
    improved = improve(lm, stage, prompts, answers, cfg) if stage.startswith("pit") else None
    for i, prompt in enumerate(prompts):
        rows = {"prompt": prompt[-1]["content"], policy: answers[i]} | (
            {stage: improved[i]} if improved else {}
        )
        page += "\n" + "".join(f"- {who}: {text}\n" for who, text in rows.items())
        if i < 2:
            for who, text in rows.items():
                lines = dict(
                    initial_indent=f"  {who:10} ",
                    subsequent_indent=" " * 13,
                    max_lines=3,
                    placeholder=" [...]",
                )
                print(fill(text, 100, **lines))
    write_text(path, before + page)
