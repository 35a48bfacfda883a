"""What the evaluation's tests share."""

import json

import pytest

from tulu_lightning.evaluation import judges, rows
from tulu_lightning.evaluation.rows import use_file


@pytest.fixture(autouse=True)
def no_files(monkeypatch):
    """Files that a test names are named for it alone."""
    monkeypatch.setattr(rows, "_given", {})


@pytest.fixture(autouse=True)
def no_judges(monkeypatch):
    """Likewise judges; and a server that fails is not asked again."""
    monkeypatch.setattr(judges, "_named", {})
    monkeypatch.setattr(judges, "_looked_for", set())
    monkeypatch.setattr(judges, "RETRIES", 0)


@pytest.fixture
def give(tmp_path):
    """Write rows and have a data set read them: `give(name, rows)`."""

    def write(name, content):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(content), encoding="utf-8")
        use_file(name, path)

    return write
