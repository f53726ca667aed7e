"""The paper's evidence for a run, measured: win, lose, delta with 95% intervals, all tables.

Every side of a comparison answers the same held-out prompts once (baselines.py), and every judge
scores each text once (judges.py). The tables are views of these texts and scores. Numbers go to
results.json, which report.py draws; texts and scores go to answers.jsonl, for anybody.

Run: python pit.py eval --run runs/tiny, under a minute
"""

from collections import defaultdict
from itertools import permutations, product

import numpy as np

import infer
from baselines import ORIGINAL, ROUNDS, TEMPERATURES, Answers, Key, all_keys, round_keys
from data import Pair, improve_prompt
from judges import SAME, adapter_judge
from run import progress, write_lines
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
VOTED = "{judge}: {a} vs {b}, delta {points:+.1f} [{low:+.1f}, {high:+.1f}], won {win:.0%} of {n}"
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
    points = (outcomes(scores[:, None], scores[None], margin) + 1) / 2  # (K, K, N)
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

    def gaps(self, key):
        """By R_PIT: how much better each text is than the one that it improves -> (N,)."""
        texts, before = self.answers.side(key).texts, self.answers.before(key).texts
        contexts = [improve_prompt(x, y_ref) for x, y_ref in zip(self.answers.prompts, before)]
        return self.judge.score(contexts, texts) - self.judge.score(contexts, before)


def evaluate(lm, run, pairs, last, judges):
    """Write, judge and compare all sides on held-out pairs -> results.json, answers.jsonl.

    last: the adapter of PIT's last round. judges: Judge by name, the main one first.
    """
    models = {r: adapter_judge(lm, r, run.config) for r in GAP_MODELS if r in lm.roles}
    answers = Answers(lm, run, pairs[: run.config.eval_n], last, models["reward_policy"])
    views = [View(name, judge, answers) for name, judge in judges.items()]
    main = views[0]
    refusal = answers.self_refine_refusal()
    methods = ["pit"] if refusal else ["pit", "self_refine"]
    keys = all_keys(methods, last)
    plain = [key for key in keys if key == Key(key.method)]  # temperature 1, one round: Table 1
    with progress(None, total=len(keys) + 1) as bar:
        # 1. every side: its texts, and their scores
        for key in keys:
            bar.set_postfix_str(f"  {key}")
            for view in views if key in plain else [main]:
                view.scores(key)
            bar.update()
        # 2. the gap models, on the pairs and on PIT's rounds
        bar.set_postfix_str("  gap models")
        evidence = gap_evidence(models, answers.pairs, written_pairs(main))
        evidence |= {"rl": rl_table(answers, models), "stops": stop_table(main, models)}
        bar.update()
    # 3. the tables, which look at the scores in every way
    rows, missing = table1(views, plain, refusal)
    run.add_results(
        main=main.name,
        judges=judge_accuracy(views),
        table1=rows,
        not_applicable=missing,
        mean_score=mean_scores(views, plain),
        mean_tokens={key.method: mean(answers.side(key).lengths) for key in plain},
        fig3=temperature_table(main, methods),
        cooler=main.compare(Key("pit", temperature=0.4), Key("pit")),
        table3=rounds_table(main, methods),
        **evidence,
    )
    write_answers(run, views, plain)
    add_votes(run)


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


def mean_scores(views, keys):
    """The mean score of each side by each judge."""
    means = {}
    for view in views:
        means[view.name] = {key.method: mean(view.scores(key)) for key in keys}
    return means


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


def rl_table(answers, models):
    """What each RL stage did to its own reward on held-out prompts: before, after, the rise."""
    policy = View("R_P", models["reward_policy"], answers)
    pit = View("gap by R_PIT", models["reward_gap"], answers)
    rows = [rise(policy.name, policy.scores, "policy_sft", "original")]
    if answers.last == "pit_rl0":
        return [*rows, rise(pit.name, pit.gaps, "pit_sft", "pit")]
    rows.append(rise(pit.name, pit.gaps, "pit_sft", "pit_rl0"))
    rows.append(rise(pit.name, pit.gaps, "pit_rl0", "pit"))
    return rows


