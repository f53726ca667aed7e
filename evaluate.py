"""The paper's evidence for a run, measured: win, lose, delta with 95% intervals, all tables.

Every side of a comparison answers the same held-out prompts once (baselines.py), and every judge
scores each text once (judges.py). The tables are views of these texts and scores. Numbers go to
results.json, which report.py draws; texts and scores go to answers.jsonl.

Run: python pit.py eval --run runs/tiny, a minute or less
"""

from collections import defaultdict
from dataclasses import dataclass
from itertools import product

import numpy as np

import infer
from baselines import ORIGINAL, TEMPERATURES, Answers, Key, all_keys, round_keys
from data import Pair
from judges import GAP_MODELS, SAME, Judge, adapter_judge
from reward import answer_contexts, gap_contexts, ranked_right, score_pairs
from run import progress, write_lines
from votes import ROWS, questions_about, read_answers, read_votes

COMPARISONS = [
    *ROWS,
    ("original", "policy_sft"),
    ("self_refine_base", "original"),
    ("base", "original"),
    ("pit_sft", "original"),
    ("pit_rl0", "original"),
    ("best_of_2", "original"),
    ("best_of_3", "original"),
    ("pit", "best_of_3"),
    ("pit", "second_sample"),
    ("pit", "pit_sft"),
    ("pit", "pit_rl0"),
    ("given", "original"),
    ("pit_given", "given"),
]
ENOUGH = 20  # votes: if evenly split, the 95% interval of delta is +-44 points
Z = 1.96  # standard deviations on either side in a 95% interval


# ---- statistics --------------------------------------------------------------------------------


def interval(values, bounds=None):
    """The 95% bootstrap interval of the mean of N values, one per prompt -> [low, high].

    Where all values are the same, resampling shows no doubt at all: [1, 1] for 5 wins of 5. With
    `bounds`, the lowest and the highest possible value, the interval is then Wilson's for what has
    not happened in N trials: a share of z^2 / (N + z^2) may lie at either bound. (Where only one or
    two values differ from the rest, the bootstrap's is still too narrow.)
    """
    values = np.array(values)
    n = len(values)
    if bounds is not None and np.ptp(values) == 0:
        unseen = Z**2 / (n + Z**2)
        return [float(values[0] + unseen * (bound - values[0])) for bound in bounds]
    draws = np.random.default_rng(0).integers(n, size=(2000, n))
    return np.quantile(values[draws].mean(1), [0.025, 0.975]).tolist()


def outcomes(a, b, margin):
    """1 where score a is above score b, -1 where it is below, 0 for a tie."""
    difference = np.subtract(a, b)
    return np.where(np.abs(difference) < margin, 0, np.sign(difference))


def compare(a, b, margin=SAME):
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
        "ci95": interval(outcome, bounds=(-1, 1)),
    }


def mean(numbers):
    return float(np.mean(numbers))


def elo(scores, margin=SAME):
    """Scores of K sides for the same N prompts, (K, N) -> their Elo ratings (K,), the first 1000.

    All K (K - 1) / 2 comparisons are fitted at once, a tie being half a win for both, so the order
    of games does not matter. P(i beats j) = sigmoid(r_i - r_j), as in a reward model: that is
    s_i / (s_i + s_j) with strengths s = exp(r).
    """
    scores = np.array(scores)
    # 1. what side i gets against side j on all prompts, each 1, 0.5 or 0; half an extra drawn
    # game keeps the rating finite for a side that never wins. On the diagonal each side plays
    # itself: that cancels in the fit, but without it the steps below could swing for ever.
    points = (outcomes(scores[:, None], scores[None], margin) + 1) / 2  # (K, K, N)
    wins = points.sum(2) + 0.25  # (K, K)
    # 2. the likeliest strengths, by the iteration of Newman (2023), "Efficient computation of
    # rankings from pairwise comparisons"
    strength = np.ones(len(scores))  # (K,)
    for _ in range(5000):  # slow only where sides nearly always win
        both = strength[:, None] + strength  # (K, K)
        strength = (wins * strength / both).sum(1) / (wins / both).sum(0)
    # 3. ratings: 400 points more mean odds of 10 to 1
    return (1000 + 400 * np.log10(strength / strength[0])).tolist()


