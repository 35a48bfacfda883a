"""What a class takes, read from its signature, and which classes there are."""

import dataclasses
import importlib
import inspect
import pkgutil
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

__all__ = ["Parameters", "import_class", "item_hints", "known_classes", "members", "parameters"]

HOMES = (
    "tulu_lightning.stages",
    "tulu_lightning.data",
    "tulu_lightning.callbacks",
    "tulu_lightning.verifiers",
    "lightning.pytorch.callbacks",
)
"""Packages whose classes a config may name; imported only to offer the nearest name after a misspelt one."""


class Parameters(NamedTuple):
    """Arguments of a class."""

    hints: dict[str, Any]
    """Name to type hint (Any where there is none or it cannot be resolved)."""
    closed: bool
    """False if it also takes `**kwargs`, whose names only the config parser can find out."""
    required: tuple[str, ...] = ()
    """Those without a default."""


def parameters(cls: type) -> Parameters:
    """The arguments of a class's constructor."""
    if dataclasses.is_dataclass(cls):
        hints, fields = _hints(cls), [f for f in dataclasses.fields(cls) if f.init]
        required = [f.name for f in fields if f.default is f.default_factory is dataclasses.MISSING]
        return Parameters({f.name: hints.get(f.name, Any) for f in fields}, closed=True, required=tuple(required))
    if cls.__init__ is object.__init__:
        return Parameters({}, closed=True)
    hints = _hints(cls.__init__)
    found, required, closed = {}, [], True
    for parameter in list(inspect.signature(cls.__init__).parameters.values())[1:]:
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            closed = False
        elif parameter.kind is not inspect.Parameter.VAR_POSITIONAL:
            found[parameter.name] = hints.get(parameter.name, Any)
            if parameter.default is inspect.Parameter.empty:
                required.append(parameter.name)
    return Parameters(found, closed, tuple(required))


def _hints(thing: Any) -> dict[str, Any]:
    try:
        return typing.get_type_hints(thing)
    except (NameError, TypeError, AttributeError):  # names imported for type checkers only
        return {}


def members(hint: Any) -> Iterator[Any]:
    """The alternatives of a hint: `A | B | None` gives A and B; `Annotated[A, ...]` gives A."""
    kind = typing.get_origin(hint)
    if kind in (typing.Union, types.UnionType):
        for part in typing.get_args(hint):
            yield from members(part)
    elif kind is typing.Annotated:
        yield from members(typing.get_args(hint)[0])
    elif hint is not type(None):
        yield hint


def item_hints(hints: Sequence[Any], container: type) -> list[Any]:
    """Hints of the items of the list-like (or, for `dict`, dict-like) alternatives among `hints`."""
    found = []
    for hint in hints:
        kind, args = typing.get_origin(hint), typing.get_args(hint)
        if not isinstance(kind, type) or not args:
            continue
        is_mapping = issubclass(kind, Mapping)
        if container is dict and is_mapping:
            found += members(args[-1])
        elif container is list and not is_mapping and issubclass(kind, typing.Iterable):  # type: ignore[arg-type]
            found += [part for arg in args if arg is not Ellipsis for part in members(arg)]
    return found


def import_class(path: str) -> Any:
    """The object at a dotted path.

    Raises:
        LookupError: there is no such module or attribute.
        ImportError: the module is there but cannot be imported.
    """
    module_name, _, name = path.rpartition(".")
    if not module_name:
        raise LookupError(f"{path!r} is no import path")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise LookupError(f"no module named {error.name!r}") from error
        raise
    if not hasattr(module, name):
        raise LookupError(f"{module_name} has no {name!r}")
    return getattr(module, name)


def known_classes(base: type) -> dict[str, type]:
    """Dotted path to class, of all subclasses of `base` that our own packages define or the process has loaded.

    Classes that only have what a protocol asks for are no subclasses: of those, what our own packages define.
    """
    modules = []
    for home in HOMES:
        package = importlib.import_module(home)
        for module in pkgutil.iter_modules(package.__path__, f"{home}."):
            try:
                modules.append(importlib.import_module(module.name))
            except ImportError:  # an extra that is not installed: nothing of it can be offered
                continue
    found: dict[str, type] = {}
    if getattr(base, "_is_protocol", False):
        own = (cls for module in modules for cls in vars(module).values() if isinstance(cls, type))
        found = {
            f"{cls.__module__}.{cls.__qualname__}": cls for cls in own if cls is not base and issubclass(cls, base)
        }
    stack = [base]
    while stack:
        for cls in stack.pop().__subclasses__():
            if not cls.__name__.startswith("_"):
                found[f"{cls.__module__}.{cls.__qualname__}"] = cls
            stack.append(cls)
    return found
