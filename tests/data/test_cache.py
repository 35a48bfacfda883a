"""Tokenised rows by content: found again, built once, safe against kills, damage and a full disk."""

import errno
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tulu_lightning.data import cache
from tulu_lightning.data.cache import ENTRY, Job, Kept, load_or_build, tokens_dir
from tulu_lightning.data.criteria import Keywords
from tulu_lightning.data.importing import find_function
from tulu_lightning.data.intake import LeftOut, TooLong
from tulu_lightning.data.keys import code_digest
from tulu_lightning.data.sft import SFTData
from tulu_lightning.data.sources import Source
from tulu_lightning.data.store import Part
from tulu_lightning.errors import InputError

SETTINGS = {"tokenizer": "tiny-random-llama", "max_tokens": 200, "examples_per_step": 4}
ROWS, CHUNK = 450, 100
FORK = multiprocessing.get_context("fork")  # the children run no tokenizer and no threads


@pytest.fixture(autouse=True)
def tokens(tmp_path, monkeypatch) -> Path:
    """A cache of its own for each test, and small chunks."""
    monkeypatch.setenv("TULU_TOKENS", str(tmp_path / "tokens"))
    monkeypatch.setattr(cache, "CHUNK", CHUNK)
    return tmp_path / "tokens"


def encoded(index: int) -> Kept | LeftOut:
    """Every tenth row is left out, every twentieth for its length."""
    if index % 10 == 9:
        return (TooLong if index % 20 == 19 else LeftOut)("for a reason")
    return Kept((Part([index, 1, 2], [0.0, 1.0, 0.5]), Part([3] * (index % 5 + 1), [1.0] * (index % 5 + 1), 0)))


def job(encode=None, wanted=None, rows=ROWS) -> Job:
    return Job("rows", rows, range(rows), wanted, encode or (lambda chunk: [encoded(index) for index in chunk]))


def never(chunk):
    pytest.fail("the rows were encoded again")


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def in_child(work) -> int:
    """Run in a process of its own; its exit code, negative for a signal."""
    child = FORK.Process(target=work)
    child.start()
    child.join(60)
    assert child.exitcode is not None
    return child.exitcode


# Entries ------------------------------------------------------------------------------------------------------------


def test_an_entry_holds_what_was_kept_and_counts_what_was_not(tokens):
    entry = load_or_build("one", job())
    kept = [index for index in range(ROWS) if index % 10 != 9]
    assert [document.segments[0].ids_L[0].item() for document in entry.store] == kept
    assert entry.store.numbers.tolist() == kept
    counts = entry.counts
    assert (counts.rows, counts.tried, counts.kept, counts.too_long) == (450, 450, 405, 22)
    assert counts.left_out == {"for a reason": 45}
    assert sorted(path.name for path in tokens.iterdir()) == [".one.lock", "one"]

    again = load_or_build("one", job(never))
    assert (again.counts, again.digest, again.store.summary) == (entry.counts, entry.digest, entry.store.summary)


@pytest.mark.parametrize("wanted", [1, 90, 91, 400])
def test_a_build_stops_at_the_last_row_that_is_wanted(wanted):
    entry = load_or_build("some", job(wanted=wanted))
    kept = [index for index in range(ROWS) if index % 10 != 9][:wanted]
    assert entry.store.numbers.tolist() == kept
    assert (entry.counts.kept, entry.counts.tried) == (wanted, kept[-1] + 1)
    assert entry.counts.left_out.total() == kept[-1] + 1 - wanted


def test_fewer_than_wanted_are_what_there_is():
    assert load_or_build("all", job(wanted=9999)).counts.kept == 405


def test_a_bad_row_leaves_nothing_behind(tokens):
    def encode(chunk):
        if 250 in chunk:
            raise InputError("row 251", "is bad", "Correct it.")
        return [encoded(index) for index in chunk]

    with pytest.raises(InputError, match="row 251"):
        load_or_build("bad", job(encode))
    assert [path.name for path in tokens.iterdir()] == [".bad.lock"]


# Kills, other processes, damage -------------------------------------------------------------------------------------


