"""Reference log-probs: computed once a row by all ranks together, found again, safe against kills, damage and mix-ups.

The model is a function here, so that every number can be worked out; `test_dpo.py` has real ones.
"""

import multiprocessing
import os
import re
import signal
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from stage_runs import ROWS, preference_data

from tulu_lightning.assets.models import resolve_model
from tulu_lightning.core.preference import Pair
from tulu_lightning.core.reduce import pair_sum
from tulu_lightning.data.sources import Source
from tulu_lightning.errors import InputError
from tulu_lightning.models.backbone import Backbone
from tulu_lightning.models.lora import Lora
from tulu_lightning.stages import reference_cache
from tulu_lightning.stages.reference import Reference
from tulu_lightning.stages.reference_cache import LogpCache
from tulu_lightning.stages.reference_store import reference_dir

TINY = "tiny-random-llama"
FORK = multiprocessing.get_context("fork")  # the children run no model and no threads
CHUNK = 8


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A cache of its own for each test, and small chunks."""
    monkeypatch.setenv("TULU_REFERENCE", str(tmp_path / "reference"))
    monkeypatch.setattr(reference_cache, "CHUNK", CHUNK)
    return tmp_path / "reference"


@pytest.fixture(scope="module")
def data():
    """40 pairs of one source and 11 of another that is used two and a half times: 68 rows, 51 different ones."""
    one = Source("sums", rows=ROWS + "pair_rows", args={"count": 40})
    two = Source("more", rows=ROWS + "pair_rows", args={"count": 11, "seed": 3}, upsample=2.5)
    made = preference_data(sources=[one, two], micro_tokens=200)
    made.setup()
    return made


class Ranks:
    """Collectives among the threads of one process."""

    def __init__(self, size):
        self.size, self.barrier, self.slots = size, threading.Barrier(size, timeout=60), [None] * size

    def exchange(self, rank, value):
        self.slots[rank] = value
        self.barrier.wait()
        values = list(self.slots)
        self.barrier.wait()
        return values


def made_up(pack):
    """Each token's log-prob is minus a hundredth of its id."""
    sides = pair_sum(-pack.target_N.float() / 100, pack.segment_N, len(pack.spans) // 3)
    return Pair(*(side[: len(pack.rows)] for side in sides))


def expected(documents):
    rows = []
    for document in documents:
        start, *sides = ((segment.ids_L * (segment.weights_L > 0)).sum() / -100 for segment in document.segments)
        rows.append([float(start + side) for side in sides])
    return torch.tensor(rows)


def stage(data, ranks=None, rank=0, step=0, digest="a" * 64, micro_tokens=200, pad_to=0, **backbone):
    ranks = ranks or Ranks(1)
    strategy = SimpleNamespace(
        broadcast=lambda value: ranks.exchange(rank, value)[0],
        batch_to_device=lambda pack: pack,
        reduce_boolean_decision=lambda told, all: any(ranks.exchange(rank, told)),
        root_device=torch.device("cpu"),
    )
    trainer = SimpleNamespace(
        strategy=strategy,
        datamodule=SimpleNamespace(micro_tokens=micro_tokens, pad_to=pad_to),
        world_size=ranks.size,
        global_rank=rank,
        is_global_zero=rank == 0,
        callbacks=[SimpleNamespace(stop_requested=False)],
    )
    where = str(resolve_model(TINY))
    return SimpleNamespace(
        start=TINY, folder=where, start_digest=digest, step=step, trainer=trainer, backbone=Backbone(TINY, **backbone),
        place=(rank, ranks.size),
        reduce_sum=lambda tensor: torch.stack(ranks.exchange(rank, tensor.clone())).sum(0),
    )  # fmt: skip


def cache(data, compute=made_up, at=None, **settings):
    return LogpCache(stage(data, **settings), at, compute)


def never(pack):
    pytest.fail("the log-probs were computed again")


def in_child(work):
    """Run in a process of its own; its exit code, negative for a signal."""
    child = FORK.Process(target=work)
    child.start()
    child.join(60)
    assert child.exitcode is not None
    return child.exitcode


# Numbers ------------------------------------------------------------------------------------------------------------


def test_every_row_has_its_own_numbers_and_repeated_ones_are_computed_once(data, capfd):
    computed = []
    found = cache(data, lambda pack: computed.extend(pack.rows) or made_up(pack)).load_or_compute(data.documents)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected(data.documents))
    assert (len(data.documents), len(computed)) == (68, 51)
    tokens = sum(int(part.lengths.sum()) for part in data.documents.sources)
    assert re.search(
        rf"^reference: 51 pairs, {tokens:,} tokens in \d+s, \S+ pairs/s; kept in ", capfd.readouterr().err, re.M
    )


