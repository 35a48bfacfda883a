"""Checkpoints that are written beside training: what goes wrong in them reaches who waits, and no wait is endless."""

import threading

import pytest

from tulu_lightning.errors import RunStopped
from tulu_lightning.models.background import Background


def test_one_piece_at_a_time_and_its_error_is_handed_on(capsys):
    background, order = Background(), []
    background.start(lambda: order.append("one"), "checkpoint step-000001.ckpt")
    background.start(lambda: order.append("two"), "checkpoint step-000002.ckpt")
    background.wait()
    assert order == ["one", "two"]

    def fail():
        raise OSError("no room")

    background.start(fail, "checkpoint step-000003.ckpt")
    with pytest.raises(OSError, match="no room"):
        background.wait()
    assert "checkpoint step-000003.ckpt could not be written: no room" in capsys.readouterr().out
    background.wait()  # told once


def test_a_disk_that_does_not_answer_stops_the_run_and_is_waited_for_once():
    background, never = Background(seconds=0.05), threading.Event()
    background.start(lambda: never.wait(60), "checkpoint step-000004.ckpt")
    with pytest.raises(RunStopped, match=r"checkpoint step-000004\.ckpt has not been written in 0s"):
        background.wait()
    background.wait()
    never.set()
