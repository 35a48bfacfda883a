"""A channel between two threads of this process, over gloo."""

import socket
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist

from tulu_lightning.rollout.channel import Channel

SHAPES = {"a": [3, 4], "b": [5], "c": [2, 2, 2], "scalar": []}
CPU = torch.device("cpu")


@pytest.fixture
def ends():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with ThreadPoolExecutor(2) as pool:
        opening = [pool.submit(Channel, "127.0.0.1", port, rank, 3, CPU, 20) for rank in (1, 2)]
        sender = Channel("127.0.0.1", port, 0, 3, CPU, 20)
        yield sender, [end.result() for end in opening], pool


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_receivers_get_what_was_sent_in_its_order(ends, dtype):
    sender, receivers, pool = ends
    others = dist.is_initialized()
    sent = [(name, torch.randn(SHAPES[name]).to(dtype)) for name in ("c", "a", "scalar")]
    sent.append(("b", torch.randn(10).to(dtype)[::2]))  # not contiguous
    got = [pool.submit(lambda end: list(end.receive(SHAPES, dtype)), end) for end in receivers]
    sender.send(sent, list(SHAPES))
    for one in got:
        assert [name for name, _ in one.result(20)] == ["c", "a", "scalar", "b"]
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(one.result(), sent, strict=True))
    assert dist.is_initialized() == others  # the trainer's own group is another matter


def test_a_sender_that_fails_tells_the_receivers_and_can_go_on(ends):
    sender, receivers, pool = ends

    def breaking():
        yield "b", torch.zeros(5)
        raise ValueError("no more")

    got = [pool.submit(lambda end: list(end.receive(SHAPES, torch.float32)), end) for end in receivers]
    with pytest.raises(ValueError, match="no more"):
        sender.send(breaking(), list(SHAPES))
    for one in got:
        with pytest.raises(RuntimeError, match="gave up in the middle"):
            one.result(20)
    got = [pool.submit(lambda end: list(end.receive(SHAPES, torch.float32)), end) for end in receivers]
    sender.send([("b", torch.ones(5))], list(SHAPES))
    assert all(one.result(20)[0][1].sum() == 5 for one in got)


def test_nobody_comes():
    with pytest.raises(RuntimeError):
        Channel("127.0.0.1", 0, 0, 2, CPU, 0.2)
