"""What decides the tokens of a row, as hashes: the names of entries in the cache."""

import hashlib
import importlib.util
import inspect
import json
import sys
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import tokenizers
from transformers import PreTrainedTokenizerBase

__all__ = ["FORMAT", "code_digest", "key", "tokenizer_digest"]

FORMAT = 1
"""Of the files of an entry; entries of another one are not looked at."""


def key(parts: Mapping[str, Any]) -> str:
    """The name of an entry: a hash of plain values, of the format and of the tokenizing library's version."""
    everything = {"format": FORMAT, "tokenizers": tokenizers.__version__, **parts}
    return hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()[:32]


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of all that a tokenizer knows (vocabulary, merges, special tokens), wherever it lies. Hexadecimal."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    known = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    special = json.dumps({name: str(token) for name, token in tokenizer.special_tokens_map.items()}, sort_keys=True)
    return hashlib.sha256(f"{type(tokenizer).__name__}\n{special}\n{known}".encode()).hexdigest()


def code_digest(*parts: Any) -> str:
    """Hash of the source that turns rows into tokens: this folder's, and that of what a user adds to it.

    A change of the code makes new entries, so a stale one is never used and nobody has to raise a number. Of a user's
    function its whole package counts, since it may call anything there; of one in a script the script; of one in a
    notebook its own source. What these import from elsewhere does not.

    Args:
        parts: classes (a user's data module), or texts that may be import paths (a reader, a filter); others are
            passed over.
    """
    digest = hashlib.sha256(_own_code().encode())
    for part in parts:
        if isinstance(part, type):
            modules = {base.__module__ for base in part.__mro__ if base is not object}
            for module in sorted(modules - {"typing", "builtins"}):
                if module.partition(".")[0] not in ("lightning", "torch", "tulu_lightning"):
                    digest.update(_module_code(module, part))
        elif isinstance(part, str) and all(name.isidentifier() for name in part.split(".")) and "." in part:
            digest.update(_function_code(part))
    return digest.hexdigest()


@cache
def _own_code() -> str:
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def _function_code(import_path: str) -> bytes:
    """What a function's result may depend on: its package's files, or where there are none the function itself."""
    module, _, name = import_path.rpartition(".")
    top = module.partition(".")[0]
    if top == __name__.partition(".")[0]:
        return _module_code(module)
    with suppress(ImportError, ValueError, AttributeError):
        spec = importlib.util.find_spec(top)
        if spec is not None and spec.submodule_search_locations:
            files = sorted(path for root in spec.submodule_search_locations for path in Path(root).rglob("*.py"))
            return b"".join(path.read_bytes() for path in files)
    found = sys.modules.get(module)
    script = getattr(found, "__file__", None)
    if script and Path(script).is_file():
        return Path(script).read_bytes()
    function = getattr(found, name, None)
    with suppress(OSError, TypeError):
        return inspect.getsource(function).encode() if function is not None else _module_code(module)
    code = getattr(function, "__code__", None)  # typed into an interpreter: its source is nowhere
    return b"" if code is None else code.co_code + repr((code.co_consts, code.co_names)).encode()


def _module_code(module: str, part: type | None = None) -> bytes:
    with suppress(ImportError, ValueError, AttributeError):
        spec = importlib.util.find_spec(module)
        if spec is not None and spec.origin and Path(spec.origin).is_file():
            return Path(spec.origin).read_bytes()
    with suppress(OSError, TypeError):  # a notebook's cells are no file
        return inspect.getsource(part).encode() if part is not None else b""
    return b""
