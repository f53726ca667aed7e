"""Padding and masks: the drawings of tokens.py as numbers."""

import torch

from tokens import Tokens, in_parts, mask_after_eos, micro_batches, one_row


def drawn():
    """The batch at the top of tokens.py: x is 7, y is 8, EOS is 2, padding is 0."""
    ids = torch.tensor([[0, 0, 7, 7, 7, 8, 8, 2, 0], [7, 7, 7, 7, 7, 8, 2, 0, 0]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1, 1, 0, 0]])
    return Tokens(ids, mask, mask[:, 5:])


def test_the_mask_keeps_the_first_eos_and_nothing_after_it():
    responses = torch.tensor([[5, 6, 2, 0, 2], [5, 6, 7, 8, 9], [2, 2, 2, 2, 2]])
    expected = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]])
    assert torch.equal(mask_after_eos(responses, eos=2), expected)


def test_responses_are_the_last_columns_and_rows_are_sliced_together():
    assert drawn().responses.tolist() == [[8, 8, 2, 0], [8, 2, 0, 0]]
    second = drawn()[torch.tensor([1])]
    assert second.ids.tolist() == [[7, 7, 7, 7, 7, 8, 2, 0, 0]]
    assert second.responses.tolist() == [[8, 2, 0, 0]]


def test_trim_takes_padding_off_both_ends_and_no_more():
    first = drawn()[[0]].trim()
    assert first.ids.tolist() == [[7, 7, 7, 8, 8, 2]]
    assert first.mask.tolist() == [[1] * 6] and first.response_mask.tolist() == [[1, 1, 1]]
    both = drawn().trim()
    assert both.ids.shape == (2, 8) and both.responses.tolist() == [[8, 8, 2], [8, 2, 0]]


def test_candidates_of_a_prompt_in_one_row():
    ids, part, ends = one_row([7, 7, 7], [[4, 4, 2], [5, 2]])
    assert ids == [7, 7, 7, 4, 4, 2, 5, 2]
    assert part == [0, 0, 0, 1, 1, 1, 2, 2]
    assert ends == [5, 7]


def test_micro_batches_hold_everything_once_and_sort_only_where_they_must():
    rows = [[0] * n for n in (5, 1, 4, 2, 3)]
    assert micro_batches(rows, 5, len) == [rows]
    sizes = [[len(row) for row in some] for some in micro_batches(rows, 2, len)]
    assert sizes == [[1, 2], [3, 4], [5]]


def test_parts_are_small_sorted_trimmed_and_come_back_in_order():
    lengths = [3, 1, 2]
    mask = torch.tensor([[1] * 2 + [1] * n + [0] * (3 - n) for n in lengths])
    tokens = Tokens(mask * torch.tensor([[1], [2], [3]]), mask, mask[:, 2:])
    seen = []

    def function(part):
        seen.append(part.ids.tolist())
        return part.responses.float()

    joined = in_parts(function, tokens, 2)
    assert seen == [[[2, 2, 2, 0], [3, 3, 3, 3]], [[1, 1, 1, 1, 1]]]
    assert joined.tolist() == [[1, 1, 1], [2, 0, 0], [3, 3, 0]]
    assert in_parts(lambda part: part.ids[:, 0], tokens, 2).tolist() == [1, 2, 3]
