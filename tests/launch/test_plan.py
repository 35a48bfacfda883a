"""`tulu plan`: every shipped config, what does not fit, what it says on one line, and against what PyTorch allocates."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tulu_lightning import cli
from tulu_lightning.checkpoints.space import space_of
from tulu_lightning.core.step_plan import StepPlan
from tulu_lightning.errors import InputError
from tulu_lightning.launch import machine
from tulu_lightning.launch.plan import known_rows, plan_of
from tulu_lightning.launch.planned import Layout, peak_parts
from tulu_lightning.launch.reckoned import DEVICES, disk, reckon, remedies
from tulu_lightning.models.architectures import find_architecture
from tulu_lightning.models.backbone import Backbone
from tulu_lightning.models.heads import PackedValue
from tulu_lightning.models.lora import Lora
from tulu_lightning.stages.optimizer import AdamW
from tulu_lightning.stages.sft import SFT

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
STAGES = ("sft", "dpo", "reward", "ppo", "grpo")
ALL = sorted(path.stem for path in CONFIGS.glob("*_*.yaml") if path.stem.startswith(STAGES))
WITHIN = 0.15


def planned(name, *options, device=None, rows=None):
    return plan_of(["--config", str(CONFIGS / f"{name}.yaml"), *options], device, rows)[0]


def told(capsys, *argv):
    capsys.readouterr()
    status = cli.main(["plan", *argv])
    return status, capsys.readouterr()


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """The later stages of the demo start from what the earlier ones wrote; that is not there."""
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    "name", [name for name in ALL if name not in ("dpo_smol", "ppo_smol", "grpo_smol", "grpo_if_smol")]
)
def test_every_config_has_a_plan(name, capsys):
    status, said = told(capsys, "--config", str(CONFIGS / f"{name}.yaml"), "--json")
    found = json.loads(said.out)
    assert status == (0 if found["fits"] else 1)
    assert found["total"] > found["parameters"] * 2 / found["devices"] * ("qlora" not in name) * 0.9
    assert found["disk"]["total"] >= found["disk"]["checkpoint"] + found["disk"]["export"]
    assert not list(Path().iterdir()), "nothing is written"
    if not found["fits"]:
        assert found["would_fit"][-1]["total"] <= found["available"]


def test_vllm_without_a_limit_does_not_start_beside_a_trainer_on_a_gpu():
    """It would take 92% of the GPU; on a CPU it has 1,024 MB for keys and values if it is not told."""
    options = ["--model.rollout.engine.kind=vllm", "--model.rollout.engine.kv_cache_mb=null"]
    with pytest.raises(InputError, match=r"rollout\.engine\.kv_cache_mb: is null, .*Give a number"):
        plan_of(["--config", str(CONFIGS / "ppo_8b.yaml"), *options], "H100")
    plan, _ = plan_of(["--config", str(CONFIGS / "ppo_tiny.yaml"), *options], "cpu")
    assert (plan.engine_cache, plan.engine_stays) == (1024 * 2**20, True)


def test_settings_of_paper_size_fit_the_gpus_that_their_configs_name():
    for name in (
        "sft_8b",
        "dpo_8b",
        "reward_8b",
        "sft_70b",
        "dpo_70b",
        "sft_405b",
        "dpo_405b",
        "ppo_8b",
        "dpo_70b_qlora",
    ):
        plan = planned(name)
        assert sum(peak_parts(plan).values()) <= DEVICES["H100"].memory, name


def test_one_copy_divides_over_the_devices_and_replicas_do_not():
    whole, two = planned("dpo_8b"), planned("dpo_8b", "--trainer.num_nodes=8")
    one, other = peak_parts(whole), peak_parts(two)
    assert one["weights"] == 2 * 4 * one["gradients"] / 8  # both fp32 of the same numbers
    assert other["weights"] * two.layout.devices == one["weights"] * whole.layout.devices
    assert other["activations"] == one["activations"]


def test_the_text_has_every_part_and_names_what_would_fit(capsys):
    config = str(CONFIGS / "ppo_8b.yaml")
    status, said = told(capsys, "--config", config)
    assert status == 0
    for part in (
        "weights",
        "gradients",
        "optimizer",
        "critic",
        "reference",
        "engine weights",
        "KV cache",
        "activations",
        "loss",
    ):
        assert f"\n  {part} " in said.out
    assert "It fits" in said.out
    assert "disk: " in said.out
    status, said = told(capsys, "--config", config, "--device", "4090")
    assert status == 1
    assert "It does not fit" in said.out
    order = [said.out.index(change) for change in ("engine.kind=server", "state_bits=8", "cpu_offload")]
    assert order == sorted(order)


def test_remedies_add_up_and_stop_when_the_run_fits():
    plan = planned("dpo_8b")
    need = sum(peak_parts(plan).values())
    for share in (0.99, 0.8, 0.6):
        *before, last = remedies(plan, share * need)
        assert last[2] <= share * need
        assert all(size > share * need for _, _, size in before)
        sizes = [need, *(size for _, _, size in before), last[2]]
        assert sizes == sorted(sizes, reverse=True)
    assert list(remedies(plan, 1.0))[-1][2] > 1.0, "no setting makes nothing of it"


def test_a_cpus_memory_is_what_this_process_may_have(monkeypatch):
    """A container's limit, not the host's memory."""
    said = {"/sys/fs/cgroup/memory.max": "1000000\n", "/proc/meminfo": "MemTotal: 900000 kB\nMemAvailable: 800000 kB\n"}
    monkeypatch.setattr(machine, "_read", lambda path: said.get(path, ""))
    found = reckon(planned("sft_tiny"), "cpu")
    assert (found["available"], found["fits"]) == (1_000_000, False)


def test_processes_on_cpus_share_one_memory():
    plan = replace(planned("sft_tiny"), layout=Layout(devices=4, sharded=True))
    one = sum(peak_parts(plan).values())
    assert reckon(plan, "cpu")["total"] == 4 * one
    found = list(remedies(plan, 1.5 * one))  # what would do for one process
    assert found
    assert all(size > 1.5 * one for _, _, size in found[:-1])
    assert not any("cpu_offload" in change or "devices" in change for change, _, _ in found), "a CPU cannot"


def test_one_device_is_offered_offload_before_more_devices():
    """8B in fp32 on one H100: whatever is recomputed, weights and gradients alone are 64 GB."""
    plan = planned("sft_8b", "--trainer.devices=1", "--trainer.num_nodes=1", "--trainer.strategy=auto")
    *_, (last, _, size) = remedies(plan, DEVICES["H100"].memory)
    assert size <= DEVICES["H100"].memory
    option, value = last.split("=", 1)
    offloaded = planned("sft_8b", f"--{option}", value.strip("'"), "--trainer.devices=1", "--trainer.num_nodes=1")
    assert offloaded.layout == Layout(devices=1, sharded=True, cpu_offload=True)
    # Nothing stays there, but a layer is brought there to compute: both of the model's ends, and two layers.
    parts = peak_parts(offloaded)
    assert not {"weights", "gradients", "optimizer"} & parts.keys()
    assert parts["gathered"] > 2 * 2 * 128_256 * 4096


def test_a_setting_is_named_for_each_optimiser_that_it_helps(capsys):
    """The policy's `state_bits` does nothing for the critic's moments."""
    plan = planned("ppo_8b")
    alone = planned("ppo_8b", "--model.optimizer.state_bits=8")
    found = {change: size for change, _, size in remedies(plan, 1.0)}
    policy, critic = (found[f"model.{key}optimizer.state_bits=8"] for key in ("", "critic."))
    numbers = plan.networks["critic"].parameters / plan.layout.shards
    assert (policy - critic) / 1.03 == pytest.approx((8 - 2 * (1 + 4 / 256)) * numbers, rel=0.01)
    assert alone.networks["critic"].state_bits == 32


def test_the_critic_has_what_its_policy_has(tiny):
    """Adapters, and its own number of layers."""
    plan = planned("ppo_tiny", "--model.backbone.lora.r=8", "--model.backbone.layers=2", "--model.critic.layers=null")
    model = PackedValue(Backbone(tiny, lora=Lora(r=8)), tiny)
    assert plan.networks["critic"].trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert (plan.networks["policy"].arch.layers, plan.networks["critic"].arch.layers) == (2, 4)


@pytest.mark.parametrize(
    ("name", "options", "there"),
    [
        ("ppo_tiny", ("--model.kl=null",), True),  # the default β is the paper's 0.05
        ("ppo_tiny", ("--model.kl.coefficient=0",), False),
        ("ppo_tiny", ("--model.kl=null", "--model.backbone.lora.r=8"), False),
        ("dpo_tiny", (), False),
        ("dpo_tiny", ("--model.reference=live",), True),
        ("dpo_tiny", ("--model.reference.mode=live",), True),
        ("dpo_tiny", ("--model.reference.mode=cached",), False),
    ],
)
def test_a_reference_is_counted_where_the_run_keeps_one(name, options, there):
    assert ("reference" in planned(name, *options).networks) == there


def test_steps_are_those_of_the_run():
    """The last step of each epoch may be short: 5 rows, 2 a step, 2 epochs are 6 steps, not 5."""
    for rows, epochs in ((5, 2), (4, 3), (1, 2)):
        sizes = replace(planned("sft_tiny").sizes, rows=rows, epochs=epochs, examples_per_step=2, max_steps=None)
        assert sizes.steps == StepPlan([1] * rows, 2, 8, epochs=epochs).total_steps
    options = ("--data.epochs=3", "--data.max_steps=null", "--model.epochs=4")
    plan = planned("ppo_tiny", *options, rows=50)
    assert plan.sizes.steps == 3 * -(-50 // plan.sizes.examples_per_step)
    assert plan.sizes.passes == 4


def test_tokens_steps_and_rows(capsys):
    plan = planned("sft_tiny")
    assert plan.sizes.rows == 96
    assert plan.sizes.steps == 6
    assert plan.sizes.tokens_per_step == 16 * plan.sizes.max_tokens
    # The mixture has 939,343 rows: 128 a step, two epochs, the last step of each short.
    assert planned("sft_8b").sizes.steps == 2 * -(-939_343 // 128)
    assert planned("dpo_8b", rows=1000).sizes.steps == 8 * planned("dpo_8b").sizes.epochs
    assert known_rows([{"name": "x", "path": "rows.jsonl"}]) is None
    assert known_rows([{"name": "x", "args": {"count": 10}, "upsample": 2}, {"name": "y", "cap": 5}]) == 25
    assert known_rows([{"name": "x", "args": {"count": 10}, "cap": 50}]) == 10
    assert known_rows([{"name": "x", "args": {"count": 10}, "fraction": 0.5}]) == 5
    assert known_rows([{"name": "x", "hub": "allenai/tulu-3-sft-mixture", "cap": 10**7}]) == 939_343
    assert (
        known_rows([{"name": "x", "hub": "allenai/tulu-3-sft-mixture", "match": {"source": "a"}, "fraction": 0.5}])
        is None
    )
    _, said = told(
        capsys, "--config", str(CONFIGS / "dpo_tiny.yaml"), "--data.sources", '[{"name": "x", "path": "no.jsonl"}]'
    )
    assert "give --rows" in said.out


def test_time_follows_the_device_and_the_length():
    def seconds(device, length):
        return reckon(planned("dpo_8b"), device, length)["seconds_per_step"]

    fast, slow = seconds("H100", 512), seconds("A100", 512)
    assert slow[0] / fast[0] == pytest.approx(989 / 312)
    assert fast[1] / fast[0] == pytest.approx(0.45 / 0.30)
    assert 2 < seconds("H100", 1024)[0] / fast[0] < 2.1, "twice the tokens and some more attention"
    # 6 FLOPs for each of 8.03e9 - 0.525e9 weights (the embedding is looked up) and token, and attention's share: 128
    # pairs of 512 on 8 GPUs at 45 % of 989e12; a third more where layers are computed again.
    plan = planned("dpo_8b")
    flops = 6 * 7.505e9 * 128 * 2 * 512 * (4 / 3 if plan.recompute == "layers" else 1)
    assert fast[0] == pytest.approx(flops / (plan.layout.devices * 0.45 * 989e12), rel=0.05)


BACKBONES = {
    "whole": ({}, []),
    "bf16": (
        {"weights_dtype": "bfloat16", "compute_dtype": "bfloat16"},
        ["--model.backbone.weights_dtype=bfloat16", "--model.backbone.compute_dtype=bfloat16"],
    ),
    "lora": ({"lora": Lora(r=8)}, ["--model.backbone.lora.r=8"]),
    "some layers": (
        {"lora": Lora(r=8, targets=["q_proj", "down_proj"])},
        ["--model.backbone.lora.r=8", '--model.backbone.lora.targets=["q_proj","down_proj"]'],
    ),
}


@pytest.mark.parametrize("case", BACKBONES)
def test_disk_is_what_the_run_itself_reserves(tiny, case):
    """Against the callback that refuses to start on a full disk, which reads the model's files."""
    settings, options = BACKBONES[case]
    stage = SFT(Backbone("tiny-random-llama", **settings), AdamW(lr=1e-3))
    stage.folder = tiny
    space, reckoned = space_of(stage), disk(planned("sft_tiny", *options))
    assert reckoned["checkpoint"] == space.checkpoint
    assert reckoned["export"] == space.export