# ---- measuring ---------------------------------------------------------------------------------


@dataclass
class View:
    """The sides as one judge sees them. Each text is written once, and scored once."""

    name: str
    judge: Judge
    answers: Answers

    def scores(self, key):
        """The judge's scores of one side -> (N,)."""
        return self.judge.score(self.answers.prompts, self.answers.side(key).texts)

    def compare(self, a, b):
        return compare(self.scores(a), self.scores(b), self.judge.margin)

    def gaps(self, key):
        """By R_PIT: how much better each text is than the one that `Key.before` names -> (N,)."""
        contexts = self.answers.to_improve(key)
        texts = self.answers.side(key).texts
        before = self.answers.before(key).texts
        return self.judge.score(contexts, texts) - self.judge.score(contexts, before)


def evaluate(lm, run, pairs, last, judges, lasts=None):
    """Write, judge and compare all sides on held-out pairs -> results.json, answers.jsonl.

    last: the adapter of PIT's last round. judges: Judge by name, the main one first. lasts:
    from `ablate`, the last adapter of each curriculum.
    """
    cfg = run.config
    reward_policy = adapter_judge(lm, "reward_policy", cfg)
    answers = Answers(lm, run, pairs[: cfg.eval_n], last, reward_policy)
    views = [View(name, judge, answers) for name, judge in judges.items()]
    main = views[0]
    methods = ["pit"] if cfg.model == "tiny" else ["pit", "self_refine"]
    keys = all_keys(methods, last, cfg.rounds.split(","))
    of_table1 = [key for key in keys if key.temperature == 1 and key.round == 1]
    all_cool = [key for key in keys if key.drafts != 1]  # the drafts at 0.4, too
    if lasts:
        keys += [Key(role) for role in lasts.values()]
    with progress(None, total=len(keys) + 1) as bar:
        # 1. every side: its texts, and their scores
        for key in keys:
            bar.set_postfix_str(f"  {key}")
            # other judges than the main one see only the sides of Table 1
            asked = views if key in of_table1 else [main]
            for view in asked:
                view.scores(key)
            bar.update()
        # 2. the tables look at these scores in every way, and at those of the gap models
        bar.set_postfix_str("  tables")
        r_p = View("R_P", reward_policy, answers)
        r_pit = View("R_PIT", adapter_judge(lm, "reward_gap", cfg), answers)
        scores = {view.name: view.scores for view in (*views, r_p)} | {"gap": r_pit.gaps}
        cool_sides = sides_table(answers, {main.name: main.scores}, all_cool)
        run.add_results(
            **gap_evidence(lm, answers.pairs, written_pairs(main), cfg),
            main=main.name,
            judges=judge_accuracy(views),
            table1=table1(views, of_table1),
            sides=sides_table(answers, scores, of_table1),
            cool={"rows": table1([main], all_cool), "sides": cool_sides},
            fig3=temperature_table(main, methods),
            table3=rounds_table(main, methods),
            stops=stop_table(main, r_pit),
        )
        if lasts:
            run.add_results(table2=curricula_table(main, lasts))
        bar.update()
    write_answers(run, views, of_table1)
    add_votes(run)


# ---- tables ------------------------------------------------------------------------------------


def judge_accuracy(views):
    """How often each judge, and "the longer wins", prefer y_w to y_l; a tie is half right."""
    answers = views[0].answers
    by_length = Judge(lambda prompts, texts: answers.lengths(texts), margin=0)
    rows = {}
    for view in [View("the longer wins", by_length, answers), *views]:
        row = view.compare(Key("y_w"), Key("y_l"))
        accuracy = row["win"] + row["tie"] / 2
        rows[view.name] = {"accuracy": accuracy, "margin": view.judge.margin}
    return rows


def table1(views, keys):
    """Table 1 by each judge: the comparisons of which this run has both sides."""
    of = {key.method: key for key in keys}
    return [
        {"a": a, "b": b, "judge": view.name} | view.compare(of[a], of[b])
        for view, (a, b) in product(views, COMPARISONS)
        if a in of and b in of
    ]


