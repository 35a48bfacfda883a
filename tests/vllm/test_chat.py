"""`tulu chat --engine vllm`: the same talk as with our own engine."""

import subprocess
import sys

TURNS = "What is the capital of France?\nWrite one word: hello.\n"


def replies(model: str, *options: str) -> str:
    """What is written to piped turns: nothing but the replies, whatever the engine logs."""
    argv = ["-m", "tulu_lightning", "chat", "--model", model, "--max_new_tokens", "24", *options]
    done = subprocess.run(
        [sys.executable, *argv], input=TURNS, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_a_talk_with_vllm_is_the_one_with_our_engine(smol):
    ours = replies(smol)
    assert "Paris" in ours
    assert len(ours.splitlines()) >= 2
    assert replies(smol, "--engine", "vllm") == ours
