"""What can be known of a recipe's stages before the first of them runs for minutes or days."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tulu_lightning.callbacks.evaluate import Evaluate
from tulu_lightning.callbacks.promote import Promote
from tulu_lightning.callbacks.suite import Suite
from tulu_lightning.core.promotion import PromotionRule
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
    _check_promotion(where, callbacks)
    if (count := processes(trainer.accelerator, trainer.devices, trainer.num_nodes)) > 1:
        # Lightning would start this whole command, and with it every other stage, again in each of them.
        remedy = "Set trainer.devices and trainer.num_nodes to 1, or run its stages one by one with `tulu fit`."
        raise InputError(where, f"asks for {count} processes, and a recipe runs in one", remedy)


def _promotes(callback: Any) -> bool:
    return _is(callback, Promote)


def _is(callback: Any, wanted: type) -> bool:
    try:
        kind = import_class(callback.class_path)
    except (LookupError, ImportError):
        return False
    return isinstance(kind, type) and issubclass(kind, wanted)


def _check_promotion(where: str, callbacks: Sequence[Any]) -> None:
    """Refuse a rule about tasks that the stage does not score: a recipe would find out when the earlier stages are done."""
    promote, evaluate = (
        next((callback for callback in callbacks if callback and _is(callback, kind)), None)
        for kind in (Promote, Evaluate)
    )
    assert promote is not None
    settings = _plain(promote.get("init_args"))
    rule = settings.pop("rule", None)
    scored = _plain(evaluate.get("init_args")) if evaluate is not None else {}
    suite = scored.get("suite")
    try:
        made = Promote(None if rule is None else PromotionRule(**rule), **settings)
        # Its sources are not read here; that there are some is all that counts.
        asks = {name: scored[name] for name in ("max_new_tokens", "every_n_steps") if name in scored}
        sources = None if scored.get("sources") is None else []
        made.check(Evaluate(sources, suite=Suite(**suite) if suite else None, **asks) if evaluate else None)
    except InputError as error:
        raise InputError(f"{where}, {error.where}", error.what, error.remedy) from error


def _plain(settings: Any) -> dict[str, Any]:
    """Parsed settings as dictionaries."""
    values = vars(settings) if hasattr(settings, "__dict__") else dict(settings or {})
    return {name: _plain(value) if hasattr(value, "as_dict") else value for name, value in values.items()}


def require_plotly() -> None:
    """Find what the report is drawn with now, rather than after the last stage.

    Raises:
        InputError: it is not installed.
    """
    if importlib.util.find_spec("plotly") is None:
        remedy = "Install it: pip install 'tulu-lightning[demo]'."
        raise InputError("tulu recipe", "the report at its end needs plotly, which is not installed", remedy)
