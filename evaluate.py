"""The paper's evidence for a run, measured: win, lose, delta with 95% intervals, all tables.

Every side of a comparison answers the same held-out prompts once (baselines.py), and every judge
scores each text once (judges.py). The tables are views of these texts and scores. Numbers go to
results.json, which report.py draws; texts and scores go to answers.jsonl, for anybody.

Run: python pit.py eval --run runs/tiny, under a minute
"""

import json
from collections import defaultdict
from itertools import permutations

import numpy as np
import torch

import infer
import reward
from baselines import ORIGINAL, ROUNDS, TEMPERATURES, Answers, Key, all_keys, round_keys
from data import Pair, improve_prompt
from judges import SAME
from run import progress, write_text
from votes import questions_about, read_answers, read_votes

COMPARISONS = [
    ("original", "y_w"),
    ("original", "policy_sft"),
    ("pit", "original"),
    ("pit", "y_w"),
    ("self_refine", "original"),
    ("self_refine_sft", "original"),
    ("pit_sft", "original"),
    ("pit_rl0", "original"),
    ("best_of_2", "original"),
    ("best_of_3", "original"),
    ("pit", "self_refine"),
    ("pit", "best_of_2"),
    ("pit", "best_of_3"),
    ("pit", "second_sample"),
    ("pit", "pit_sft"),
    ("pit", "pit_rl0"),
]
GAP_MODELS = {
    "reward_gap": "R_PIT, Eq. 2 centred",
    "reward_policy": "R_P(y) - R_P(y_ref)",
    "reward_gap2": "Eq. 2 as published",
    "reward_gap3": "Eq. 2, first three terms",
}
Z = 1.96  # standard deviations on either side in a 95% interval


# ---- statistics --------------------------------------------------------------------------------


def interval(values, bounds=None, resamples=2000, seed=0):
    """The 95% bootstrap interval of the mean of N values, one per prompt -> [low, high].

    Where all values are the same, resampling sees no doubt at all: [1, 1] for 5 wins of 5. With
    `bounds`, the lowest and the highest possible value, the interval is then Wilson's for what has
    not happened in N trials: a share of z^2 / (N + z^2) may lie at either bound.
    """
    values = np.asarray(values, dtype=float)
    n = len(values)
    if bounds is not None and np.ptp(values) == 0:
        unseen = Z**2 / (n + Z**2)
        return [float(values[0] + unseen * (bound - values[0])) for bound in bounds]
    draws = np.random.default_rng(seed).integers(n, size=(resamples, n))
    return np.quantile(values[draws].mean(1), [0.025, 0.975]).tolist()


def outcomes(a, b, margin):
    """1 where score a is above score b, -1 where it is below, 0 for a tie."""
    difference = np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
    return np.where(np.abs(difference) < margin, 0, np.sign(difference))


def compare(a, b, margin=SAME, **options):
    """Do the scores a beat b? Both (n,), for the same prompts -> n, win, lose, tie, delta, ci95.

    delta = win - lose. Its interval is a paired bootstrap: a prompt is drawn with both its scores.
    Where all n outcomes are the same, it is Wilson's instead (see `interval`).
    """
    outcome = outcomes(a, b, margin)  # (n,)
    return {
        "n": len(outcome),
        "win": mean(outcome == 1),
        "lose": mean(outcome == -1),
        "tie": mean(outcome == 0),
        "delta": mean(outcome),
        "ci95": interval(outcome, bounds=(-1, 1), **options),
    }


def mean(numbers):
    return float(np.mean(numbers))


def elo(scores, margin=SAME, resamples=200, seed=0):
    """Scores of K sides for the same N prompts, (K, N) -> Elo ratings (K,), 95% intervals (K, 2).

    Side 0 has 1000. All K (K - 1) / 2 comparisons are fitted at once, a tie being half a win for
    both, so there is no order of games to depend on. The interval is a bootstrap over prompts.
    """
    scores = np.asarray(scores, dtype=float)
    K, N = scores.shape
    # 1. what side i gets against side j on each prompt: 1, 0.5 or 0
    difference = scores[:, None] - scores[None]  # (K, K, N)
    points = np.where(np.abs(difference) < margin, 0.5, difference > 0)
    # 2. how often each resample draws each prompt; the first one is the prompts themselves
    drawn = np.random.default_rng(seed).multinomial(N, np.full(N, 1 / N), size=resamples)
    times = np.vstack([np.ones(N), drawn])  # (S, N), S = 1 + resamples
    # 3. points of i against j in each resample, and half a drawn game more, which keeps the rating
    #    of a side that never wins finite
    wins = np.einsum("sn,ijn->sij", times, points) + 0.25
    wins[:, range(K), range(K)] = 0  # nobody plays himself
    # 4. ratings
    ratings = 1000 + 400 * np.log10(bradley_terry(wins))  # (S, K)
    return ratings[0].tolist(), np.quantile(ratings[1:], [0.025, 0.975], axis=0).T.tolist()


