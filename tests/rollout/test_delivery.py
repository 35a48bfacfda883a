"""Weights on their way: what is sent, and which fault is laid to whom."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from transformers import AutoModelForCausalLM

from tulu_lightning.errors import InputError
from tulu_lightning.rollout.delivery import Delivery, contents_of, dtype_of, joined
from tulu_lightning.rollout.engine import RefreshError
from tulu_lightning.rollout.fingerprint import fingerprint, mark
from tulu_lightning.rollout.held_weights import columns_of

EMBED, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


@pytest.fixture(scope="module")
def weights(tiny):
    return AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).state_dict()


@pytest.fixture(scope="module")
def contents(tiny):
    return contents_of(tiny)


def send(contents, named, dtype=torch.float32):
    """The delivery after its end, and the marks of an honest receiver."""
    delivery = Delivery(contents, dtype, named)
    return delivery, {name: mark(tensor) for name, tensor in delivery}


def test_what_any_of_several_workers_finds_counts(contents, weights):
    delivery, received = send(contents, weights.items())
    good = {"received": received, "differ": [], "unproved": []}
    assert joined([good]) == joined([good, good]) == good
    assert joined([{"rank": 1}, {"rank": 2}]) == {"rank": 1}
    one = {**good, "received": {**received, NORM: "other"}}
    two = {**good, "differ": [EMBED], "unproved": [NORM]}
    less = {**good, "received": {name: word for name, word in received.items() if name != EMBED}}
    for answers, kind, name in (
        ([good, one], "changed on the way", NORM),
        ([good, less], "changed on the way", EMBED),
        ([good, two], "not held as sent", EMBED),
    ):
        report = joined(answers)
        problems = delivery.problems(report["received"], report["differ"])
        assert {k: names for k, names in problems.items() if names} == {kind: [name]}
    assert joined([good, two])["unproved"] == [NORM]


def test_contents_are_those_of_the_model_without_its_weights(contents, weights):
    assert contents.shapes == {name: tuple(tensor.shape) for name, tensor in weights.items()}
    assert contents.tied == {HEAD: EMBED}
    assert (contents.vocabulary, contents.positions) == (264, 4096)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tied_tensors_travel_once_and_are_known_by_all_names(contents, weights, dtype):
    delivery, received = send(contents, weights.items(), dtype)
    assert set(received) == set(weights) - {HEAD}
    assert delivery.settle(received) == fingerprint(weights.items(), dtype)


def test_a_head_that_comes_first_travels_as_the_embedding(contents, weights):
    named = {HEAD: weights[HEAD], **{name: tensor for name, tensor in weights.items() if name not in (EMBED, HEAD)}}
    delivery, received = send(contents, named.items())
    assert next(iter(received)) == EMBED
    assert delivery.settle(received) == fingerprint(weights.items())


@pytest.mark.parametrize(
    ("change", "problems"),
    [
        (lambda w, r: w.pop(NORM), {"not delivered": (NORM,)}),
        (lambda w, r: w.update({HEAD: w[HEAD] + 1}), {"not held as sent": (HEAD,)}),
        (lambda w, r: w.update(x=torch.zeros(2)), {"unknown": ("x",)}),
        (
            lambda w, r: w.update({NORM: torch.zeros(3)}),
            {"not delivered": (NORM,), "of another shape": (f"{NORM} (3,) for (256,)",)},
        ),
        (lambda w, r: r.update({NORM: "other"}), {"changed on the way": (NORM,)}),
        (lambda w, r: r.update({NORM: None}), {"changed on the way": (NORM,)}),
    ],
)
def test_each_fault_is_named(contents, weights, change, problems):
    named, faults = dict(weights), {}
    change(named, faults)
    delivery, received = send(contents, named.items())
    with pytest.raises(RefreshError) as caught:
        delivery.settle({**received, **faults})
    assert caught.value.problems == problems


def test_what_the_receiver_holds_otherwise_is_named(contents, weights):
    delivery, received = send(contents, weights.items())
    with pytest.raises(RefreshError) as caught:
        delivery.settle(received, differ=[HEAD, NORM])
    assert caught.value.problems == {"not held as sent": (HEAD, NORM)}


def test_the_senders_own_marks_are_held_against_it(contents, weights):
    expected = fingerprint(weights.items())
    delivery, received = send(contents, {**weights, NORM: weights[NORM] + 1}.items())
    with pytest.raises(RefreshError) as caught:
        delivery.settle(received, expected=expected)
    assert caught.value.problems == {"not held as expected": (NORM,)}


def test_shards_are_gathered_tensor_by_tensor(contents, weights, tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        alive = []

        def sharded():
            for name, tensor in weights.items():
                alive.append(name)  # made only when it is asked for
                yield name, distribute_tensor(tensor, mesh, [Shard(0)])

        delivery = Delivery(contents, torch.float32, sharded())
        for count, (_, tensor) in enumerate(delivery, 1):
            assert type(tensor) is torch.Tensor
            assert len(alive) == count
        assert delivery.marks() == fingerprint(weights.items())
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("dtype", ["float16", "nonsense", torch.int8])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(InputError, match="float32 or bfloat16"):
        dtype_of(dtype)


def test_proof_columns_are_few_within_the_matrix_and_change_with_the_version():
    chosen = [columns_of(576, 16, version).tolist() for version in range(3)]
    assert all(len(set(columns)) == 16 and 0 <= min(columns) <= max(columns) < 576 for columns in chosen)
    assert chosen[0] != chosen[1] != chosen[2]
    assert columns_of(576, 16, 0).tolist() == chosen[0]
    assert columns_of(5, 0, 0).tolist() == columns_of(5, 16, 0).tolist() == [0, 1, 2, 3, 4]
