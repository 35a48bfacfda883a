"""Bad input that concerns ranks, their strategy and their precision: one line, status 2, before anything heavy runs."""

import importlib.util
from pathlib import Path

import lightning as L
import pytest
import yaml

from tulu_lightning import cli
from tulu_lightning.errors import InputError
from tulu_lightning.models.backbone import PackedLM
from tulu_lightning.ranks import check_launched
from tulu_lightning.stages.checks import check_trainer

CONFIGS = Path(__file__).parents[1] / "configs"
STAGES = ("sft", "reward", "dpo", "ppo", "grpo")


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """`refused(stage, options, **settings)` is the one line said; weights that load, or ranks that meet, are a failure."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(PackedLM, "__init__", lambda *_, **__: pytest.fail("weights were loaded first"))
    monkeypatch.setattr("torch.distributed.init_process_group", lambda *_, **__: pytest.fail("the ranks met first"))

    def run(stage, *options, **settings):
        Path("mine.yaml").write_text(yaml.safe_dump({"include": [str(CONFIGS / f"{stage}_tiny.yaml")], **settings}))
        assert cli.main(["fit", "--config", "mine.yaml", *options]) == 2
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tulu: ")]
        assert len(said) == 1, said
        assert said[0].startswith("tulu: error: ")
        return said[0].removeprefix("tulu: error: ")

    return run


def backbone(**settings):
    return {"model": {"init_args": {"backbone": settings}}}


LORA = {"r": 4}


# How many ranks -----------------------------------------------------------------------------------------------------


@pytest.fixture
def started(monkeypatch):
    """`started(world, here)`: torchrun has started so many processes, this one and so many on this machine."""

    def start(world, here):
        where = {"RANK": 0, "LOCAL_RANK": 0, "GROUP_RANK": 0, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": here}
        where |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1, "TORCHELASTIC_RUN_ID": "x"}
        for name, value in where.items():
            monkeypatch.setenv(name, str(value))

    return start


@pytest.mark.parametrize(
    ("world", "here", "nodes", "devices", "product", "remedy"),
    [
        (4, 2, 1, 2, 2, "Set trainer.num_nodes to 2 and trainer.devices to 2, or start others."),
        (4, 2, 2, 3, 6, "Set trainer.num_nodes to 2 and trainer.devices to 2, or start others."),
        (2, 2, 2, 2, 4, "Set trainer.num_nodes to 1 and trainer.devices to 2, or start others."),
        (44, 8, 5, 8, 40, "Start as many on each machine, or start others."),
    ],
)
def test_other_ranks_than_were_started(world, here, nodes, devices, product, remedy, started, refused):
    started(world, here)
    options = {"strategy": "fsdp2", "accelerator": "cpu", "num_nodes": nodes, "devices": devices}
    assert refused("sft", trainer=options) == (
        f"trainer.num_nodes x trainer.devices: is {nodes} x {devices} = {product} processes, "
        f"and torchrun started {world}, {here} of them here. {remedy}"
    )


def test_one_device_in_each_of_two_processes_would_be_the_same_run_twice(started, refused):
    started(2, 2)
    assert refused("dpo").startswith(
        "trainer.num_nodes x trainer.devices: is 1 x 1 = 1 processes, and torchrun started 2"
    )


def test_as_many_as_were_started_and_no_torchrun_at_all_are_fine(started, monkeypatch):
    check_launched(8, 4)
    started(32, 8)
    check_launched(8, 4)
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    with pytest.raises(InputError, match="torchrun started 32, 32 of them here"):
        check_launched(8, 2)


# Strategies ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "strategy"), [*((stage, "ddp") for stage in STAGES), ("sft", "ddp_find_unused_parameters_true")]
)
def test_ddp_on_two_processes(stage, strategy, started, refused):
    started(2, 2)
    said = refused(stage, trainer={"strategy": strategy, "accelerator": "cpu", "devices": 2})
    assert said == (
        "trainer.strategy: is DDPStrategy with 2 processes. "
        "Use fsdp2: any other would average micro-batches that this package sums."
    )


@pytest.mark.parametrize("strategy", ["fsdp", "fsdp_cpu_offload", "deepspeed", "deepspeed_stage_3", "xla"])
@pytest.mark.parametrize("devices", [1, 2])
def test_a_strategy_that_shards_in_its_own_way(strategy, devices, refused):
    """Also where its package is missing or wants a GPU: to install or buy that would be for nothing."""
    said = refused("sft", trainer={"strategy": strategy, "devices": devices})
    assert said == (
        f"trainer.strategy: is {strategy}, which shards and counts in ways of its own. "
        "Use fsdp2, which every stage runs under, on one process or many; or auto, on one."
    )


def test_a_strategy_that_does_not_exist(refused):
    assert (
        refused("sft", "--trainer.strategy", "fsdp3") == "trainer.strategy: there is no 'fsdp3'. Did you mean 'fsdp2'?"
    )
    assert refused("sft", "--trainer.strategy", "zzz") == "trainer.strategy: there is no 'zzz'. Known: auto, fsdp2."


def test_lightnings_own_sharding_by_class(started, refused):
    started(2, 2)
    own = {"class_path": "lightning.pytorch.strategies.ModelParallelStrategy", "init_args": {}}
    said = refused("sft", trainer={"strategy": own, "accelerator": "cpu", "devices": 2})
    assert said.startswith("trainer.strategy: is ModelParallelStrategy with 2 processes. Use fsdp2")


def test_the_same_is_refused_without_the_command_line(started):
    started(2, 2)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    with pytest.raises(InputError, match=r"trainer\.strategy: is DDPStrategy with 2 processes"):
        check_trainer(L.Trainer(accelerator="cpu", devices=2, strategy="ddp", **quiet))
    with pytest.raises(InputError, match=r"is 1 x 1 = 1 processes, and torchrun started 2"):
        check_trainer(L.Trainer(accelerator="cpu", devices=1, **quiet))


# Precision ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("precision", "strategy"),
    [
        ("bf16-true", "auto"),
        ("bf16-true", "fsdp2"),
        ("bf16-mixed", "fsdp2"),
        ("16-mixed", "auto"),
        ("64-true", "auto"),
        ("transformer-engine", "auto"),
    ],
)
def test_another_precision_of_the_trainer(precision, strategy, refused):
    """`transformer-engine` also where its package is missing."""
    said = refused("ppo", trainer={"precision": precision, "strategy": strategy})
    assert said == (
        f"trainer.precision: is {precision}. Leave it at 32-true; "
        "model.init_args.backbone.compute_dtype sets that of the matrix products."
    )


def test_the_trainers_precision_beside_the_backbones(refused):
    """Both would say bf16, and mean two things."""
    settings = backbone(compute_dtype="bfloat16", lora=LORA, quantize={"kind": "nf4"})
    assert refused("sft", **settings, trainer={"precision": "bf16-true"}).startswith("trainer.precision: is bf16-true.")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"weights_dtype": "bfloat16"},
            "backbone.weights_dtype: is bfloat16 while compute_dtype is float32, whose digits such weights do not have",
        ),
        ({"quantize": {"kind": "nf4"}}, "backbone.quantize: is set without lora, and a base in 4 bits does not train."),
        (
            {"quantize": {"kind": "int8"}, "lora": LORA},
            "mine.yaml, line 9: 'model.init_args.backbone.quantize.kind' is 'int8'",
        ),
        ({"quantize": {"blocksize": 65}, "lora": LORA}, "quantize.blocksize: is 65. Use one of 32, 64, 128"),
        (
            {"quantize": {}, "lora": LORA, "weights_dtype": "bfloat16"},
            "backbone.weights_dtype: is bfloat16 while compute_dtype is float32",
        ),
    ],
)
@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_precisions_of_the_backbone_that_contradict_each_other(stage, settings, said, refused):
    assert refused(stage, **backbone(**settings)).startswith(said)


# Packages -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_four_bits_without_bitsandbytes(stage, refused, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "bitsandbytes" else find(name, *more)
    )
    assert refused(stage, **backbone(quantize={"kind": "nf4"}, lora=LORA)) == (
        "backbone.quantize: needs bitsandbytes, which is not installed. "
        "Install it: pip install 'tulu-lightning[qlora]'. Or leave quantize out."
    )


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_four_bits_sharded_by_a_torch_that_shards_no_integers(stage, refused, monkeypatch):
    monkeypatch.setattr("torch.__version__", "2.11.0+cu130")
    settings = backbone(quantize={"kind": "nf4"}, lora=LORA)
    options = {"strategy": "fsdp2", "accelerator": "cpu"}
    assert refused(stage, **settings, trainer=options) == (
        "backbone.quantize: is set under strategy fsdp2, and torch 2.11.0+cu130 shards no integers. "
        "Install torch 2.12 or newer, or run on one device without it."
    )


# A server on other machines -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("engine", "said"),
    [
        (
            {"kind": "local", "broadcast_workers": 4},
            "rollout.engine.broadcast_workers: is 4, and rollout.engine.kind local does",
        ),
        (
            {"kind": "server", "broadcast_workers": 4},
            "rollout.engine.broadcast_workers: is 4, and a server that is started here gets files",
        ),
        (
            {"kind": "server", "url": "http://node5:8000", "broadcast_workers": 0},
            "rollout.engine.broadcast_workers: is 0. Use the server's tensor-parallel size.",
        ),
    ],
)
def test_weights_that_are_broadcast_to_nobody(engine, said, refused):
    assert refused("ppo", model={"init_args": {"rollout": {"engine": engine}}}).startswith(said)