def sides_table(answers, scores, keys):
    """What the sides of Table 1 are: their length, cost, and means of scores.

    scores: by name, how to score a side. tokens, texts: all that was generated for one answer.
    unchanged: the share of answers that are empty, or equal to the text that `Key.before` names.
    """
    table = {}
    for key in keys:
        side = answers.side(key)
        before = answers.before(key).texts
        same = [y in ("", y_0) for y, y_0 in zip(side.texts, before)]
        table[key.method] = {
            "length": mean(answers.lengths(side.texts)),
            "tokens": mean(side.spent),
            "texts": len(side.written),
            "unchanged": mean(same),
            "scores": {name: mean(score(key)) for name, score in scores.items()},
        }
    return table


def temperature_table(view, methods):
    """Fig. 3: one improvement at each temperature against the original, and 0.4 against each."""
    rows = []
    for method in methods:
        best = Key(method, temperature=0.4)
        for T in TEMPERATURES:
            key = Key(method, temperature=T)
            row = {"method": method, "temperature": T} | view.compare(key, ORIGINAL)
            if key != best:
                row["04_over_it"] = view.compare(best, key)
            rows.append(row)
    return rows


def rounds_table(view, methods):
    """Table 3: the original and every round of each method; Elo, mean score, who beats whom."""
    keys = [ORIGINAL] + [key for method in methods for key in round_keys(method)]
    ratings = elo([view.scores(key) for key in keys], view.judge.margin)
    rows = []
    for key, rating in zip(keys, ratings):
        scores = view.scores(key)
        row = {
            "method": key.method,
            "round": 0 if key == ORIGINAL else key.round,
            "elo": rating,
            "mean": mean(scores),
            "mean_ci95": interval(scores),
            "over_original": view.compare(key, ORIGINAL),
            "over_previous": view.compare(key, key.before()),
        }
        if key.method == "pit" and "self_refine" in methods:
            row["over_self_refine"] = view.compare(key, key._replace(method="self_refine"))
        rows.append(row)
    return rows


def stop_table(main, r_pit):
    """Each stop rule on the same rounds of PIT, cut short at each limit: mean score, tokens."""
    answers = main.answers
    rows = []
    for stop in infer.STOPS:
        # of each prompt, (N,): the score of its answer so far, the tokens written up to now, and
        # whether the rule goes on
        scores = main.scores(ORIGINAL)
        tokens = answers.side(ORIGINAL).spent
        going = True
        for limit, key in enumerate(round_keys("pit"), 1):
            side = answers.side(key)
            steps = zip(answers.side(key.before()).texts, side.texts, r_pit.gaps(key))
            tokens = np.where(going, side.spent, tokens)
            going = np.logical_and(going, [infer.goes_on(stop, *step) for step in steps])
            scores = np.where(going, main.scores(key), scores)
            row = {"stop": stop, "limit": limit, "mean": mean(scores), "ci95": interval(scores)}
            rows.append(row | {"tokens": mean(tokens)})
    return rows


def curricula_table(view, lasts):
    """Table 2: the last adapter of each curriculum (lasts) improves the same originals."""
    both = Key(lasts["annotated,policy"])
    return [
        {
            "curriculum": curriculum,
            "over_original": view.compare(Key(role), ORIGINAL),
            "both_over_it": view.compare(both, Key(role)),
            "judge": view.name,
        }
        for curriculum, role in lasts.items()
    ]


# ---- gap models --------------------------------------------------------------------------------


def written_pairs(view):
    """Two samples of the policy as preference pairs, by this judge; ties are left out.

    Not PIT's answers: RL optimised them for R_PIT, so "PIT is better" is right on nearly all.
    (RL optimised the policy's for R_P, which may cost R_P a little here.)
    """
    answers = view.answers
    second = Key("second_sample")
    signs = outcomes(view.scores(second), view.scores(ORIGINAL), view.judge.margin)
    texts = answers.side(second).texts, answers.side(ORIGINAL).texts
    return [
        Pair(x, a, b) if sign > 0 else Pair(x, b, a)
        for x, a, b, sign in zip(answers.prompts, *texts, signs)
        if sign
    ]


