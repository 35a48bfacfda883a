"""What can be known of a recipe's stages before the first of them runs for minutes or days."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tulu_lightning.callbacks.promote import Promote
from tulu_lightning.errors import InputError
from tulu_lightning.launch.parsed import ParsedFit, processes
from tulu_lightning.launch.quiet import without_noise
from tulu_lightning.launch.signatures import import_class

__all__ = ["check_fit", "fill", "require_plotly"]


def fill(where: str, items: Sequence[str], **values: object) -> list[str]:
    """A stage's `set` with its placeholders filled in.

    Args:
        where: names the stage in errors.
        items: `key=value` texts with `{name}` placeholders; `{{` and `}}` are plain braces.
        values: what each placeholder stands for.

    Raises:
        InputError: a placeholder that is not among `values`, or a lone brace.
    """
    filled = []
    for item in items:
        try:
            filled.append(item.format(**values))
        except (KeyError, IndexError, ValueError, AttributeError) as error:
            known = " and ".join(f"{{{name}}}" for name in values)
            what = f"its set holds a placeholder that cannot be filled in: {item!r}"
            raise InputError(where, what, f"Use {known}, and write {{{{ and }}}} for plain braces.") from error
    return filled


def check_fit(where: str, config: Path, options: Sequence[str]) -> None:
    """Parse the config of a training stage, keys and values, and refuse one that a recipe could not go on from.

    Args:
        where: names the stage in errors.
        config: the YAML file.
        options: as `fit` gets them.

    Raises:
        InputError: a bad key or value, no `Promote` callback, or more than one process.
    """
    try:
        with without_noise():
            parsed: Any = ParsedFit(["fit", "--config", str(config), *options])
    except SystemExit as leaving:  # --help and --print_config
        raise InputError(where, f"{' '.join(options)} ends the process", "Take it out of set.") from leaving
    trainer = parsed.config["fit"].trainer
    callbacks = trainer.callbacks or []
    if not any(_promotes(callback) for callback in callbacks if callback):
        remedy = "Add tulu_lightning.callbacks.promote.Promote to its trainer.callbacks: it ends the stage."
        raise InputError(where, f"there is no Promote callback in {config}", remedy)
    if (count := processes(trainer.accelerator, trainer.devices, trainer.num_nodes)) > 1:
        # Lightning would start this whole command, and with it every other stage, again in each of them.
        remedy = "Set trainer.devices and trainer.num_nodes to 1, or run its stages one by one with `tulu fit`."
        raise InputError(where, f"asks for {count} processes, and a recipe runs in one", remedy)


def _promotes(callback: Any) -> bool:
    try:
        kind = import_class(callback.class_path)
    except (LookupError, ImportError):
        return False
    return isinstance(kind, type) and issubclass(kind, Promote)


def require_plotly() -> None:
    """Find what the report is drawn with now, rather than after the last stage.

    Raises:
        InputError: it is not installed.
    """
    if importlib.util.find_spec("plotly") is None:
        remedy = "Install it: pip install 'tulu-lightning[demo]'."
        raise InputError("tulu recipe", "the report at its end needs plotly, which is not installed", remedy)
