"""Reading the YAML of a recipe or of `tulu pairs`: same `include`, same strict keys and one-line errors as `tulu fit`."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from tulu_lightning.errors import InputError
from tulu_lightning.launch.arguments import read_layers, with_lists_anew
from tulu_lightning.launch.parser import IncludingConfigFile, TuluParser
from tulu_lightning.launch.schema import check_keys
from tulu_lightning.launch.signatures import parameters

__all__ = ["read_config"]

T = TypeVar("T")


def read_config(kind: type[T], command: str, argv: Sequence[str]) -> tuple[T, Path | None]:
    """Build a settings dataclass from `--config FILE` and options that win over it.

    Args:
        kind: the dataclass; its fields are the keys.
        command: for help and messages, e.g. `tulu pairs`.
        argv: arguments after the command.

    Returns:
        The settings, and the last config file given.

    Raises:
        InputError: an unknown key (with file, line and the nearest name), a value of the wrong type, or a missing one.
    """
    if "dry_run" in kind.__dataclass_fields__:  # type: ignore[attr-defined]
        argv = ["--dry_run=true" if word == "--dry-run" else word for word in argv]
    if not argv:
        raise InputError("command line", "no config is given", f"Write `{command} --config FILE`.")
    parser: Any = TuluParser(prog=command, description=kind.__doc__ or "")
    parser.add_argument("-c", "--config", action=IncludingConfigFile, help="YAML file; its `include` lists parents.")
    parser.add_argument("--include", type=list[str] | str, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    parser.add_class_arguments(kind, None, fail_untyped=True)
    layers = read_layers(argv)
    check_keys(layers, parameters(kind).hints)
    parser.layers = layers
    namespace = parser.parse_args(with_lists_anew(argv))
    settings = parser.instantiate_classes(namespace)
    values = {name: value for name, value in vars(settings).items() if name in kind.__dataclass_fields__}  # type: ignore[attr-defined]
    files = [layer.path for layer in layers if layer.path is not None]
    try:
        return kind(**values), files[-1] if files else None
    except TypeError as error:
        raise InputError(command, str(error), "See `--help`.") from error
