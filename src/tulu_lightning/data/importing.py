"""Functions that a config names by their import path."""

import importlib
import inspect
from collections.abc import Callable
from typing import Any

from tulu_lightning.errors import InputError

__all__ = ["check_call", "find_function"]


def find_function(where: str, import_path: str, example: str) -> Callable[..., Any]:
    """The function (or class) of that import path.

    Args:
        where: what asks for it, for the error.
        import_path: `package.module.function`.
        example: an import path that would do.

    Raises:
        InputError: there is no such module, or nothing callable of that name in it.
    """
    remedy = f"Give the import path of a function, such as {example}."
    try:
        function = _look_up(import_path)
    except (ImportError, ValueError) as error:
        raise InputError(where, f"{import_path} cannot be imported ({error})", remedy) from error
    except Exception as error:  # a user's module, which may do anything when it is imported
        what = f"{import_path} cannot be imported: its module fails ({type(error).__name__}: {error})"
        raise InputError(where, what, "Correct the module.") from error
    if not callable(function):
        raise InputError(where, f"{import_path} is not a function", remedy)
    return function


def _look_up(import_path: str) -> Any:
    """Not cached: a notebook defines a function anew, and an imported module costs next to nothing to find again."""
    module, _, name = import_path.rpartition(".")
    return getattr(importlib.import_module(module), name, None)


def check_call(where: str, import_path: str, function: Callable[..., Any], args: dict[str, Any]) -> None:
    """Refuse keyword arguments that the function does not take, before it is called.

    Raises:
        InputError: they do not fit, or the function names no parameters.
    """
    try:
        signature = inspect.signature(function)
    except ValueError:
        what = f"{import_path} is built in and names no parameters"
        raise InputError(where, what, "Wrap it in a function.") from None
    try:
        signature.bind(**args)
    except TypeError as error:
        remedy = f"It takes {signature}."
        raise InputError(where, f"{import_path} cannot be called with these args ({error})", remedy) from None
