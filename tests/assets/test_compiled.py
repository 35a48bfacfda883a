"""C++ that is compiled where it runs: once, and never a reason to stop."""

import logging
import os
import pwd
import stat

import pytest

from tulu_lightning.assets import compiled
from tulu_lightning.assets.compiled import compiler, load_compiled

SOURCE = """
extern "C" int twice(int x) { return 2 * x; }
extern "C" int named() { return NUMBER; }
"""


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("TULU_CACHE", str(tmp_path / "cache"))
    load_compiled.cache_clear()
    caplog.set_level(logging.INFO)
    yield
    load_compiled.cache_clear()


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "small.cpp"
    path.write_text(SOURCE)
    return path


needs_compiler = pytest.mark.skipif(compiler() is None, reason="no C++ compiler")


@needs_compiler
def test_a_file_is_compiled_once_for_each_set_of_macros(source, tmp_path, monkeypatch):
    before = os.umask(0o002)  # Debian's for users with a group of their own
    try:
        libraries = {number: load_compiled(source, (("NUMBER", number),)).library for number in (3, 4)}
    finally:
        os.umask(before)
    for number, library in libraries.items():
        assert library is not None
        assert (library.twice(21), library.named()) == (42, number)
    assert len(list((tmp_path / "cache").glob("small-*"))) == 2

    load_compiled.cache_clear()
    monkeypatch.setattr(compiled, "build_once", lambda name, _: tmp_path / "cache" / name)  # builds nothing
    library = load_compiled(source, (("NUMBER", 4),)).library
    assert library is not None
    assert library.named() == 4


@needs_compiler
@pytest.mark.parametrize("change", ["source", "header", "processor", "compiler"])
def test_another_source_header_processor_or_compiler_is_another_library(source, tmp_path, monkeypatch, change):
    assert load_compiled(source, (("NUMBER", 1),)).library is not None
    load_compiled.cache_clear()
    if change == "source":
        source.write_text(SOURCE.replace("2 * x", "3 * x"))
    elif change == "header":
        (source.parent / "more.h").write_text("")
    else:
        monkeypatch.setattr(compiled, {"processor": "_processor", "compiler": "_version"}[change], lambda *_: "new")
    assert load_compiled(source, (("NUMBER", 1),)).library is not None
    assert len(list((tmp_path / "cache").glob("small-*"))) == 2


@needs_compiler
def test_what_the_compiler_refuses_is_told_in_its_words_and_leaves_nothing(source, tmp_path, caplog):
    source.write_text("int broken( {")
    assert load_compiled(source).library is None
    assert "small.cpp is not compiled" in caplog.text
    assert "error" in caplog.text
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


@needs_compiler
@pytest.mark.parametrize("others", ["library.so", "."])
def test_a_library_that_others_can_write_is_not_loaded(source, tmp_path, caplog, others):
    assert load_compiled(source, (("NUMBER", 1),)).library is not None
    load_compiled.cache_clear()
    (made,) = (tmp_path / "cache").glob("small-*")
    (made / others).chmod(0o777)
    assert load_compiled(source, (("NUMBER", 1),)).library is None
    assert "can be written by others" in caplog.text


def test_no_compiler_is_no_error(source, monkeypatch, caplog):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert load_compiled(source).library is None
    assert "no C++ compiler is installed" in caplog.text


def test_the_compiler_can_be_named(source, tmp_path, monkeypatch, caplog):
    mine = tmp_path / "mine"
    mine.write_text("#!/bin/sh\necho ${0##*/} was asked >&2; exit 3\n")
    mine.chmod(mine.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(mine))
    assert load_compiled(source).library is None
    assert "mine was asked" in caplog.text


def test_it_can_be_switched_off(source, monkeypatch, caplog):
    monkeypatch.setenv("TULU_COMPILE", "0")
    assert load_compiled(source).library is None
    assert "TULU_COMPILE is 0" in caplog.text


@needs_compiler
@pytest.mark.parametrize("left", [b"", b"\x7fELF and no more", None])
def test_a_library_that_was_lost_or_cut_short_is_made_anew(source, left):
    path = compiled._built(str(compiler()), source, {"NUMBER": 1}) / "library.so"  # not loaded: that is once a path
    if left is None:
        path.unlink()
    else:
        path.write_bytes(left)
    library = load_compiled(source, (("NUMBER", 1),)).library
    assert library is not None
    assert library.named() == 1


@needs_compiler
def test_no_home_is_no_error(source, monkeypatch, caplog):
    def none(user: int) -> None:
        raise KeyError(user)

    monkeypatch.delenv("TULU_CACHE")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", none)  # a container's user without a line in /etc/passwd
    assert load_compiled(source, (("NUMBER", 1),)).library is None
    assert "Could not determine home directory" in caplog.text


@needs_compiler
@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_cache_that_cannot_be_written_is_no_error(source, tmp_path, caplog):
    (tmp_path / "cache").mkdir(mode=0o500)
    assert load_compiled(source, (("NUMBER", 1),)).library is None
    assert "cannot be written" in caplog.text