@pytest.mark.parametrize("cut", [{"micro_tokens": 1}, {"micro_tokens": 4096}, {"pad_to": 64, "micro_tokens": 256}])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_neither_passes_nor_padding_nor_ranks_change_a_number(data, cut, size, folder):
    ranks, passes = Ranks(size), [[] for _ in range(size)]

    def run(rank):
        def compute(pack):
            passes[rank].append(len(pack.rows))
            return made_up(pack)

        found[rank] = cache(data, compute, ranks=ranks, rank=rank, **cut).load_or_compute(data.documents)

    found = {}
    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for rank in range(size):
        torch.testing.assert_close(found[rank], expected(data.documents))
    assert len({len(each) for each in passes}) == 1, "every rank makes as many passes"
    assert sum(map(sum, passes)) == 51
    assert torch.equal(cache(data, never).load_or_compute(data.documents), found[0])


def test_other_mixtures_and_runs_find_a_sources_rows_again(data):
    cache(data).load_or_compute(data.documents)
    alone = preference_data(sources=[data.sources[1]], seed=9, epochs=3)
    torch.testing.assert_close(
        cache(data, never, micro_tokens=77).load_or_compute(alone.documents), expected(alone.documents)
    )
    with_adapters = cache(data, never, lora=Lora(r=4))
    with_adapters.load_or_compute(data.documents)  # they are off: it is the same model


@pytest.mark.parametrize(
    "other", [{"digest": "b" * 64}, {"layers": 1}, {"compute_dtype": "bfloat16"}],
)  # fmt: skip
def test_other_weights_or_arithmetic_have_numbers_of_their_own(data, other):
    before = cache(data).load_or_compute(data.documents)
    twice = cache(data, lambda pack: Pair(*(2 * side for side in made_up(pack))), **other)
    twice.check(data.documents)
    assert torch.equal(twice.load_or_compute(data.documents), 2 * before)
    assert torch.equal(cache(data, never).load_or_compute(data.documents), before)


def test_a_model_that_gives_no_number_is_refused_with_the_row(data):
    def broken(pack):
        chosen, rejected = made_up(pack)
        return Pair(chosen, torch.full_like(rejected, float("nan")))

    with pytest.raises(InputError, match=r"^tiny-random-llama: gives an answer of source 'sums', row 1 the log-prob"):
        cache(data, broken).load_or_compute(data.documents)


# Kills, other processes, damage -------------------------------------------------------------------------------------


def kill_in_pass(number, data):
    """Compute row by row, and be killed in the given pass."""
    passes = []

    def compute(pack):
        passes.append(pack)
        if len(passes) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return made_up(pack)

    cache(data, compute, micro_tokens=1).load_or_compute(data.documents)


def test_a_kill_costs_a_chunk_at_most_and_the_next_run_goes_on(data, folder):
    assert in_child(lambda: kill_in_pass(CHUNK - 1, data)) == -signal.SIGKILL
    kept = np.fromfile(next(folder.glob("*/*/logps.bin")), "<f4")
    assert np.isnan(kept).all()
    assert in_child(lambda: kill_in_pass(2 * CHUNK + 3, data)) == -signal.SIGKILL
    kept = np.fromfile(next(folder.glob("*/*/logps.bin")), "<f4").reshape(-1, 2)
    assert np.isfinite(kept[: 2 * CHUNK]).all()
    assert np.isnan(kept[2 * CHUNK :]).all()
    rest = []
    found = cache(data, lambda pack: rest.extend(pack.rows) or made_up(pack)).load_or_compute(data.documents)
    assert len(rest) == 51 - 2 * CHUNK
    torch.testing.assert_close(found, expected(data.documents))


def test_who_wants_what_another_process_computes_waits_for_it_and_says_so(data, capfd):
    begun, waited = FORK.Event(), FORK.Event()

    def compute(pack):
        begun.set()
        assert waited.wait(60)
        return made_up(pack)

    child = FORK.Process(target=lambda: cache(data, compute).load_or_compute(data.documents))
    child.start()
    assert begun.wait(60)
    mine = cache(data, never)
    mine._say = lambda text: (said.append(text), waited.set())
    said = []
    found = mine.load_or_compute(data.documents)
    child.join(60)
    torch.testing.assert_close(found, expected(data.documents))
    assert said[0].startswith("source 'sums': another process is computing its reference log-probs (")