def rise(by, reward, before, after):
    """How far a reward rose from one side to another."""
    start, end = reward(Key(before)), reward(Key(after))
    row = {"before": before, "after": after, "by": by, "start": mean(start), "end": mean(end)}
    return row | {"ci95": interval(end - start)}


def stop_table(view, models):
    """Each stop rule on the same five rounds of PIT, cut short at each limit: mean score, tokens.

    For "time" the limit is the time of that many average rounds. Time goes with the tokens written,
    whatever the machine.
    """
    r_pit = View("gap by R_PIT", models["reward_gap"], view.answers)
    rounds = round_keys("pit")
    sides = [view.answers.side(key) for key in (ORIGINAL, *rounds)]
    # of each prompt, a row: the texts y_0 ... y_K, their scores and gaps, the tokens up to each
    texts = list(zip(*(side.texts for side in sides)))
    scores = np.stack([view.scores(key) for key in (ORIGINAL, *rounds)], 1)  # (N, K + 1)
    gaps = np.stack([r_pit.gaps(key) for key in rounds], 1)  # (N, K)
    tokens = np.stack([side.spent for side in sides], 1)  # (N, K + 1)
    spent = tokens - tokens[:, :1]
    everybody = range(len(texts))
    rows = []
    for stop, limit in product(infer.STOPS, range(1, ROUNDS + 1)):
        kept = ROUNDS if stop == "time" else limit
        budget = limit * spent[:, -1].mean() / ROUNDS
        ends = []  # which text is the answer, after how many rounds
        for i in everybody:
            ends.append(infer.end_of(stop, texts[i][: kept + 1], gaps[i], spent[i], budget))
        answer, made = zip(*ends)
        final = scores[everybody, answer]
        row = {"stop": stop, "limit": limit, "mean": mean(final), "ci95": interval(final)}
        rows.append(row | {"tokens": mean(tokens[everybody, made])})
    return rows


# ---- gap models --------------------------------------------------------------------------------


def written_pairs(view):
    """PIT's answer and the original as preference pairs, by this judge; ties are left out."""
    pit, original = Key("pit"), ORIGINAL
    texts = [view.answers.side(key).texts for key in (pit, original)]
    over = outcomes(view.scores(pit), view.scores(original), view.judge.margin)
    pairs = []
    for x, a, b, sign in zip(view.answers.prompts, *texts, over):
        if sign:
            pairs.append(Pair(x, a, b) if sign > 0 else Pair(x, b, a))
    return pairs


def gap_evidence(models, annotated, written):
    """Fig. 2's four distributions, and how right every gap model is, on both kinds of pairs."""
    fig2, eq2 = {}, []
    for kind, pairs in (("annotated", annotated), ("written by models", written)):
        if not pairs:
            continue
        four = eq1_scores(models["reward_gap"], pairs)
        fig2[kind] = {name: scores.round(3).tolist() for name, scores in four.items()}
        for role, model in models.items():
            gaps = pair_gaps(role, model, pairs)
            # is the sign right, in both directions?
            right = np.mean([gaps[0] > 0, gaps[1] < 0], axis=0)  # (n,)
            row = {"model": role, "pairs": kind, "n": len(pairs), "accuracy": mean(right)}
            row |= {"ci95": interval(right, bounds=(0, 1)), "calibration_error": calibration(gaps)}
            eq2.append(row)
    return {"fig2": fig2, "eq2": eq2}


def pair_gaps(role, model, pairs):
    """The gaps of y_w over y_l, and of y_l over y_w -> (2, n); 0 is "no change"."""
    if role == "reward_policy":  # R_P(y) - R_P(y_ref)
        prompts = [pair.prompt for pair in pairs]
        chosen = model.score(prompts, [pair.chosen for pair in pairs])
        rejected = model.score(prompts, [pair.rejected for pair in pairs])
        return np.stack([chosen - rejected, rejected - chosen])
    four = eq1_scores(model, pairs)  # r(y, y_ref) - r(y_ref, y_ref)
    return np.stack([four["wl"] - four["ll"], four["lw"] - four["ww"]])


