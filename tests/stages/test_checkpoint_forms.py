"""A checkpoint goes on as any form of itself: a file, a folder of 2 or 4 ranks; same examples, same weights, same numbers."""

import json
import re
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file
from test_resume import assert_same
from test_sharding import CONFIGS, lines, two_processes

from tulu_lightning import cli
from tulu_lightning.assets.models import resolve_model
from tulu_lightning.errors import InputError
from tulu_lightning.models.saved import Header, header_of, regroups_moments
from tulu_lightning.models.single_file import read_folder

OWN = "tulu_lightning.callbacks."
STEPS, STOP = 6, 3


def config(folder, stage, *callbacks, data=None, **model):
    """The shipped tiny run of a stage in 6 steps, each saved; a large eps, so that rounding decides no update's sign."""
    folder.mkdir(parents=True, exist_ok=True)
    refresh = [{"class_path": OWN + "refresh.RolloutRefresh"}] if stage == "ppo" else []
    optimizer = {"lr": 1e-2, "eps": 1e-2}
    settings = {
        "include": [str(CONFIGS / f"{stage}_tiny.yaml")],
        "model": {"init_args": {"optimizer": optimizer, **model}},
        "data": {"init_args": {"examples_per_step": 8, "max_steps": STEPS, **(data or {})}},
        "trainer": {
            "default_root_dir": str(folder / "run"),
            "logger": False,
            "callbacks": [
                {"class_path": OWN + "records.Records"},
                *refresh,
                {"class_path": "stage_faults.KeepRows"} if stage != "ppo" else None,
                *callbacks,
                {"class_path": OWN + "checkpoints.Checkpoints", "init_args": {"every_n_steps": STOP, "keep": 2}},
                {"class_path": OWN + "promote.Promote"},
            ],
        },
    }
    settings["trainer"]["callbacks"] = [c for c in settings["trainer"]["callbacks"] if c]
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return ["fit", "--config", str(path)]


PREEMPT = {"class_path": "stage_faults.Interrupt", "init_args": {"step": STOP, "number": 15}}
STAGES = {
    "sft": {},
    "dpo": {},
    "reward": {},
    "ppo": {
        "critic": {"warmup_steps": 4, "optimizer": {"lr": 1e-2, "eps": 1e-2}},
        "rollout": {"staleness": 1, "samples_per_prompt": 4, "max_new_tokens": 6},
        "overlong": {"kind": "none"},
    },
}
EVEN = {"sources": [{"name": "even", "rows": "stage_runs.even_rows", "args": {"count": 40}}]}


def start(argv, ranks):
    """The command on so many processes: (status, what it said)."""
    done = two_processes(argv, ranks, sharded=ranks > 1)
    return done.returncode, done.stdout + done.stderr