@pytest.mark.parametrize(("every", "copies"), [(1, 0), (3, 1)])
def test_a_checkpoint_has_the_engines_weights_where_they_may_be_older(every, copies):
    """As `space_of` reserves it; `tests/stages/test_saving.py` holds that against files."""
    own = "tulu_lightning.callbacks."
    refresh = {"class_path": own + "refresh.RolloutRefresh", "init_args": {"every_n_steps": every}}
    callbacks = [{"class_path": own + "records.Records"}, refresh]
    plan = planned("ppo_tiny", "--trainer.callbacks", json.dumps(callbacks))
    engine = 4 * plan.networks["policy"].parameters
    assert disk(plan)["checkpoint"] == disk(replace(plan, engine_saved=False))["checkpoint"] + copies * engine


MESH = '{"class_path": "tulu_lightning.models.sharding.Fsdp2", "init_args": {"tensor_parallel": 3}}'


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--device", "H10"], "--device: is 'H10'. Did you mean 'H100'"),
        (["--rows", "0"], "--rows: is 0"),
        (["--tokens_per_row", "-3"], "--tokens_per_row: is -3"),
        (["--model.backbone.path", "nobody/no-model"], "its shapes are not known"),
        (["--model.optimizer.lrr", "3"], "lrr"),
        ([f"--trainer.strategy={MESH}"], "tensor_parallel 3 and replicas 1, and 32 ranks are not a multiple of 3"),
    ],
)
def test_bad_input(options, said, capsys):
    status, heard = told(capsys, "--config", str(CONFIGS / "sft_8b.yaml"), *options)
    assert status == 2
    assert said in heard.err