def eq1_scores(model, pairs):
    """The scores of Eq. 1, the candidate's letter first -> {"ww": (n,), "lw": ..., "wl", "ll"}."""
    texts = {"w": [pair.chosen for pair in pairs], "l": [pair.rejected for pair in pairs]}
    four = {}
    for reference in "wl":
        contexts = [improve_prompt(p.prompt, y_ref) for p, y_ref in zip(pairs, texts[reference])]
        for candidate in "wl":
            four[candidate + reference] = model.score(contexts, texts[candidate])
    return four


# ---- for other judges --------------------------------------------------------------------------


def write_answers(run, views, keys):
    """A line per prompt: the answers of Table 1's sides, and their scores -> answers.jsonl."""
    answers, scores = views[0].answers, {}
    texts = {key.method: answers.side(key).texts for key in keys}
    for view in views:
        scores[view.name] = {key.method: view.scores(key).tolist() for key in keys}
    lines = []
    for i, prompt in enumerate(answers.prompts):
        lines.append({"prompt": prompt, "answers": at(i, texts), "scores": {}})
        for judge, columns in scores.items():
            lines[i]["scores"][judge] = at(i, columns)
    write_lines(run.path / "answers.jsonl", lines)


def at(i, columns):
    """Row i of columns by name."""
    return {name: column[i] for name, column in columns.items()}


def add_votes(run):
    """Turn all votes (votes.py) into rows of Table 1, and print them -> results.json."""
    votes, results = read_votes(run), run.results()
    voters = sorted({judge for judge, _ in votes})
    if not voters:
        return
    # 1. the votes on each pair of sides, and whether a voter says the same as each other judge
    cast, same = defaultdict(list), defaultdict(list)
    lines = read_answers(run)
    for question in questions_about(lines):
        verdicts = scored_verdicts(question, lines, results["judges"])
        for judge in voters:
            if (judge, question.id()) in votes:
                verdicts[judge] = votes[judge, question.id()]["vote"]
                cast[judge, question.a, question.b].append(verdicts[judge])
        for judge, other in permutations(verdicts, 2):
            if judge in voters:
                same[judge, other].append(verdicts[judge] == verdicts[other])
    # 2. a row for each; what an answer costs is the same for all judges
    table1 = [row for row in results["table1"] if row["judge"] not in voters]
    measured = {(row["a"], row["b"]): row for row in table1}
    for (judge, a, b), said in cast.items():
        row = measured[a, b] | {"judge": judge} | compare(said, np.zeros(len(said)))
        table1.append(row)
        low, high = row["ci95"]
        in_points = {"points": 100 * row["delta"], "low": 100 * low, "high": 100 * high}
        print(VOTED.format(**in_points, **row))
    # 3. how far to trust them
    trust = {judge: position_bias(votes, judge) for judge in voters}
    for (judge, other), agrees in same.items():
        trust[judge][other] = {"same": mean(agrees), "n": len(agrees)}
        print(f"{judge} agrees with {other} on {mean(agrees):.0%} of {len(agrees)} pairs.")
    run.add_results(table1=table1, votes=trust)


def scored_verdicts(question, lines, judges):
    """What the judges that score say of a pair: 1, a is better; -1, b is; 0, a tie."""
    verdicts = {}
    for judge, scores in lines[question.line]["scores"].items():
        margin = judges[judge]["margin"]
        verdicts[judge] = int(outcomes(scores[question.a], scores[question.b], margin))
    return verdicts


def position_bias(votes, judge):
    """For a language model: how often the order decided, and how many replies made no sense."""
    lines = [line for (who, _), line in votes.items() if who == judge and "order_decides" in line]
    if not lines:
        return {}
    bias = mean([line["order_decides"] for line in lines])
    unreadable = sum(line["unreadable"] for line in lines)
    print(f"{judge}: the order of the answers decided {bias:.0%} of {len(lines)} pairs: ties.")
    print(f"{judge}: {unreadable} replies could not be read, and count as ties.")
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
