"""Reading checkpoint folders without running what a pickle may hold.

PyTorch writes the table of a distributed checkpoint as a pickle and reads it as one, which runs code of whoever wrote the
file. Here only the classes that such a table is made of are let through.
"""

import io
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageReaderTransforms
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem

from tulu_lightning.errors import InputError

__all__ = ["SafeReader", "load_plain"]

MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
"""Of the records that a table is made of."""
NAMES = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("builtins", "set"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        known = module in MODULES and not name.startswith("__") and "." not in name
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        found = super().find_class(module, name) if known or dtype or (module, name) in NAMES else None
        # Of the modules of records only the records: what they import could be called as well.
        if known and not (isinstance(found, type) and found.__module__ in MODULES):
            found = None
        if found is None:
            raise pickle.UnpicklingError(f"it wants {module}.{name}")
        return found


class _Numbers(_StorageReaderTransforms):
    """Turns stored 8-bit moments (torchao's) into numbers."""

    def transform_load_stream(
        self, read_item: ReadItem, transform_descriptors: Sequence[str], raw_stream: IO[bytes]
    ) -> IO[bytes]:
        """See its class."""
        stream = super().transform_load_stream(read_item, transform_descriptors, raw_stream)
        if read_item.type == LoadItemType.BYTE_IO:
            return stream
        data = io.BytesIO(stream.read(-1))
        tensor = torch.load(data, map_location="cpu", weights_only=True)
        if hasattr(tensor, "codes"):
            data = io.BytesIO()
            torch.save(tensor.dequantize(), data)
        data.seek(0)
        return data


class SafeReader(FileSystemReader):
    """Reads a distributed checkpoint whose table holds nothing but a table.

    Args:
        path: the folder.
        plain: give 8-bit moments as the fp32 numbers that they stand for, which can be cut anywhere.
    """

    def __init__(self, path: Path, plain: bool = False) -> None:
        super().__init__(path)
        if plain:
            self.transforms = _Numbers()

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The table.

        Raises:
            InputError: it is missing, damaged, or holds anything else.
        """
        path = Path(self.path, ".metadata")
        remedy = "Give another checkpoint; this one is half written, damaged, or not ours."
        try:
            table = _Unpickler(io.BytesIO(path.read_bytes())).load()
        except OSError as error:
            raise InputError(str(path), f"cannot be read ({error.strerror})", remedy) from None
        except (pickle.UnpicklingError, EOFError, ValueError, TypeError, LookupError, AttributeError) as error:
            raise InputError(str(path), f"is no table of a checkpoint ({error})", remedy) from None
        if not isinstance(table, Metadata):
            raise InputError(str(path), f"is a {type(table).__name__}, not a table of a checkpoint", remedy)
        if table.storage_meta is None:
            table.storage_meta = StorageMeta()
        table.storage_meta.load_id = self.load_id
        return table


def load_plain(path: Path) -> dict[str, Any]:
    """A file of tensors and plain values that `torch.save` wrote; tensors stay on the disk until they are read.

    Raises:
        InputError: it is missing, damaged, or holds objects of other classes.
    """
    remedy = "Give another checkpoint; this one is half written, damaged, or not ours."
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except OSError as error:
        raise InputError(str(path), f"cannot be read ({error.strerror or error})", remedy) from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError) as error:
        line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(str(path), f"cannot be read as tensors and plain values ({line[:160]})", remedy) from None
