"""Whatever is wrong with what the user gives is said in one line, with status 2, before any weights load."""

import errno
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tulu_lightning import cli
from tulu_lightning.callbacks import records
from tulu_lightning.checkpoints import shards
from tulu_lightning.models.backbone import PackedLM

CONFIGS = Path(__file__).parents[1] / "configs"
ANSWER = {"role": "assistant", "content": "59"}
QUESTION = {"role": "user", "content": "What is 31 + 28?"}


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """`refused(argv)` runs the command in an empty folder and returns its one line; loading weights is a failure."""
    monkeypatch.chdir(tmp_path)

    def loaded(*args, **kwargs):
        pytest.fail("weights were loaded before the input was checked")

    monkeypatch.setattr(PackedLM, "__init__", loaded)

    def run(*argv: str) -> str:
        assert cli.main(argv) == 2
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tulu: error: ")]
        assert len(said) == 1, said
        return said[0].removeprefix("tulu: error: ")

    return run


def leaf(tmp_path, stage, **settings):
    """A config of the user's own that includes a shipped one."""
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"include": [str(CONFIGS / f"{stage}_tiny.yaml")], **settings}, sort_keys=False))
    return "fit", "--config", str(path)


def rows(tmp_path, stage, lines, **settings):
    """The shipped tiny stage on a file with these lines."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    data = {"init_args": {"sources": [{"name": "mine", "path": str(path)}], **settings}}
    return leaf(tmp_path, stage, data=data)


def good(count):
    return [{"messages": [QUESTION, ANSWER]} for _ in range(count)]


# Configs ------------------------------------------------------------------------------------------------------------


def test_an_unknown_key(refused, tmp_path):
    said = refused(*leaf(tmp_path, "sft", trainor={"max_epochs": 2}))
    assert said == "mine.yaml, line 3: no such option: 'trainor'. Did you mean 'trainer'?"


def test_a_misspelt_nested_key_offers_the_nearest(refused, tmp_path):
    said = refused(*leaf(tmp_path, "sft", model={"init_args": {"optimizer": {"warmup_ration": 0.1}}}))
    assert said.startswith("mine.yaml, line 6: no such option: ")
    assert "model.init_args.optimizer.warmup_ration" in said
    assert said.endswith("Did you mean 'model.init_args.optimizer.warmup_ratio'?")


def test_a_value_that_cannot_be(refused, tmp_path):
    said = refused(*leaf(tmp_path, "sft", model={"init_args": {"optimizer": {"lr": -1.0}}}))
    assert said == "optimizer.lr: is -1.0. It must be above 0."


@pytest.mark.parametrize(
    ("stage", "settings", "said"),
    [
        ("dpo", {"loss": {"init_args": {"beta": 0.0}}}, "loss.beta: is 0.0. It must be above 0."),
        ("sft", {"optimizer": {"beta1": 1.5}}, "optimizer.beta1: is 1.5. It is a share: 0 to below 1."),
        ("ppo", {"rollout": {"temperature": 0.0}}, "rollout.temperature: is 0.0. It must be above 0: greedy"),
        ("ppo", {"epochs": 0}, "model.epochs: is 0. Use at least 1."),
        ("ppo", {"mini_batches": 0}, "model.mini_batches: is 0. Use at least 1."),
        ("ppo", {"value_loss": {"clip": 0.0}}, "value_loss.clip: is 0.0. It must be above 0."),
        ("ppo", {"critic": {"warmup_steps": -1}}, "critic.warmup_steps: is -1. Use 0 or more."),
    ],
)
def test_a_setting_out_of_its_range(stage, settings, said, refused, tmp_path):
    assert refused(*leaf(tmp_path, stage, model={"init_args": settings})).startswith(said)


def test_a_models_own_template_that_does_not_say_what_is_trained(refused, tmp_path, tiny):
    folder = shutil.copytree(tiny, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% for message in messages %}{{ message.content + eos_token }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    settings = {"template": "model", "tokenizer": str(folder)}
    said = refused(*rows(tmp_path, "sft", good(8), **settings))
    assert said.startswith("template 'model': the tokenizer's chat template has no {% generation %} spans")
    assert "use one of our templates (tulu, llama3, chatml, smollm2)" in said


def test_a_weight_below_zero_is_named_with_its_row(refused, tmp_path):
    row = {"messages": [QUESTION, {**ANSWER, "weight": -1}]}
    said = refused(*rows(tmp_path, "sft", [*good(8), row]))
    assert "rows.jsonl, row 9: weight of messages[1] is -1. Use a number from 0" in said


@pytest.mark.parametrize(
    ("key", "value", "instead"),
    [
        ("gradient_clip_val", 1.0, "model.init_args.optimizer.max_grad_norm"),
        ("accumulate_grad_batches", 2, "data.micro_tokens"),
        ("precision", "bf16-true", "model.init_args.backbone.compute_dtype"),
    ],
)
def test_a_trainer_setting_that_the_stage_has_its_own_for(key, value, instead, refused, tmp_path):
    said = refused(*leaf(tmp_path, "sft", trainer={key: value}))
    assert said.startswith(f"trainer.{key}: is {value}")
    assert instead in said


def sharded(**settings):
    strategy = {"class_path": "tulu_lightning.models.sharding.Fsdp2", "init_args": settings}
    return {"strategy": strategy, "devices": 1, "accelerator": "cpu"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"tensor_parallel": 2},
            "trainer.strategy: has tensor_parallel 2 and replicas 1, and 1 ranks are not a multiple",
        ),
        (
            {"replicas": 3},
            "trainer.strategy: has tensor_parallel 1 and replicas 3, and 1 ranks are not a multiple of 3",
        ),
        ({"replicas": 0}, "trainer.strategy.init_args.replicas: is 0. Use at least 1."),
        ({"timeout_minutes": 0}, "trainer.strategy.init_args.timeout_minutes: is 0.0"),
        ({"cpu_offload": True}, "trainer.strategy.init_args.cpu_offload: is true, and the accelerator is the CPU"),
    ],
)
def test_a_mesh_that_the_ranks_do_not_make(settings, message, refused, tmp_path):
    assert refused(*leaf(tmp_path, "sft", trainer=sharded(**settings))).startswith(message)


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed", "64-true", "transformer-engine"])
def test_a_precision_beside_that_of_the_shards(precision, refused, tmp_path):
    said = refused(*leaf(tmp_path, "sft", trainer={**sharded(), "precision": precision}))
    assert said.startswith("trainer")
    assert "precision" in said or "transformer_engine" in said


def test_offload_by_a_strategy_that_has_none(refused, tmp_path):
    strategy = {"class_path": "lightning.pytorch.strategies.SingleDeviceStrategy", "init_args": {"cpu_offload": True}}
    assert "cpu_offload" in refused(*leaf(tmp_path, "sft", trainer={"strategy": strategy}))
    said = refused(*leaf(tmp_path, "sft", trainer={"strategy": "fsdp_cpu_offload", "accelerator": "cpu"}))
    assert said.startswith("trainer.strategy: is fsdp_cpu_offload")
    assert "Use fsdp2" in said


# Models -------------------------------------------------------------------------------------------------------------


def test_a_stage_without_its_start_checkpoint(refused):
    said = refused("fit", "--config", str(CONFIGS / "dpo_smol.yaml"))
    assert said == (
        "runs/sft_smol/promoted: there is no such model folder. Run the stage that leaves it first "
        "(`tulu fit --config configs/sft_smol.yaml` fills runs/sft_smol), or give another start checkpoint "
        "(--model.init_args.backbone.path)."
    )


@pytest.mark.parametrize(
    ("removed", "missing"),
    [(["model.safetensors"], "weights (*.safetensors)"), (["tokenizer.json", "tokenizer_config.json"], "tokenizer")],
)
def test_a_model_folder_that_lacks_something(removed, missing, refused, tmp_path, tiny):
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    for name in removed:
        (folder / name).unlink()
    said = refused(*leaf(tmp_path, "sft", model={"init_args": {"backbone": {"path": str(folder)}}}))
    assert said.startswith(f"{folder}: the model folder has no {missing}")
    assert said.endswith("Save the model there with save_pretrained(), as safetensors, together with its tokenizer.")


def test_a_critic_with_another_tokenizer(refused, tmp_path, tiny):
    folder = shutil.copytree(tiny, tmp_path / "critic")
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.add_tokens(["<|more|>"])
    tokenizer.save_pretrained(folder)
    said = refused(*leaf(tmp_path, "ppo", model={"init_args": {"critic": {"path": str(folder)}}}))
    assert said.startswith(f"critic.path: {folder} has another tokenizer than the policy {tiny}.")


# Rows ---------------------------------------------------------------------------------------------------------------


def test_a_missing_file(refused, tmp_path):
    data = {"init_args": {"sources": [{"name": "mine", "path": "nowhere.jsonl"}]}}
    said = refused(*leaf(tmp_path, "sft", data=data))
    assert said == "nowhere.jsonl: there is no such file. Correct the source's path."


def test_an_empty_file(refused, tmp_path):
    said = refused(*rows(tmp_path, "sft", []))
    assert said == f"{tmp_path}/rows.jsonl: it is empty. Give at least one row, or leave the source out."


def test_row_17_is_not_json(refused, tmp_path):
    said = refused(*rows(tmp_path, "sft", [*good(16), '{"messages": [', *good(3)]))
    assert said.startswith(f"{tmp_path}/rows.jsonl, row 17: the line is not JSON (")
    assert said.endswith("Write one JSON object a line.")


def test_a_row_without_messages(refused, tmp_path):
    said = refused(*rows(tmp_path, "sft", [*good(2), {"text": "hello"}]))
    assert said == (f"{tmp_path}/rows.jsonl, row 3: the row has no field 'messages' (it has text). Add 'messages'.")


def test_a_role_that_does_not_exist(refused, tmp_path):
    said = refused(*rows(tmp_path, "sft", [{"messages": [QUESTION, {"role": "asistant", "content": "59"}]}]))
    assert said == (
        f"{tmp_path}/rows.jsonl, row 1: messages[1] has the role 'asistant', which does not exist. "
        "Did you mean 'assistant'?"
    )


def test_a_row_longer_than_the_limit(refused, tmp_path):
    long = {"messages": [QUESTION, {"role": "assistant", "content": "9" * 300}]}
    said = refused(*rows(tmp_path, "sft", [*good(1), long], on_overflow="error"))
    # One token a byte: 9 + 16 + 1 of the question with its header, 14 of the reply's header, 300 + 1 of the reply.
    assert said == (
        f"{tmp_path}/rows.jsonl, row 2: the row has 341 tokens, and max_tokens is 256. "
        "Raise max_tokens, shorten the row, or set on_overflow to drop."
    )


def test_rows_with_more_tokens_than_the_model_has_positions(refused, tmp_path, tiny):
    folder = shutil.copytree(tiny, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 40}))
    model = {"init_args": {"backbone": {"path": str(folder)}}}
    for stage in ("sft", "dpo", "ppo"):
        said = refused(*leaf(tmp_path, stage, model=model))
        assert said.startswith("data: the longest row has ")
        assert f"the model {folder} has 40 positions" in said


def test_token_ids_beyond_the_vocabulary(refused, tmp_path, tiny):
    pair = {"prompt_ids": [7, 8], "chosen_ids": [9, 264], "rejected_ids": [10]}
    said = refused(*rows(tmp_path, "dpo", [pair]))
    assert said.startswith(f"data: a row has the token id 264, and the model {tiny} knows 0 to 263.")


def test_a_target_that_is_not_a_number(refused, tmp_path):
    row = {"messages": [QUESTION], "ground_truth": "fifty-nine", "verifier": "last_number"}
    said = refused(*rows(tmp_path, "ppo", [row]))
    assert said.startswith(f"{tmp_path}/rows.jsonl, row 1: verifier 'last_number' cannot use ground_truth: ")
    assert "fifty-nine" in said
    assert said.endswith("Correct the target.")


# The disk -----------------------------------------------------------------------------------------------------------


def test_a_run_folder_that_cannot_be_written(refused, tmp_path):
    (tmp_path / "file").touch()
    said = refused(*leaf(tmp_path, "sft", trainer={"default_root_dir": str(tmp_path / "file" / "run")}))
    assert said == (
        f"{tmp_path}/file/run: the run folder cannot be written (Not a directory). "
        "Set trainer.default_root_dir to a folder you can write to."
    )


class SafetensorError(Exception):
    """As safetensors raises it: no errno, only words."""


def full_disk(where, monkeypatch):
    """From the fifth step on (of 6), or at the export, nothing more can be written there."""
    no_space = OSError(errno.ENOSPC, "No space left on device")
    if where == "metrics":
        append = records._append

        def write(path, lines):
            if lines and lines[0]["step"] == 5:
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
            append(path, lines)

        monkeypatch.setattr(records, "_append", write)
    elif where == "checkpoint":
        save = torch.save

        def write(state, *args, **kwargs):
            if state["tulu_stage"]["step"] == 5:
                raise no_space
            save(state, *args, **kwargs)

        monkeypatch.setattr(torch, "save", write)
    else:

        def write(*args, **kwargs):
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

        monkeypatch.setattr(shards, "save_file", write)


@pytest.mark.parametrize("where", ["metrics", "checkpoint", "export"])
def test_a_full_disk_in_the_middle_of_a_stage_keeps_what_was_finished(where, tmp_path, monkeypatch, capsys):
    def argv(run):
        own = "tulu_lightning.callbacks."
        callbacks = [
            {"class_path": own + "records.Records"},
            {"class_path": own + "checkpoints.Checkpoints", "init_args": {"every_n_steps": 1, "keep": 1}},
            {"class_path": own + "promote.Promote"},
        ]
        return leaf(tmp_path, "sft", trainer={"default_root_dir": str(run), "callbacks": callbacks})

    def steps(run):
        return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]

    straight, run = tmp_path / "straight", tmp_path / "run"
    assert cli.main(argv(straight)) == 0
    capsys.readouterr()
    with monkeypatch.context() as patch:
        full_disk(where, patch)
        assert cli.main(argv(run)) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "No space left on device" in said
    assert said.endswith(
        "Free some space, or choose another folder (trainer.default_root_dir), and run the same command again; "
        "what was finished is kept."
    )
    finished = {"metrics": 4, "checkpoint": 4, "export": 6}[where]
    whole = [p.name for p in (run / "checkpoints").glob("step-*.ckpt")]
    assert whole == [f"step-{finished:06d}.ckpt"]
    assert torch.load(run / "checkpoints" / whole[0], weights_only=False)["tulu_stage"]["step"] == finished
    assert steps(run)[:finished] == list(range(1, finished + 1))
    assert not (run / "promoted").exists()
    assert not (run / "summary.json").exists()

    assert cli.main(argv(run)) == 0, "with space again the same command goes on"
    assert f"(step {finished})" in capsys.readouterr().out
    assert steps(run) == [1, 2, 3, 4, 5, 6]
    one, other = (load_file(folder / "promoted" / "model.safetensors") for folder in (straight, run))
    assert all(torch.equal(one[name], other[name]) for name in one)
    AutoModelForCausalLM.from_pretrained(run / "promoted")
