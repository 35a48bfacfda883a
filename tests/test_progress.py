import io

import pytest

from tulu_lightning.progress import Progress, duration


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (44.4, "44s"), (59.6, "1m00s"), (224, "3m44s"), (3599.7, "1h00m"), (7500, "2h05m"), (-3, "0s")],
)
def test_durations_read_as_people_write_them(seconds, text):
    assert duration(seconds) == text


def lines_of(total, updates, done=0):
    """Lines printed for (seconds since the last update, done, note) updates."""
    clock, stream = Clock(), io.StringIO()
    with Progress("sft", total, done, stream=stream, clock=clock) as progress:
        for seconds, count, note in updates:
            clock.now += seconds
            progress.update(count, note)
    return stream.getvalue().splitlines()


def test_a_slow_action_gets_a_line_an_iteration():
    # 8 s an iteration; after 12 of 40, 28 x 8 = 224 s = 3m44s are left
    lines = lines_of(40, [(8.0, i, f"loss {i}") for i in range(1, 13)])
    assert len(lines) == 12
    assert lines[-1] == "sft  12/40  loss 12  8.0 s/it  3m44s left"


def test_a_fast_action_gets_a_line_in_five_seconds_with_the_first_and_the_last():
    # 1 s an iteration: lines at 1 (first), 6, 11 (each 5 s after the one before) and 13 (last)
    lines = lines_of(13, [(1.0, i, "") for i in range(1, 14)])
    assert [line.split()[1] for line in lines] == ["1/13", "6/13", "11/13", "13/13"]
    assert lines[0] == "sft  1/13  1.0 s/it  12s left"
    assert lines[-1] == "sft  13/13  1.0 s/it  0s left"


def test_an_action_that_stops_early_shows_how_far_it_came():
    lines = lines_of(40, [(1.0, 1, ""), (1.0, 2, ""), (1.0, 3, "")])
    assert [line.split()[1] for line in lines] == ["1/40", "3/40"]


def test_a_resumed_action_counts_only_its_own_iterations():
    # 30 of 40 were done; one more took 6 s, so 9 x 6 = 54 s are left, not 40 x 6 / 31
    assert lines_of(40, [(6.0, 31, "")], done=30) == ["sft  31/40  6.0 s/it  54s left"]


def test_the_estimate_follows_the_recent_rate():
    # 20 iterations of 1 s, then 20 of 10 s: the mean of all would be 5.5 s, of the recent window it is 10 s
    updates = [(1.0, i, "") for i in range(1, 21)] + [(10.0, i, "") for i in range(21, 41)]
    assert lines_of(50, updates)[-1] == "sft  40/50  10.0 s/it  1m40s left"


def test_many_iterations_a_second_are_counted_the_other_way():
    assert lines_of(1000, [(0.5, 10, "")]) == ["sft  10/1000  20.0 it/s  50s left"]


@pytest.mark.parametrize(
    ("updates", "line"),
    [
        ([(0.0, 1, "")], "sft  1/4  0.0 s/it  0s left"),  # no time went by
        ([(1.0, 0, "warming up")], "sft  0/4  warming up"),  # nothing is done yet: no rate, no estimate
        ([(1.0, 9, "")], "sft  9/4  9.0 it/s  0s left"),  # more than was announced
    ],
)
def test_nothing_is_divided_by_zero_or_negative(updates, line):
    assert lines_of(4, updates) == [line]


def test_a_terminal_gets_a_bar_and_actions_within_one_another_share_it():
    stream, clock = Terminal(), Clock()
    with Progress("outer", 2, stream=stream, clock=clock) as outer:
        with Progress("inner", 4, stream=stream, clock=clock) as inner:
            clock.now += 2.0
            inner.update(4, "loss 1.23")
        clock.now += 2.0
        outer.update(1)
    text = stream.getvalue()
    assert "outer" in text
    assert "1/2" in text
    assert "inner" in text
    assert "loss 1.23" in text
    assert "4.0 s/it  4s left" in text


def test_the_display_is_given_back_when_an_action_fails():
    for _ in range(2):  # rich refuses a second display while the first one is alive
        with pytest.raises(KeyError), Progress("x", 2, stream=Terminal()):
            raise KeyError
