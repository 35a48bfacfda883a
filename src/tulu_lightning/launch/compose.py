"""Configs made of files: `include` lists a file's parents, and every key remembers where it came from.

A config is a list of layers, the weakest first. The merging itself is the parser's; what is here finds the files, reads
them strictly (a key given twice is an error, not the last one's victory) and says which file and line set a key.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from tulu_lightning.errors import InputError

__all__ = [
    "COMMAND_LINE",
    "KeyPath",
    "Layer",
    "compose",
    "dotted",
    "inner_classes",
    "list_paths",
    "merge",
    "option_layer",
    "origin",
    "read_layer",
    "value_at",
]

COMMAND_LINE = "command line"
KeyPath = tuple[str | int, ...]
"""Where a value sits: keys of mappings and indices of lists."""


class Layer(NamedTuple):
    """One file, or one option of the command line."""

    name: str
    """What people call it: the file relative to the working directory, or `command line`."""
    data: dict[str, Any]
    lines: Mapping[KeyPath, int]
    """Line of each key and list entry, from 1; empty for the command line."""
    path: Path | None = None


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads `1e-5` as a number, as YAML 1.2 and the config parser do."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$|[-+]?(?:\d+\.\d*|\.\d+)$|[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$"
    ),
    list("-+.0123456789"),
)


def compose(path: str | Path) -> list[Layer]:
    """Read a config file and all it includes.

    Args:
        path: the file. Its `include` (a name or a list of names, relative to the file) is read first, and so on up.

    Returns:
        Layers, parents before children. A parent that two files share is taken once, where it comes first.

    Raises:
        InputError: a file is missing, empty, not a mapping or not YAML, or includes itself.
    """
    layers: dict[Path, Layer] = {}
    _collect(Path(path), (), layers)
    return list(layers.values())


def _collect(path: Path, via: tuple[Path, ...], layers: dict[Path, Layer]) -> None:
    real = path.resolve()
    if real in via:
        chain = " -> ".join(_shown(p) for p in (*via[via.index(real) :], real))
        raise InputError(_shown(via[-1]), f"includes itself: {chain}", "Take one of these out of `include`.")
    if real in layers:
        return
    if via and not real.is_file():
        parent = f"includes {_shown(real)}, which does not exist"
        raise InputError(_shown(via[-1]), parent, "Names in `include` are relative to the file that includes them.")
    layer = read_layer(path)
    for parent in _parents(layer):
        _collect(real.parent / parent, (*via, real), layers)
    layers[real] = layer


def _parents(layer: Layer) -> list[str]:
    include = layer.data.get("include") or []
    names = [include] if isinstance(include, str) else include
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(origin([layer], ("include",)), f"include is {include!r}", "Give a list of file names.")
    return names


def read_layer(path: str | Path) -> Layer:
    """Read one YAML file, `include` and all.

    Raises:
        InputError: it is missing, empty, not a mapping or not YAML, or gives a key twice.
    """
    path = Path(path)
    name = _shown(path.resolve())
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        remedy = "Give the path of a YAML file, e.g. --config configs/sft_tiny.yaml."
        raise InputError(name, f"cannot be read ({error.strerror})", remedy) from error
    except UnicodeDecodeError as error:
        raise InputError(name, "is not UTF-8 text", "Give a YAML file.") from error
    lines: dict[KeyPath, int] = {}
    data = _parse(text, name, lines)
    if data is None:
        raise InputError(name, "is empty", "Give at least one setting.")
    if not isinstance(data, dict):
        raise InputError(name, f"holds a {type(data).__name__}, not a mapping", "Write `key: value` lines.")
    return Layer(name, data, lines, path.resolve())


def _parse(text: str, name: str, lines: dict[KeyPath, int]) -> Any:
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _note(node, (), name, lines, frozenset())
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{name}, line {mark.line + 1}" if mark else name
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise InputError(
            where, f"is not valid YAML: {problem}", "Check indentation, colons and quotes there."
        ) from error
    finally:
        loader.dispose()


def _note(node: yaml.Node, path: KeyPath, name: str, lines: dict[KeyPath, int], inside: frozenset[int]) -> None:
    """Record the line of every key below a node; refuse a key given twice and an alias to its own parent."""
    if id(node) in inside:
        raise InputError(f"{name}, line {node.start_mark.line + 1}", "an alias contains itself", "Write the value out.")
    inside |= {id(node)}
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            lines[(*path, index)] = item.start_mark.line + 1
            _note(item, (*path, index), name, lines, inside)
    elif isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if key.value in seen and key.value != "<<":
                where, what = f"{name}, line {line}", f"{key.value!r} is given twice, first in line {seen[key.value]}"
                raise InputError(where, what, "Keep one.")
            seen[key.value] = line
            lines[(*path, key.value)] = line
            _note(value, (*path, key.value), name, lines, inside)


def merge(layers: Sequence[Layer]) -> dict[str, Any]:
    """One mapping out of the layers: mappings merge key by key, `key+` appends to a list, anything else is replaced.

    `include` is left out.
    """
    result: dict[str, Any] = {}
    for layer in layers:
        result = _merged(result, {k: v for k, v in layer.data.items() if k != "include"})
    return result


def _merged(below: Any, above: Any) -> Any:
    if not isinstance(below, dict) or not isinstance(above, dict):
        return above
    result = dict(below)
    for key, value in above.items():
        plain = key.removesuffix("+") if isinstance(key, str) else key
        appends = plain != key and isinstance(value, list)
        result[plain] = [*(below.get(plain) or []), *value] if appends else _merged(below.get(plain), value)
    return result


def list_paths(data: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Dotted paths of the lists that a layer sets; those of `key+`, which append, are not among them."""
    for key, value in data.items():
        if isinstance(value, Mapping):
            yield from list_paths(value, f"{prefix}{key}.")
        elif isinstance(value, list) and not key.endswith("+"):
            yield prefix + key