def test_a_folder_without_shapes(tmp_path, capsys):
    Path("model").mkdir()
    Path("model", "config.json").write_text('{"hidden_size": 4, "num_attention_heads": 2}')
    status, heard = told(capsys, "--config", str(CONFIGS / "sft_8b.yaml"), "--model.backbone.path", "model")
    assert status == 2
    assert "config.json: has no 'intermediate_size'" in heard.err


def test_a_mixture_of_experts_is_not_planned_as_one_expert(capsys):
    """Mixtral 8x7B has 46.7B parameters; its config.json reads like a dense model's of 7.2B."""
    shapes = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    more = {"num_key_value_heads": 8, "vocab_size": 32000, "num_local_experts": 8}
    Path("model").mkdir()
    Path("model", "config.json").write_text(json.dumps({**shapes, **more}))
    status, heard = told(capsys, "--config", str(CONFIGS / "sft_8b.yaml"), "--model.backbone.path", "model")
    assert status == 2
    assert "config.json: has num_local_experts 8: a mixture of experts" in heard.err
    assert find_architecture("model", experts=True).kv == 1024  # keys and values are told all the same
    Path("model", "config.json").write_text(json.dumps({**shapes, **more, "num_local_experts": 1}))
    assert find_architecture("model").parameters == 7_241_732_096


