"""The step plan: same content on any number of machines, level ranks, nothing lost."""

from collections import Counter

import pytest
import torch

from tulu_lightning.core.step_plan import StepPlan, cost, cut, mix_seed

LENGTHS = torch.randint(1, 400, (103,), generator=torch.Generator().manual_seed(0)).tolist()


def plan(**changes):
    return StepPlan(**{"lengths": LENGTHS, "examples_per_step": 10, "micro_tokens": 512, "seed": 3, **changes})


def test_every_row_comes_once_an_epoch_and_the_last_step_is_short():
    two = plan(epochs=2)
    assert two.steps_per_epoch == 11  # 103 rows, 10 a step
    assert two.total_steps == 22
    for epoch in (0, 1):
        steps = [two.examples(k) for k in range(11 * epoch, 11 * epoch + 11)]
        assert [len(s) for s in steps] == [10] * 10 + [3]
        assert sorted(row for s in steps for row in s) == list(range(103))
    assert two.examples(0) != two.examples(11)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("micro_tokens", [400, 512, 100_000])
def test_the_rows_of_a_step_depend_on_neither_ranks_nor_micro_batches(world_size, micro_tokens):
    base, other = plan(), plan(world_size=world_size, micro_tokens=micro_tokens)
    for step in range(base.total_steps):
        dealt = [other.micro_batches(step, rank) for rank in range(world_size)]
        assert len({len(micros) for micros in dealt}) == 1  # collectives: the same number on every rank
        rows = Counter(row for micros in dealt for micro in micros for row in micro)
        assert rows == Counter(base.examples(step))


def test_no_micro_batch_is_over_the_limit_unless_one_row_alone_is():
    for step in range(plan().total_steps):
        for micro in plan(micro_tokens=300).micro_batches(step):
            assert sum(LENGTHS[row] for row in micro) <= 300 or len(micro) == 1


def test_a_short_rank_is_given_fillers():
    # Three rows that each fill a micro-batch, on two ranks: two micro-batches each, one of them a filler.
    assert cut([5, 5, 5], 5, ranks=2) == [[(0,), (2,)], [(1,), ()]]
    assert cut([5], 5, ranks=3) == [[(0,)], [()], [()]]


def test_best_fit_fills_what_next_fit_would_not():
    # 6+4, 7+3: two full bins of 10; first come first served would open a third.
    assert sorted(sorted(m) for m in cut([6, 7, 3, 4], 10)[0]) == [[0, 3], [1, 2]]


def test_ranks_carry_level_costs():
    ranks = cut([400, 390, 210, 200, 100, 90, 20, 10], 400, ranks=2)
    loads = [sum(cost([400, 390, 210, 200, 100, 90, 20, 10][i]) for micro in r for i in micro) for r in ranks]
    assert max(loads) / min(loads) < 1.1


def test_order_is_a_function_of_seed_and_epoch_only():
    assert plan().examples(4) == plan().examples(4)
    assert plan(seed=4).examples(4) != plan().examples(4)
    late_first = plan(epochs=3)
    assert late_first.examples(25) == plan(epochs=3).examples(25)
    assert late_first.examples(2) == plan(epochs=3).examples(2)


def test_max_steps_shortens_and_lengthens():
    assert plan(max_steps=4).total_steps == 4
    long = plan(max_steps=30)
    assert len(long.examples(29)) == 10  # third epoch
    with pytest.raises(IndexError, match="step 30 of a run of 30"):
        long.examples(30)


@pytest.mark.parametrize("name", ["examples_per_step", "micro_tokens", "epochs", "world_size"])
def test_counts_below_one_are_refused(name):
    with pytest.raises(ValueError, match=name):
        plan(**{name: 0})


def test_seed_streams_do_not_meet():
    seeds = {mix_seed(a, b) for a in range(100) for b in range(100)}
    assert len(seeds) == 10_000
    assert mix_seed(1, 2) != mix_seed(2, 1)
    assert all(0 <= s < 2**63 for s in seeds)