def inner_classes(data: Mapping[str, Any], prefix: str = "", inside: bool = False) -> Iterator[tuple[str, str]]:
    """Dotted path and class of each `class_path` that a layer sets inside the arguments of another class."""
    if inside and isinstance(data.get("class_path"), str):
        yield prefix.removesuffix("."), data["class_path"]
    for key, value in data.items():
        if isinstance(value, Mapping):
            yield from inner_classes(value, f"{prefix}{key}.", inside or key == "init_args")


def value_at(data: Any, path: KeyPath) -> Any:
    """The value at a key path, or None."""
    for key in path:
        try:
            data = data[key]
        except (KeyError, IndexError, TypeError):
            return None
    return data


def origin(layers: Sequence[Layer], path: KeyPath) -> str:
    """Who set a key last: `configs/x.yaml, line 7` or `command line`; for a key nobody set, its nearest parent's."""
    for length in range(len(path), 0, -1):
        for layer in reversed(layers):
            if path[:length] in layer.lines:
                return f"{layer.name}, line {layer.lines[path[:length]]}"
            if (
                layer.path is None
                and value_at(layer.data, path[: length - 1])
                and path[length - 1] in _keys(layer, path[: length - 1])
            ):
                return layer.name
    return next((layer.name for layer in reversed(layers) if layer.path is not None), COMMAND_LINE)


def _keys(layer: Layer, path: KeyPath) -> Sequence[str | int]:
    value = value_at(layer.data, path)
    return range(len(value)) if isinstance(value, list) else list(value) if isinstance(value, dict) else []


def dotted(path: KeyPath) -> str:
    """A key path for people: `data.init_args.sources[0].path`."""
    text = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path)
    return text.removeprefix(".")


def _shown(path: Path) -> str:
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def option_layer(key: str, text: str) -> Layer:
    """The layer of one command-line option, e.g. `--trainer.max_steps 5`."""
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError:
        value = text
    data: dict[str, Any] = {}
    *parents, last = key.split(".")
    inner = data
    for parent in parents:
        inner = inner.setdefault(parent, {})
    inner[last] = value
    return Layer(COMMAND_LINE, data, {})
