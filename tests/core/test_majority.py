"""The value that most answers state."""

import pytest

from tulu_lightning.core.majority import majority


@pytest.mark.parametrize(
    ("values", "equal", "expected"),
    [
        (["5", "5", "7"], [], ("5", [0, 1])),
        (["7", "5", "5.0"], [("5.0", "5")], ("5", [1, 2])),
        (["7", "1/2", "0.5"], [("1/2", "0.5")], ("1/2", [1, 2])),
        (["5", "7"], [], (None, [])),  # as many of each
        (["5", "5", "7", "7"], [], (None, [])),
        (["5", None, None], [], (None, [])),  # one alone is no majority
        ([None, "5", "5", None], [], ("5", [1, 2])),
        ([None, None], [], (None, [])),
        ([], [], (None, [])),
        (["5"], [], ("5", [0])),  # of one answer it is
    ],
)
def test_it_is_the_largest_group_as_its_first_answer_writes_it(values, equal, expected):
    assert majority(values, equal) == expected
