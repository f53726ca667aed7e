"""A batch of prompts with their responses: padding and the one mask.

Prompts are padded on the left and responses on the right, so that all responses of a batch start
in the same column:

    ids              pad pad  x   x   x | y   y  eos pad
                     x   x    x   x   x | y  eos pad pad
                     <------ P -------> | <----- R ---->
    mask              0   0   1   1   1   1   1   1   0
                      1   1   1   1   1   1   1   0   0
    response_mask                         1   1   1   0     with EOS: stopping is part of the answer
                                          1   1   0   0

Shapes everywhere: B batch, P prompt tokens, R response tokens, L = P + R, V vocabulary, D hidden
size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


@dataclass
class Tokens:
    """A batch of prompts with their responses, padded as drawn above. Slicing selects rows."""

    ids: Tensor  # (B, L) int64
    mask: Tensor  # (B, L) 1 for real tokens, 0 for padding
    response_mask: Tensor  # (B, R) 1 for each response token up to and including EOS

    def __getitem__(self, rows):
        return Tokens(self.ids[rows], self.mask[rows], self.response_mask[rows])

    @property
    def responses(self):
        """(B, R) token ids."""
        return self.ids[:, -self.response_mask.shape[1] :]

    def trim(self):
        """Without the columns that hold nothing but padding, which are at both ends."""
        used = self.mask.any(0)  # (L,)
        R = self.response_mask.shape[1]
        return Tokens(self.ids[:, used], self.mask[:, used], self.response_mask[:, used[-R:]])


def mask_after_eos(responses, eos):
    """(B, R) token ids -> (B, R) mask: 1 up to and including the first EOS, 0 after it.

    responses   y   y  eos pad pad
    is_eos      0   0   1   0   0
    cumsum      0   0   1   1   1
    minus       0   0   0   1   1   -> real where this is 0
    """
    is_eos = (responses == eos).long()
    # EOS tokens strictly before each token: none before a real one
    return ((is_eos.cumsum(1) - is_eos) == 0).long()


def one_row(prompt, responses):
    """A prompt and all its responses in one row -> lists: ids, part, ends.

        ids        x   x   x   a   a  eos  b  eos
        part       0   0   0   1   1   1   2   2       a token sees part 0 and its own, up to itself
        position   0   1   2   3   4   5   3   4       as many as it sees before it
        ends                           5       7       the last token of each response

    Positions start again with each response, as if it were the only one.
    """
    ids = list(prompt)
    part = [0] * len(prompt)
    ends = []
    for number, response in enumerate(responses, 1):
        ids += response
        part += [number] * len(response)
        ends.append(len(ids) - 1)
    return ids, part, ends


def micro_batches(items, size, length=None):
    """Lists of at most `size` items; with `length`, similar ones together, to save padding.

    If one list holds them all, or without `length`, they keep their order.
    """
    if length and len(items) > size:
        items = sorted(items, key=length)
    return [items[start : start + size] for start in range(0, len(items), size)]


def in_parts(function, tokens, size):
    """Apply `function` to `size` rows at a time and join the results: same values, less memory.

    Rows of similar length go together, trimmed. The results are padded with zeros, up to
    the longest response.
    """
    # short rows first
    order = tokens.mask.sum(1).argsort()
    rows = []
    for part in order.split(size):
        # a tensor with one row per response: each (), (R_part,) or (R_part + 1, D)
        rows.extend(function(tokens[part].trim()))
    # parts differ in R: pad each row to the longest
    joined = pad_sequence(rows, batch_first=True) if rows[0].dim() > 0 else torch.stack(rows)
    # back to the order of `tokens`
    return joined[order.argsort()]