def kill(*_) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_in(when: str) -> None:
    """Build, and be killed at the third of the five chunks, or when all are done."""
    write, append = cache._write, cache.Writer.append

    def encode(chunk):
        if when == "while it encodes" and chunk[0] == 2 * CHUNK:
            kill()
        return [encoded(index) for index in chunk]

    def append_and_die(writer, rows, numbers):
        append(writer, rows, numbers)
        if numbers[0] >= 2 * CHUNK:
            kill()

    def die_in_the_middle(path, values):
        if (values["counts"]["tried"] == 3 * CHUNK) if when == "in the journal" else (path.name == ENTRY):
            path.with_name(f".{path.name}.tmp").write_text('{"summary": {"ro')
            kill()
        write(path, values)

    if when == "between the rows and the journal":
        cache.Writer.append = append_and_die
    if when in ("in the journal", "at the end"):
        cache._write = die_in_the_middle
    load_or_build("killed", job(encode))


WHEN = {
    "while it encodes": {0, CHUNK, 2 * CHUNK},  # what was tokenised but not stored is lost
    "between the rows and the journal": {2 * CHUNK},
    "in the journal": {2 * CHUNK},
    "at the end": {ROWS},
}


@pytest.mark.parametrize("when", WHEN)
def test_a_build_that_was_killed_goes_on_and_ends_in_the_same_bytes(when, tokens):
    whole = files(load_or_build("whole", job()).store.folder)
    assert in_child(lambda: kill_in(when)) == -signal.SIGKILL
    assert not (tokens / "killed").exists()

    tried = []

    def rest(chunk):
        tried.extend(chunk)
        return [encoded(index) for index in chunk]

    assert files(load_or_build("killed", job(rest)).store.folder) == whole
    done = ROWS - len(tried)
    assert tried == list(range(done, ROWS))
    assert done in WHEN[when]


def test_reading_a_chunk_goes_on_while_another_is_tokenised():
    """The second chunk is read before the first is tokenised; were they done in turn, this would wait forever."""
    second = threading.Event()

    def read(chunk):
        if chunk[0] == CHUNK:
            second.set()
        return chunk

    def encode(chunk):
        assert second.wait(30)
        return [encoded(index) for index in chunk]

    assert load_or_build("both", job(encode)._replace(read=read)).counts.kept == 405


def test_rows_that_may_not_be_needed_are_not_read():
    read = []
    load_or_build("few", job(wanted=150)._replace(read=lambda chunk: read.extend(chunk) or chunk))
    # 150 rows are missing, so 150 are tried (100 and 64); 16 of those 164 are left out, so 64 more, the least at once.
    assert len(read) <= 164 + 64


def test_the_first_bad_row_is_the_one_that_is_named():
    """A later chunk is read early, and is found bad before the first is tokenised."""

    def bad(number):
        raise InputError(f"row {number}", "is bad", "Correct it.")

    def read(chunk):
        return bad(150) if 150 in chunk else chunk

    def encode(chunk):
        time.sleep(0.05)
        return bad(20)

    with pytest.raises(InputError, match="row 20: is bad"):
        load_or_build("bad", job(encode)._replace(read=read))


def test_who_wants_what_another_process_builds_waits_for_it_and_says_so(tokens, monkeypatch):
    begun, waited = FORK.Event(), FORK.Event()

    def build():
        def encode(chunk):
            begun.set()
            assert waited.wait(30)
            return [encoded(index) for index in chunk]

        load_or_build("shared", job(encode))

    child = FORK.Process(target=build)
    child.start()
    assert begun.wait(30)
    said = []
    monkeypatch.setattr(cache, "_say", lambda text: (said.append(text), waited.set()))
    entry = load_or_build("shared", job(never))
    child.join(30)
    assert child.exitcode == 0
    assert entry.counts.kept == 405
    (line,) = said
    assert line.startswith("source 'rows': another process is tokenising these rows (")
    assert str(tokens / "shared") in line


def test_what_a_killed_builder_held_is_free_at_once():
    assert in_child(lambda: load_or_build("x", job(lambda _: os.kill(os.getpid(), signal.SIGKILL)))) == -signal.SIGKILL
    assert load_or_build("x", job()).counts.kept == 405


