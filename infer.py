"""Using PIT: answer, improve, iterate, stop; and the baselines: Self-Refine and best-of-n.

y_0 ~ M_P^RL(x)            y_{k+1} ~ M_PIT^RL(x, y_k)            gap_k = R_PIT(x, y_{k+1}, y_k) - R_PIT(x, y_k, y_k)

Run: python pit.py infer --run runs/tiny "..."
"""

import json
import os
import time
import zlib
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import torch
from transformers import AutoConfig

import reward
from data import BadRow, improve_prompt, is_prompt, max_length, read_columns, read_turns, real_text, rows_of_file, shorten
from errors import UserError
from run import progress, read_json, seed_all, write_json

# Self-Refine (arXiv 2303.17651) asks the policy itself, in words: once for feedback, once for the refined answer.
FEEDBACK = "What could be better in your answer? Name each flaw and say how to mend it. Do not write a new answer yet."
REFINE = "Now write your answer again with these flaws mended. Write nothing but the new answer."
FOLLOWS = 0.5  # Self-Refine applies where at least this share of the feedback is neither empty nor the answer once more
TEMPERATURES = (0.1, 0.4, 0.6, 0.8, 1.0, 1.25, 1.5)  # of Fig. 3
SAMPLED = 32_768  # tokens in memory at one time while texts are written, prompts included
ROUNDS = 5  # of Table 3
STOPS = ("rounds", "same", "gap", "time")  # what ends the rounds of improvement, see `after_round`


def talk(prompt, *texts):
    """A chat that goes on after its prompt, the assistant and the user by turns."""
    return [*prompt, *({"role": role, "content": text} for role, text in zip(cycle(("assistant", "user")), texts))]


