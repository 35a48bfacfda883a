"""What README.md and docs/ say can be done, can be done; what they name is there; numbers quoted from configs are theirs.

In these files every ```python block is run, in order, one namespace a file. Of the ```sh blocks the lines that start with
`tulu` are run if they concern the tiny model, and otherwise parsed without being run. A ```yaml block is a piece of a
config and is parsed over configs/ppo_tiny.yaml.
"""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from tulu_lightning import cli
from tulu_lightning.evaluation.harness import split_suite
from tulu_lightning.evaluation.suite import find_tasks
from tulu_lightning.launch import chat, evaluate, export, lineage
from tulu_lightning.launch.compose import compose, merge, value_at
from tulu_lightning.recipes import report
from tulu_lightning.verifiers import registry

ROOT = Path(__file__).parents[2]
FILES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = (ROOT, ROOT / "src" / "tulu_lightning")
"""What a path in the text may be relative to, besides the file that it stands in."""
PARSERS = {
    "eval": evaluate.parser,
    "export": export.parser,
    "lineage": lineage.parser,
    "report": report.parser,
    "chat": chat.parser,
}
"""Of commands that need a trained model or a run; where those are not the tiny ones, only their options are read."""
OF_A_RUN = ("runs/", "scores/", "promotions/", "checkpoints/step-", "exports/", "config.yaml")
"""Names of what a run writes; they are in no clone."""


class Block(NamedTuple):
    language: str
    line: int
    """Of its first line, from 1."""
    text: str


def blocks(path: Path, language: str) -> list[Block]:
    found, start, kind = [], None, ""
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        if not line.startswith("```"):
            continue
        if start is None:
            start, kind = number + 1, line[3:].strip()
        else:
            found.append(Block(kind, start, "\n".join(lines[start - 1 : number - 1])))
            start = None
    assert start is None, f"{path}: a block is not closed"
    return [block for block in found if block.language == language]


def prose(path: Path) -> str:
    """The text without blocks and comments."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)


def names(paths: list[Path]) -> list[str]:
    return [path.name for path in paths]


@pytest.fixture
def clone(tmp_path, monkeypatch) -> Path:
    """An empty working directory in which `configs/` is there, as in a clone."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "answers.jsonl").write_text('{"response": "It is \\\\boxed{60}.", "ground_truth": "60"}\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "VERIFIERS", dict(registry.VERIFIERS))
    return tmp_path


WITH_PYTHON = [path for path in FILES if blocks(path, "python")]


@pytest.mark.parametrize("path", WITH_PYTHON, ids=names(WITH_PYTHON))
def test_the_python_examples_run(path, clone):
    namespace = {"__name__": "example"}
    for block in blocks(path, "python"):
        # Blank lines before it, so that a traceback names the line of the page.
        exec(compile("\n" * (block.line - 1) + block.text, str(path), "exec"), namespace)


def commands(path: Path) -> Iterator[list[str]]:
    for block in blocks(path, "sh"):
        for line in block.text.splitlines():
            words = shlex.split(line, comments=True)
            if words and words[0] == "tulu":
                yield words[1:]


def runnable(words: list[str]) -> bool:
    """Whether a command concerns the tiny model, and this process alone, or no model at all."""
    several = any(word.startswith("--trainer.devices") for word in words)
    return words[0] == "verify" or (any("tiny" in word for word in words) and not several)


WITH_COMMANDS = [path for path in FILES if list(commands(path))]


@pytest.mark.parametrize("path", WITH_COMMANDS, ids=names(WITH_COMMANDS))
def test_the_commands_run(path, clone, capsys):
    for words in commands(path):
        if words[0] in PARSERS and "tiny" not in " ".join(words):
            options = PARSERS[words[0]]().parse_args(words[1:])
            if words[0] == "eval":
                find_tasks(split_suite(options.suite)[0])
            continue
        if words[0] == "plan":  # loads nothing; 1 says that the run does not fit
            assert cli.main(words) in (0, 1), capsys.readouterr().err
            continue
        more = [] if runnable(words) or "--print_config" in words else ["--print_config"]
        if words[0] == "doctor":
            more = ["--no-smoke"]  # its own test has that
        try:
            status = cli.main([*words, *more])
        except SystemExit as leaving:  # --print_config of a recipe or of pairs
            status = leaving.code
        assert not status, f"tulu {' '.join(words)}: {capsys.readouterr().err}"


