"""One network, the same steps: on one process, sharded, in replicas, and split by tensor parallelism.

The ranks' side is `mesh_ranks`; losses are held against one process to 1e-5 relative, weights after three clipped updates
to 1e-6 (they move by some thousandths), both in fp32.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from test_sharding import lines, sharded_sizes

from tulu_lightning import cli
from tulu_lightning.models.saved import header_of

HERE = Path(__file__).parent
CONFIGS = HERE.parents[1] / "configs"
OWN = "tulu_lightning.callbacks."
EXACT = ["lm", "checkpointed", "reward", "value", "lora", "4bit"]


def torchrun(ranks, *arguments):
    """Run something on some ranks."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    launch = ["torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port", port]
    path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, "-m", *launch, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        timeout=500,
        check=False,
    )


def compared(folder, ranks, model, cases, meshes):
    """What `mesh_ranks` found, by case and mesh."""
    output = folder / "found.json"
    done = torchrun(ranks, HERE / "mesh_ranks.py", output, model, ",".join(cases), *meshes)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(output.read_text())


def check_exact(found):
    assert found["start"] == 0, "the same numbers are in the same places"
    assert found["moved"] > 5e-3
    assert found["end"] < 1e-6
    assert found["losses"] == pytest.approx(found["expected losses"], rel=1e-5)
    assert found["norms"] == pytest.approx(found["expected norms"], rel=1e-5)
    assert min(found["norms"]) > 0.5, "clipping is in it"
    assert found["holes"] == 1, "all ranks skip an update of which one has a gradient that is not finite"
    assert found["gradients of frozen weights"] == 0


@pytest.mark.slow
def test_two_ranks_are_one(tmp_path, tiny):
    results = compared(tmp_path, 2, tiny, ["lm"], ["1,1", "1,2", "2,1"])
    assert results.keys() == {"lm 1,1", "lm 1,2", "lm 2,1"}
    for found in results.values():
        check_exact(found)


@pytest.mark.slow
def test_four_ranks_over_every_mesh_are_one(tmp_path, tiny):
    meshes = ["1,1", "1,2", "2,1", "2,2"]
    results = compared(tmp_path, 4, tiny, EXACT, meshes)
    assert len(results) == 4 * 4 + 2 * 2, "adapters are not split by tensor parallelism"
    for found in results.values():
        check_exact(found)


