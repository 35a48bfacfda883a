"""The config parser: `include`, and errors in one line that a user can act on."""

import argparse
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from jsonargparse import ActionConfigFile  # pyright: ignore[reportPrivateImportUsage]  its documented home
from lightning.pytorch.cli import LightningArgumentParser

from tulu_lightning.errors import InputError
from tulu_lightning.launch.compose import (
    KeyPath,
    Layer,
    compose,
    dotted,
    inner_classes,
    list_paths,
    origin,
    value_at,
)
from tulu_lightning.launch.schema import suggest

__all__ = ["IncludingConfigFile", "TuluParser", "causes", "explain", "in_own_words"]


class IncludingConfigFile(ActionConfigFile):
    """`--config FILE`, which merges the file's parents first."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: Any,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Apply the file's layers one by one, parents first.

        `include` itself is declared without default and help, which keeps it out of what is printed and saved.

        A list replaces the one below it: the parser would otherwise complete the entries of a list of the same length
        with those that they replace, e.g. a source that names a `path` with the `rows` of another. A class inside
        another's arguments that changes starts from its own defaults for the same reason: β = 5 of DPO is no SimPO's.
        """
        for layer in compose(values):
            for path in list_paths(layer.data):
                if isinstance(namespace.get(path), list):
                    namespace[path] = []
            for path, name in inner_classes(layer.data):
                before = namespace.get(f"{path}.class_path")
                if before and before.rpartition(".")[2] != name.rpartition(".")[2]:
                    namespace[path] = None
            super().__call__(parser, namespace, str(layer.path), option_string)


class ParserError(Exception):
    """An error inside a class's own arguments, on its way up to the parser that knows where the class stands."""

    def __init__(self, message: str, names: Sequence[str]) -> None:
        self.names = names
        super().__init__(message)


class TuluParser(LightningArgumentParser):
    """Reports an error as `InputError` instead of printing usage and leaving the process."""

    layers: Sequence[Layer] = ()
    """What is being parsed; lets an error name the file."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise the error; of nested ones only the innermost, which is about what the user wrote."""
        names = sorted({a.dest for a in self._actions if a.dest not in ("help", "==SUPPRESS==", "cfg")})
        if not self.exit_on_error:  # jsonargparse's parser for a class; it collects what alternatives say
            raise ParserError(message, names) from ex
        raise explain(message, ex, self.layers, names) from ex


def explain(message: str, ex: BaseException | None, layers: Sequence[Layer], names: Sequence[str] = ()) -> InputError:
    """The `InputError` for one of the parser's errors.

    Args:
        message: the parser's text.
        ex: the exception behind it, with its causes.
        layers: what was parsed.
        names: the parser's own options.
    """
    chain = list(causes(ex))
    for error in chain:
        if isinstance(error, InputError):
            return error
    texts = [message, *(str(error) for error in chain)]
    for error in chain:
        names = error.names if isinstance(error, ParserError) else names
    keys = _keys(texts)
    last = texts[-1]
    if match := re.search(r"following arguments are required: ([\w.,\- ]+)", last):
        key = re.sub(r"^(fit|validate|test|predict)\.", "", match[1].split(",")[0].strip())
        path = _path(layers, [*keys, key])
        remedy = "Give it in the config file or as an option."
        return InputError(origin(layers, path), f"{dotted(path)!r} is missing", remedy)
    if match := re.search(r"(?:Option|accept option|arguments:) '?(?:--)?([\w.]+)", last):
        path = _locate(layers, [*keys, match[1]]) or _path(layers, [*keys, match[1]])
        remedy = suggest(str(path[-1]), path[:-1], [n.rpartition(".")[2] for n in names])
        return InputError(origin(layers, path), f"no such option: {dotted(path)!r}", remedy)
    path = _locate(layers, keys) or _path(layers, keys)
    what, remedy = _value_fault(last)
    return InputError(origin(layers, path), f"{dotted(path) or 'the config'!r} {what}", remedy)


def causes(ex: BaseException | None) -> Iterator[BaseException]:
    """An exception and those behind it."""
    seen: set[int] = set()
    while ex is not None and id(ex) not in seen:
        seen.add(id(ex))
        yield ex
        ex = ex.__cause__ or ex.__context__


@contextmanager
def in_own_words() -> Iterator[None]:
    """What a constructor refuses reaches the user as it said it, not as one of the parser's alternatives."""
    try:
        yield
    except (TypeError, ValueError) as error:
        said = next((e for e in causes(error) if isinstance(e, InputError)), None)
        if said is None or said is error:
            raise
        raise said from None


def _keys(texts: Sequence[str]) -> list[str]:
    """Keys named on the way in, outermost first: ["model", "critic", "optimizer.lr"]."""
    found: list[str] = []
    for text in texts:
        match = re.match(r'Parser key "([^"]+)"', text) or re.match(r"Group '([^']+)'", text)
        if match and (not found or found[-1] != match[1]):
            found.append(match[1])
    return found


def _path(layers: Sequence[Layer], keys: Sequence[str]) -> KeyPath:
    """The key path, with `init_args` where the layers have it."""
    path: KeyPath = ()
    for key in keys:
        if path and any(isinstance(value_at(layer.data, (*path, "init_args")), dict) for layer in layers):
            path = (*path, "init_args")
        path = (*path, *key.split("."))
    return path


def _locate(layers: Sequence[Layer], keys: Sequence[str]) -> KeyPath | None:
    """The last place set by the layers that has these keys in this order and ends with the last of them.

    The parser leaves out list indices and `init_args`.
    """
    wanted = [part for key in keys for part in key.split(".")]
    for layer in reversed(layers):
        for path in reversed(list(_paths(layer.data))):
            parts = iter(path)
            if wanted and path[-1] == wanted[-1] and all(part in parts for part in wanted):
                return path
    return None


def _paths(value: Any, path: KeyPath = ()) -> Iterator[KeyPath]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from _paths(item, (*path, key))


TYPES = {
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "bool": "true or false",
    "list": "a list",
    "dict": "a mapping",
}


def _value_fault(text: str) -> tuple[str, str]:
    """What is wrong with a value, and what would do, from the parser's innermost text."""
    text = re.sub(r'^Parser key "[^"]+":\s*', "", text)
    first = text.strip().splitlines()[0] if text.strip() else "is not valid"
    if match := re.match(r"Expected a (.+?)\. Got value: (.*)", first):
        kind = re.sub(r"^<class '(.+)'>$", r"\1", match[1])
        if kind.startswith("typing.Literal["):
            return f"is {match[2]!r}", f"Use one of {kind.removeprefix('typing.Literal[').removesuffix(']')}."
        return f"is {match[2]!r}", f"It must be {TYPES.get(kind, kind)}."
    return f"is refused ({first.rstrip('.')})", "Correct it; `tulu fit --help` lists the options."
