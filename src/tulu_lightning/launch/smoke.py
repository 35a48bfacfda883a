"""A training step of SFT and one of GRPO on a tiny random model, in seconds: does this machine train?

`tulu doctor` runs it as a process of its own (`python -m tulu_lightning.launch.smoke`): a kernel that does not fit the
processor ends that one only. It keeps its caches in a temporary folder, and prints one JSON object.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

from tulu_lightning.launch.findings import Finding
from tulu_lightning.progress import Progress

__all__ = ["look", "main"]

PART = "smoke step"
SECONDS = 300
"""After which a step that takes seconds is called a hang; a GPU may compile kernels in it."""


def look() -> Iterator[Finding]:
    """Run the step in a child; its progress goes to standard error."""
    command = [sys.executable, "-m", "tulu_lightning.launch.smoke"]
    try:
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=None,
            text=True,
            timeout=SECONDS,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        text = f"it has not ended in {SECONDS} s"
        yield Finding(
            PART, "SFT and GRPO", "fails", text, "Run it alone and look: python -m tulu_lightning.launch.smoke"
        )
        return
    try:
        found = json.loads(done.stdout.strip().splitlines()[-1])
    except (ValueError, IndexError):
        text = f"it ended with {_status(done.returncode)} before it had a result"
        remedy = "Read what it printed above; `python -m tulu_lightning.launch.smoke` runs it alone."
        yield Finding(PART, "SFT and GRPO", "fails", text, remedy)
        return
    for name, result in found.items():
        remedy = "`python -m tulu_lightning.launch.smoke` runs it alone." if not result["ok"] else ""
        yield Finding(PART, name, "ok" if result["ok"] else "fails", result["text"], remedy)


def _status(code: int) -> str:
    return f"status {code}" if code >= 0 else f"signal {-code}"


def main() -> int:
    """The child: one JSON object with a result for each stage on standard output; progress on standard error."""
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="tulu-smoke-") as folder, Progress("smoke step", total=3) as progress:
        os.environ.update(dict.fromkeys(("TULU_CACHE", "TULU_TOKENS", "TULU_REFERENCE"), folder))
        out, sys.stdout = sys.stdout, sys.stderr  # what the stages say is not the result
        try:
            progress.update(0, "importing")
            from tulu_lightning.launch import smoke_runs

            for at, (name, run) in enumerate(smoke_runs.RUNS.items(), start=1):
                progress.update(at, name)
                results[name] = _result(run, folder)
            progress.update(3, "done")
        except Exception as error:  # told in one line; the traceback is for whoever runs it alone
            results["imports"] = _fault(error)
        finally:
            sys.stdout = out
    print(json.dumps(results))
    return 0 if all(result["ok"] for result in results.values()) else 1


def _result(run: Any, folder: str) -> dict[str, Any]:
    start = time.monotonic()
    try:
        device, told, metrics = run(folder)
    except Exception as error:
        return _fault(error)
    seconds = time.monotonic() - start
    broken = [name for name, value in metrics.items() if not math.isfinite(value)]
    if broken:
        return {"ok": False, "text": f"not finite: {', '.join(broken)}"}
    return {"ok": True, "text": f"{told} on {device} in {seconds:.1f} s", "seconds": seconds}


def _fault(error: BaseException) -> dict[str, Any]:
    reason = (str(error).strip().splitlines() or [""])[0]
    return {"ok": False, "text": f"{type(error).__name__}: {reason}"}


if __name__ == "__main__":
    sys.exit(main())
