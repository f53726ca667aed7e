"""Using PIT: answer, improve, iterate, and the baselines that spend the same number of generations.

y_0 ~ M_P^RL(x)            y_{k+1} ~ M_PIT^RL(x, y_k)            gap_k = R_PIT(x, y_{k+1}, y_k), above 0 for "better"
"""

import json
import os

import torch
from transformers import AutoConfig

import reward
from data import BadRow, improve_prompt, read_columns, read_turns, real_text, rows_of_file, shorten
from models import in_parts
from run import UserError, progress, seed_all


def answer(lm, role, prompts, cfg, temperature=1.0):
    """One answer by policy `role` to each prompt (lists of chat messages) -> texts."""
    return write(lm, role, [lm.encode_prompt(prompt) for prompt in prompts], cfg, temperature)


def improve(lm, role, prompts, references, cfg, temperature=1.0):
    """One improvement by PIT model `role` of each reference (texts) -> texts."""
    pairs = zip(prompts, references)
    return write(lm, role, [lm.encode_prompt(improve_prompt(x, y_ref)) for x, y_ref in pairs], cfg, temperature)


def write(lm, role, prompts, cfg, temperature):
    texts = []
    for start in range(0, len(prompts), cfg.rl_batch):
        batch = prompts[start : start + cfg.rl_batch]
        texts += lm.decode(lm.generate(role, batch, cfg.max_response, temperature).responses)
    return texts


def gaps(lm, prompts, answers, references, cfg):
    """How much better R_PIT holds each answer to be than its reference -> (N,) on the CPU; 0 means no change."""
    encoded = [lm.encode_prompt(improve_prompt(x, y_ref)) for x, y_ref in zip(prompts, references)]
    answers, references = ([lm.encode_response(text) for text in texts] for texts in (answers, references))
    return reward.gap(lm, encoded, answers, references, cfg.micro_batch).cpu()


def rewards(lm, role, prompts, answers, cfg):
    """R_P, or a judge by its role, of each answer -> (N,) on the CPU."""
    return score(lm, role, [lm.encode_prompt(x) for x in prompts], answers, cfg)


@torch.no_grad()
def score(lm, role, prompts, answers, cfg):
    lm.activate(role)
    tokens = lm.collate(prompts, [lm.encode_response(text) for text in answers])
    return in_parts(lambda part: lm.scores(role, part), tokens, cfg.micro_batch).cpu()


def best_of_n(lm, prompts, candidates, cfg):
    """The candidate that R_P scores highest for each prompt; candidates: n lists of texts."""
    scores = torch.stack([rewards(lm, "reward_policy", prompts, texts, cfg) for texts in candidates])  # (n, N)
    return [candidates[best][i] for i, best in enumerate(scores.argmax(0).tolist())]


def iterate(lm, policy, pit, prompt, cfg, rounds, temperature, response=None):
    """Yield (text, gap over the text before) for one prompt: first the policy's answer, or `response`, with gap None."""
    text = response if response is not None else answer(lm, policy, [prompt], cfg, temperature)[0]
    yield text, None
    for _ in range(rounds):
        better = improve(lm, pit, [prompt], [text], cfg, temperature)[0]
        yield better, gaps(lm, [prompt], [better], [text], cfg).item()
        text = better


# ---- whole files -----------------------------------------------------------------------------------------------------------


def read_rows(path):
    """Rows with a `prompt` (text or messages), and a `response` where there is one -> [(row, messages, response or None)]."""
    rows = []
    for place, row in rows_of_file(path):
        try:
            row = read_columns(row)
            prompt = read_turns(row.get("prompt", ""), "prompt")
            response = real_text(row["response"], "response") if "response" in row else None
            if not prompt or prompt[-1]["role"] != "user" or response == "":
                raise BadRow("`prompt` must end in the user's turn, and neither it nor `response` may be empty")
        except BadRow as error:
            raise UserError(f"{path}, {place}: {error}.") from None
        rows.append((row, prompt, response))
    return rows


def rows_done(path, rows):
    """How many rows an earlier start has answered in the output `path`; a line that it left half-written is taken off."""
    text = path.read_bytes() if path.exists() else b""
    *lines, rest = text.split(b"\n")
    begin = b'{"improved": '
    try:
        prompts = [json.loads(line)["prompt"] for line in lines if line.startswith(begin)]
    except (ValueError, KeyError):
        prompts = []
    if prompts != [row["prompt"] for row, *_ in rows[: len(lines)]] or not rest.startswith(begin[: len(rest)]):
        raise UserError(f"--output {path} is there already, and is not the beginning of this work. Give another --output.")
    if rest:
        os.truncate(path, len(text) - len(rest))
    return len(lines)


def improve_file(lm, policy, pit, rows, path, cfg, rounds, temperature, seed):
    """Append to the JSONL file `path` each row with its improved text, the texts before it, and their gaps, in order."""
    done = rows_done(path, rows)
    with open(path, "a", encoding="utf-8", newline="\n") as file:
        for start in progress(range(done, len(rows), cfg.rl_batch)):
            batch = rows[start : start + cfg.rl_batch]
            seed_all(seed, "infer", start)
            prompts = [shorten(turns, lambda turns: len(lm.encode_prompt(turns)), cfg.max_prompt) for _, turns, _ in batch]
            if None in prompts:
                raise UserError(f"Row {start + prompts.index(None) + 1}: no cut brings its prompt to {cfg.max_prompt} tokens.")
            written = iter(answer(lm, policy, [p for p, row in zip(prompts, batch) if row[2] is None], cfg, temperature))
            texts, steps = [[text if text is not None else next(written) for *_, text in batch]], []
            for _ in range(rounds):
                texts.append(improve(lm, pit, prompts, texts[-1], cfg, temperature))
                steps.append(gaps(lm, prompts, texts[-1], texts[-2], cfg).tolist())
            for (row, *_), versions, worth in zip(batch, zip(*texts), zip(*steps)):
                line = {"improved": versions[-1]} | row | {"versions": versions, "gaps": [round(gap, 3) for gap in worth]}
                file.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")
            file.flush()


# ---- for other programs -----------------------------------------------------------------------------------------------------


def export(lm, role, source, folder, merge):
    """Write the role saved in `source` for plain peft, or merged for plain transformers. Merging uses this LM up."""
    lm.load(role, source)
    eos, model = lm.tokenizer.convert_ids_to_tokens(lm.eos), lm.peft.get_base_model()
    lm.tokenizer.eos_token, lm.tokenizer.pad_token = eos, lm.tokenizer.convert_ids_to_tokens(lm.pad)
    lm.tokenizer.save_pretrained(folder)
    if not merge:
        lm.peft.peft_config[role].base_model_name_or_path = str(model.name_or_path)
        return lm.save(role, folder)
    model = lm.peft.merge_and_unload(adapter_names=[role])
    for config in (model.config, model.generation_config):  # answers end where our own do
        config.eos_token_id, config.pad_token_id = lm.eos, lm.pad
    model.to(AutoConfig.from_pretrained(model.name_or_path).dtype or model.dtype).save_pretrained(folder)