DAMAGE = {
    "a file cut short": (lambda folder: os.truncate(folder / "ids.bin", 1000), "ids.bin has 1000 bytes instead of"),
    "a file too long": (
        lambda folder: os.truncate(folder / "parents.bin", 9999),
        "parents.bin has 9999 bytes instead of",
    ),
    "a file missing": (lambda folder: (folder / "row_ends.bin").unlink(), "row_ends.bin is missing"),
    "no record": (lambda folder: (folder / ENTRY).unlink(), "entry.json cannot be read (FileNotFoundError)"),
    "half a record": (lambda folder: os.truncate(folder / ENTRY, 40), "entry.json cannot be read (JSONDecodeError)"),
    "another record": (lambda folder: (folder / ENTRY).write_text("[]"), "entry.json cannot be read (TypeError)"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_entry_is_reported_in_one_line_and_built_again(what, capfd):
    entry, other = load_or_build("entry", job()), load_or_build("other", job())
    whole = files(entry.store.folder)
    damage, said = DAMAGE[what]
    damage(entry.store.folder)
    capfd.readouterr()
    again = load_or_build("entry", job())
    reported = [line for line in capfd.readouterr().err.splitlines() if "damaged" in line]
    assert len(reported) == 1
    assert said in reported[0]
    assert reported[0].startswith("source 'rows': its tokens in the cache are damaged (")
    assert files(again.store.folder) == whole
    assert load_or_build("other", job(never)).digest == other.digest


def test_a_journal_that_promises_more_than_there_is_starts_anew(tokens):
    assert in_child(lambda: load_or_build("x", job(lambda c: never_mind(c)))) == -signal.SIGKILL
    os.truncate(tokens / ".x.building" / "ids.bin", 4)
    assert load_or_build("x", job()).counts.kept == 405


def never_mind(chunk):
    if chunk[0] >= 200:
        os.kill(os.getpid(), signal.SIGKILL)
    return [encoded(index) for index in chunk]


def test_a_full_disk_says_so_and_keeps_what_was_finished(tokens):
    """A limit on the size of files stands for the disk: the third chunk's ids do not fit."""
    heard = FORK.SimpleQueue()

    def build():
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))
        try:
            load_or_build("full", job())
        except InputError as error:
            heard.put((str(error), error.__cause__.errno))

    assert in_child(build) == 0
    said, number = heard.get()
    assert number == errno.EFBIG
    assert "the cache cannot be written" in said
    assert "point TULU_TOKENS or TULU_CACHE to another folder" in said
    kept = json.loads((tokens / ".full.building" / "journal.json").read_text())["counts"]["tried"]
    assert 0 < kept < ROWS
    tried = []
    load_or_build("full", job(lambda chunk: [tried.append(index) or encoded(index) for index in chunk]))
    assert tried == list(range(kept, ROWS))


# What decides an entry ----------------------------------------------------------------------------------------------


def conversation(question: str, answer: str) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


CHATS = [conversation(f"q{i}", "a" * (i + 1)) for i in range(8)]


@pytest.fixture
def entries(write, tokens):
    """`entries(rows, **settings)` sets the data up and says how many entries the cache has then."""

    def count(rows=CHATS, name="rows", source=None, kind=SFTData, **settings) -> int:
        written = write(rows, name)
        kind(sources=[Source(**{**vars(written), **(source or {})})], **{**SETTINGS, **settings}).setup()
        return len([path for path in tokens.iterdir() if not path.name.startswith(".")])

    return count


def test_the_same_rows_under_another_path_and_name_are_the_same_entry(entries, write):
    assert entries() == entries(name="elsewhere") == 1
    one, other = (SFTData(sources=[write(CHATS, name)], **SETTINGS) for name in ("rows", "elsewhere"))
    assert one.digest() == other.digest()


@pytest.mark.parametrize(
    "same",
    [
        {"seed": 5},
        {"examples_per_step": 2, "micro_tokens": 64, "epochs": 3, "max_dropped_share": 0.9},
        {"source": {"upsample": 2.0}},
    ],
)
def test_what_does_not_change_a_token_finds_the_entry(same, entries):
    assert entries() == entries(**same) == 1


@pytest.mark.parametrize(
    "other",
    [
        {"template": "tulu"},
        {"max_tokens": 199},
        {"on_overflow": "truncate"},
        {"train": "last"},
        {"rows": CHATS[:-1]},
        {"source": {"filters": [Keywords(["q3"], roles=["user"])]}},
        {"source": {"limit": 7}},
        {"source": {"count": 3}},
    ],
)
def test_what_may_change_a_token_makes_another_entry(other, entries):
    assert entries() == 1
    assert entries(**other) == 2


def test_a_sample_is_another_entry_for_another_seed_or_name(entries):
    assert entries(source={"count": 3}) == 1
    assert entries(source={"count": 3}, seed=1) == 2
    assert entries(source={"count": 3}, name="another") == 3


def test_a_kind_of_data_is_part_of_it(entries):
    class Shouting(SFTData):
        def _messages(self, source, number, row):
            return [{**each, "content": each["content"].upper()} for each in super()._messages(source, number, row)]

    assert entries() == 1
    assert entries(kind=Shouting) == 2