def bradley_terry(wins, tolerance=1e-9):
    """S fits to `wins` of i over j, (S, K, K), of P(i beats j) = p_i / (p_i + p_j) -> p, (S, K).

    Hunter's MM iteration (2004), p_i <- wins_i / sum_j games_ij / (p_i + p_j), until no p changes,
    which takes thousands of steps where a side hardly ever loses. p_0 = 1.
    """
    games = wins + wins.transpose(0, 2, 1)  # (S, K, K)
    strength = np.ones(wins.shape[:2])  # (S, K)
    change = np.inf
    while change > tolerance:
        before = strength
        expected = games / (before[:, :, None] + before[:, None])  # (S, K, K), per unit of strength
        strength = wins.sum(2) / expected.sum(2)
        strength = strength / strength[:, :1]
        change = np.abs(strength / before - 1).max()
    return strength


def calibration(gaps, bins=10):
    """Gaps of better over worse and of worse over better, (2, n) -> the error of sigma(gap).

    This is the expected calibration error of sigma(gap) as a probability; 0 is perfect. With noisy
    labels Eq. 2 cannot be perfect: where annotators prefer the better text with p = 0.8, its
    minimum is at sigma(gap) = 0.75, since r^wl and r^lw, two gaps apart, are to be 0.8 as well.
    """
    p = 1 / (1 + np.exp(-np.concatenate(gaps)))  # (2n,)
    better = np.repeat([1.0, 0.0], len(gaps[0]))
    bin_of = np.minimum((p * bins).astype(int), bins - 1)
    error = 0.0
    for k in range(bins):
        error += abs((p - better)[bin_of == k].sum())
    return float(error / len(p))


# ---- measuring ---------------------------------------------------------------------------------


class View:
    """The sides as one judge sees them. What is asked twice was written and scored once."""

    def __init__(self, name, judge, answers):
        self.name, self.judge, self.answers = name, judge, answers

    def scores(self, key):
        """The judge's scores of one side -> (N,)."""
        return self.judge.score(self.answers.prompts, self.answers.side(key).texts)

    def compare(self, a, b):
        return compare(self.scores(a), self.scores(b), self.judge.margin)


def evaluate(lm, run, pairs, last, judges):
    """Write, judge and compare all sides on held-out pairs -> results.json, answers.jsonl.

    last: the adapter of PIT's last round. judges: Judge by name, the main one first.
    """
    answers = Answers(lm, run, pairs[: run.config.eval_n], last)
    views = [View(name, judge, answers) for name, judge in judges.items()]
    main = views[0]
    refusal = answers.self_refine_refusal()
    methods = ["pit"] if refusal else ["pit", "self_refine"]
    keys = all_keys(methods, last)
    plain = [key for key in keys if key == Key(key.method)]  # temperature 1, one round: Table 1
    gaps = {}
    with progress(None, total=len(keys) + 1) as bar:
        # 1. every side: its texts, their scores, and R_PIT's gaps where PIT wrote them
        for key in keys:
            bar.set_postfix_str(f"  {key}")
            for view in views if key in plain else [main]:
                view.scores(key)
            if key.method.startswith("pit") and key.temperature == 1.0:
                gaps[key] = gaps_over_before(lm, answers, key)
            bar.update()
        # 2. the gap models, on pairs
        bar.set_postfix_str("  gap models")
        evidence = gap_evidence(lm, run.config, answers.pairs, written_pairs(main))
        bar.update()
    # 3. the tables, which look at these numbers in every way
    rows, missing = table1(views, plain, refusal)
    run.add_results(
        main=main.name,
        judges=judge_accuracy(views),
        table1=rows,
        not_applicable=missing,
        mean_score={view.name: means(view.scores, plain) for view in views},
        mean_tokens=means(lambda key: answers.side(key).lengths, plain),
        fig3=temperature_table(main, methods),
        cooler=main.compare(Key("pit", temperature=0.4), Key("pit")),
        table3=rounds_table(main, methods),
        rl=rl_table(answers, gaps),
        stops=stop_table(main, gaps),
        **evidence,
    )
    write_answers(run, views, plain)
    add_votes(run)


