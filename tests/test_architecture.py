"""The rules that keep the package readable, each checked on src/ and shown to bite on a toy tree."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = "tulu_lightning"
SOURCE = Path(__file__).parents[1] / "src" / PACKAGE
MAX_LINES = 300

RANKS = {
    **dict.fromkeys(("types.py", "errors.py", "progress.py", "files.py", "ranks.py"), 0),
    **dict.fromkeys(("core", "verifiers", "assets"), 1),
    **dict.fromkeys(("data", "models"), 2),
    **dict.fromkeys(("rollout", "checkpoints"), 3),
    "evaluation": 4,
    **dict.fromkeys(("stages", "callbacks"), 5),
    "launch": 6,
    "recipes": 7,
    "cli.py": 8,
    "__main__.py": 9,  # `python -m tulu_lightning`: calls cli.py
}
PURE = {
    "types.py": {"torch"},
    "core": {"torch"},
    "verifiers": {"torch", "sympy", "math_verify", "langdetect", "nltk"},
}


def files(root: Path) -> Iterator[tuple[str, str, Path]]:
    """Every module as (path within the package, its unit: the folder or top-level file it belongs to, full path)."""
    for path in sorted(root.rglob("*.py")):
        inside = path.relative_to(root)
        yield inside.as_posix(), inside.parts[0], path


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Every module that a file names in an import, wherever it stands, also through import_module("...")."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                yield node.lineno, "." * node.level + (node.module or "")
            elif node.module == PACKAGE:
                yield from ((node.lineno, f"{PACKAGE}.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, node.module or ""
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in {"import_module", "__import__"} and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


def unit_of(module: str) -> str | None:
    """`tulu_lightning.core.kl` -> `core`; `tulu_lightning.types` -> `types.py`; None for what is not ours."""
    parts = module.split(".")
    if parts[0] != PACKAGE or len(parts) == 1:
        return None
    return parts[1] if parts[1] in RANKS else f"{parts[1]}.py"


def broken_ranks(root: Path) -> list[str]:
    found = []
    for name, unit, path in files(root):
        if name == "__init__.py":
            continue
        if unit not in RANKS:
            found.append(f"{name}: {unit} has no rank")
            continue
        for line, module in imports(path):
            target = unit_of(module)
            if module.startswith("."):
                found.append(f"{name}:{line}: relative import")
            elif target in RANKS and target != unit and RANKS[target] >= max(RANKS[unit], 1):
                found.append(f"{name}:{line}: {unit} (rank {RANKS[unit]}) imports {module} (rank {RANKS[target]})")
            elif target is not None and target not in RANKS and module != f"{PACKAGE}.__version__":
                found.append(f"{name}:{line}: {module} has no rank")
    return found


def impure(root: Path) -> list[str]:
    found = []
    for name, unit, path in files(root):
        if unit not in PURE:
            continue
        for line, module in imports(path):
            top = module.split(".")[0]
            if top not in PURE[unit] and top not in sys.stdlib_module_names and top != PACKAGE:
                found.append(f"{name}:{line}: {unit} imports {module}")
    return found


def vllm_imports(root: Path) -> list[str]:
    return [
        f"{name}:{line}: {module}"
        for name, _, path in files(root)
        for line, module in imports(path)
        if module.split(".")[0] == "vllm" and name != "rollout/vllm.py"
    ]


def too_long(root: Path) -> list[str]:
    lengths = ((name, len(path.read_text(encoding="utf-8").splitlines())) for name, _, path in files(root))
    return [f"{name}: {lines} lines" for name, lines in lengths if lines > MAX_LINES]


def filled_inits(root: Path) -> list[str]:
    return [
        name
        for name, _, path in files(root)
        if path.name == "__init__.py" and name != "__init__.py" and path.read_text(encoding="utf-8").strip()
    ]


RULES = [broken_ranks, impure, vllm_imports, too_long, filled_inits]


@pytest.mark.parametrize("rule", RULES)
def test_the_package_keeps_the_rule(rule):
    assert len(list(files(SOURCE))) > 10, "looked in the wrong place"
    assert rule(SOURCE) == []


@pytest.fixture
def toy(tmp_path):
    """A small tree that keeps every rule; `toy(path, text)` adds a file to it and returns its root."""

    def write(name: str, text: str) -> Path:
        path = tmp_path / PACKAGE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return tmp_path / PACKAGE

    write("__init__.py", '__version__ = "0"\n')
    write("types.py", "from torch import Tensor\n")
    write("progress.py", "from tulu_lightning.errors import InputError\n")
    write("core/__init__.py", "")
    write("core/kl.py", "import math\nimport torch.nn\nfrom tulu_lightning.core.packing import pack\n")
    write("verifiers/math.py", "import sympy\nfrom math_verify import parse\n")
    write("rollout/vllm.py", "from vllm import LLM\nfrom tulu_lightning.types import Pack\n")
    write("cli.py", "from tulu_lightning import __version__\nfrom tulu_lightning.recipes import report\n")
    return write


@pytest.mark.parametrize("rule", RULES)
def test_a_tree_that_keeps_the_rules_passes(toy, rule):
    assert rule(toy("core/ok.py", "x = 1\n" * MAX_LINES)) == []


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("data/a.py", "from tulu_lightning.stages.sft import SFT"),  # upwards
        ("data/a.py", "from tulu_lightning.models.backbone import Backbone"),  # sideways
        ("verifiers/a.py", "import tulu_lightning.core.kl"),  # sideways, plain import
        ("core/a.py", "from tulu_lightning import cli"),  # through the package
        ("types.py", "from tulu_lightning.core import kl"),  # the bottom looks up
        ("stages/a.py", "def f():\n    from tulu_lightning.recipes import report"),  # inside a function
        ("models/a.py", 'import importlib\nm = importlib.import_module("tulu_lightning.launch.x")'),  # by name
        ("core/a.py", "from . import kl"),  # relative
        ("helpers/a.py", "import math"),  # a folder that has no place in the order
        ("utils.py", "import math"),
        ("recipes/a.py", "from tulu_lightning.helpers import a"),
    ],
)
def test_the_import_rule_bites(toy, name, line):
    assert len(broken_ranks(toy(name, line + "\n"))) == 1


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("core/a.py", "import numpy as np"),
        ("core/a.py", "from sympy import Symbol"),  # for verifiers only
        ("types.py", "import lightning"),
        ("verifiers/a.py", "def f():\n    import requests"),
    ],
)
def test_the_purity_rule_bites(toy, name, line):
    assert len(impure(toy(name, line + "\n"))) == 1


def test_the_vllm_rule_bites(toy):
    root = toy("rollout/engine.py", "def f():\n    import vllm.sampling_params\n")
    assert vllm_imports(root) == ["rollout/engine.py:2: vllm.sampling_params"]


def test_the_length_rule_bites(toy):
    assert too_long(toy("core/long.py", "x = 1\n" * (MAX_LINES + 1))) == ["core/long.py: 301 lines"]


def test_the_empty_init_rule_bites(toy):
    assert filled_inits(toy("core/__init__.py", "from tulu_lightning.core.kl import k1\n")) == ["core/__init__.py"]