@pytest.mark.slow
def test_a_model_whose_sizes_do_not_divide_is_sharded_the_same(tmp_path, odd):
    for found in compared(tmp_path, 4, odd, ["lm", "value"], ["1,1", "1,2", "2,1", "2,2"]).values():
        check_exact(found)


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """A Qwen 2 (biases) without tied embeddings, whose vocabulary and widths four ranks cannot share evenly."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("odd")
    torch.manual_seed(0)
    sizes = {"vocab_size": 259, "hidden_size": 54, "intermediate_size": 106, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10, "tie_word_embeddings": False}
    model = Qwen2ForCausalLM(Qwen2Config(**sizes, **heads))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder, max_shard_size="40KB")
    return str(folder)


@pytest.mark.slow
def test_bf16_products_differ_by_rounding_alone(tmp_path, tiny):
    for case, tolerance in (("bf16", 5e-4), ("stored bf16", 2e-3)):
        for found in compared(tmp_path, 4, tiny, [case], ["1,1", "1,2", "2,1", "2,2"]).values():
            assert found["start"] == 0
            assert found["end"] < tolerance, case
            assert found["losses"] == pytest.approx(found["expected losses"], rel=1e-3)
            assert found["norms"] == pytest.approx(found["expected norms"], rel=5e-3)


# Whole runs --------------------------------------------------------------------------------------------------------


def config(folder, stage, strategy, ranks, *callbacks):
    """A shipped tiny run in a few clipped steps."""
    folder.mkdir(exist_ok=True)
    optimizer = {"lr": 1e-2, "eps": 1e-2, "max_grad_norm": 0.05}
    data = {"examples_per_step": 5, "max_steps": 3}
    model = {"optimizer": optimizer}
    rows = [{"class_path": "stage_faults.KeepRows"}]
    if stage in ("ppo", "grpo"):
        model |= {
            "rollout": {"samples_per_prompt": 4, "max_new_tokens": 8},
            "micro_tokens": 120,
            "overlong": {"kind": "none"},
        }
        data["sources"] = [{"name": "even", "rows": "stage_runs.even_rows", "args": {"count": 40}}]
        rows = [{"class_path": OWN + "refresh.RolloutRefresh"}]
    else:
        data["micro_tokens"] = 200
    trainer = {
        "default_root_dir": str(folder / "run"),
        "callbacks": [
            {"class_path": OWN + "records.Records"},
            *rows,
            *callbacks,
            {"class_path": OWN + "checkpoints.Checkpoints", "init_args": {"every_n_steps": 1, "keep": 1}},
            {"class_path": OWN + "promote.Promote"},
        ],
    }
    if ranks > 1:
        trainer |= {"strategy": strategy, "devices": ranks, "accelerator": "cpu"}
    settings = {
        "include": [str(CONFIGS / f"{stage}_tiny.yaml")],
        "model": {"init_args": model},
        "data": {"init_args": data},
        "trainer": trainer,
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return ["fit", "--config", str(path)]


def fsdp2(**settings):
    return {"class_path": "tulu_lightning.models.sharding.Fsdp2", "init_args": settings}


def fit(folder, stage, ranks, *callbacks, **settings):
    """A run on some ranks, in a folder of its own."""
    return torchrun(ranks, "-m", "tulu_lightning", *config(folder, stage, fsdp2(**settings), ranks, *callbacks))


NUMBERS = ("loss", "grad_norm", "critic_grad_norm", "tokens", "trained_tokens", "margin", "reward", "score", "version")


def check_run(one, other):
    """The same numbers, rollouts and weights, to the tolerance that clipped Adam steps leave."""
    pairs = list(zip(lines(one), lines(other), strict=True))
    assert len(pairs) == 3
    for single, split in pairs:
        assert split.keys() == single.keys()
        for name in set(NUMBERS) & single.keys():
            assert split[name] == pytest.approx(single[name], rel=2e-4, abs=2e-5), (single["step"], name)
    assert min(single["grad_norm"] for single, _ in pairs) > 0.05
    weights = [load_file(run / "promoted" / "model.safetensors") for run in (one, other)]
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-4, atol=1e-4)
    if (one / "rollouts.jsonl").exists():
        rows = [[(row["ids"], row["score"]) for row in lines(run, "rollouts.jsonl")] for run in (one, other)]
        assert rows[0] == rows[1]
        assert rows[0]


def check_rows(one, other, places):
    """The rows of each step are the same, divided over the data-parallel places; ranks of one place share theirs."""
    expected = [set(row["mine"]) for row in lines(one, "rows-0.jsonl")]
    ranks = [[set(row["mine"]) for row in lines(other, f"rows-{rank}.jsonl")] for rank in range(len(places))]
    for step, whole in enumerate(expected):
        by_place = {}
        for rank, place in enumerate(places):
            assert by_place.setdefault(place, ranks[rank][step]) == ranks[rank][step]
        assert set.union(*by_place.values()) == whole
        assert sum(map(len, by_place.values())) == len(whole)


def test_sft_split_over_two_ranks_is_that_of_one(tmp_path):
    """Tensor parallelism through the command line, with a checkpoint and a promoted folder."""
    assert cli.main(config(tmp_path / "one", "sft", None, 1)) == 0
    done = fit(tmp_path / "two", "sft", 2, tensor_parallel=2)
    assert done.returncode == 0, done.stderr[-4000:]
    check_run(tmp_path / "one/run", tmp_path / "two/run")
    check_rows(tmp_path / "one/run", tmp_path / "two/run", [0, 0])
    checkpoint = next((tmp_path / "two/run/checkpoints").glob("step-*.ckpt"))
    assert header_of(checkpoint).mesh == [1, 1, 2]
    sizes = sharded_sizes(checkpoint)
    parts = {name: len(chunks) for name, chunks in sizes.items() if "_proj" in name or "embed" in name}
    assert any("exp_avg" in name for name in parts)
    assert {n for name, n in parts.items() if not name.endswith("step")} == {2}, "each rank wrote its part"


MESHES = {
    "fsdp2 over 4": (4, {}, [0, 1, 2, 3]),
    "2 replicas of 2 shards": (4, {"replicas": 2}, [0, 1, 2, 3]),
    "2 shards of 2 split": (4, {"tensor_parallel": 2}, [0, 0, 1, 1]),
    "2 split": (2, {"tensor_parallel": 2}, [0, 0]),
}


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "reward", "dpo", "ppo", "grpo"])
def test_whole_runs_over_every_mesh_are_those_of_one_process(tmp_path, stage, monkeypatch):
    monkeypatch.setenv("TULU_REFERENCE", str(tmp_path / "reference"))
    assert cli.main(config(tmp_path / "one", stage, None, 1)) == 0
    for name, (ranks, settings, places) in MESHES.items():
        monkeypatch.setenv("TULU_REFERENCE", str(tmp_path / f"reference of {name}"))
        done = fit(tmp_path / name, stage, ranks, **settings)
        assert done.returncode == 0, (name, done.stderr[-4000:])
        check_run(tmp_path / "one/run", tmp_path / name / "run")
        if stage in ("sft", "dpo"):
            check_rows(tmp_path / "one/run", tmp_path / name / "run", places)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((2, {"tensor_parallel": 2}), (2, {"tensor_parallel": 2})),
        ((4, {"tensor_parallel": 2}), (2, {})),
        ((2, {}), (4, {"tensor_parallel": 2})),
        ((4, {"replicas": 2}), (2, {"tensor_parallel": 2})),
    ],
)
def test_a_checkpoint_goes_on_over_the_same_mesh_or_another(tmp_path, before, after):
    """A signal to one rank stops them all; run again, over another mesh maybe, the run is that of one process."""
    assert cli.main(config(tmp_path / "one", "sft", None, 1)) == 0
    ranks, settings = before
    fault = {"class_path": "stage_faults.Interrupt", "init_args": {"step": 2, "rank": ranks - 1}}
    stopped = fit(tmp_path / "other", "sft", ranks, fault, **settings)
    assert "interrupted; run the same command again" in stopped.stderr, stopped.stderr[-4000:]
    ranks, settings = after
    resumed = fit(tmp_path / "other", "sft", ranks, **settings)
    assert resumed.returncode == 0, resumed.stderr[-4000:]
    assert "step-000002.ckpt (step 2)" in resumed.stdout
    check_run(tmp_path / "one/run", tmp_path / "other/run")
