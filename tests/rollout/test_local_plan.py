"""How rows are put into slots: all of them once, within the limits, sharing where it pays."""

import pytest
import torch

from tulu_lightning.rollout.plan import Row, common, sections


def draw(seed: int) -> dict:
    generator = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    start = [7] * number(0, 300)
    prompts = [[*start, *([number(0, 3)] * number(1, 200))] for _ in range(number(1, 12))]
    return {
        "prompts": [*prompts, *prompts[:2]],
        "n": number(1, 6),
        "new": number(1, 300),
        "max_rows": number(1, 20),
        "batch_tokens": number(1, 3000),
    }


@pytest.mark.parametrize("seed", range(40))
def test_every_row_once_and_no_more_places_than_allowed(seed):
    call = draw(seed)
    found = []
    for section in sections(**call):
        assert section.slots <= call["max_rows"]
        total = section.slots * section.places + section.groups * section.shared_places
        one = max(len(job.ids) for job in section.jobs) + call["new"]
        assert total <= max(call["batch_tokens"], one)
        for job in section.jobs:
            found += [(row, job.ids) for row in job.rows]
            own = {"none": len(job.ids), "job": 0, "all": len(job.ids) - section.prefix}[section.share]
            shared = {"none": 0, "job": len(job.ids), "all": section.prefix}[section.share]
            assert own + call["new"] <= section.places
            assert shared <= section.shared_places
            assert 0 < len(job.rows) <= section.slots
            assert section.prefix < len(job.ids)
    expected = [(Row(i, j), tuple(ids)) for i, ids in enumerate(call["prompts"]) for j in range(call["n"])]
    assert sorted(found) == sorted(expected)


@pytest.mark.parametrize(
    ("prompts", "n", "share"),
    [
        ([[1] * 200, [2] * 200], 4, "job"),
        ([[1] * 200, [2] * 200], 1, "none"),
        ([[1] * 20, [2] * 20], 8, "none"),
        ([[1] * 200 + [2], [1] * 200 + [3]], 1, "all"),
    ],
)
def test_long_tokens_are_shared_and_short_ones_copied(prompts, n, share):
    (section,) = sections(prompts, n, 10, 64, 10_000)
    assert section.share == share


def test_short_prompts_do_not_get_the_room_of_a_long_one():
    long, short = sections([[1] * 2000, *([[i] * 20 for i in range(2, 50)])], 1, 20, 256, 4000)
    assert (len(long.jobs), long.slots) == (1, 1)
    assert (len(short.jobs), short.slots, short.places) == (48, 48, 40)


def test_what_all_prompts_begin_with_leaves_a_token_of_each():
    assert common([(1, 2, 3), (1, 2, 4, 5)]) == 2
    assert common([(1, 2), (1, 2)]) == 1
    assert common([(1,), (1, 2)]) == 0