# Against what is allocated --------------------------------------------------------------------------------------------

SMOL = ["--data.micro_tokens=512", "--data.max_tokens=256"]
START = "--model.backbone.path=smollm2-135m-instruct"
CRITIC = "--model.critic.warmup_steps=0"
PAIRS = '--data.sources=[{"name": "sums", "rows": "tulu_lightning.assets.arithmetic.pair_rows", "args": {"count": 96}}]'
MEASURED = {
    "sft_tiny": [],
    "ppo_tiny": [],
    "dpo_tiny": [],
    "reward_tiny": [],
    "grpo_tiny": [],
    "sft_tiny bf16": ["--model.backbone.compute_dtype=bfloat16"],
    "sft_tiny checkpointing": ["--model.backbone.activation_checkpointing=true"],
    "sft_tiny lora": ["--model.backbone.lora.r=8"],
    "sft_tiny 8 bits": ["--model.optimizer.state_bits=8"],
    "sft_tiny qlora": ["--model.backbone.lora.r=8", "--model.backbone.quantize.blocksize=64"],
    "sft_smol": [*SMOL, "--data.examples_per_step=64"],
    "dpo_smol": [*SMOL, START, PAIRS, "--data.examples_per_step=48"],
    "ppo_smol": [START, CRITIC, "--model.micro_tokens=512", "--data.max_tokens=128", "--data.examples_per_step=8"],
}
QUICK = ("sft_tiny", "ppo_tiny")