def gaps_over_before(lm, answers, key):
    """By R_PIT: how much better each text of a side is than the one that it improves -> (N,)."""
    texts, before = answers.side(key).texts, answers.before(key).texts
    gaps = np.zeros(len(texts))  # "no change" is 0
    changed = [i for i in range(len(texts)) if texts[i] != before[i]]
    columns = [[column[i] for i in changed] for column in (answers.prompts, texts, before)]
    if changed:
        gaps[changed] = reward.gaps(lm, *columns, answers.run.config)
    return gaps


def means(numbers_of, keys):
    return {key.method: mean(numbers_of(key)) for key in keys}


# ---- tables ------------------------------------------------------------------------------------


def judge_accuracy(views):
    """How often each judge, and "the longer wins", prefer y_w to y_l; a tie is half right."""
    better, worse = Key("y_w"), Key("y_l")
    side = views[0].answers.side
    rows = {"the longer wins": accuracy(compare(side(better).lengths, side(worse).lengths), 0)}
    for view in views:
        rows[view.name] = accuracy(view.compare(better, worse), view.judge.margin)
    return rows


def accuracy(row, margin):
    return {"accuracy": row["win"] + row["tie"] / 2, "margin": margin}


def table1(views, keys, refusal):
    """Table 1 by each judge -> its rows, and those that do not apply, with the reason."""
    rows, missing = [], []
    for view in views:
        for a, b in COMPARISONS:
            row = {"a": a, "b": b, "judge": view.name}
            if Key(a) in keys and Key(b) in keys:
                row |= view.compare(Key(a), Key(b))
                rows.append(row | costs(view.answers.side(Key(a)), view.answers.side(Key(b))))
            elif "pit_rl0" not in (a, b):  # after one round alone, that is `pit` itself
                missing.append(row | {"not_applicable": refusal})
    return rows, missing


def costs(a, b):
    """The lengths of two sides, and all that was generated for one answer of a."""
    return {
        "tokens_a": mean(a.lengths),
        "tokens_b": mean(b.lengths),
        "generated_tokens": mean(a.spent),
        "generations": a.generations,
    }


def temperature_table(view, methods):
    """Fig. 3: one improvement at each temperature against the original, and 0.4 against it."""
    rows = []
    for method in methods:
        best = Key(method, temperature=0.4)
        for T in TEMPERATURES:
            key = Key(method, temperature=T)
            row = {"method": method, "temperature": T} | view.compare(key, ORIGINAL)
            rows.append(row if key == best else row | {"04_over_it": view.compare(best, key)})
    return rows


def rounds_table(view, methods):
    """Table 3: the original and every round of each method; Elo, mean score, who beats whom."""
    keys = [ORIGINAL] + [key for method in methods for key in round_keys(method)]
    ratings, intervals = elo([view.scores(key) for key in keys], view.judge.margin)
    rows = []
    for key, rating, ends in zip(keys, ratings, intervals):
        scores = view.scores(key)
        row = {"method": key.method, "round": 0 if key == ORIGINAL else key.round}
        row |= {"elo": rating, "elo_ci95": ends}
        row |= {"mean": mean(scores), "mean_ci95": interval(scores)}
        row["over_original"] = view.compare(key, ORIGINAL)
        if key.round > 1:
            row["over_previous"] = view.compare(key, key._replace(round=key.round - 1))
        if key.method == "pit" and "self_refine" in methods:
            row["over_self_refine"] = view.compare(key, key._replace(method="self_refine"))
        rows.append(row)
    return rows


def rl_table(answers, gaps):
    """What each RL stage did to its own reward on held-out prompts: before, after, the rise."""
    rewards = {key.method: value for key, value in gaps.items() if key.round == 1}
    pit = list(rewards)  # after SFT, after round 0, ...
    for method in ("policy_sft", "original"):
        texts = answers.side(Key(method)).texts
        rewards[method] = answers.reward_policy.score(answers.prompts, texts)
    rows = []
    for before, after in [("policy_sft", "original"), *zip(pit, pit[1:])]:
        by = "R_P" if after == "original" else "gap by R_PIT"
        start, end = rewards[before], rewards[after]
        row = {"before": before, "after": after, "by": by, "start": mean(start), "end": mean(end)}
        rows.append(row | {"ci95": interval(end - start)})
    return rows


