"""What the tests of recipes and of the report share."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))  # the tests share `pages` and `made_run`

from made_run import write_run


@pytest.fixture
def run_dir(tmp_path):
    """A finished run folder."""
    return write_run(tmp_path / "smol")
