"""`tulu report RUN [--against RUN2]`: a run, or two beside each other, as one HTML page that needs no network.

The page shows whatever the run folder holds: what is missing is left out or said to be missing.
"""

import argparse
import contextlib
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

from tulu_lightning.errors import InputError
from tulu_lightning.recipes.records import RunRecord, read_run

# The browser itself holds the page to its word: nothing is fetched, whatever a model may have written.
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"


def main(argv: Sequence[str] | None = None) -> int:
    """`tulu report RUN [--against RUN2] [--out FILE]`: writes the page and prints its path.

    Raises:
        InputError: RUN is not a run folder, the output cannot be written, or plotly is not installed.
    """
    args = parser().parse_args(argv)
    print(write_report(args.run, args.out, args.against))
    return 0


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    found = argparse.ArgumentParser(prog="tulu report", description="Write a run as one self-contained HTML page.")
    found.add_argument("run", type=Path, metavar="RUN", help="folder of a run or of one stage, e.g. runs/smol")
    found.add_argument("--against", type=Path, metavar="RUN2", help="a second run, compared on the same page")
    where = "where to write it; RUN/report.html by default"
    found.add_argument("--out", "--output", type=Path, metavar="FILE", dest="out", help=where)
    return found


def write_report(run_dir: Path, output: Path | None = None, against: Path | None = None) -> Path:
    """Writes the report of a run and returns its path.

    Args:
        run_dir: the run folder, finished or not.
        output: the file to write; `run_dir/report.html` by default.
        against: folder of a second run to compare it with.

    Raises:
        InputError: `run_dir` or `against` is not a run folder, `output` cannot be written, or plotly is not installed.
    """
    run = read_run(run_dir)
    other = None if against is None else read_run(against)
    if importlib.util.find_spec("plotly") is None:
        raise InputError("tulu report", "plotly is not installed", "Install it: pip install 'tulu-lightning[demo]'.")
    output = output or run_dir / "report.html"
    part = output.with_name(f"{output.name}.part")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(render(run, other), encoding="utf-8", errors="replace")  # JSON may hold lone surrogates
        os.replace(part, output)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise InputError(
            str(output), f"cannot be written ({error.strerror})", "Give a file that can, with --out."
        ) from error
    return output


def render(run: RunRecord, against: RunRecord | None = None) -> str:
    """The whole page.

    Args:
        run: the run.
        against: a second one to compare it with.
    """
    from tulu_lightning.recipes import report_page  # needs plotly, which write_report asks for first

    return report_page.page(run, against, POLICY)
