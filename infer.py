"""Using PIT: answer, improve round by round, stop.

answer      y_0 ~ M_P^RL(x)
improve     y_{k+1} ~ M_PIT^RL(x, y_k)
stop        when the gap is not above 0: R_PIT(x, y_{k+1}, y_k) - R_PIT(x, y_k, y_k)

Run: python pit.py infer --run runs/tiny "..." (chat.py shows it)
"""

from dataclasses import dataclass

from data import improve_prompt
from reward import gaps

POLICY = "policy_rl"  # writes the original answer
STOPS = ("gap", "same", "rounds")  # what ends the rounds, see `goes_on`


@dataclass
class Settings:
    """How to improve an answer."""

    pit: str  # the adapter that improves: PIT's last round
    rounds: int  # how many improvements, at most
    temperature: float
    stop: str  # one of STOPS
    seed: int


def improve(lm, role, prompts, references, cfg, temperature=1.0):
    """One improvement of each reference by PIT model `role`, texts -> texts."""
    chats = list(map(improve_prompt, prompts, references))
    return lm.answer(role, chats, cfg, temperature)


def goes_on(stop, before, text, gap):
    """Whether stop rule `stop` accepts `text` in place of `before` and allows another round.

    If not, `before` is the answer.
    """
    if stop == "gap":
        # a copy has a gap of 0, up to rounding
        return gap > 0 and text != before
    if stop == "same":
        return text != before
    return True


def end_of(stop, texts, gaps):
    """Which of the texts y_0 ... y_K is the answer under a stop rule -> its index.

    gaps[k]: of texts[k + 1] over texts[k].
    """
    for k, gap in enumerate(gaps):
        # the first step that the rule refuses
        if not goes_on(stop, texts[k], texts[k + 1], gap):
            return k
    return len(gaps)


def improve_rounds(lm, cfg, settings, prompts, responses):
    """Improve an answer to each prompt, round by round -> yields (texts, gaps over those before).

    The first texts are the responses, or the policy's answers for None; they have no gaps. All
    `settings.rounds` rounds come, whatever the stop rule: the caller stops, by `goes_on`, or picks
    the answer afterwards, by `end_of`.
    """
    # y_0: the given text, or the policy's answer
    unanswered = [x for x, response in zip(prompts, responses) if response is None]
    answers = iter(lm.answer(POLICY, unanswered, cfg, settings.temperature))
    texts = [next(answers) if response is None else response for response in responses]
    yield texts, None
    # y_{k+1} from y_k, and the gap between them
    for _ in range(settings.rounds):
        better = improve(lm, settings.pit, prompts, texts, cfg, settings.temperature)
        yield better, gaps(lm, prompts, better, texts, cfg).tolist()
        texts = better