def stop_table(view, gaps):
    """Each stop rule on the same five rounds of PIT, cut short at each limit: mean score, tokens.

    For "time" the limit is the time of that many average rounds. Time goes with the tokens written,
    whatever the machine.
    """
    keys = [ORIGINAL, *round_keys("pit")]
    sides = [view.answers.side(key) for key in keys]
    texts = list(zip(*(side.texts for side in sides)))  # N times K + 1
    scores = np.stack([view.scores(key) for key in keys], 1)  # (N, K + 1)
    tokens = np.stack([side.spent for side in sides], 1)  # (N, K + 1)
    gap = np.stack([gaps[key] for key in keys[1:]], 1)  # (N, K)
    spent = tokens - tokens[:, :1]
    prompts = np.arange(len(texts))
    rows = []
    for stop in infer.STOPS:
        for limit in range(1, ROUNDS + 1):
            K = ROUNDS if stop == "time" else limit
            budget = limit * spent[:, -1].mean() / ROUNDS
            ends = [
                infer.end_of(stop, texts[i][: K + 1], gap[i], spent[i], budget) for i in prompts
            ]
            answer, rounds = np.transpose(
                ends
            )  # (N,) each: which text it is, after how many rounds
            final = scores[prompts, answer]
            row = {"stop": stop, "limit": limit, "mean": mean(final), "ci95": interval(final)}
            rows.append(row | {"tokens": mean(tokens[prompts, rounds])})
    return rows


# ---- gap models --------------------------------------------------------------------------------


def written_pairs(view):
    """PIT's answer and the original as preference pairs, by this judge; ties are left out."""
    pit, original = view.answers.side(Key("pit")), view.answers.side(ORIGINAL)
    above = view.scores(Key("pit")) - view.scores(ORIGINAL)
    pairs = []
    for i, prompt in enumerate(view.answers.prompts):
        better, worse = pit.texts[i], original.texts[i]
        if above[i] < 0:
            better, worse = worse, better
        if abs(above[i]) >= view.judge.margin:
            pairs.append(Pair(prompt, better, worse))
    return pairs


def gap_evidence(lm, cfg, annotated, written):
    """Fig. 2's four distributions, and how right every gap model is, on both kinds of pairs."""
    fig2, eq2 = {}, []
    for kind, pairs in (("annotated", annotated), ("written by models", written)):
        for role in GAP_MODELS:
            if not pairs or role not in lm.roles:
                continue
            scores = pair_scores(lm, cfg, role, pairs)
            if role == "reward_gap":
                four = np.round(scores, 3).tolist()
                fig2[kind] = dict(zip(("ww", "lw", "wl", "ll"), four))
            gaps = gaps_of_pairs(scores)
            # is the sign right, in both directions?
            right = ((gaps[0] > 0) + 1.0 * (gaps[1] < 0)) / 2  # (n,)
            row = {"model": role, "pairs": kind, "n": len(pairs), "accuracy": mean(right)}
            row |= {"ci95": interval(right, bounds=(0, 1)), "calibration_error": calibration(gaps)}
            eq2.append(row)
    return {"fig2": fig2, "eq2": eq2}


def pair_scores(lm, cfg, role, pairs):
    """y_w and y_l as R_P scores them, (2, n), or after y_w and after y_l by a gap model, (4, n).

    In the order of Eq. 1: ww, lw, wl, ll, the candidate first.
    """
    contexts = [[pair.prompt for pair in pairs]]
    if role != "reward_policy":
        after_chosen = [improve_prompt(pair.prompt, pair.chosen) for pair in pairs]
        after_rejected = [improve_prompt(pair.prompt, pair.rejected) for pair in pairs]
        contexts = [after_chosen, after_rejected]
    scores = []
    for context in contexts:
        scores.append(reward.rewards(lm, role, context, [pair.chosen for pair in pairs], cfg))
        scores.append(reward.rewards(lm, role, context, [pair.rejected for pair in pairs], cfg))
    return torch.stack(scores).double().numpy()


