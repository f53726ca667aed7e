"""Stage 1, supervised fine-tuning: teach one base to answer, and to improve an answer.

policy     M_P^SFT     x         -> y_w       L = - sum log M_P(y_w | x)
PIT        M_PIT^SFT   x, y_l    -> y_w       L = - sum log M_PIT(y_w | x, y_l)

Each sum is divided by the answer tokens of its batch; the learning rate falls linearly to 0. Left
out: dropout, packing, and an unlikelihood loss, which the paper mentions without a formula.

Run: python pit.py sft --run runs/tiny (a run that `all` has begun), half a minute. The loss falls
from 0.36 to 0.2 nats per token for the policy, from 0.44 to 0.3 for PIT.
"""

from data import improve_prompt
from models import adamw, take_step
from run import shuffled_batch
from tokens import micro_batches


def train_policy(lm, run, pairs):
    """M_P^SFT from D_SFT -> adapter policy_sft."""
    if run.load_trained(lm, "policy_sft"):
        return
    with run.stage("policy_sft", "learn to answer, from the better answers (x -> y_w)"):
        examples = [
            (lm.encode_prompt(pair.prompt), lm.encode_response(pair.chosen)) for pair in pairs
        ]
        train(lm, run, "policy_sft", examples)


def train_pit(lm, run, pairs):
    """M_PIT^SFT from D_SFT -> adapter pit_sft."""
    if run.load_trained(lm, "pit_sft"):
        return
    with run.stage("pit_sft", "learn to improve, from both answers (x, y_l -> y_w)"):
        # the prompt shows x and y_l, the response is y_w
        examples = []
        for pair in pairs:
            prompt = improve_prompt(pair.prompt, pair.rejected)
            examples.append((lm.encode_prompt(prompt), lm.encode_response(pair.chosen)))
        train(lm, run, "pit_sft", examples)


def train(lm, run, role, examples):
    """Maximise the log-likelihood of responses given prompts and save the adapter `role`.

    examples: a list of (prompt ids, response ids). All training loops rely on run.py: `steps`
    yields the steps still to do and saves checkpoints, `shuffled_batch` picks the examples of a
    step, `log` writes a line of metrics.jsonl.
    """
    cfg = run.config
    lm.add(role)
    optimizer = adamw(lm.parameters(role), cfg.sft_lr)
    for step in run.steps(cfg.sft_steps, [optimizer]):
        # the step's pairs
        batch = shuffled_batch(examples, cfg.sft_batch, step, cfg.seed)
        n_tokens = sum(len(response) for _, response in batch)
        # the gradient, summed over micro-batches
        lm.activate(role, train=True)
        loss = 0.0
        for part in micro_batches(batch, cfg.micro_batch, example_length):
            tokens = lm.collate(*zip(*part))
            # divided by the tokens of the whole batch: the micro-batch size changes the gradient by
            # rounding alone
            part_loss = -log_likelihood(lm.logprobs(tokens), tokens.response_mask) / n_tokens
            part_loss.backward()
            loss += part_loss.detach()
        # one step; the learning rate decays linearly to 0
        norm = take_step(optimizer, cfg.sft_lr * (1 - step / cfg.sft_steps))
        run.log(loss=loss, grad_norm=norm)
    run.keep(lm, role)


def example_length(example):
    prompt, response = example
    return len(prompt) + len(response)


def log_likelihood(logprobs, mask):
    """sum log M(y | .) over a batch; both arguments (B, R)."""
    return (logprobs * mask).sum()
