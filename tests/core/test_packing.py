"""Packing: where tokens go, who predicts whom."""

import pytest
import torch

from tulu_lightning.core.packing import ancestors, filler, length, loss_weight, pack, scored_tokens
from tulu_lightning.types import Document, Segment, Span


def segment(ids, weights, parent=-1):
    return Segment(torch.tensor(ids), torch.tensor(weights, dtype=torch.float32), parent)


PLAIN = Document((segment([10, 11, 12], [0, 1, 1]),))
PAIR = Document((segment([20, 21], [0, 0]), segment([30, 31], [1, 1], 0), segment([40], [1], 0)))


def test_a_plain_document_predicts_each_token_from_the_one_before():
    packed = pack([PLAIN], rows=[7])
    assert packed.tokens_T.tolist() == [10, 11, 12]
    assert packed.positions_T.tolist() == [0, 1, 2]
    assert packed.source_N.tolist() == [0, 1]  # tokens 1 and 2 are scored, from 0 and 1
    assert packed.target_N.tolist() == [11, 12]
    assert packed.rows == (7,)


def test_children_share_their_parents_last_hidden_state_and_restart_their_positions():
    packed = pack([PLAIN, PAIR])
    #                 plain      prompt  chosen  rejected
    # index            0  1  2    3  4    5  6    7
    assert packed.tokens_T.tolist() == [10, 11, 12, 20, 21, 30, 31, 40]
    assert packed.positions_T.tolist() == [0, 1, 2, 0, 1, 2, 3, 2]
    assert packed.spans == (Span(0, 3, -1), Span(3, 5, -1), Span(5, 7, 1), Span(7, 8, 1))
    # 30 is predicted from the prompt's last token (4), 31 from 30 (5), 40 from the prompt's last token again.
    assert packed.source_N.tolist() == [0, 1, 4, 5, 4]
    assert packed.target_N.tolist() == [11, 12, 30, 31, 40]
    assert packed.segment_N.tolist() == [0, 0, 2, 2, 3]


def test_grandchildren_continue_their_parent():
    chain = Document((segment([1, 2], [0, 0]), segment([3], [0], 0), segment([4, 5], [1, 1], 1)))
    packed = pack([chain])
    assert packed.positions_T.tolist() == [0, 1, 2, 3, 4]
    assert packed.source_N.tolist() == [2, 3]
    assert ancestors(packed.spans, 2) == (0, 1)
    assert ancestors(packed.spans, 0) == ()


def test_the_first_token_of_a_document_is_never_scored():
    document = Document((segment([1, 2], [1, 0.5]),))
    assert scored_tokens(document) == 1
    assert loss_weight(document) == 0.5
    assert pack([document]).target_N.tolist() == [2]
    assert length(document) == 2


def test_counts_agree_with_the_pack():
    packed = pack([PLAIN, PAIR])
    assert sum(map(scored_tokens, (PLAIN, PAIR))) == packed.target_N.numel() == 5
    assert sum(map(loss_weight, (PLAIN, PAIR))) == float(packed.weight_N.sum()) == 5
    assert sum(map(length, (PLAIN, PAIR))) == packed.tokens_T.numel() == 8


def test_a_filler_computes_and_counts_for_nothing():
    empty = filler(PAIR)
    assert empty.target_N.numel() == 3
    assert empty.weight_N.tolist() == [0, 0, 0]
    assert empty.rows == ()


def test_padding_is_one_last_segment_that_no_row_owns():
    packed = pack([PLAIN, PAIR], rows=[7, 9], pad_to=6, pad_id=5)  # 8 tokens, to 12
    plain = pack([PLAIN, PAIR], rows=[7, 9])
    assert packed.tokens_T.tolist() == [*plain.tokens_T.tolist(), 5, 5, 5, 5]
    assert packed.positions_T.tolist() == [*plain.positions_T.tolist(), 0, 0, 0, 0]
    assert packed.spans == (*plain.spans, Span(8, 12, -1))
    assert packed.padding == 4
    assert repr(packed[3:8]) == repr(plain[3:8])  # sources, targets, weights, segments, rows
    assert plain.padding == pack([PLAIN, PAIR], pad_to=8).padding == 0
    assert pack([PLAIN, PAIR], pad_to=8).spans == plain.spans


def test_a_filler_has_the_shape_of_the_others():
    assert filler(PAIR, pad_to=16).tokens_T.numel() == 16
    assert filler(PAIR, pad_to=16).weight_N.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    "documents",
    [[], [Document((segment([], []),))], [Document((segment([1], [0], 0),))], [Document((segment([1], [0], 3),))]],
)
def test_nonsense_is_refused(documents):
    with pytest.raises(ValueError, match=r"pack needs|parent comes first"):
        pack(documents)
