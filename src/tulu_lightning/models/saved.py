"""What a checkpoint says of itself, readable without its weights, and whether it is whole.

A checkpoint of one process is a file as `torch.save` writes it, that of sharded ranks a folder as
`torch.distributed.checkpoint` does. Both carry `tulu.json`: the version of this layout, the stage, the step, the run's
identity and config, and in a folder the size and a digest of each file. A file has checksums of its own.
"""

import json
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tulu_lightning.errors import InputError
from tulu_lightning.files import FULL_BYTES, content_digest

__all__ = [
    "FORMAT",
    "KEY",
    "Header",
    "check_names",
    "check_whole",
    "header_of",
    "newest_in",
    "read_header",
    "regroups_moments",
    "step_of",
    "write_header",
]

FORMAT = 1
"""Version of the layout; one that is newer than this is refused."""
KEY = "tulu_header"
"""Where a checkpoint in memory holds what becomes its header."""
NAME = "tulu.json"
STEP = re.compile(r"step-(\d+)\.ckpt")
FOLDER = (".metadata", "meta.pt")
"""What a folder of `torch.distributed.checkpoint`, and of Lightning, has when it was written to its end."""


class Header(NamedTuple):
    """`tulu.json`."""

    format: int
    stage: str
    step: int
    ranks: int
    versions: dict[str, str]
    """Of this package and those that made the numbers."""
    identity: dict[str, Any]
    """What decides the run's course: `checkpoints.identity`."""
    config: dict[str, Any] | None = None
    """The command's config; None where the run was started from Python."""
    files: dict[str, tuple[int, str]] | None = None
    """Size and digest of each file of a folder."""
    mesh: list[int] | None = None
    """Of sharded ranks, how many there are along each axis (`models.mesh.Sizes`); None where it is not known."""


def step_of(checkpoint: str | Path) -> int | None:
    """Finished steps, from a checkpoint's name `step-<n>.ckpt`; None of any other name."""
    match = STEP.fullmatch(Path(checkpoint).name)
    return int(match[1]) if match else None


def newest_in(folder: Path, without: str = "") -> Path | None:
    """Of the checkpoints that lie in a folder, the one after the most steps; None where there is none.

    Args:
        folder: of checkpoints.
        without: the name of one that does not count.
    """
    found = (path for path in folder.glob("step-*.ckpt") if path.name != without)
    steps = {step: path for path in found if (step := step_of(path)) is not None}
    return steps[max(steps)] if steps else None


def write_header(at: Path, header: Mapping[str, Any], digests: Mapping[str, str] | None = None) -> None:
    """Put the header into a checkpoint that is otherwise finished.

    Args:
        at: the file or folder.
        header: what `Header` has but `files`.
        digests: `content_digest` of each file of a folder; computed here if left out.
    """
    if at.is_dir():
        names = sorted(path.name for path in at.iterdir() if path.name != NAME)
        known = dict(digests or {})
        files = {n: ((at / n).stat().st_size, known.get(n) or content_digest([at / n])) for n in names}
        (at / NAME).write_text(json.dumps({**header, "files": files}))
        return
    with zipfile.ZipFile(at, "a") as archive:
        root = archive.namelist()[0].partition("/")[0]
        archive.writestr(f"{root}/{NAME}", json.dumps(header))


def read_header(path: str | Path) -> Header | None:
    """What a checkpoint says of itself; None for one that is not of this package but looks whole.

    Raises:
        InputError: it is no checkpoint, half of one, or of a newer layout.
    """
    path = Path(path)
    text = _folder_header(path) if path.is_dir() else _file_header(path)
    if text is None:
        return None
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(str(path / NAME), f"is damaged ({error})", remedy_for(path)) from error
    if not isinstance(found, dict) or not isinstance(form := found.get("format"), int):
        raise InputError(str(path / NAME), "is damaged (it names no format)", remedy_for(path))
    if form > FORMAT:
        by = (found.get("versions") or {}).get("tulu_lightning", "?")
        what = f"is a checkpoint of format {form}, written by tulu_lightning {by}; this version reads up to {FORMAT}"
        raise InputError(str(path), what, "Update tulu_lightning, or give a checkpoint of this version.")
    try:
        return Header(**{name: value for name, value in found.items() if name in Header._fields})
    except TypeError as error:
        raise InputError(str(path / NAME), f"is damaged ({error})", remedy_for(path)) from error