@pytest.mark.parametrize("case", [pytest.param(c, marks=[] if c in QUICK else pytest.mark.slow) for c in MEASURED])
def test_predicted_memory_is_what_pytorch_allocates(case, request):
    if "smol" in case:
        request.getfixturevalue("smol")
    name = case.split()[0]
    options = [
        option.replace("--model.", "--model.init_args.").replace("--data.", "--data.init_args.")
        for option in MEASURED[case]
    ]
    command = [
        sys.executable,
        str(ROOT / "benchmarks/memory.py"),
        str(CONFIGS / f"{name}.yaml"),
        "--data.init_args.max_steps=2",
    ]
    ran = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    found = json.loads(ran.stdout.splitlines()[-1])
    assert found["tokens"] > 100
    assert found["predicted"] == pytest.approx(found["measured"], rel=WITHIN), found


def test_a_smaller_pass_takes_less():
    plan = planned("sft_tiny")
    half = replace(plan, sizes=replace(plan.sizes, micro_tokens=plan.sizes.micro_tokens // 2))
    assert peak_parts(half)["activations"] == pytest.approx(peak_parts(plan)["activations"] / 2)
    assert peak_parts(half)["weights"] == peak_parts(plan)["weights"]


@pytest.mark.parametrize(
    ("kind", "said", "tied"),
    [("gemma", {}, True), ("llama", {}, False), ("gemma", {"tie_word_embeddings": False}, False), ("new", {}, False)],
)
def test_a_config_that_does_not_say_whether_its_head_is_tied_means_its_kinds_default(tmp_path, kind, said, tied):
    shapes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = {"model_type": kind, "vocab_size": 100, **shapes, **said}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert find_architecture(str(tmp_path)).tied == tied
