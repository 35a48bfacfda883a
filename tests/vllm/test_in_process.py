"""vLLM as a guest of the trainer's process."""

import os
import random

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tulu_lightning.errors import InputError
from tulu_lightning.types import Sampling

SETTINGS = {"max_model_len": 128, "max_num_seqs": 8, "kv_cache_mb": 32}


def build(folder, **changes):
    from tulu_lightning.rollout.vllm import VLLMEngine

    return VLLMEngine.from_folder(folder, **{**SETTINGS, **changes})


def state():
    return (
        torch.get_rng_state().tolist(),
        random.getstate(),
        np.random.get_state()[1].tolist(),
        torch.get_num_threads(),
        torch.set_num_threads,
        dict(os.environ),
    )


def test_start_and_end_leave_the_process_as_it_was(tiny):
    before = state()
    assert not dist.is_initialized()
    engine = build(tiny)
    assert state() == before
    assert engine.health() == (True, 0, "vLLM in this process")
    engine.close()
    engine.close()  # twice is once
    assert state() == before
    assert not dist.is_initialized()
    assert engine.health() == (False, 0, "vLLM in this process: closed")


def test_an_engine_outlives_another_one_and_the_trainers_process_group_both(tiny, tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        first, second = build(tiny), build(tiny, version=3)
        wanted = first.generate([[1, 2, 3]], 2, Sampling(4), 0)
        first.close()
        got = second.generate([[1, 2, 3]], 2, Sampling(4), 0)
        assert [c.ids_L.tolist() for c in got[0]] == [c.ids_L.tolist() for c in wanted[0]]
        assert got[0][0].version == 3
        second.close()
        one = torch.ones(1)
        dist.all_reduce(one)
        assert one.item() == 1
    finally:
        dist.destroy_process_group()


def test_a_proof_of_whole_matrices_finds_what_columns_may_miss(tiny):
    from transformers import AutoModelForCausalLM

    from tulu_lightning.rollout.engine import RefreshError
    from tulu_lightning.rollout.vllm_worker import Worker

    weights = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).state_dict()
    name = "model.layers.2.mlp.down_proj.weight"

    def spoiled(self, model):  # one element of one packed matrix, after loading
        bad = weights[name].clone()
        bad[3, 70] += 1
        layer = model.model.layers[2].mlp.down_proj
        layer.weight = torch.nn.Parameter(bad, requires_grad=False)
        layer.quant_method.process_weights_after_loading(layer)

    engine = build(tiny, proof_columns=0)
    engine.refresh(weights.items(), 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Worker, "_tulu_repack", spoiled)
        with pytest.raises(RefreshError) as caught:
            engine.refresh(weights.items(), 2)
    assert caught.value.problems == {"not held as sent": (name,)}
    engine.close()


@pytest.mark.parametrize("changes", [{"max_model_len": 100_000}, {"dtype": "float65"}])
def test_what_vllm_refuses_is_the_users_to_read(tiny, changes):
    with pytest.raises(InputError):
        build(tiny, **changes)
    assert not dist.is_initialized()
