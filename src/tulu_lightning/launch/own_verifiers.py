"""Verifiers of your own from a YAML file: by name, each a class and its settings.

helpful:
  class_path: tulu_lightning.verifiers.judge.Judge
  init_args:
    url: http://localhost:8000/v1
    model: my-model
    rubric: "Rate from 0 to 10 how well this answers {prompt}: {response}. End with 'Score: N'."
"""

import importlib
from pathlib import Path
from typing import Any

from tulu_lightning.errors import InputError
from tulu_lightning.verifiers.registry import Verifier

__all__ = ["read_verifiers"]

FORM = "Give each name a class_path and, if it takes settings, init_args."


def read_verifiers(path: Path) -> dict[str, Verifier]:
    """The verifiers of a file, by name.

    Raises:
        InputError: the file is not there, is no such YAML, or a class or its settings are wrong.
    """
    import yaml

    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(str(path), f"cannot be read ({error.strerror})", "Correct --verifiers.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(str(path), f"is no YAML ({error})", FORM) from None
    if not isinstance(found, dict) or not found:
        raise InputError(str(path), "names no verifiers", FORM)
    return {str(name): _built(f"{path}, {name}", entry) for name, entry in found.items()}


def _built(where: str, entry: Any) -> Verifier:
    if not isinstance(entry, dict) or "class_path" not in entry or set(entry) - {"class_path", "init_args"}:
        raise InputError(where, f"is {entry!r}", FORM)
    module, _, name = str(entry["class_path"]).rpartition(".")
    try:
        kind = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"{where}.class_path", f"cannot be imported ({error})", "Give module.Class.") from None
    try:
        built: Any = kind(**(entry.get("init_args") or {}))
    except InputError as error:
        raise InputError(f"{where}: {error.where}", error.what, error.remedy) from None
    except TypeError as error:
        raise InputError(f"{where}.init_args", f"do not fit ({error})", f"See the arguments of {name}.") from None
    if not callable(built) or not hasattr(built, "complaint"):
        raise InputError(f"{where}.class_path", f"{name} is no verifier", "Give a class with __call__ and complaint.")
    verifier: Any = built
    return verifier