def test_a_change_of_one_source_tokenises_only_that_one(write, monkeypatch):
    encode, done = SFTData._encode, []

    def watched(self, source, numbers, rows):
        done.append((source.name, len(rows)))
        return encode(self, source, numbers, rows)

    monkeypatch.setattr(SFTData, "_encode", watched)

    def start(rows):
        done.clear()
        data = SFTData(sources=[write(CHATS, "one"), write(rows, "two")], **SETTINGS)
        return data.digest(), list(done)

    digest, first = start(CHATS[:5])
    assert first == [("one", 8), ("two", 5)]
    assert start(CHATS[:5]) == (digest, [])
    other, second = start(CHATS[:4])
    assert second == [("two", 4)]
    assert other != digest


def test_a_users_reader_is_part_of_it_by_its_source(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    module = tmp_path / "a_reader_of_mine.py"
    module.write_text("def read(row): return row\n")
    before = code_digest("a_reader_of_mine.read")
    assert code_digest("a_reader_of_mine.read") == before != code_digest("messages")
    module.write_text("def read(row): return None\n")
    assert code_digest("a_reader_of_mine.read") != before
    assert code_digest("no such thing. At all") == code_digest("nowhere.to_be_found") == code_digest()


def test_the_folder_can_be_chosen(monkeypatch, tmp_path):
    monkeypatch.delenv("TULU_TOKENS")
    monkeypatch.setenv("TULU_CACHE", str(tmp_path))
    assert tokens_dir() == tmp_path / "tokens"
    monkeypatch.setenv("TULU_TOKENS", str(tmp_path / "large disk"))
    assert tokens_dir() == tmp_path / "large disk"


def run_script(script: Path) -> str:
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


SCRIPT = """
from tulu_lightning.data.sft import SFTData
from tulu_lightning.data.sources import Source
{reader}
data = SFTData(sources=[Source("s", path="rows.jsonl", read="{path}")], tokenizer="tiny-random-llama", max_tokens=99,
               examples_per_step=1)
data.setup()
print(repr(data.tokenizer.decode(data.documents[0].segments[0].ids_L)))
"""
READER = 'def read(row):\n    return {"messages": [*row["messages"][:1], {"role": "assistant", "content": WORD}]}'


@pytest.mark.slow
def test_an_edited_reader_in_a_script_or_in_what_its_package_calls_is_never_served_stale(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    package = tmp_path / "my_readers"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "reading.py").write_text("from my_readers.words import WORD\n" + READER)
    for word in ("first", "second"):
        script = tmp_path / "script.py"
        script.write_text(SCRIPT.format(reader=f"WORD = {word!r}\n{READER}", path="__main__.read"))
        assert word in run_script(script)
        (package / "words.py").write_text(f"WORD = {word!r}\n")
        shutil.rmtree(package / "__pycache__", ignore_errors=True)  # written within a second, it would be taken for new
        script.write_text(SCRIPT.format(reader="", path="my_readers.reading.read"))
        assert word in run_script(script)


def test_a_function_defined_anew_in_a_notebook_is_found_and_told_apart(monkeypatch):
    main = sys.modules["__main__"]
    monkeypatch.delattr(main, "__file__", raising=False)
    digests = []
    for word in ("first", "second"):
        space = {}
        exec(f"def read(row):\n    return {word!r}", space)  # as an interpreter has it: without a source file
        monkeypatch.setattr(main, "read", space["read"], raising=False)
        assert find_function("here", "__main__.read", "a.b")({}) == word
        digests.append(code_digest("__main__.read"))
    assert digests[0] != digests[1]


def explode(**settings):
    raise RuntimeError("no rows today")


def test_a_users_functions_and_modules_that_fail_are_told_without_a_traceback(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"source 's': .*explode fails \(RuntimeError: no rows today\)"):
        SFTData(sources=[Source("s", rows=f"{__name__}.explode")], **SETTINGS).setup()
    (tmp_path / "torn.py").write_text("def read(row:\n")
    (tmp_path / "nameless.py").write_text("READERS = undefined\n")
    monkeypatch.syspath_prepend(tmp_path)
    for module, fault in (("torn", "SyntaxError"), ("nameless", "NameError")):
        with pytest.raises(InputError, match=f"{module}.read cannot be imported: its module fails \\({fault}"):
            find_function("here", f"{module}.read", "a.b")
