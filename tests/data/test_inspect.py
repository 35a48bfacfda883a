import numpy as np
import pytest
import torch
from matplotlib.image import imread

from tulu_lightning.assets.tiny import byte_tokenizer
from tulu_lightning.data.inspect import Run, runs, shown
from tulu_lightning.data.lengths import Summary, histogram, histogram_text, summaries, write_png
from tulu_lightning.errors import InputError
from tulu_lightning.types import Document, Segment

TOKENIZER = byte_tokenizer()
END = 258  # <|im_end|>


def ids(text: str) -> tuple[int, ...]:
    return tuple(TOKENIZER.encode(text, add_special_tokens=False))


def segment(*parts: tuple[tuple[int, ...], float], parent: int = -1) -> Segment:
    tokens = [token for part, _ in parts for token in part]
    weights = [weight for part, weight in parts for _ in part]
    return Segment(torch.tensor(tokens), torch.tensor(weights), parent)


ROW = segment((ids("Hi? "), 0.0), ((*ids("yes"), END), 1.0), (ids("\n"), 0.0), (ids("no"), 0.5))


def test_runs_are_cut_where_the_weight_changes_and_nowhere_else():
    assert list(runs(TOKENIZER, ROW)) == [
        Run("Hi? ", ids("Hi? "), 0.0),
        Run("yes<|im_end|>", (*ids("yes"), END), 1.0),
        Run("\n", ids("\n"), 0.0),
        Run("no", ids("no"), 0.5),
    ]


def test_without_colour_trained_text_stands_between_brackets_with_its_weight_if_it_is_not_1():
    assert shown(TOKENIZER, Document((ROW,)), colour=False).plain == "Hi? ⟦yes<|im_end|>⟧\n⟦no⟧×0.5"


def test_the_first_token_is_context_whatever_its_weight_for_nothing_predicts_it():
    plain = segment((ids("abc"), 1.0))
    assert shown(TOKENIZER, Document((plain,)), colour=False).plain == "a⟦bc⟧"
    child = segment((ids("x"), 1.0), parent=0)
    assert shown(TOKENIZER, Document((plain, child)), colour=False).plain.endswith("⟦x⟧")


def test_with_colour_only_trained_text_is_green():
    text = shown(TOKENIZER, Document((ROW,)))
    green = "".join(text.plain[span.start : span.end] for span in text.spans if "green" in str(span.style))
    assert text.plain == "Hi? yes<|im_end|>\nno×0.5"
    assert green == "yes<|im_end|>no"


def test_control_characters_are_shown_and_not_obeyed():
    row = Document((segment((ids("a\r\n\x1b[2J\t"), 0.0), (ids("\x7f"), 1.0)),))
    assert shown(TOKENIZER, row, colour=False).plain == "a␍\n␛[2J\t⟦␡⟧"
    assert shown(TOKENIZER, row, ids=True, colour=False).plain.startswith(f"a⟨{ids('a')[0]}⟩␍⟨")


def test_ids_stand_behind_their_tokens():
    document = Document((segment((ids("a"), 0.0), ((END,), 1.0)),))
    assert shown(TOKENIZER, document, ids=True, colour=False).plain == f"a⟨{ids('a')[0]}⟩⟦<|im_end|>⟨258⟩⟧"


def test_a_pair_has_its_three_parts_named():
    pair = Document(
        (
            segment((ids("p"), 0.0)),
            segment((ids("c"), 1.0), parent=0),
            segment((ids("r"), 1.0), parent=0),
        )
    )
    assert shown(TOKENIZER, pair, colour=False).plain == "[shared start]\np\n[chosen]\n⟦c⟧\n[rejected]\n⟦r⟧"


LENGTHS = {"a": np.array([1, 2, 4, 8]), "b": np.array([8, 8]), "none": np.array([], dtype=np.int64)}


def test_figures_are_those_of_the_rows():
    found = summaries(LENGTHS)
    assert found["a"] == Summary(rows=4, mean=3.75, median=3.0, p95=pytest.approx(7.4), longest=8, total=15)
    assert list(found) == ["a", "b"]


def test_every_row_is_in_one_bin_and_all_sources_have_the_same_bins():
    found = histogram(LENGTHS, bins=3)
    # geometric from 1 to 9: 1, 2.08, 4.33, 9, to whole numbers
    assert found.edges == (1.0, 2.0, 4.0, 9.0)
    assert found.counts == {"a": (1, 1, 2), "b": (0, 0, 2)}
    one = histogram({"a": np.array([5, 5])}, bins=4)
    assert (one.edges, one.counts) == ((5.0, 6.0), {"a": (2,)})


def test_bars_are_as_long_as_their_share_of_the_longest():
    lines = histogram_text(histogram({"a": np.array([1, 2, 2, 4, 4, 4, 4])}, bins=3)).splitlines()
    assert lines[0] == "a: rows by tokens"
    assert [line.count("█") for line in lines[1:]] == [10, 20, 40]
    assert [line.split()[0] for line in lines[1:]] == ["1–1", "2–2", "3–4"]  # 1, 1.71, 2.92, 5 to whole numbers


def test_the_picture_is_a_png_of_some_size(tmp_path):
    path = write_png(histogram(LENGTHS), tmp_path / "h.png")
    height, width, _ = imread(path).shape
    assert width > 600
    assert height > 300


@pytest.mark.parametrize(
    ("call", "where"),
    [
        (lambda folder: histogram(LENGTHS, bins=0), "--bins"),
        (lambda folder: histogram({}), "data"),
        (lambda folder: write_png(histogram(LENGTHS), folder / "missing" / "h.png"), "h.png"),
    ],
)
def test_what_cannot_be_drawn_is_said(call, where, tmp_path):
    with pytest.raises(InputError) as caught:
        call(tmp_path)
    assert where in caught.value.where
