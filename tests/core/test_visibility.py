"""Two numbers a token say who sees whom, as the definition by chains of parents does."""

import random

import pytest
import torch

from tulu_lightning.core.packing import ancestors
from tulu_lightning.core.visibility import sees, visibility
from tulu_lightning.types import Span


def random_spans(seed: int, longest: int = 6, documents: int = 4, segments: int = 6):
    """Trees in which any earlier segment of a document may be the parent, not only the last ones."""
    rng, spans, start = random.Random(seed), [], 0
    for _ in range(documents):
        first = len(spans)
        for _ in range(rng.randint(1, segments)):
            count = rng.randint(1, longest)
            parent = rng.randint(first, len(spans) - 1) if len(spans) > first else -1
            spans.append(Span(start, start + count, parent))
            start += count
    return spans


def by_definition(spans):
    tokens = [(index, at) for index, span in enumerate(spans) for at in range(span.start, span.end)]
    return torch.tensor(
        [[k <= q if own == other else other in ancestors(spans, own) for other, k in tokens] for own, q in tokens]
    )


@pytest.mark.parametrize("seed", range(8))
def test_numbers_say_what_the_chain_of_parents_says(seed):
    spans = random_spans(seed)
    every = torch.arange(spans[-1].end)
    assert torch.equal(sees(visibility(spans), every[:, None], every[None]), by_definition(spans))


def test_the_numbers_of_a_prompt_with_two_answers():
    enter_T, leave_T = visibility([Span(0, 2, -1), Span(2, 3, 0), Span(3, 4, 0), Span(4, 6, -1)])
    assert enter_T.tolist() == [0, 0, 1, 2, 3, 3]
    assert leave_T.tolist() == [3, 3, 2, 3, 4, 4]


def test_a_chain_of_thousands_is_no_deeper_than_a_loop():
    spans = [Span(i, i + 1, i - 1) for i in range(5000)]
    enter_T, leave_T = visibility(spans)
    assert enter_T.tolist() == list(range(5000))
    assert set(leave_T.tolist()) == {5000}