def resumed(root, stage, first, then):
    """A run that is stopped on some ranks and goes on on others."""
    folder = root / f"{stage} {first} {then}"
    more = {"data": EVEN if stage == "ppo" else None, **STAGES[stage]}
    status, said = start(config(folder, stage, PREEMPT, **more), first)
    assert (folder / "run" / "checkpoints" / f"step-{STOP:06d}.ckpt").exists(), said
    assert status == (75 if first == 1 else 1), said  # torchrun gives its own
    status, said = start(config(folder, stage, **more), then)
    assert status == 0, said
    assert f"step-{STOP:06d}.ckpt (step {STOP})" in said
    return folder / "run"


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Undisturbed runs on one process, by stage."""
    root, found = tmp_path_factory.mktemp("straight"), {}

    def run(stage):
        if stage not in found:
            more = {"data": EVEN if stage == "ppo" else None, **STAGES[stage]}
            assert cli.main(config(root / stage, stage, **more)) == 0
            found[stage] = root / stage / "run"
        return found[stage]

    return run


def check(run, straight, stage, exact=False):
    one, other = (load_file(folder / "promoted" / "model.safetensors") for folder in (straight, run))
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        if exact:
            assert torch.equal(tensor, other[name]), name
        torch.testing.assert_close(other[name], tensor, rtol=1e-4, atol=1e-5)
    assert [row["step"] for row in lines(run)] == list(range(1, STEPS + 1))
    for row, undisturbed in zip(lines(run), lines(straight), strict=True):
        for key in ("loss", "grad_norm", "tokens", "lr"):
            assert row[key] == pytest.approx(undisturbed[key], rel=1e-3, abs=1e-5), (row["step"], key)
    if stage != "ppo":
        rows = {}
        for path in run.glob("rows-*.jsonl"):
            for line in path.read_text().splitlines():
                record = json.loads(line)
                rows.setdefault(record["step"], set()).update(record["mine"])
        alone = {r["step"]: set(r["mine"]) for r in lines(straight, "rows-0.jsonl")}
        assert rows == alone, "the same examples in the same steps"


@pytest.mark.slow
def test_a_file_goes_on_on_two_ranks_and_their_folder_on_one(tmp_path, straight):
    check(resumed(tmp_path, "sft", 1, 2), straight("sft"), "sft")
    run = resumed(tmp_path, "sft", 2, 1)
    check(run, straight("sft"), "sft")
    check_spoilt(run / "checkpoints" / f"step-{STOP:06d}.ckpt", tmp_path / "spoilt")


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [(1, 1), (1, 2), (2, 1), (2, 2), (2, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("stage", STAGES)
def test_any_number_of_ranks_goes_on_from_any_other(tmp_path, straight, stage, first, then):
    check(resumed(tmp_path, stage, first, then), straight(stage), stage, exact=first == then == 1)


# A folder that is not what was written, and kills and full disks within the save of one ----------------------------


def _cut(file):
    file.write_bytes(file.read_bytes()[:-1])


def _flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


SPOILT = {
    "missing": (
        "__1_0.distcp",
        lambda f: f.unlink(),
        r"__1_0\.distcp: is missing: the checkpoint is not whole\. Remove",
    ),
    "cut": ("__0_0.distcp", _cut, r"__0_0\.distcp: has \d+ bytes, and was written with \d+\. Remove"),
    "flipped": ("__1_0.distcp", _flip, r"__1_0\.distcp: is damaged: its content is not what was written\. Remove"),
    "half": (".metadata", lambda f: f.unlink(), r"is no checkpoint, or half of one: it has no \.metadata\. Remove"),
    "header": ("tulu.json", _cut, r"tulu\.json: is damaged \(.*\)\. Remove"),
}


def check_spoilt(checkpoint, tmp_path):
    assert header_of(checkpoint).ranks == 2
    for name, (file, spoil, said) in SPOILT.items():
        copy = tmp_path / name / checkpoint.name
        shutil.copytree(checkpoint, copy)
        spoil(copy / file)
        with pytest.raises(InputError, match=said):
            header_of(copy)


def faulty(folder, fault, **saving):
    """SFT on two ranks that something happens to while it saves."""
    argv = config(folder, "sft", fault)
    path = folder / "config.yaml"
    settings = yaml.safe_load(path.read_text())
    settings["trainer"]["callbacks"][-2]["init_args"] |= {"every_n_steps": 1, **saving}
    path.write_text(yaml.safe_dump(settings))
    return argv


@pytest.mark.slow
@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize(("rank", "file"), [(0, 1), (1, 1), (0, 3)])
def test_killed_within_the_save_of_a_folder_and_run_again(tmp_path, straight, rank, file, background):
    fault = {"class_path": "stage_faults.DieWhileSaving", "init_args": {"step": 4, "rank": rank, "file": file}}
    status, said = start(faulty(tmp_path, fault, background=background), 2)
    assert status != 0
    left = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir() if not path.name.startswith("."))
    assert left == ["step-000002.ckpt", "step-000003.ckpt"], said
    status, said = start(faulty(tmp_path, {"class_path": "stage_faults.KeepRows"}, background=background), 2)
    assert status == 0, said
    assert "(step 3)" in said
    check_weights(tmp_path / "run", straight("sft"))
    names = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert names == ["step-000005.ckpt", "step-000006.ckpt"], "and nothing half is left"


@pytest.mark.slow
@pytest.mark.parametrize("background", [False, True])
def test_a_disk_too_small_for_one_ranks_part_leaves_the_last_good_folder(tmp_path, background):
    fault = {"class_path": "stage_faults.SmallDisk", "init_args": {"step": 4, "limit": 50_000}}
    status, said = start(faulty(tmp_path, fault, background=background), 2)
    assert status != 0
    assert re.search(r"tulu: error: \S+/\.step-000004\.ckpt\.tmp: File too large\. Raise the limit", said), said
    left = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert left == ["step-000002.ckpt", "step-000003.ckpt"]


@pytest.mark.slow
def test_a_folder_that_is_written_beside_training_holds_what_was_there(tmp_path):
    """Every save of the second run is held up until a later step has changed all weights."""
    late = {"class_path": "stage_faults.LateWrite"}
    for name, fault, background in (("plain", {"class_path": "stage_faults.KeepRows"}, False), ("late", late, True)):
        status, said = start(faulty(tmp_path / name, fault, background=background, keep=9), 2)
        assert status == 0, said
    for step in range(1, STEPS + 1):
        one, other = (
            read_folder(tmp_path / name / f"run/checkpoints/step-{step:06d}.ckpt") for name in ("plain", "late")
        )
        assert_same(one["state_dict"], other["state_dict"])
        assert_same(one["optimizer_states"], other["optimizer_states"])
    assert "began after step" in said


def check_weights(run, straight):
    one, other = (load_file(folder / "promoted" / "model.safetensors") for folder in (straight, run))
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-4, atol=1e-5)


ADAPTERS = {
    "lora": {"backbone": {"lora": {"r": 4}}},
    "qlora": {"backbone": {"lora": {"r": 4}, "quantize": {}}},
    "8 bits": {"optimizer": {"lr": 1e-2, "state_bits": 8}},
}


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [(1, 2), (2, 1), (2, 4)])
@pytest.mark.parametrize("name", ["lora", "qlora"])
def test_adapters_and_a_4_bit_base_go_on_on_other_ranks(tmp_path, name, first, then):
    assert start(config(tmp_path / "straight", "sft", **ADAPTERS[name]), 1)[0] == 0
    status, said = start(config(tmp_path / "run", "sft", PREEMPT, **ADAPTERS[name]), first)
    status, said = start(config(tmp_path / "run", "sft", **ADAPTERS[name]), then)
    assert status == 0, said
    assert f"(step {STOP})" in said
    check_weights(tmp_path / "run/run", tmp_path / "straight/run")


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [(1, 1), (2, 2), (1, 2), (2, 1), (2, 4), (4, 2)])
def test_8_bit_moments_go_on_on_other_ranks(tmp_path, first, then):
    """Bit for bit on as many; on others the moments are rounded once more, and nothing is lost of them."""
    goes_on_with_8_bits(tmp_path, first, then)


def goes_on_with_8_bits(folder, first, then):
    more = ADAPTERS["8 bits"]
    assert start(config(folder / "straight", "sft", **more), first)[0] == 0
    start(config(folder / "run", "sft", PREEMPT, **more), first)
    status, said = start(config(folder / "run", "sft", **more), then)
    assert status == 0, said
    assert f"(step {STOP})" in said
    straight, run, start_of = (
        load_file(at / "model.safetensors")
        for at in (folder / "straight/run/promoted", folder / "run/run/promoted", resolve_model("tiny-random-llama"))
    )
    for name, tensor in straight.items():
        if first == then:
            assert torch.equal(run[name], tensor), name
        moved = (tensor - start_of[name]).norm()
        assert (run[name] - tensor).norm() <= 0.02 * moved, name


MOMENTS = {"optimizer.state_bits": 8}


@pytest.mark.parametrize(
    ("saved", "now", "anew"),
    [
        ([1, 4, 1], [1, 4, 1], False),
        ([1, 4, 1], [2, 2, 1], True),
        ([2, 1, 2], [1, 4, 1], True),
        (None, [1, 2, 2], False),  # of an older version, which did not say
    ],
)
def test_8_bit_moments_are_cut_anew_for_other_ranks_and_other_meshes_of_as_many(tmp_path, saved, now, anew):
    """torchao divides them between blocks of rows alone."""
    header = Header(1, "SFT", 3, 4, {}, MOMENTS, mesh=saved)
    assert regroups_moments(tmp_path, header, 4, now) == anew
    assert regroups_moments(tmp_path, header, 2, now)
    assert not regroups_moments(tmp_path / "a file", header, 2, now)
    assert not regroups_moments(tmp_path, header._replace(identity={"optimizer.state_bits": 32}), 2, now)
