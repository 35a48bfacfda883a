import io
import json
import tarfile

import pytest

from tulu_lightning.assets import rows
from tulu_lightning.assets.cache import cache_dir
from tulu_lightning.assets.rows import alpaca_rows, preference_rows
from tulu_lightning.errors import InputError

needs_package = pytest.mark.skipif(
    not (cache_dir() / "packages" / rows.ARCHIVE).is_file(), reason="the package is not in the cache"
)


@pytest.fixture
def small_package(tmp_path, monkeypatch):
    """A package of three rows in place of the real one."""
    content = json.dumps(
        [
            {"instruction": "Say hi.", "input": "", "output": "hi"},
            {"instruction": "Upper-case it.", "input": "abc", "output": "ABC"},
            {"instruction": "Go on.", "input": "", "output": "x" * 1000},
        ]
    ).encode()
    archive = tmp_path / "packages" / rows.ARCHIVE
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as tar:
        info = tarfile.TarInfo(rows.MEMBER)
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
    monkeypatch.setenv("TULU_CACHE", str(tmp_path))
    monkeypatch.setattr(rows, "SHA256", rows.hashlib.sha256(archive.read_bytes()).hexdigest())
    return archive


@pytest.mark.usefixtures("small_package")
def test_short_rows_come_back_in_messages_form():
    found = alpaca_rows(2)
    assert sorted(row["messages"][0]["content"] for row in found) == ["Say hi.", "Upper-case it.\n\nabc"]
    assert sorted(row["messages"][1]["content"] for row in found) == ["ABC", "hi"]
    assert all(row["source"] == "alpaca" for row in found)
    assert [message["role"] for message in found[0]["messages"]] == ["user", "assistant"]


@pytest.mark.usefixtures("small_package")
def test_more_rows_than_there_are_short_ones_are_refused():
    with pytest.raises(InputError, match=r"limit is 3, and 2 rows have at most 400 characters"):
        alpaca_rows(3)


def test_a_damaged_package_is_refused(small_package):
    small_package.write_bytes(small_package.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"its SHA-256 is wrong.*make setup"):
        alpaca_rows(1)


def test_a_missing_package_sends_to_make_setup(tmp_path, monkeypatch):
    monkeypatch.setenv("TULU_CACHE", str(tmp_path))
    with pytest.raises(InputError, match="Run `make setup`"):
        alpaca_rows(1)


@needs_package
def test_the_real_package_gives_what_is_promised():
    found = alpaca_rows(410)
    lengths = [sum(len(message["content"]) for message in row["messages"]) for row in found]
    assert len(found) == 410
    assert max(lengths) <= 400
    assert alpaca_rows(20, seed=1) == alpaca_rows(410, seed=1)[:20]
    assert alpaca_rows(20, seed=1) != alpaca_rows(20, seed=2)


@needs_package
def test_the_real_pairs_are_300_and_a_seed_draws_some_of_them():
    found = preference_rows()
    assert len(found) == 300
    assert all(row["prompt"][-1]["role"] == "user" for row in found)
    assert all(
        [message["role"] for message in row[side]] == ["assistant"] for row in found for side in ("chosen", "rejected")
    )
    assert preference_rows(20, seed=1) == preference_rows(300, seed=1)[:20]
    assert preference_rows(20, seed=1) != preference_rows(20, seed=2)
    for limit in (0, 301):
        with pytest.raises(InputError, match=f"limit is {limit}, and there are 300 rows"):
            preference_rows(limit)
