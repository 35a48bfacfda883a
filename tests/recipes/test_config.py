"""Configs of recipes and pairs are held to the same rules as those of `tulu fit`."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tulu_lightning.errors import InputError
from tulu_lightning.recipes.config import read_config


@dataclass(frozen=True)
class Part:
    name: str
    weight: float = 1.0


@dataclass(frozen=True)
class Whole:
    """A toy with the shape of RecipeConfig."""

    run: str
    parts: list[Part]
    seed: int = 1
    tags: list[str] = field(default_factory=list)


GOOD = """\
run: runs/x
seed: 2
parts:
  - name: a
  - name: b
    weight: 0.5
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def make(name: str, text: str) -> str:
        Path(name).write_text(text)
        return name

    return make


def read(*argv: str) -> Whole:
    return read_config(Whole, "tulu toy", argv)[0]


def test_the_fields_are_the_keys_and_options_win(write):
    path = write("a.yaml", GOOD)
    expected = Whole("runs/x", [Part("a"), Part("b", 0.5)], seed=3)
    assert read_config(Whole, "tulu toy", ["--config", path, "--seed=3"]) == (expected, Path(path).resolve())


def test_an_include_is_merged(write):
    write("a.yaml", GOOD)
    assert read("--config", write("leaf.yaml", "include: a.yaml\nseed: 5\n")) == Whole(
        "runs/x", [Part("a"), Part("b", 0.5)], seed=5
    )


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("seed:", "sed:", "a.yaml, line 2: no such option: 'sed'. Did you mean 'seed'?"),
        (
            "weight",
            "wieght",
            "a.yaml, line 6: no such option: 'parts[1].wieght'. Did you mean 'parts[1].weight'?",
        ),
        ("  - name: a\n", "  - weight: 2\n", "a.yaml, line 4: 'parts[0].name' is missing. Give it in this entry."),
        ("seed: 2", "seed: x", "a.yaml, line 2: 'seed' is 'x'. It must be a whole number."),
        ("run: runs/x\n", "", "a.yaml: 'run' is missing. Give it in the config file or as an option."),
    ],
)
def test_a_bad_key_or_value_is_named_with_file_line_and_remedy(write, before, after, message):
    path = write("a.yaml", GOOD.replace(before, after))
    with pytest.raises(InputError) as caught:
        read("--config", path)
    assert str(caught.value) == message


def test_the_file_named_is_the_one_that_holds_the_key(write):
    write("a.yaml", GOOD.replace("seed:", "sed:"))
    with pytest.raises(InputError, match=r"^a\.yaml, line 2: no such option: 'sed'"):
        read("--config", write("leaf.yaml", "include: a.yaml\n"))


def test_a_bad_option_is_the_command_lines_fault(write):
    with pytest.raises(InputError, match=r"^command line: no such option: 'sed'\. Did you mean 'seed'\?$"):
        read("--config", write("a.yaml", GOOD), "--sed=3")


def test_without_arguments_it_says_what_to_write():
    with pytest.raises(InputError, match=r"^command line: no config is given\. Write `tulu toy --config FILE`\.$"):
        read()
