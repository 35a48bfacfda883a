import errno
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


def test_a_reader_that_is_gone_is_no_error():
    argv = [sys.executable, "-m", "tulu_lightning", "--help"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.wait() == 141
        assert process.stderr.read() == ""


def test_a_pipe_of_the_runs_own_that_breaks_keeps_its_traceback(monkeypatch):
    with pytest.raises(BrokenPipeError):
        called_with(monkeypatch, ["recipe"], BrokenPipeError(errno.EPIPE, "x"))


def test_any_other_error_keeps_its_traceback(monkeypatch):
    with pytest.raises(FileNotFoundError):
        called_with(monkeypatch, ["recipe"], FileNotFoundError(errno.ENOENT, "x", "y"))
