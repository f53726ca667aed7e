"""A batch of prompts with their responses: padding and the one mask.

Prompts are padded on the left and responses on the right, so that all responses of a batch start in the same column:

    ids              pad pad  x   x   x | y   y  eos pad
                     x   x    x   x   x | y  eos pad pad
                     <------ P -------> | <----- R ---->
    mask              0   0   1   1   1   1   1   1   0
                      1   1   1   1   1   1   1   0   0
    response_mask                         1   1   1   0        the EOS is in it: that an answer ends is part of the answer
                                          1   1   0   0

Shapes everywhere: B batch, P prompt tokens, R response tokens, L = P + R, V vocabulary, D hidden size.
"""

from dataclasses import dataclass
from itertools import accumulate

import torch


@dataclass
class Tokens:
    """A batch of prompts with their responses, padded as drawn above. Slicing selects rows."""

    ids: torch.Tensor  # (B, L) int64
    mask: torch.Tensor  # (B, L) 1 for real tokens, 0 for padding
    response_mask: torch.Tensor  # (B, R) 1 for each response token up to and including EOS

    def __getitem__(self, rows):
        return Tokens(self.ids[rows], self.mask[rows], self.response_mask[rows])

    @property
    def responses(self):  # (B, R)
        return self.ids[:, -self.response_mask.shape[1] :]

    def trim(self):
        """Without the columns, at both ends, that hold nothing but padding."""
        P = self.ids.shape[1] - self.response_mask.shape[1]
        first, R = P - int(self.mask[:, :P].sum(1).max()), int(self.response_mask.sum(1).max())
        return Tokens(
            self.ids[:, first : P + R], self.mask[:, first : P + R], self.response_mask[:, :R]
        )


def mask_after_eos(responses, eos):
    """(B, R) token ids -> (B, R) mask: 1 up to and including the first EOS, 0 after it.

    responses   y   y  eos pad pad
    is eos      0   0   1   0   0
    cumsum      0   0   1   1   1
    minus       0   0   0   1   1   -> real where this is 0
    """
    is_eos = (responses == eos).long()
    return ((is_eos.cumsum(1) - is_eos) == 0).long()


def one_row_each(prompts, candidates):
    """Rows that hold a prompt and all its responses -> lists: ids, the part and position of each token, where responses end.

    Positions start again with each response, and no response is to see another:

        ids        x   x   x   a   a  eos  b  eos
        part       0   0   0   1   1   1   2   2       a token sees part 0 and its own part, up to itself
        position   0   1   2   3   4   5   3   4
        ends                           5       7
    """
    ids, part, position, ends = [], [], [], []
    for prompt, responses in zip(prompts, candidates):
        pieces = [prompt, *responses]
        ids.append([token for piece in pieces for token in piece])
        part.append([k for k, piece in enumerate(pieces) for _ in piece])
        position.append(
            [i + (k > 0) * len(prompt) for k, piece in enumerate(pieces) for i in range(len(piece))]
        )
        ends.append([end - 1 for end in accumulate(map(len, pieces))][1:])
    return ids, part, position, ends


def micro_batches(items, size, length):
    """Items in lists of at most `size`: where one does not hold them all, similar lengths go together, for little padding."""
    items = sorted(items, key=length) if len(items) > size else items
    return [items[at : at + size] for at in range(0, len(items), size)]


def in_parts(function, tokens, size):
    """Apply `function` to `size` rows at a time and join the results: memory for one part, the same values.

    Rows of similar length go together, without the padding that they do not need; results get it back, as zeros.
    """
    order = tokens.mask.sum(1).argsort()
    results, R = [], tokens.response_mask.shape[1]
    for rows in order.split(size):
        part = tokens[rows].trim()
        result = function(part)  # (b,), or (b, R of this part, maybe + 1, ...)
        if result.dim() > 1:
            missing = result.new_zeros(
                len(rows), R - part.response_mask.shape[1], *result.shape[2:]
            )
            result = torch.cat([result, missing], 1)
        results.append(result)
    return torch.cat(results)[order.argsort()]
