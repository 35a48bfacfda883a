"""The choice among the attention backends: right for every machine, tried before it is trusted, and said once."""

import pytest
import torch

from tulu_lightning.errors import InputError
from tulu_lightning.models import backends
from tulu_lightning.models.backbone import Backbone
from tulu_lightning.models.backends import Chooser, Machine, candidates, lacks
from tulu_lightning.models.tiles import SdpaTiles
from tulu_lightning.types import Span

BF16, FP32 = torch.bfloat16, torch.float32
H100, T4, CPU = Machine("cuda", (9, 0), True), Machine("cuda", (7, 5), True), Machine("cpu")


@pytest.mark.parametrize(
    ("requested", "machine", "plain", "shared"),
    [
        ("auto", CPU, ("compiled", "matmul"), ("compiled", "matmul")),
        ("auto", H100, ("varlen", "flex", "sdpa"), ("flex", "sdpa")),
        ("auto", Machine("mps"), ("sdpa",), ("sdpa",)),
        ("sdpa", H100, ("sdpa",), ("sdpa",)),
        ("flex", H100, ("flex",), ("flex",)),
        ("varlen", H100, ("varlen",), ("flex", "sdpa")),
    ],
)
def test_backends_are_tried_in_this_order(requested, machine, plain, shared):
    assert candidates(requested, False, machine) == plain
    assert candidates(requested, True, machine) == shared


@pytest.mark.parametrize(
    ("name", "dtype", "machine", "said"),
    [
        ("varlen", BF16, H100, None),
        ("varlen", FP32, H100, "it needs compute_dtype bfloat16"),
        ("varlen", BF16, T4, "it needs a GPU of compute capability 8.0, and this one has 7.5"),
        ("varlen", BF16, CPU, "it needs a CUDA GPU, and the device is cpu"),
        ("flex", FP32, T4, None),
        ("flex", BF16, Machine("cuda", (9, 0), False), "it needs triton"),
        ("matmul", FP32, CPU, None),
        ("sdpa", BF16, T4, None),
    ],
)
def test_what_a_machine_lacks_for_a_backend(name, dtype, machine, said):
    assert lacks(name, dtype, machine) == said


@pytest.mark.parametrize("name", ["flex", "varlen"])
def test_an_explicit_choice_that_the_machine_cannot_run_is_refused_before_weights_load(name, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=f"backbone.attention: is {name}, but it needs a CUDA GPU"):
        Backbone("x", compute_dtype="bfloat16", attention=name).load(str(tmp_path / "nothing here"))
    with pytest.raises(InputError, match="is 'flash'"):
        Backbone("x", attention="flash").load(str(tmp_path / "nothing here"))  # type: ignore[arg-type]


@pytest.fixture
def on_a_gpu(monkeypatch):
    """A machine that looks like an H100 to the choice, while tensors stay where they are; and what it reported."""
    said = []
    monkeypatch.setattr(Machine, "of", staticmethod(lambda device: H100))
    monkeypatch.setattr(backends, "rank_zero_info", said.append)
    backends._report.cache_clear()
    yield said
    backends._report.cache_clear()


class Shape:
    num_attention_heads, num_key_value_heads, hidden_size = 4, 2, 32

    def get_text_config(self, decoder):
        return self


def broken(spans, device=None):
    raise RuntimeError("no kernel image is available\nfor execution")


def leaking(spans, device=None):
    return SdpaTiles([Span(0, spans[-1].end, -1)], device)


class Fails:
    """Right, but where a kernel of its own would be needed."""

    def __init__(self, spans, device=None):
        self.tokens, self.right = spans[-1].end, SdpaTiles(spans, device)

    def __call__(self, *given):
        if self.wrong():
            raise RuntimeError("no choices exist for this backend")
        return self.right(*given)


class FailsBelowABlock(Fails):
    def wrong(self):
        return self.tokens < 128


class FailsWithoutGradients(Fails):
    def wrong(self):
        return not torch.is_grad_enabled()


def right(spans, device=None):
    return SdpaTiles(spans, device)


@pytest.mark.parametrize("trees", [False, True])
def test_a_kernel_that_passes_its_trial_is_taken(on_a_gpu, monkeypatch, trees):
    monkeypatch.setattr(backends, "BACKENDS", {**backends.BACKENDS, "varlen": right, "flex": right})
    chooser = Chooser("auto", BF16)
    state = torch.get_rng_state()
    assert chooser.backend(trees, torch.device("cpu"), Shape()) is right
    chooser.backend(trees, torch.device("cpu"), Shape())
    assert torch.equal(torch.get_rng_state(), state)
    kind = (
        "attention: flex (cpu, bfloat16) for packs with shared prompts"
        if trees
        else "attention: varlen (cpu, bfloat16)"
    )
    assert on_a_gpu == [kind]  # once


@pytest.mark.parametrize("broken_one", [broken, leaking, FailsBelowABlock, FailsWithoutGradients])
def test_a_kernel_that_fails_or_is_wrong_is_passed_over_and_said_so(on_a_gpu, monkeypatch, broken_one):
    monkeypatch.setattr(backends, "BACKENDS", {**backends.BACKENDS, "varlen": broken_one, "flex": broken_one})
    with torch.no_grad():
        assert Chooser("auto", BF16).backend(False, torch.device("cpu"), Shape()) is SdpaTiles
    (line,) = on_a_gpu
    reasons = {broken: "it fails here (no kernel image is available)", leaking: "its numbers are wrong here"}
    reason = reasons.get(broken_one, "it fails here (no choices exist for this backend)")
    assert line == f"attention: sdpa (cpu, bfloat16); not varlen: {reason}, not flex: {reason}"
    with pytest.raises(InputError, match="is flex, but flex: it"):
        Chooser("flex", FP32).backend(False, torch.device("cpu"), Shape())