PIECES = [(path, block) for path in FILES for block in blocks(path, "yaml")]


@pytest.mark.parametrize(("path", "block"), PIECES, ids=[f"{path.name}:{block.line}" for path, block in PIECES])
def test_the_pieces_of_configs_parse(path, block, clone, capsys):
    Path("piece.yaml").write_text(f"include: configs/ppo_tiny.yaml\n{block.text}\n")
    assert cli.main(["fit", "--config", "piece.yaml", "--print_config"]) == 0, capsys.readouterr().err


def paths_named(text: str) -> Iterator[str]:
    for code in re.findall(r"`([^`\s]+)`", text):
        is_path = "/" in code or re.search(r"\.(py|yaml|md|ipynb|toml|txt)$", code)
        if is_path and not code.startswith((*OF_A_RUN, "~", "$", "-", "http")):
            yield code
    for link in re.findall(r"\]\(([^)#\s]+)\)", text):
        if not link.startswith("http"):
            yield link


def missing(text: str, beside: Path) -> list[str]:
    return [name for name in paths_named(text) if not any((f / name).exists() for f in (*FOLDERS, beside))]


@pytest.mark.parametrize("path", FILES, ids=names(FILES))
def test_every_file_that_is_named_exists(path):
    words = [word for words in commands(path) for word in words if "://" not in word]
    commands_text = " ".join(f"`{word.partition('=')[2] or word}`" for word in words)
    assert missing(prose(path) + commands_text, path.parent) == []


def test_a_file_that_does_not_exist_is_found_missing():
    text = "See `core/packing.py`, `configs/no.yaml`, `runs/x/a.md` and [this](docs/no.md), not `key: a/b`."
    assert missing(text, ROOT) == ["configs/no.yaml", "docs/no.md"]


def targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.mark.parametrize("path", FILES, ids=names(FILES))
def test_every_make_target_that_is_named_exists(path):
    text = prose(path) + "".join(block.text for block in blocks(path, "sh"))
    named = set(re.findall(r"(?:`|^)make ([\w-]+)", text, re.MULTILINE))
    assert named <= targets()
    if path.name == "README.md":
        assert {"demo", "test", "check"} <= named


@pytest.mark.parametrize("path", FILES, ids=names(FILES))
def test_every_anchor_leads_somewhere(path):
    text = path.read_text(encoding="utf-8")
    headings = re.findall(r"^#+ (.+)$", prose(path), re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= anchors


class Setting(NamedTuple):
    """One row of a table of docs/recipe.md."""

    stage: str
    key: str
    value: str
    demo: str


def settings() -> list[Setting]:
    found, stage = [], ""
    for line in (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8").splitlines():
        if match := re.match(r"Stage file `configs/stage/(\w+)\.yaml`", line):
            stage = match[1]
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("| ") else []
        if len(cells) == 6 and cells[2].startswith("`"):
            found.append(Setting(stage, *(cell.strip("`") for cell in cells[2:5])))
    return found


def config_value(file: str, key: str) -> object:
    """The value of a key, written without `init_args`, in a config and all that it includes."""
    section, *rest = key.split(".")
    return value_at(merge(compose(ROOT / "configs" / file)), (section, "init_args", *rest))


@pytest.mark.parametrize("row", settings(), ids=lambda row: f"{row.stage} {row.key}")
def test_the_tables_of_settings_quote_the_configs(row):
    paper, demo = (config_value(file, row.key) for file in (f"stage/{row.stage}.yaml", f"{row.stage}_smol.yaml"))
    quoted = yaml.safe_load(row.value)
    assert (paper, demo) == (quoted, yaml.safe_load(row.demo) if row.demo else quoted), "correct docs/recipe.md"


def test_the_tables_hold_every_setting_of_the_stage_files():
    told = {(row.stage, row.key) for row in settings()}
    for stage in ("sft", "dpo", "ppo", "grpo"):
        config = merge(compose(ROOT / "configs" / "stage" / f"{stage}.yaml"))
        keys = {f"{s}.{key}" for s in ("model", "data") for key in leaves(config[s]["init_args"])}
        untold = keys - {key for s, key in told if s == stage} - {"data.micro_tokens", "model.micro_tokens"}
        assert untold - {"model.critic.optimizer.max_grad_norm"} == set()


def leaves(tree: dict, prefix: str = "") -> Iterator[str]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"
