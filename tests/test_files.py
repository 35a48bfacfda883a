"""Files that are whole or not there."""

import os
from pathlib import Path

import pytest

from tulu_lightning.files import write_whole


def test_a_text_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    """Else a power cut can leave the name with nothing behind it, and "finished" would stand for an empty file."""
    steps, synced, renamed = [], os.fsync, Path.replace

    def sync(descriptor):
        steps.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        synced(descriptor)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(Path, "replace", lambda path, to: steps.append("renamed") or renamed(path, to))
    write_whole(tmp_path / "summary.json", "{}")
    assert steps == [".summary.json.tmp", "renamed", tmp_path.name]
    assert (tmp_path / "summary.json").read_text() == "{}"


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    write_whole(tmp_path / "summary.json", "old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_whole(tmp_path / "summary.json", "new")
    assert (tmp_path / "summary.json").read_text() == "old"