def header_of(path: str | Path) -> Header | None:
    """`read_header` of a checkpoint that is whole: sizes and checksums of all that it holds are looked at, too.

    Raises:
        InputError: as `read_header`, or something in it is not as it was written.
    """
    header = read_header(path)
    check_whole(Path(path), header)
    return header


def check_whole(path: Path, header: Header | None) -> None:
    """Refuse a checkpoint that has changed since it was written.

    Raises:
        InputError: a file is missing, or its size or content is another.
    """
    if path.is_file():
        if zipfile.is_zipfile(path) and path.stat().st_size <= FULL_BYTES:
            with zipfile.ZipFile(path) as archive:
                _checked(path, archive)
        return
    for name, (size, digest) in ((header and header.files) or {}).items():
        file = path / name
        if not file.is_file():
            raise InputError(str(file), "is missing: the checkpoint is not whole", remedy_for(path))
        if (found := file.stat().st_size) != size:
            raise InputError(str(file), f"has {found} bytes, and was written with {size}", remedy_for(path))
        if content_digest([file]) != digest:
            raise InputError(str(file), "is damaged: its content is not what was written", remedy_for(path))


def _checked(path: Path, archive: zipfile.ZipFile) -> None:
    try:
        bad = archive.testzip()
    except (OSError, zipfile.BadZipFile, NotImplementedError) as error:
        raise InputError(str(path), f"is damaged ({error})", remedy_for(path)) from error
    if bad is not None:
        raise InputError(str(path), f"is damaged: the checksum of its part {bad} does not fit", remedy_for(path))


def _folder_header(path: Path) -> str | None:
    missing = [name for name in FOLDER if not (path / name).is_file()]
    if missing:
        what = f"is no checkpoint, or half of one: it has no {' and no '.join(missing)}"
        raise InputError(str(path), what, remedy_for(path))
    file = path / NAME
    return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else None


def _file_header(path: Path) -> str | None:
    try:
        with zipfile.ZipFile(path) as archive:
            inside = next((name for name in archive.namelist() if name.endswith(f"/{NAME}")), None)
            return None if inside is None else archive.read(inside).decode(errors="replace")
    except (OSError, zipfile.BadZipFile) as error:
        what = f"is no checkpoint, or half of one ({path.stat().st_size} bytes; {error})"
        raise InputError(str(path), what, remedy_for(path)) from error


def remedy_for(path: Path) -> str:
    """What to do about a checkpoint that cannot be read; only what has the name of one is there to be removed."""
    if step_of(path) is None:
        inside = newest_in(path / "checkpoints")
        return f"Give a checkpoint of tulu fit{f': {inside}' if inside else ', RUN/checkpoints/step-….ckpt'}."
    newest = newest_in(path.parent, without=path.name)
    if newest is None:
        return f"Remove {path}, and run the same command again: it starts anew."
    return f"Remove {path}; ckpt_path: auto then goes on from {newest.name}."


def regroups_moments(path: Path, header: Header | None, ranks: int, mesh: Sequence[int] | None = None) -> bool:
    """Whether a folder has 8-bit moments of other ranks, or of as many over another mesh.

    They are kept in blocks of what a rank holds, so they are read as the numbers they stand for, and rounded once more.

    Args:
        path: the checkpoint.
        header: what it says of itself.
        ranks: of this run, which share one model.
        mesh: how many there are along each axis.
    """
    if header is None or not path.is_dir():
        return False
    same = header.mesh is None or mesh is None or list(header.mesh) == list(mesh)  # an older version did not say
    if same and header.ranks == ranks:
        return False
    return any(name.endswith("state_bits") and value == 8 for name, value in header.identity.items())


def check_names(where: str, saved: Mapping[str, Sequence[int]], built: Mapping[str, Sequence[int]]) -> None:
    """Refuse the weights of another model.

    Args:
        where: the checkpoint.
        saved: its tensors' names and shapes.
        built: those of the model that is to take them.

    Raises:
        InputError: they differ; it names the first tensor that does, and how many do.
    """
    differs = [name for name in built if tuple(saved.get(name, (-1,))) != tuple(built[name])]
    differs += [name for name in saved if name not in built]
    if not differs:
        return
    name = differs[0]
    one, other = (f"{list(shapes[name])}" if name in shapes else "not there" for shapes in (saved, built))
    what = f"holds another model: {name} is {one} in it and {other} in this one; {len(differs)} of its tensors differ"
    remedy = (
        "Give a checkpoint of this model, or the model (backbone.path, layers, lora, quantize) that it was saved of."
    )
    raise InputError(where, what, remedy)
