import errno
import os
import subprocess
import sys

import pytest

from tulu_lightning import __version__, cli
from tulu_lightning.errors import InputError

HEAVY = ("torch", "lightning", "transformers", "jsonargparse", "yaml", "numpy", "rich")


def run(*argv: str) -> tuple[int, str, str, list[str]]:
    """Run the command in a fresh interpreter: status, stdout, stderr, and which heavy packages it imported."""
    code = (
        "import sys\nfrom tulu_lightning.cli import main\nstatus = main(sys.argv[1:])\n"
        f"print([m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr)\nsys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, check=False)
    *errors, imported = done.stderr.splitlines()
    return done.returncode, done.stdout, "\n".join(errors), eval(imported)


@pytest.mark.parametrize("argv", [(), ("--help",), ("-h",)])
def test_help_lists_every_command_and_imports_nothing_heavy(argv):
    status, out, err, imported = run(*argv)
    assert (status, err, imported) == (0, "", [])
    assert out.startswith("usage: tulu COMMAND [options]\n")
    for command in cli.COMMANDS:
        assert f"  {command.name}" in out


def test_the_version_is_printed_without_heavy_imports():
    assert run("--version") == (0, f"tulu {__version__}\n", "", [])


def test_an_unknown_command_offers_the_nearest_without_heavy_imports():
    assert run("recipee") == (
        2,
        "",
        "tulu: error: command line: no such command: 'recipee'. Did you mean 'recipe'?",
        [],
    )


def test_the_package_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "tulu_lightning", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"tulu {__version__}\n"


def called_with(monkeypatch, argv, result: int | BaseException = 0):
    """What `main` hands to the command's module, and to which module."""
    calls = []

    class Module:
        def __init__(self, name: str) -> None:
            self.name = name

        def main(self, arguments):
            calls.append((self.name, arguments))
            if isinstance(result, BaseException):
                raise result
            return result

    monkeypatch.setattr(cli.importlib, "import_module", Module)
    return cli.main(argv), calls


@pytest.mark.parametrize(
    ("argv", "call"),
    [
        (["fit", "--config", "x"], ("tulu_lightning.launch.fit", ["fit", "--config", "x"])),
        (["test", "--config", "x"], ("tulu_lightning.launch.fit", ["test", "--config", "x"])),
        (["recipe", "--config", "x"], ("tulu_lightning.recipes.recipe", ["--config", "x"])),
        (["pairs", "x"], ("tulu_lightning.recipes.pairs", ["x"])),
        (["report"], ("tulu_lightning.recipes.report", [])),
    ],
)
def test_a_command_gets_its_arguments(monkeypatch, argv, call):
    assert called_with(monkeypatch, argv) == (0, [call])


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (InputError("x.yaml", "is empty", "Fill it."), 2, "tulu: error: x.yaml: is empty. Fill it.\n"),
        (KeyboardInterrupt(), 130, "tulu: interrupted; run the same command again to go on\n"),
        (
            OSError(errno.EROFS, "x", "runs/a"),
            2,
            "tulu: error: runs/a: Read-only file system. Choose a folder on a writable disk (trainer.default_root_dir), "
            "and run the same command again; what was finished is kept.\n",
        ),
        (
            PermissionError(errno.EACCES, "x", "runs/a"),
            2,
            "tulu: error: runs/a: Permission denied. Change its permissions, or choose another folder "
            "(trainer.default_root_dir), and run the same command again; what was finished is kept.\n",
        ),
        (
            OSError(errno.ENOSPC, "x"),
            2,
            "tulu: error: the disk: No space left on device. Free some space, or choose another folder "
            "(trainer.default_root_dir), and run the same command again; what was finished is kept.\n",
        ),
    ],
)
def test_what_a_user_can_mend_is_one_line_and_a_status(monkeypatch, capsys, error, status, text):
    assert called_with(monkeypatch, ["recipe"], error)[0] == status
    assert capsys.readouterr().err == text


def test_any_other_error_keeps_its_traceback(monkeypatch):
    with pytest.raises(FileNotFoundError):
        called_with(monkeypatch, ["recipe"], FileNotFoundError(errno.ENOENT, "x", "y"))


# A reader that goes away --------------------------------------------------------------------------------------------

AWAY = """
import sys, types
from tulu_lightning import cli
def main(argv): {}
cli.importlib.import_module = lambda name: types.SimpleNamespace(main=main)
sys.exit(cli.main(["lineage", "x"]))
"""


def unread(body, stream="stdout", unbuffered=""):
    """A command with this body, one of whose streams nobody reads: its status, and what it said on the other."""
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    reader, writer = os.pipe()
    os.close(reader)
    other = "stderr" if stream == "stdout" else "stdout"
    streams = {stream: writer, other: subprocess.PIPE}
    done = subprocess.run([sys.executable, "-c", AWAY.format(body)], check=False, text=True, env=environment, **streams)
    os.close(writer)
    return done.returncode, getattr(done, other)


@pytest.mark.parametrize(
    "body",
    [
        "print('x'); return 0",  # still in the buffer when the command is done
        "print('x'); sys.exit(0)",  # as argparse does after --help
        "print('x' * 10**6); return 0",
        "from rich.console import Console; Console().print('x'); return 0",
        "from rich.console import Console; [Console().print('x') for _ in range(2)]; return 0",
    ],
)
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_command_whose_reader_went_away_ends_quietly(unbuffered, body):
    assert unread(body, unbuffered=unbuffered) == (141, "")


def test_an_error_is_told_all_the_same():
    body = "print('x'); raise cli.InputError('x.yaml', 'is empty', 'Fill it.')"
    assert unread(body) == (141, "tulu: error: x.yaml: is empty. Fill it.\n")


def test_so_does_one_whose_errors_nobody_reads():
    assert unread("print('x' * 10**6, file=sys.stderr, flush=True); return 0", "stderr") == (141, "")


def test_a_broken_pipe_to_a_process_of_its_own_keeps_its_traceback():
    done = subprocess.run(
        [sys.executable, "-c", AWAY.format("raise BrokenPipeError(32, 'a worker is gone')")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.endswith("BrokenPipeError: [Errno 32] a worker is gone\n")


@pytest.mark.parametrize("argv", [["--help"], ["lineage", "--help"]])
def test_help_that_nobody_reads_is_quiet(argv):
    command = f"{sys.executable} -m tulu_lightning {' '.join(argv)} | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert done.stdout.strip() in ("141", "0")
