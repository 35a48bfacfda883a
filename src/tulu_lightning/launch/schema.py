"""Strict keys: every key of every layer must be one that the class it configures takes.

The config parser refuses most unknown keys too, but deep inside a class it says neither where, nor in which file, nor
what else there is; and an unknown key with an empty mapping below it goes through. So keys are checked first, with what
the classes' signatures say, and only values are left to the parser. Where a signature is open (`**kwargs`) or a hint
says nothing, the parser has the last word.
"""

import dataclasses
import difflib
import inspect
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

from tulu_lightning.errors import InputError
from tulu_lightning.launch.compose import KeyPath, Layer, dotted, origin, value_at
from tulu_lightning.launch.signatures import Parameters, import_class, item_hints, known_classes, members, parameters

__all__ = ["check_keys", "class_of", "suggest"]

CLASS_KEYS = ("class_path", "init_args", "dict_kwargs")
SECTIONS = (("trainer",), ("model",), ("data",))


def check_keys(layers: Sequence[Layer], top: Mapping[str, Any]) -> None:
    """Refuse the first key that nothing takes, and the first class that does not exist.

    Args:
        layers: the config, weakest first.
        top: hint of each top-level key.

    Raises:
        InputError: with the file and line, the key, and the nearest name.
    """
    for index, layer in enumerate(layers):
        walk = _Walk(layers, index)
        for key, value in layer.data.items():
            if key == "include":
                continue
            name = key.removesuffix("+") if isinstance(key, str) else str(key)
            if name not in top:
                walk.unknown((key,), top)
            walk.value((key,), value, list(members(top[name])))


def class_of(layers: Sequence[Layer], path: KeyPath) -> type | None:
    """The class configured at a key path, if one is and it can be imported."""
    name = _class_path(layers, len(layers) - 1, path)
    try:
        found = import_class(name) if name else None
    except (LookupError, ImportError):
        return None
    return found if isinstance(found, type) else None


def suggest(name: str, prefix: KeyPath, choices: Iterable[str]) -> str:
    """A remedy with the nearest key, written in full, or all of them."""
    known = sorted(choices)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f"Did you mean {dotted((*prefix, close[0]))!r}?"
    return f"Known here: {', '.join(known)}." if known else f"{dotted(prefix)!r} takes no options."


def _class_path(layers: Sequence[Layer], index: int, path: KeyPath) -> str | None:
    """The class in force at a path as of one layer; if none was named yet, the one named later."""
    order = [*range(index, -1, -1), *range(index + 1, len(layers))]
    for i in order:
        value = value_at(layers[i].data, path)
        name = value.get("class_path") if isinstance(value, dict) else value
        if isinstance(name, str) and not name.endswith((".yaml", ".yml", ".json")):
            return name
    return None