def rows_at_a_time(cfg):
    """How many texts are written at one time: as many as SAMPLED holds, yet no more than four of PPO's batches."""
    return max(1, min(SAMPLED // max_length(cfg), 4 * cfg.rl_batch))


def answer(lm, role, chats, cfg, temperature=1.0):
    """One text by `role`, a policy or a PIT model, to each chat (lists of messages) -> texts."""
    texts, size = [], rows_at_a_time(cfg)
    for start in range(0, len(chats), size):
        batch = [lm.encode_prompt(chat) for chat in chats[start : start + size]]
        texts += lm.decode(lm.generate(role, batch, cfg.max_response, temperature).responses)
    return texts


def improve(lm, role, prompts, references, cfg, temperature=1.0):
    """One improvement by PIT model `role` of each reference (texts) -> texts."""
    return answer(lm, role, [improve_prompt(x, y_ref) for x, y_ref in zip(prompts, references)], cfg, temperature)


def gaps(lm, prompts, answers, references, cfg):
    """How much better R_PIT holds each answer to be than its reference -> (N,) on the CPU; 0 means no change."""
    encoded = [lm.encode_prompt(improve_prompt(x, y_ref)) for x, y_ref in zip(prompts, references)]
    answers, references = ([lm.encode_response(text) for text in texts] for texts in (answers, references))
    changed = reward.scores(lm, "reward_gap", lm.collate(encoded, answers), cfg.micro_batch)
    return reward.gap(lm, changed, encoded, references, cfg.micro_batch).cpu()


def rewards(lm, role, prompts, answers, cfg):
    """R_P, or a judge by its role, of each answer -> (N,) on the CPU."""
    tokens = lm.collate([lm.encode_prompt(x) for x in prompts], [lm.encode_response(text) for text in answers])
    return reward.scores(lm, role, tokens, cfg.micro_batch).cpu()


def best_of_n(lm, prompts, candidates, cfg):
    """The candidate that R_P scores highest for each prompt; candidates: n lists of texts."""
    scores = torch.stack([rewards(lm, "reward_policy", prompts, texts, cfg) for texts in candidates])  # (n, N)
    return [candidates[best][i] for i, best in enumerate(scores.argmax(0).tolist())]


def after_round(stop, before, text, gap, seconds, budget):
    """What a round of improvement (texts before and after it, its gap, the seconds so far) calls for, by stop rule `stop`:

    "next" round; "stop", and take the new text; or go "back" to the text before, and stop.
    """
    if stop == "gap" and (gap <= 0 or text == before):  # R_PIT holds the new text for no better than "no change"
        return "back"
    return "stop" if (stop == "same" and text == before) or (stop == "time" and seconds >= budget) else "next"


def end_of(stop, texts, gaps, spent, budget):
    """Where stop rule `stop` ends, of the texts y_0 ... y_K of one prompt -> (index of the answer, rounds that were made).

    gaps[k - 1] is that of texts[k] over the text before; spent[k]: seconds, or whatever unit `budget` has, after k rounds.
    """
    for k in range(1, len(texts)):
        then = after_round(stop, texts[k - 1], texts[k], gaps[k - 1], spent[k], budget)
        if then != "next":
            break
    return k - (then == "back"), k


def iterate(lm, policy, pit, prompt, cfg, rounds, temperature, response=None, stop="rounds", budget=60.0):
    """Yield (text, gap over the text before) for one prompt: first the policy's answer, or `response`, with gap None.

    At most `rounds` improvements, fewer where the stop rule says so (budget: seconds, for "time"). The last text is the answer.
    """
    text = response.strip() if response else answer(lm, policy, [prompt], cfg, temperature)[0]
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


def check_request(prompt, response, input, output, stop):
    """Complain about options of the command `infer` that do not go together."""
    if (prompt is None) == (input is None) or (input is None) != (output is None) or input and response:
        raise UserError("Give either a prompt (and --response, if you like), or both --input and --output.")
    if output and output.suffix == ".gz":
        raise UserError(
            f"--output {output}: it is written as plain text, so that it can go on where it stopped. Leave out .gz."
        )
    for name, text in (("the prompt", prompt), ("--response", response)):
        try:
            if text is not None and not real_text(text, name):
                raise BadRow(f"{name} is empty")
        except BadRow as error:
            raise UserError(f"{error}. Say what to answer; without --response the policy answers first.") from None
    if stop not in STOPS or stop == "time" and input:
        raise UserError(f"--stop {stop}: choose one of {', '.join(STOPS)}; time is not for whole files.")


def fit_prompt(lm, turns, response, cfg, name):
    """A prompt, its oldest part cut off where it is longer than --max-prompt; complains, by name, of what no model has seen."""
    if not is_prompt(turns):
        raise UserError(f"{name}: a prompt is turns of user and assistant, the user's first and last.")
    short = shorten(turns, lambda turns: len(lm.encode_prompt(turns)), cfg.max_prompt)
    if short is None:
        raise UserError(f"{name}: no cut brings the prompt to the {cfg.max_prompt} tokens of this run's --max-prompt.")
    if response and len(lm.encode_response(response)) > cfg.max_response + 1:
        raise UserError(f"{name}: the response is longer than the {cfg.max_response} tokens of this run's --max-response.")
    return short


# ---- whole files -----------------------------------------------------------------------------------------------------------


def read_rows(path):
    """Rows with a `prompt` (text or messages), maybe a `response` -> [(row, messages, response or None, file and line)]."""
    rows = []
    for place, row in rows_of_file(path):
        try:
            row = read_columns(row)
            if "prompt" not in row:
                raise BadRow("there is no `prompt`")
            prompt = read_turns(row["prompt"], "prompt")
            response = real_text(row["response"], "response") if "response" in row else None
            if not prompt or response == "":
                raise BadRow("neither `prompt` nor `response` may be empty")
        except BadRow as error:
            raise UserError(f"{path}, {place}: {error}.") from None
        rows.append((row, prompt, response, f"{path}, {place}"))
    return rows


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
        raise UserError(f"--output {path} is there already, and is not the beginning of this work. Give another --output.")
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
    with open(path, "a", encoding="utf-8", errors="backslashreplace", newline="\n") as file:  # half a character as it came
        for start in progress(range(done, len(rows), cfg.rl_batch)):
            batch, prompts = (some[start : start + cfg.rl_batch] for some in (rows, fitting))
            seed_all(seed, "infer", start)
            written = iter(answer(lm, policy, [p for p, row in zip(prompts, batch) if row[2] is None], cfg, temperature))
            texts, steps = [[text if text is not None else next(written) for _, _, text, _ in batch]], []
            for _ in range(rounds):
                texts.append(improve(lm, pit, prompts, texts[-1], cfg, temperature))
                steps.append(gaps(lm, prompts, texts[-1], texts[-2], cfg).tolist())
            for (row, *_), versions, worth in zip(batch, zip(*texts), zip(*steps)):
                kept, _ = end_of(stop, versions, worth, [0] * len(versions), 0)
                ours = {"improved": versions[kept], "versions": versions, "gaps": [round(gap, 3) for gap in worth]}
                line = {"improved": None} | row | ours  # "improved" first: that is how `rows_done` knows its lines
                file.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")
            file.flush()


# ---- for other programs -----------------------------------------------------------------------------------------------------


def check_export(run, role, folder, merge):
    """Complain about a role that cannot be exported like this, and a folder that is there already."""
    if Path(role).name != role or role in ("", ".."):
        raise UserError(f"--adapter {role}: give the name of a role, such as pit_rl1 or policy_rl, not a path.")
    run.need(role, "all")
    if folder.exists():
        raise UserError(f"--to {folder} is there already. Give a new folder.")
    if merge and (run.adapter(role) / "head.safetensors").exists():
        raise UserError(f"{role} is a scalar head on an adapter, not a model that writes: leave out --merge.")


def export(lm, role, source, folder, merge):
    """Write the role saved in `source` for plain peft, or merged for plain transformers. Merging uses this LM up."""
    lm.load(role, source)
    eos, model = lm.tokenizer.convert_ids_to_tokens(lm.eos), lm.peft.get_base_model()
    pad = lm.pad if lm.pad in lm.tokenizer.all_special_ids else lm.eos  # a word as padding would be left out when decoding
    lm.tokenizer.eos_token, lm.tokenizer.pad_token = eos, lm.tokenizer.convert_ids_to_tokens(pad)
    lm.tokenizer.save_pretrained(folder)
    if not merge:
        lm.peft.peft_config[role].base_model_name_or_path = str(model.name_or_path)
        return lm.save(role, folder)
    model = lm.peft.merge_and_unload(adapter_names=[role])
    for config in (model.config, model.generation_config):  # answers end where our own do
        config.eos_token_id, config.pad_token_id = lm.eos, pad
    model.to(AutoConfig.from_pretrained(model.name_or_path).dtype or model.dtype).save_pretrained(folder)


# ---- the sides of every comparison, sampled once ---------------------------------------------------------------------------


@dataclass(eq=False)  # hashable: a side that goes by several names is judged once
class Side:
    """One final answer to each of N prompts; tokens written on the way to it, each EOS included (N,); generations."""

    texts: list
    tokens: list
    generations: int


class Answers:
    """Texts are sampled once, and kept in runs/NAME/answers.json while their writer and what it reads stay the same."""

    def __init__(self, lm, run, prompts):
        self.lm, self.run, self.prompts, self.path = lm, run, prompts, run.path / "answers.json"
        self.kept = read_json(self.path)

    def write(self, name, role, chats, temperature=1.0, after=None):
        """Let `role` answer each chat -> Side; `after`: the side whose texts stand in the chats, and whose cost counts too."""
        cfg = self.run.config
        writer = zlib.crc32((self.run.adapter(role) / "adapter_model.safetensors").read_bytes())
        made_of = zlib.crc32(repr((writer, chats, temperature, cfg.max_response, cfg.seed)).encode())
        if self.kept.get(name, {}).get("made_of") != made_of:
            print(f"\r  writing {name:30}", end="", flush=True)
            seed_all(cfg.seed, "answers", name)
            self.kept[name] = {"made_of": made_of, "texts": answer(self.lm, role, chats, cfg, temperature)}
            write_json(self.path, self.kept)
        texts = self.kept[name]["texts"]
        tokens = [len(self.lm.encode_response(text)) for text in texts]
        after = after or Side([], [0] * len(texts), 0)
        return Side(texts, [new + old for new, old in zip(tokens, after.tokens)], after.generations + 1)

    def improve(self, name, role, side, temperature=1.0):
        chats = [improve_prompt(x, y_ref) for x, y_ref in zip(self.prompts, side.texts)]
        return self.write(name, role, chats, temperature, side)

    def feedback(self, name, role, side, temperature=1.0):
        chats = [talk(x, y, FEEDBACK) for x, y in zip(self.prompts, side.texts)]
        return self.write(f"{name} feedback", role, chats, temperature, side)

    def self_refine(self, name, role, side, temperature=1.0):
        feedback = self.feedback(name, role, side, temperature)
        chats = [talk(x, y, FEEDBACK, said, REFINE) for x, y, said in zip(self.prompts, side.texts, feedback.texts)]
        return self.write(name, role, chats, temperature, feedback)

    def best_of(self, sides):
        texts = best_of_n(self.lm, self.prompts, [side.texts for side in sides], self.run.config)
        return Side(texts, [sum(row) for row in zip(*(side.tokens for side in sides))], sum(side.generations for side in sides))


def write_sides(answers, pairs, last):
    """All sides of Table 1, the temperatures (NAME@T) and the rounds (NAME#K) of PIT and Self-Refine, by name -> dict of Side.

    `last` is the adapter of PIT's last round. Where Self-Refine does not apply, its sides are missing; the second result says
    why, and is None otherwise.
    """
    sides = {"y_w": Side([pair.chosen for pair in pairs], [0] * len(pairs), 0)}
    sides["policy_sft"] = answers.write("policy_sft", "policy_sft", answers.prompts)
    samples = "original", "second_sample", "third_sample"
    sides |= {name: answers.write(name, "policy_rl", answers.prompts) for name in samples}
    original = sides["original"]
    sides |= {name: answers.improve(name, name, original) for name in ("pit_sft", "pit_rl0") if name != last}
    sides |= {f"best_of_{n}": answers.best_of([sides[name] for name in samples[:n]]) for n in (2, 3)}
    methods = {"pit": lambda name, side, T=1.0: answers.improve(name, last, side, T)}
    refusal = self_refine_refusal(answers, original)
    if refusal is None:
        methods["self_refine"] = lambda name, side, T=1.0: answers.self_refine(name, "policy_rl", side, T)
        sides["self_refine_sft"] = answers.self_refine("self_refine_sft", "policy_sft", original)
    for method, write_one in methods.items():
        side = sides[method] = sides[f"{method}@1.0"] = sides[f"{method}#1"] = write_one(method, original)
        sides |= {f"{method}@{T}": write_one(f"{method}@{T}", original, T) for T in TEMPERATURES if T != 1.0}
        for k in range(2, ROUNDS + 1):
            side = sides[f"{method}#{k}"] = write_one(f"{method}#{k}", side)
    return sides, refusal


def self_refine_refusal(answers, original):
    """Why Self-Refine does not apply to this model, in words, or None where it does."""
    if answers.run.config.model == "tiny":
        return "the built-in base cannot follow such prompts"
    texts = answers.feedback("self_refine", "policy_rl", original).texts  # kept, and used again by `self_refine`
    follows = sum(bool(text) and text != y for text, y in zip(texts, original.texts)) / len(texts)
    return None if follows >= FOLLOWS else f"only {follows:.0%} of the policy's feedback says anything but the answer again"
