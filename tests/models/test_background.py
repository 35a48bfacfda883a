"""Checkpoints that are written beside training: copies are copies, what goes wrong reaches who waits, no wait is endless."""

import threading

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from tulu_lightning.errors import RunStopped
from tulu_lightning.models.background import Background, snapshot


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


def test_a_copy_shares_nothing_with_what_training_changes_next():
    """Plain tensors, 8-bit moments (torchao gives those no clone), and shards of both."""
    eight = pytest.importorskip("torchao.optim.subclass_8bit")
    moments = eight.OptimState8bit.zeros((64, 64))
    moments.codes.fill_(3)
    moments.scale.fill_(0.5)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        spread = [DTensor.from_local(part, mesh, [Shard(0)]) for part in (torch.ones(4), moments)]
        taken = snapshot({"plain": torch.ones(4), "moments": moments, "shards": spread})
        moments.codes.zero_()
        moments.scale.zero_()
        spread[0].to_local().zero_()
        assert torch.equal(taken["plain"], torch.ones(4))
        assert torch.equal(taken["shards"][0].to_local(), torch.ones(4))
        for copy in (taken["moments"], taken["shards"][1].to_local()):
            assert copy.codes.unique().tolist() == [3]
            assert copy.scale.unique().tolist() == [0.5]
        one, other = spread[1], taken["shards"][1]
        assert (other.placements, other.shape, other.stride()) == (one.placements, one.shape, one.stride())
    finally:
        dist.destroy_process_group()
