"""Documents on disk: what is written comes back, whatever its shape, and only arrays are in memory."""

import gc
import pickle
import random
import tracemalloc

import numpy as np
import pytest
import torch

from tulu_lightning.core import packing
from tulu_lightning.data.intake import Counts
from tulu_lightning.data.rows import Documents, SourceRows
from tulu_lightning.data.store import Part, Store, Summary, Writer, expected_sizes
from tulu_lightning.models.limits import check_documents
from tulu_lightning.types import Document, Segment


def some_rows(count: int, seed: int = 0) -> list[tuple[Part, ...]]:
    """Chats, pairs and chains, with weights that are odd numbers, equal over borders, or all alike."""
    rng = random.Random(seed)

    def part(parent: int) -> Part:
        size = rng.choice([1, 2, 7, 30])
        weights = rng.choice(
            [[0.0] * size, [1.0] * size, [rng.random() for _ in range(size)], [float(i > 2) for i in range(size)]]
        )
        return Part([rng.randrange(5, 70_000) for _ in range(size)], weights, parent)

    shapes = [(-1,), (-1, 0, 0), (-1, 0, 1, 0)]
    return [tuple(part(parent) for parent in rng.choice(shapes)) for _ in range(count)]


def document(row: tuple[Part, ...]) -> Document:
    return Document(
        tuple(Segment(torch.tensor(p.ids), torch.tensor(p.weights, dtype=torch.float32), p.parent) for p in row)
    )


@pytest.fixture
def written(tmp_path):
    """`written(rows, chunk)` is the store of these rows, written so many at a time."""

    def write(rows, chunk=7, name="store") -> Store:
        folder = tmp_path / name
        folder.mkdir()
        with Writer(folder) as writer:
            for start in range(0, len(rows), chunk):
                part = rows[start : start + chunk]
                writer.append(part, range(100 + start, 100 + start + len(part)))
        return Store(folder, writer.summary)

    return write


def same(ours: Document, theirs: Document) -> bool:
    pairs = list(zip(ours.segments, theirs.segments, strict=True))
    return all(
        a.ids_L.dtype == torch.int64
        and a.weights_L.dtype == torch.float32
        and torch.equal(a.ids_L, b.ids_L)
        and torch.equal(a.weights_L, b.weights_L)
        and a.parent == b.parent
        for a, b in pairs
    )


def test_documents_come_back_as_they_were(written):
    rows = some_rows(60)
    store = written(rows)
    assert len(store) == 60
    assert all(same(ours, document(row)) for ours, row in zip(store, rows, strict=True))
    assert same(store[-1], document(rows[-1]))
    assert [same(ours, document(row)) for ours, row in zip(store[3:6], rows[3:6], strict=True)] == [True] * 3
    with pytest.raises(IndexError):
        store[60]


def test_what_is_known_of_all_rows_equals_a_pass_over_them(written):
    rows = some_rows(60)
    store = written(rows)
    documents = [document(row) for row in rows]
    assert store.lengths.tolist() == [packing.length(each) for each in documents]
    assert store.scored.tolist() == [packing.scored_tokens(each) for each in documents]
    assert store.weight_sums.tolist() == pytest.approx([packing.loss_weight(each) for each in documents])
    assert store.numbers.tolist() == list(range(100, 160))
    ids = [token for row in rows for part in row for token in part.ids]
    chains = []
    for row in rows:
        for part in row:
            tokens, above = len(part.ids), part.parent
            while above >= 0:
                tokens, above = tokens + len(row[above].ids), row[above].parent
            chains.append(tokens)
    known = store.summary
    assert (known.tokens, known.min_id, known.max_id) == (len(ids), min(ids), max(ids))
    assert known.longest_chain == max(chains)
    assert known.trained_tokens == sum(packing.scored_tokens(each) for each in documents)


def test_the_cut_into_chunks_leaves_no_trace(written):
    rows = some_rows(40)
    one, many = written(rows, chunk=40, name="one"), written(rows, chunk=3, name="many")
    for file in expected_sizes(one.summary):
        assert (one.folder / file).read_bytes() == (many.folder / file).read_bytes()
    assert one.summary == many.summary
    assert one.content_digest() == many.content_digest()