def gaps_of_pairs(scores):
    """The gaps of y_w over y_l, and of y_l over y_w -> (2, n); 0 is "no change".

    Of scores (2, n) by R_P: R_P(y) - R_P(y_ref). Of scores (4, n) by a gap model:
    r(y, y_ref) - r(y_ref, y_ref).
    """
    if len(scores) == 2:
        chosen, rejected = scores
        return np.stack([chosen - rejected, rejected - chosen])
    ww, lw, wl, ll = scores
    return np.stack([wl - ll, lw - ww])


# ---- for other judges --------------------------------------------------------------------------


def write_answers(run, views, keys):
    """A line per prompt: the answers of Table 1's sides, and their scores -> answers.jsonl."""
    lines = []
    for i, prompt in enumerate(views[0].answers.prompts):
        line = {"prompt": prompt, "answers": {}, "scores": {}}
        for key in keys:
            line["answers"][key.method] = views[0].answers.side(key).texts[i]
        for view in views:
            line["scores"][view.name] = {key.method: view.scores(key)[i] for key in keys}
        lines.append(json.dumps(line) + "\n")
    write_text(run.path / "answers.jsonl", "".join(lines))


def add_votes(run):
    """Make rows of Table 1 of all votes (votes.py), and print them -> results.json."""
    votes, results = read_votes(run), run.results()
    voters = sorted({judge for judge, _ in votes})
    if not voters:
        return
    # 1. the votes on each pair of sides, and whether a voter says the same as another judge
    cast, same = defaultdict(list), defaultdict(list)
    lines = read_answers(run)
    for question in questions_about(lines):
        verdicts = {}
        for judge, scores in lines[question.line]["scores"].items():
            margin = results["judges"][judge]["margin"]
            verdicts[judge] = outcomes(scores[question.a], scores[question.b], margin)
        for judge in voters:
            if (judge, question.id()) in votes:
                verdicts[judge] = votes[judge, question.id()]["vote"]
                cast[judge, question.a, question.b].append(verdicts[judge])
        for judge, other in permutations(verdicts, 2):
            if judge in voters:
                same[judge, other].append(verdicts[judge] == verdicts[other])
    # 2. a row for each; what answers cost is the same for all judges
    table1 = [row for row in results["table1"] if row["judge"] not in voters]
    measured = {(row["a"], row["b"]): row for row in table1}
    for (judge, a, b), said in cast.items():
        row = measured[a, b] | {"judge": judge} | compare(said, np.zeros(len(said)))
        table1.append(row)
        low, high = row["ci95"]
        print(f"{judge}: {a} vs {b}, delta {row['delta']:+.2f} [{low:+.2f}, {high:+.2f}]", end="")
        print(f", {row['win']:.0%} won, {row['lose']:.0%} lost of {row['n']}")
    # 3. how far to trust them
    trust = {judge: {"agreement": {}} | position_bias(votes, judge) for judge in voters}
    for (judge, other), agrees in same.items():
        trust[judge]["agreement"][other] = {"same": mean(agrees), "n": len(agrees)}
        print(f"{judge} agrees with {other} on {mean(agrees):.0%} of {len(agrees)} pairs.")
    run.add_results(table1=table1, votes=trust)


def position_bias(votes, judge):
    """Of a language model: how often the order of the answers decided, what could not be read."""
    lines = [line for (who, _), line in votes.items() if who == judge and "order_decides" in line]
    if not lines:
        return {}
    bias = mean([line["order_decides"] for line in lines])
    unreadable = sum(line["unreadable"] for line in lines)
    print(
        f"{judge}: the order of the two answers decided {bias:.0%} of {len(lines)} pairs,", end=""
    )
    print(f" which are ties; {unreadable} replies could not be read.")
    return {"position_bias": bias, "unreadable": unreadable}


def judge_curricula(lm, run, pairs, lasts, judges):
    """Table 2: the last adapter of each curriculum (lasts) improves the same originals."""
    answers = Answers(lm, run, pairs[: run.config.eval_n])
    name = next(iter(judges))
    view = View(name, judges[name], answers)
    both, rows = Key(lasts["annotated,policy"]), []
    for curriculum, role in progress(lasts.items(), total=len(lasts)):
        row = {"curriculum": curriculum, "judge": name}
        row["over_original"] = view.compare(Key(role), ORIGINAL)
        row["both_over_it"] = view.compare(both, Key(role))
        rows.append(row)
    run.add_results(table2=rows, lasts=lasts)