def gap_evidence(lm, annotated, written, cfg):
    """Fig. 2's four distributions, and how often each gap model is right, on both kinds."""
    kinds = {"annotated": annotated, "written by models": written}
    fig2 = {}
    eq2 = []
    for (kind, pairs), role in product(kinds.items(), GAP_MODELS):
        if not pairs or role not in lm.roles:
            continue
        # R_P reads no reference: its gap is R_P(y) - R_P(y_ref)
        contexts_of = answer_contexts if role == "reward_policy" else gap_contexts
        scores = score_pairs(lm, role, contexts_of, pairs, cfg).numpy()  # (c, 2, n)
        if (kind, role) == ("annotated", "reward_gap"):
            four = scores.reshape(4, -1).round(3)
            fig2 = dict(zip(("ww", "lw", "wl", "ll"), four.tolist()))
        # Is the sign of the gap r(y, y_ref) - r(y_ref, y_ref) right? For better over worse it is
        # if r^wl > r^ll, for worse over better if r^ww > r^lw. If only one holds: a tie.
        right = ranked_right(scores).mean(0)  # (n,)
        eq2.append({"model": role, "pairs": kind, "accuracy": mean(right)} | compare(right, 0.5))
    return {"fig2": fig2, "eq2": eq2}


# ---- for other judges --------------------------------------------------------------------------


def write_answers(run, views, keys):
    """A line per prompt: the answers of Table 1's sides, and their scores -> answers.jsonl."""
    answers = views[0].answers
    scores = {}
    texts = {key.method: answers.side(key).texts for key in keys}
    for view in views:
        scores[view.name] = by_row({key.method: view.scores(key).tolist() for key in keys})
    columns = {"prompt": answers.prompts, "answers": by_row(texts), "scores": by_row(scores)}
    write_lines(run.path / "answers.jsonl", by_row(columns))


def by_row(columns):
    """Columns by name -> a dict for each of their rows."""
    return [dict(zip(columns, row)) for row in zip(*columns.values())]


def add_votes(run):
    """Turn all votes (votes.py) into rows of Table 1, and notes on them -> results.json."""
    votes = read_votes(run)
    results = run.results()
    said = all_verdicts(votes, read_answers(run), results["judges"])
    table1 = [row for row in results["table1"] if row["judge"] not in votes]
    few = []
    notes = {}
    for voter, cast in votes.items():
        verdicts = said[voter]
        # questions of two rows that show the same texts share a vote
        counted = {question.id(): question for question in verdicts}
        of_voter = [f"{len(counted)} votes. A row of Table 1 needs {ENOUGH}."]
        # 1. rows of Table 1, where there are enough votes
        for a, b in ROWS:
            on_row = [vote for question, vote in verdicts.items() if question.sides == (a, b)]
            if not on_row:
                continue
            row = {"a": a, "b": b, "judge": voter} | compare(on_row, 0)
            if len(on_row) >= ENOUGH:
                table1.append(row)
            else:
                few.append(row)
        # 2. how far to trust them: do they agree with other judges?
        # (not about two answers that are the same text: there everybody sees a tie)
        differ = [question for question in counted.values() if not question.is_tie()]
        for judge, others in said.items():
            both = [question for question in differ if question in others]
            if both and judge != voter:
                same = mean([verdicts[question] == others[question] for question in both])
                of_voter.append(f"agrees with {judge} on {same:.0%} of {len(both)} pairs.")
        # 3. a language model is asked in both orders
        asked = [cast[key] for key in counted if "order_decides" in cast[key]]
        if asked:
            both_read = [vote["order_decides"] for vote in asked if not vote["unreadable"]]
            if both_read:
                bias = f"{mean(both_read):.0%} of {len(both_read)} pairs"
                of_voter.append(f"the order of the answers decided {bias}, counted as ties.")
            unreadable = sum(vote["unreadable"] for vote in asked)
            of_voter.append(f"{unreadable} replies could not be read, counted as ties.")
        notes[voter] = of_voter
    run.add_results(table1=table1, few_votes=few, votes=notes)


def all_verdicts(votes, lines, judges):
    """What every judge says -> {judge: {question: 1, a is better; -1, b is; 0, a tie}}."""
    said = defaultdict(dict)
    for question in questions_about(lines):
        a, b = question.sides
        for judge, scores in lines[question.line]["scores"].items():
            said[judge][question] = outcomes(scores[a], scores[b], judges[judge]["margin"])
        for voter, cast in votes.items():
            if question.id() in cast:
                said[voter][question] = cast[question.id()]["vote"]
    return said
