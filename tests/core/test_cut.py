"""Cutting a step over ranks and micro-batches: properties over random lengths, balance, fill, and a plain twin."""

import random

import pytest
import torch

from tulu_lightning.core.step_plan import StepPlan, cost, cut


def chat_lengths(rows, seed=0):
    """Log-normal, median 500, cut to 30..4096 tokens."""
    rng = random.Random(seed)
    return [min(4096, max(30, round(rng.lognormvariate(6.2146, 0.9)))) for _ in range(rows)]


def costs_of(dealt, lengths):
    return [[sum(cost(lengths[i]) for i in micro) for micro in micros] for micros in dealt]


def padded(tokens, pad_to):
    return -(-tokens // pad_to) * pad_to


@pytest.mark.parametrize("pad_to", [0, 64, 512])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8, 64])
def test_every_item_comes_once_within_the_limit_and_as_often_on_every_rank(ranks, pad_to):
    rng = random.Random(ranks)
    for trial in range(20):
        lengths = [rng.choice([rng.randint(1, 60), rng.randint(1, 600)]) for _ in range(rng.randint(1, 150))]
        dealt = cut(lengths, 512, ranks, pad_to)
        assert len({len(micros) for micros in dealt}) == 1, trial
        assert len(dealt) == ranks
        micros = [micro for rank in dealt for micro in rank if micro]
        assert sorted(i for micro in micros for i in micro) == list(range(len(lengths)))
        assert all(sum(lengths[i] for i in micro) <= 512 or len(micro) == 1 for micro in micros)
        assert all(micro == tuple(sorted(micro)) for micro in micros)
        assert dealt == cut(lengths, 512, ranks, pad_to)


@pytest.mark.parametrize("pad_to", [0, 64])
@pytest.mark.parametrize("ranks", [1, 3, 8])
def test_there_are_no_more_micro_batches_than_best_fit_needs(ranks, pad_to):
    def best_fit(lengths, limit):
        rooms = []
        for size in sorted(lengths, reverse=True):
            fits = [b for b in range(len(rooms)) if rooms[b] >= size]
            if fits:
                rooms[min(fits, key=lambda b: rooms[b])] -= size
            else:
                rooms.append(limit - size)
        return len(rooms)

    for seed in range(10):
        lengths = [random.Random(seed + i).randint(1, 300) for i in range(80)]
        rounds = -(-best_fit(lengths, 700) // ranks)
        assert len(cut(lengths, 700, ranks, pad_to)[0]) <= rounds


@pytest.mark.parametrize("rows", [128, 256])
@pytest.mark.parametrize(
    ("ranks", "micro_tokens", "pad_to", "bound"),
    [(2, 8192, 0, 1.02), (8, 8192, 0, 1.02), (8, 16384, 0, 1.02), (8, 4096, 0, 1.13), (8, 16384, 256, 1.04)],
)
def test_ranks_wait_little_for_each_other(ranks, micro_tokens, pad_to, bound, rows):
    # 4096 tokens a micro-batch is the length of the longest rows: those cannot be joined by short ones to even it out.
    for seed in range(60):
        lengths = chat_lengths(rows, seed)
        costs = costs_of(cut(lengths, micro_tokens, ranks, pad_to), lengths)
        mean = sum(map(sum, costs)) / ranks
        waited = sum(max(one) for one in zip(*costs, strict=True))  # every round lasts as long as its dearest
        assert max(map(sum, costs)) <= waited <= bound * mean, seed


def test_in_every_round_the_rank_with_least_so_far_gets_the_dearest_micro_batch():
    # Four micro-batches of one item each: 10 and 8, then 7 to the rank that had 8. In turn it would be 17 and 11.
    assert cut([10, 8, 7, 3], 10, ranks=2) == [[(0,), (3,)], [(1,), (2,)]]


def test_with_two_rows_a_rank_nothing_is_dearer_than_the_dearest_row_must_be():
    for seed in range(5):
        lengths = chat_lengths(128, seed)
        costs = [sum(micros) for micros in costs_of(cut(lengths, 8192, 64), lengths)]
        assert max(costs) <= max(1.05 * sum(costs) / 64, max(map(cost, lengths)))


def test_a_documents_attention_costs_its_square_whatever_else_is_in_the_pack():
    # A token of a document as long as ATTENTION_TOKENS costs twice what a lone one does; two half as long, 1.5 times.
    assert cost(16384) == 2 * 16384
    assert 2 * cost(8192) == 1.5 * 16384
    # So one rank gets the long document, and the other more tokens in short ones.
    (long,), (short,) = cut([8192, *[1024] * 13], 16384, ranks=2)
    assert long == (0, 13)  # 9,216 tokens
    assert len(short) == 12  # 12,288


@pytest.mark.parametrize(("micro_tokens", "pad_to"), [(4096, 4096), (8192, 8192), (4096, 256)])
def test_a_whole_set_fills_a_fixed_budget_to_98_percent(micro_tokens, pad_to):
    lengths = chat_lengths(10_000)
    packs = [sum(lengths[i] for i in micro) for micro in cut(lengths, micro_tokens, pad_to=pad_to)[0]]
    assert sum(packs) == sum(lengths)  # nothing dropped, and `cut` splits nothing
    assert sum(lengths) >= 0.98 * sum(padded(tokens, pad_to) for tokens in packs)


@pytest.mark.parametrize("ranks", [1, 8])
@pytest.mark.parametrize("rows", [128, 256])
@pytest.mark.parametrize("pad_to", [256, 512])
def test_steps_fill_few_shapes_to_98_percent(pad_to, rows, ranks):
    lengths = chat_lengths(10_000)
    plan = StepPlan(lengths, rows, 8192, world_size=ranks, pad_to=pad_to)
    shapes = [
        padded(sum(lengths[row] for row in micro), pad_to)
        for step in range(plan.total_steps)
        for micros in plan.ranks(step)
        for micro in micros
        if micro
    ]
    assert sum(lengths) >= 0.98 * sum(shapes)
    assert len(set(shapes)) <= 8192 // pad_to


@pytest.mark.parametrize("pad_to", [-1, 300])
def test_padding_must_divide_the_limit(pad_to):
    with pytest.raises(ValueError, match="must divide micro_tokens"):
        StepPlan([1], 1, 512, pad_to=pad_to)


def test_lengths_may_be_a_list_a_tensor_or_an_array():
    lengths = chat_lengths(50)
    tensor = torch.tensor(lengths, dtype=torch.int32)
    plans = [StepPlan(kind, 8, 4096, world_size=2) for kind in (lengths, tensor, tensor.numpy())]
    for step in range(plans[0].total_steps):
        cuts = [plan.ranks(step) for plan in plans]
        assert cuts[0] == cuts[1] == cuts[2]
        assert all(type(row) is int for micros in cuts[2] for micro in micros for row in micro)


def test_the_set_of_a_step_depends_on_seed_and_epoch_alone():
    def sets(**changes):
        plan = StepPlan(**{"lengths": chat_lengths(100), "examples_per_step": 16, "micro_tokens": 4096, **changes})
        found = [[row for micros in plan.ranks(k) for micro in micros for row in micro] for k in range(7)]
        assert [sorted(rows) for rows in found] == [sorted(plan.examples(k)) for k in range(7)]
        return [set(rows) for rows in found]

    one = sets()
    assert sets(world_size=5) == sets(micro_tokens=8192) == sets(pad_to=512) == sets(lengths=[7] * 100) == one
    assert sets(epochs=3, max_steps=90) == one
    assert sets(seed=1) != one