def test_the_digest_is_of_ids_weights_and_segments_but_not_of_where_rows_are_from(written, tmp_path):
    rows = some_rows(10)
    digest = written(rows).content_digest()
    first = rows[0][0]
    others = {
        "ids": Part([*first.ids[:-1], first.ids[-1] + 1], first.weights),
        "weights": Part(first.ids, [*first.weights[:-1], first.weights[-1] + 0.5]),
    }
    for name, changed in others.items():
        assert written([(changed, *rows[0][1:]), *rows[1:]], name=name).content_digest() != digest
    pair = (Part([1], [1.0]), Part([2], [1.0], 0), Part([3], [1.0], 0))
    chain = (*pair[:2], Part([3], [1.0], 1))
    assert written([pair], name="pair").content_digest() != written([chain], name="chain").content_digest()
    (tmp_path / "numbers").mkdir()
    with Writer(tmp_path / "numbers") as writer:
        writer.append(rows, range(10))
    assert Store(tmp_path / "numbers", writer.summary).content_digest() == digest


def test_a_writer_goes_on_from_an_earlier_summary_and_cuts_off_what_came_after(written, tmp_path):
    rows = some_rows(20)
    whole = written(rows, name="whole")
    folder = tmp_path / "again"
    folder.mkdir()
    with Writer(folder) as writer:
        writer.append(rows[:12], range(100, 112))
        kept = writer.summary
        writer.append(rows[3:9], range(6))  # half a chunk of somebody who was killed
    with Writer(folder, kept) as writer:
        writer.append(rows[12:], range(112, 120))
    for file in expected_sizes(whole.summary):
        assert (folder / file).read_bytes() == (whole.folder / file).read_bytes()


def test_an_empty_store_is_one(tmp_path):
    with Writer(tmp_path) as writer:
        writer.append([], [])
    store = Store(tmp_path, writer.summary)
    assert writer.summary == Summary()
    assert (len(store), store.lengths.tolist(), list(store)) == (0, [], [])


def test_a_store_travels_as_its_path(written):
    store = written(some_rows(5))
    assert len(store[3].segments) >= 1  # mapped here
    travelled = pickle.dumps(store)
    assert len(travelled) < 1000
    assert same(pickle.loads(travelled)[3], store[3])


def test_a_mixture_of_many_rows_is_a_few_arrays(written):
    row = (Part([5, 6, 7], [0.0, 1.0, 1.0]),)
    store = written([row] * 50_000, chunk=10_000)
    gc.collect()
    objects = len(gc.get_objects())
    tracemalloc.start()
    try:
        part = SourceRows("many", store, store.lengths, store.scored, Counts(kept=50_000), store.content_digest(), "")
        documents = Documents((part, part._replace(name="again")), (np.arange(50_000), np.arange(50_000)))
        lengths, sums, numbers = documents.lengths, documents.weight_sums, documents.source_numbers
        digest = documents.digest()
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # int64: each store's lengths (two names for one), picks (two), places, lengths; float64 sums; int32 sources.
    assert held < 100_000 * (4 + 8 + 8 + 8 + 8 + 4) + 200_000
    assert len(gc.get_objects()) - objects < 200
    assert (len(lengths), sums[-1], numbers[-1], len(digest)) == (100_000, 2.0, 1, 64)
    assert documents.extent == (5, 7, 3)
    assert same(documents[99_999], document(row))


class Extent(list):
    """Rows that may not be read, which know their extent."""

    def __init__(self, extent):
        super().__init__([None])
        self.extent = extent


def test_a_models_limits_are_checked_without_reading_a_row(tiny):
    check_documents(Extent((0, 263, 4096)), tiny)
    with pytest.raises(ValueError, match="a row has the token id 99999"):
        check_documents(Extent((0, 99_999, 10)), tiny)
    with pytest.raises(ValueError, match="the longest row has 99999 tokens"):
        check_documents(Extent((0, 10, 99_999)), tiny)