def flip(path):
    content = bytearray(path.read_bytes())
    content[17] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "cut short": (lambda at: os.truncate(at / "logps.bin", 100), r"logps\.bin has 100 bytes instead of 320"),
    "another number": (lambda at: flip(at / "logps.bin"), r"logps\.bin is not what was written"),
    "missing": (lambda at: (at / "logps.bin").unlink(), r"a file cannot be read \(FileNotFoundError\)"),
    "half a record": (lambda at: os.truncate(at / "record.json", 40), r"a file cannot be read \(JSONDecodeError\)"),
    "another record": (lambda at: (at / "record.json").write_text("[]"), r"a file cannot be read \(TypeError\)"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_entry_is_reported_and_computed_again(data, what, folder, capfd):
    before = cache(data).load_or_compute(data.documents)
    damage, said = DAMAGE[what]
    damage(next(folder.glob(f"{data.documents.sources[0].digest[:32]}/*/record.json")).parent)
    capfd.readouterr()
    computed = []
    found = cache(data, lambda pack: computed.extend(pack.rows) or made_up(pack)).load_or_compute(data.documents)
    assert torch.equal(found, before)
    assert len(computed) == 40, "the other source's entry is whole"
    reported = [line for line in capfd.readouterr().err.splitlines() if "log-probs are damaged" in line]
    assert len(reported) == 1
    assert re.search(rf"^source 'sums': its reference log-probs are damaged \(.*: {said}\)", reported[0])


def test_a_folder_that_cannot_be_written_says_so(data, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot be written .*point reference\.folder, TULU_REFERENCE or TULU_CACHE"):
        cache(data, at=str(tmp_path / "file" / "below")).load_or_compute(data.documents)


# Refusals -----------------------------------------------------------------------------------------------------------


def test_a_chosen_folder_with_other_weights_or_arithmetic_is_refused_before_anything_is_computed(data, tmp_path):
    at = str(tmp_path / "chosen")
    cache(data, at=at).load_or_compute(data.documents)
    cache(data, never, at=at).check(data.documents)
    said = (
        rf"^{re.escape(at)}: holds the reference log-probs of source 'sums' computed otherwise than from {TINY}: "
        r"start weights was aaaaaaaaaaaa… and is bbbbbbbbbbbb…; compute_dtype was float32 and is bfloat16\. .*another ref"
    )
    with pytest.raises(InputError, match=said):
        cache(data, never, at=at, digest="b" * 64, compute_dtype="bfloat16").check(data.documents)
    other = preference_data(sources=[Source("other", rows=ROWS + "pair_rows", args={"count": 5, "seed": 8})])
    cache(data, never, at=at, digest="b" * 64).check(other.documents)  # other rows are in nobody's way


def test_numbers_of_weights_that_are_gone_are_not_made_up(data, folder):
    with pytest.raises(InputError, match=r"neither it nor the checkpoint has .* 'sums' under the start weights, which"):
        cache(data, never, step=3).load_or_compute(data.documents)
    cache(data, step=3, lora=Lora(r=4)).load_or_compute(data.documents)  # the base is still there
    cache(data, never, step=3).load_or_compute(data.documents)  # as are the numbers, now


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"mode": "lazy"}, r"reference\.mode: is 'lazy'"),
        ({"mode": "live", "folder": "x"}, r"reference\.folder: is x with mode live"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, said):
    with pytest.raises(InputError, match=said):
        Reference(**settings)


def test_the_folder_is_the_given_one_else_the_environments_else_the_caches(monkeypatch, tmp_path):
    monkeypatch.setenv("TULU_REFERENCE", str(tmp_path / "env"))
    assert reference_dir() == tmp_path / "env"
    assert reference_dir(str(tmp_path / "own")) == tmp_path / "own"
    monkeypatch.delenv("TULU_REFERENCE")
    monkeypatch.setenv("TULU_CACHE", str(tmp_path))
    assert reference_dir() == tmp_path / "reference"


def test_only_rows_that_the_run_reaches_are_computed_and_a_longer_run_adds_the_rest(data, folder):
    """20 rows of 40 and none of 11; then all: the other 20 and the 11."""
    needed = np.zeros(68, dtype=bool)
    needed[10:30] = True
    first = cache(data).load_or_compute(data.documents, needed)
    assert torch.isfinite(first).all(1).tolist() == needed.tolist()
    torch.testing.assert_close(first[10:30], expected(data.documents)[10:30])
    again = cache(data, never).load_or_compute(data.documents, needed)
    assert torch.equal(again[10:30], first[10:30])
    computed = []
    found = cache(data, lambda pack: computed.extend(pack.rows) or made_up(pack)).load_or_compute(data.documents)
    torch.testing.assert_close(found, expected(data.documents))
    assert len(computed) == 31


def test_a_signal_ends_the_pass_between_two_chunks_and_nothing_computed_is_lost(data):
    interrupted = cache(data)
    calls = []

    def told(pack):
        calls.extend(pack.rows)
        interrupted.stage.trainer.callbacks[0].stop_requested = len(calls) >= 2 * CHUNK
        return made_up(pack)

    interrupted.compute = told
    with pytest.raises(KeyboardInterrupt):
        interrupted.load_or_compute(data.documents)
    assert len(calls) == 2 * CHUNK
    computed = []
    cache(data, lambda pack: computed.extend(pack.rows) or made_up(pack)).load_or_compute(data.documents)
    assert len(computed) == 51 - 2 * CHUNK