class _Walk:
    """Goes through one layer, with the others at hand for the classes they name."""

    def __init__(self, layers: Sequence[Layer], index: int) -> None:
        self.layers, self.index, self.layer = layers, index, layers[index]

    def value(self, path: KeyPath, value: Any, hints: list[Any]) -> None:
        """Check what is below one key."""
        if isinstance(value, list):
            for i, item in enumerate(value):
                self.value((*path, i), item, item_hints(hints, list))
        elif isinstance(value, dict):
            # on the command line `--data.init_args.sources.path=x` speaks of the list's last item
            hints = hints + item_hints(hints, list)
            if any(key in value for key in CLASS_KEYS) or self._abstract(hints):
                self.class_config(path, value, hints)
            else:
                self.group(path, value, hints)
        elif path in SECTIONS and not isinstance(value, str | None):
            where, what = origin([self.layer], path), f"{dotted(path)!r} is {value!r}, not a mapping"
            raise InputError(where, what, "Put its settings below it, one `key: value` a line.")
        elif isinstance(value, str) and hints and all(isinstance(h, type) and inspect.isabstract(h) for h in hints):
            self.class_parameters(path, tuple(hints))  # nothing but the name of a class can stand for an abstract one

    @staticmethod
    def _abstract(hints: list[Any]) -> bool:
        """Only a `class_path` can say what belongs here: the hints are ordinary classes, no dataclass, no dict."""
        classes = [h for h in hints if isinstance(h, type) and h.__module__ != "builtins"]
        return bool(classes) and not any(map(dataclasses.is_dataclass, classes)) and not item_hints(hints, dict)

    def group(self, path: KeyPath, value: dict[str, Any], hints: list[Any]) -> None:
        """Check the fields of a dataclass (or of one of several), or the values of a dict."""
        inner = item_hints(hints, dict)
        takers = [parameters(h) for h in hints if isinstance(h, type) and dataclasses.is_dataclass(h)]
        takers += [h for h in hints if isinstance(h, Parameters)]
        if not takers:
            for key, item in value.items():
                self.value((*path, key), item, inner)
            return
        takes = _union(takers)
        missing = [name for name in takes.required if name not in value]
        if missing and isinstance(path[-1], int):  # lists are replaced whole: no other layer can complete the item
            what, remedy = f"{dotted((*path, missing[0]))!r} is missing", "Give it in this entry."
            raise InputError(origin([self.layer], path), what, remedy)
        self.fields(path, value, takes, free=bool(inner))

    def fields(self, path: KeyPath, value: dict[str, Any], takes: Parameters, free: bool = False) -> None:
        """Check keys against names, and go on below each."""
        for key, item in value.items():
            name = key.removesuffix("+") if isinstance(key, str) else str(key)
            if name not in takes.hints and takes.closed and not free and name != "help":
                self.unknown((*path, key), takes.hints)
            self.value((*path, key), item, list(members(takes.hints.get(name, Any))))

    def class_config(self, path: KeyPath, value: dict[str, Any], hints: list[Any]) -> None:
        """Check `class_path`, `init_args` and, as the command line may leave `init_args` out, the short form."""
        bases = tuple(h for h in hints if isinstance(h, type) and h.__module__ != "builtins")
        takes = self.class_parameters(path, bases)
        if isinstance(value.get("init_args"), dict):
            self.fields((*path, "init_args"), value["init_args"], takes)
        rest = {key: item for key, item in value.items() if key not in CLASS_KEYS}
        names = Parameters({**dict.fromkeys(CLASS_KEYS, Any), **takes.hints}, takes.closed)
        self.fields(path, rest, names)

    def class_parameters(self, path: KeyPath, bases: tuple[type, ...]) -> Parameters:
        """What the class in force at this place takes; anything, when only the parser can tell."""
        name = _class_path(self.layers, self.index, path)
        if name is None:
            return Parameters({}, closed=True) if path in (("model",), ("data",)) else Parameters({}, closed=False)
        place = path if isinstance(value_at(self.layer.data, path), str) else (*path, "class_path")
        if "." not in name:
            loaded = [c for b in bases for full, c in known_classes(b).items() if full.endswith(f".{name}")]
            if not loaded:
                self.no_class(place, name, f"there is no class {name!r}", bases)
            return parameters(loaded[0])
        try:
            cls = import_class(name)
        except LookupError as error:
            self.no_class(place, name, f"there is no class {name!r} ({error.args[0]})", bases)
        except ImportError as error:
            remedy = "Install what it needs, or choose another class."
            raise InputError(origin(self.layers, place), f"{name!r} cannot be imported ({error})", remedy) from error
        if not isinstance(cls, type):
            return Parameters({}, closed=False)
        if bases and not issubclass(cls, bases):
            self.no_class(place, name, f"{name!r} is no {' or '.join(b.__name__ for b in bases)}", bases)
        return parameters(cls)

    def no_class(self, place: KeyPath, name: str, what: str, bases: tuple[type, ...]) -> NoReturn:
        """Raise for a class that is not there, offering the nearest that is."""
        known = [full for base in bases for full in known_classes(base)]
        close = _nearest_class(name, known)
        remedy = f"Did you mean {close!r}?" if close else f"Known: {', '.join(sorted(known))}."
        raise InputError(f"{origin(self.layers, place)} ({dotted(place)})", what, remedy)

    def unknown(self, path: KeyPath, choices: Iterable[str]) -> NoReturn:
        """Raise for a key that nothing takes."""
        what = f"no such option: {dotted(path)!r}"
        remedy = suggest(str(path[-1]), path[:-1], choices)
        raise InputError(origin([self.layer], path), what, remedy)


def _union(takers: Sequence[Parameters]) -> Parameters:
    hints: dict[str, Any] = {}
    for taker in takers:
        for name, hint in taker.hints.items():
            hints[name] = typing.Union[hints[name], hint] if name in hints else hint  # noqa: UP007 - built at run time
    required = takers[0].required if len(takers) == 1 else ()
    return Parameters(hints, all(taker.closed for taker in takers), required)


def _nearest_class(name: str, known: Sequence[str]) -> str | None:
    """By class name first (people know those, not always in which case), then by the whole path."""
    by_name = {full.rpartition(".")[2].lower(): full for full in sorted(known, reverse=True)}
    short = difflib.get_close_matches(name.rpartition(".")[2].lower(), list(by_name), n=1, cutoff=0.6)
    if short:
        return by_name[short[0]]
    return next(iter(difflib.get_close_matches(name, known, n=1, cutoff=0.6)), None)
