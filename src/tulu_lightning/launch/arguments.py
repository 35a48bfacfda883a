"""The command line of a Lightning command as layers, and the settings that follow from others."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tulu_lightning.errors import InputError
from tulu_lightning.launch.compose import Layer, compose, merge, option_layer, value_at
from tulu_lightning.launch.schema import class_of
from tulu_lightning.launch.signatures import parameters

__all__ = ["linked_options", "read_layers", "with_classes_anew", "with_lists_anew", "with_nulls_as_files"]

FLAGS = ("--print_config", "--help", "-h")


def read_layers(argv: Sequence[str]) -> list[Layer]:
    """Config files and options, in the order given (the order in which they win).

    Args:
        argv: arguments after the subcommand.

    Raises:
        InputError: a config file is bad, or an argument is no option.
    """
    layers: list[Layer] = []
    rest = list(argv)
    while rest:
        token = rest.pop(0)
        name, equals, text = token.partition("=")
        if name in FLAGS or name.endswith(".help"):
            if name.endswith(".help") and not equals and rest and not rest[0].startswith("-"):
                rest.pop(0)  # `--model.help CLASS`
            continue
        if not name.startswith("-"):
            remedy = (
                f"Config files are given as --config {token}." if token.endswith((".yaml", ".yml")) else "Remove it."
            )
            raise InputError("command line", f"unexpected argument {token!r}", remedy)
        if not equals and rest and not rest[0].startswith("--"):
            equals, text = "=", rest.pop(0)
        if not equals:
            raise InputError("command line", f"{name!r} is given without a value", f"Write {name}=VALUE.")
        layers += compose(text) if name in ("-c", "--config") else [option_layer(name.lstrip("-"), text)]
    return layers


def with_lists_anew(argv: Sequence[str]) -> list[str]:
    """The same arguments with `--key=[]` before each `--key=[...]`, so that a list replaces the one below it.

    The parser would otherwise complete its entries with those that they replace, if both lists are of one length.
    """
    result: list[str] = []
    for index, token in enumerate(argv):
        name, equals, text = token.partition("=")
        value = text if equals else next(iter(argv[index + 1 : index + 2]), "")
        if name.startswith("--") and not name.endswith("+") and value.lstrip().startswith("["):
            result.append(f"{name}=[]")
        result.append(token)
    return result


def with_classes_anew(argv: Sequence[str], layers: Sequence[Layer]) -> list[str]:
    """The same arguments with `--key=null` before a `--key=Class` where the files have another class.

    The parser would otherwise keep what the new class takes too, and DPO's β is no SimPO's. Only classes inside another
    class's arguments start anew; a stage or data module that changes keeps what fits it.

    Args:
        argv: arguments.
        layers: what they stand for.
    """
    files = merge([layer for layer in layers if layer.path is not None])
    result: list[str] = []
    for index, token in enumerate(argv):
        name, equals, text = token.partition("=")
        key = name.removeprefix("--").removesuffix(".class_path")
        value = text if equals else next(iter(argv[index + 1 : index + 2]), "")
        if name.startswith("--") and _changes_class(files, key.split("."), value):
            result.append(f"--{key}=null")
        result.append(token)
    return result


@contextmanager
def with_nulls_as_files(argv: Sequence[str]) -> Iterator[list[str]]:
    """The same arguments with each `--model.a.b=null` as a config file of its own, for as long as the context lasts.

    The parser hands an option inside a class's argument on as text, and there null becomes the word None.
    """
    result: list[str] = []
    with TemporaryDirectory() as folder:
        for index, token in enumerate(argv):
            name, equals, text = token.partition("=")
            section, *rest = name.removeprefix("--").split(".")
            inside = rest[1:] if rest[:1] == ["init_args"] else rest  # an option may leave init_args out
            if not (equals and text == "null" and section in ("model", "data") and len(inside) > 1):
                result.append(token)
                continue
            value: Any = None
            for key in reversed([section, "init_args", *inside]):
                value = {key: value}
            path = Path(folder, f"{index}.yaml")
            path.write_text(json.dumps(value), encoding="utf-8")  # JSON is YAML
            result += ["--config", str(path)]
        yield result


def _changes_class(files: dict[str, Any], path: Sequence[str], value: str) -> bool:
    section, *rest = path
    inside = rest[1:] if rest[:1] == ["init_args"] else rest  # an option may leave init_args out
    before = value_at(files, (section, "init_args", *inside, "class_path"))
    name = value.rpartition(".")[2]
    return bool(inside) and isinstance(before, str) and name.isidentifier() and name != before.rpartition(".")[2]


def linked_options(layers: Sequence[Layer]) -> list[str]:
    """Options that follow from others: the data reads with the model's tokenizer, unless told otherwise.

    A plain option rather than the parser's own link, because a link hides its target from the printed config and
    overrides what the user gave.
    """
    config = merge(layers)
    path = _model_path(config)
    data = class_of(layers, ("data",))
    if path is None or data is None or "tokenizer" not in parameters(data).hints:
        return []
    given = value_at(config, ("data", "init_args", "tokenizer")) or value_at(config, ("data", "tokenizer"))
    return [] if given else [f"--data.init_args.tokenizer={path}"]


def _model_path(config: dict[str, Any]) -> str | None:
    places = (("model", "backbone", "path"), ("model", "init_args", "backbone", "path"))  # the short form is an option
    return next((path for path in (value_at(config, place) for place in places) if isinstance(path, str)), None)
