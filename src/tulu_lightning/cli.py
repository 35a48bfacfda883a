"""The `tulu` command. A table of commands; each one's module, and with it torch, is imported when it is called."""

import errno
import importlib
import logging
import os
import select
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

from tulu_lightning import __version__
from tulu_lightning.errors import InputError, Preempted, RunStopped, nearest
from tulu_lightning.files import system_code

__all__ = ["main"]

BAD_INPUT = 2
STOPPED = 1
INTERRUPTED = 130
PREEMPTED = 75
"""EX_TEMPFAIL of sysexits.h: nothing is wrong, try again later."""
UNREAD = 141
"""What a shell says of a command that SIGPIPE has ended."""

DISK_REMEDIES = {
    errno.ENOSPC: "Free some space, or choose another folder (trainer.default_root_dir)",
    errno.EDQUOT: "Free some space, or choose another folder (trainer.default_root_dir)",
    errno.EFBIG: "Raise the limit on file sizes (ulimit -f), or choose another folder (trainer.default_root_dir)",
    errno.EROFS: "Choose a folder on a writable disk (trainer.default_root_dir)",
    errno.EACCES: "Change its permissions, or choose another folder (trainer.default_root_dir)",
}


CHATTY = ("torchao", "bitsandbytes", "torch.utils._pytree")
"""Loggers that say, when transformers imports the first two, which of their kernels are for other machines."""


class Command(NamedTuple):
    """One command: `main(argv)` of its module runs it; `argv` starts with the name where one module has several."""

    name: str
    help: str
    module: str
    wants_name: bool = False


LIGHTNING = "tulu_lightning.launch.fit"
COMMANDS = (
    Command(
        "recipe",
        "run all stages of a recipe, each from the last one's promoted checkpoint",
        "tulu_lightning.recipes.recipe",
    ),
    Command("fit", "train one stage; run again, it goes on where it stopped", LIGHTNING, wants_name=True),
    Command("validate", "run the validation loop of one stage", LIGHTNING, wants_name=True),
    Command("test", "run the test loop of one stage", LIGHTNING, wants_name=True),
    Command("predict", "run the prediction loop of one stage", LIGHTNING, wants_name=True),
    Command(
        "doctor", "what is installed, what is off and why, and whether the demo runs", "tulu_lightning.launch.doctor"
    ),
    Command("plan", "memory, tokens, steps, time and disk of a run, before it starts", "tulu_lightning.launch.plan"),
    Command(
        "data",
        "see what the model will see: inspect rows, length statistics; decontaminate",
        "tulu_lightning.launch.data",
    ),
    Command("generate", "sample responses to prompts from a pool of models", "tulu_lightning.recipes.making.generate"),
    Command("judge", "rate responses by models or verifiers", "tulu_lightning.recipes.making.judge"),
    Command("pairs", "make preference pairs of rated responses", "tulu_lightning.recipes.pairs"),
    Command("prompts", "build a set of prompts that programs verify", "tulu_lightning.recipes.making.prompts"),
    Command(
        "synthesize",
        "make prompts and answers by personas, checked by programs",
        "tulu_lightning.recipes.making.synthesize",
    ),
    Command("verify", "score responses offline; `verify audit` measures the verifiers", "tulu_lightning.launch.verify"),
    Command(
        "eval", "score a model on the paper's tasks, with intervals; compare two", "tulu_lightning.launch.evaluate"
    ),
    Command("export", "write a training checkpoint as a Hugging Face folder", "tulu_lightning.launch.export"),
    Command(
        "lineage",
        "what a checkpoint was made from, stage by stage, with gains and cost",
        "tulu_lightning.launch.lineage",
    ),
    Command("report", "write a run as one HTML page, or two runs beside each other", "tulu_lightning.recipes.report"),
    Command("chat", "talk to a checkpoint, in the terminal or the browser", "tulu_lightning.launch.chat"),
)


def usage() -> str:
    """The text of `tulu --help`."""
    width = max(len(c.name) for c in COMMANDS)
    lines = [f"  {c.name:<{width}}  {c.help}" for c in COMMANDS]
    return "\n".join(
        [
            "usage: tulu COMMAND [options]",
            "",
            "Post-training of open-weight language models: SFT, DPO, PPO with verifiable rewards.",
            "",
            "commands:",
            *lines,
            "",
            "options:",
            "  --help     show this text; `tulu COMMAND --help` shows a command's options",
            "  --version  show the version",
            "",
            "example: tulu fit --config configs/sft_tiny.yaml",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments without the program's name; those of the process by default.

    Returns:
        Exit status: 0, 1 for a run that stopped itself, 2 for bad input or a disk that cannot be written, 75 after
        SIGTERM or SIGUSR1, 130 after Ctrl-C, 141 when nobody reads on what it prints. After 75 and 130 the same command
        goes on.
    """
    try:
        try:
            return _run(list(sys.argv[1:] if argv is None else argv))
        finally:
            print(end="", flush=True)  # here, and not when Python ends, where the error could not be caught
    except BrokenPipeError:
        if not _unread():
            raise
    except SystemExit as error:
        if not isinstance(error.__context__, BrokenPipeError):  # rich makes one of the other, with status 1
            raise
    _silence()
    return UNREAD


def _run(argv: list[str]) -> int:
    """Run one command; what a user can mend is one line and a status."""
    try:
        return _dispatch(argv)
    except InputError as error:
        return _fail(str(error))
    except RunStopped as error:
        print(f"tulu: stopped: {error}", file=sys.stderr)
        return STOPPED
    except Preempted:
        print("tulu: stopped by a signal; run the same command again to go on", file=sys.stderr)
        return PREEMPTED
    except KeyboardInterrupt:
        print("tulu: interrupted; run the same command again to go on", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        text = disk_fault(error)
        if text is None:
            raise
        return _fail(text)


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if argv[0] in ("-V", "--version"):
        print(f"tulu {__version__}")
        return 0
    commands = {c.name: c for c in COMMANDS}
    if argv[0] not in commands:
        raise InputError("command line", f"no such command: {argv[0]!r}", nearest(argv[0], commands))
    command = commands[argv[0]]
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    module = importlib.import_module(command.module)
    return module.main(argv if command.wants_name else argv[1:])


def _fail(text: str) -> int:
    print(f"tulu: error: {text}", file=sys.stderr)
    return BAD_INPUT


def _unread() -> bool:
    """Whether a reader of what this process prints is gone; a pipe to a process of its own may break as well."""
    pipes = select.poll()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):  # not a file, or closed
            pipes.register(stream.fileno(), 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in pipes.poll(0))


def _silence() -> None:
    """What is left in the streams' buffers goes nowhere, so that Python can end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):
            os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def disk_fault(error: BaseException | None) -> str | None:
    """The message for a disk that is full or may not be written; None for any other error.

    Libraries wrap such errors, so the chain behind the error is searched too.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        code, where = _disk_code(error)
        if code in DISK_REMEDIES:
            return f"{where}: {os.strerror(code)}. {DISK_REMEDIES[code]}, and run the same command again; what was finished is kept."
        error = error.__cause__ or error.__context__
    return None


def _disk_code(error: BaseException) -> tuple[int, str]:
    """The system's error number (0 for none) and the file."""
    named = (error.filename2 or error.filename) if isinstance(error, OSError) else None
    return system_code(error), os.fsdecode(named or "the disk")
