"""Packs of sequences in which what several begin with stands once."""

import pytest
import torch

from tulu_lightning.core.packing import ancestors
from tulu_lightning.core.prefix_tree import prefix_pack, prefix_parts


def test_answers_of_one_token_cost_their_prompt_once():
    made = prefix_pack([([5, 6], [7]), ([5, 6], [8])])
    assert made.tokens_T.tolist() == [5, 6]
    assert made.source_N.tolist() == [1, 1]
    assert made.target_N.tolist() == [7, 8]
    assert made.spans == ((0, 2, -1),)


def test_a_tree_worked_out():
    # 1 2 3 4 | 5 6 (7)      shots 1 2 3 4, then a question with two answers, one of them of two tokens, and another question
    # 1 2 3 4 | 5 6 8 (9)
    # 1 2 3 4 | 0 (7)
    # 9 (1)
    pairs = [([1, 2, 3, 4, 5, 6], [7]), ([1, 2, 3, 4, 5, 6], [8, 9]), ([1, 2, 3, 4, 0], [7]), ([9], [1])]
    made = prefix_pack(pairs, least=2)
    assert made.tokens_T.tolist() == [1, 2, 3, 4, 0, 5, 6, 8, 9]
    assert made.positions_T.tolist() == [0, 1, 2, 3, 4, 4, 5, 6, 0]
    assert made.spans == ((0, 4, -1), (4, 5, 0), (5, 7, 0), (7, 8, 2), (8, 9, -1))
    assert made.source_N.tolist() == [6, 6, 7, 4, 8]
    assert made.target_N.tolist() == [7, 8, 9, 7, 1]
    assert made.segment_N.tolist() == [2, 2, 3, 1, 4]


def test_a_response_may_begin_in_what_is_shared():
    # One pair scores tokens that are another's prompt: they are predicted from the shared segment and from its child.
    made = prefix_pack([([1, 2], [3, 4, 5]), ([1, 2, 3, 6], [7])], least=1)
    assert made.tokens_T.tolist() == [1, 2, 3, 4, 6]
    assert made.source_N.tolist() == [1, 2, 3, 4]
    assert made.segment_N.tolist() == [0, 0, 1, 2]


def test_an_empty_response_has_no_place_among_those_of_others():
    made = prefix_pack([([1, 2], []), ([1, 3], [5])], least=1)
    assert made.source_N.tolist() == [2]
    assert made.target_N.tolist() == [5]


def test_short_beginnings_are_not_shared():
    made = prefix_pack([([1, 2, 3], [4]), ([1, 2, 5], [4]), ([1, 2], [4])], least=3)
    assert sorted(span.parent for span in made.spans) == [-1, -1, -1]
    assert len(made.tokens_T) == 8


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("least", [1, 3, 16])
def test_every_scored_token_sees_its_own_sequence_and_nothing_else(seed, least):
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    stems = [[draw(0, 3) for _ in range(draw(1, 40))] for _ in range(4)]
    pairs = [
        ([*stems[draw(0, 4)], *(draw(0, 3) for _ in range(draw(0, 4)))], [draw(0, 3) for _ in range(draw(1, 4))])
        for _ in range(30)
    ]
    made = prefix_pack(pairs, least)
    assert len(made.tokens_T) <= sum(len(prompt) + len(response) - 1 for prompt, response in pairs)
    assert all(span.parent < i for i, span in enumerate(made.spans))
    scored = 0
    for prompt, response in pairs:
        whole = [*prompt, *response]
        for place in range(len(prompt), len(whole)):
            source, segment = int(made.source_N[scored]), int(made.segment_N[scored])
            start, end, _ = made.spans[segment]
            assert start <= source < end
            chain = [made.spans[i] for i in ancestors(made.spans, segment)]
            seen = [*(t for span in chain for t in range(span.start, span.end)), *range(start, source + 1)]
            assert made.tokens_T[seen].tolist() == whole[:place]
            assert made.positions_T[seen].tolist() == list(range(place))
            assert int(made.target_N[scored]) == whole[place]
            scored += 1
    assert scored == len(made.source_N) == len(made.weight_N)


def test_documents_lie_in_one_piece():
    made = prefix_pack([([r, *[1] * 4, q], [a]) for q in range(3) for r in range(3) for a in range(2)], least=2)
    for i, span in enumerate(made.spans):
        assert span.parent < 0 or made.spans[i - 1].end == span.start
    roots = [i for i, span in enumerate(made.spans) if span.parent < 0]
    assert len(roots) == 3
    assert len(made.tokens_T) == 3 * (5 + 3)


def test_many_beginnings_of_each_other_do_not_recurse():
    pairs = [([1] * n, [2]) for n in range(1, 3000)]
    assert len(prefix_pack(pairs, least=1).tokens_T) == 2999


def test_parts_keep_those_together_that_share():
    shots = [list(range(20)), list(range(100, 120))]
    pairs = [([*shots[i % 2], 50 + i], [1]) for i in range(6)]  # 20 shared and one own token each
    assert list(prefix_parts(pairs, 24)) == [[0, 2, 4], [1, 3, 5]]
    assert list(prefix_parts(pairs, 22)) == [[0, 2], [4], [1, 3], [5]]
    assert list(prefix_parts(pairs, 1)) == [[0], [2], [4], [1], [3], [5]]
    assert list(prefix_parts([], 10)) == []
