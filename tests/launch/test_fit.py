import json
import logging
import signal
from pathlib import Path

import launch_toys
import pytest
import yaml

from tulu_lightning import cli as command
from tulu_lightning.errors import InputError
from tulu_lightning.launch.fit import fit, main
from tulu_lightning.launch.quiet import without_noise


def test_fit_trains_and_returns_what_it_trained(toy):
    cli = fit(toy, ["--trainer.max_steps=3"])
    assert cli.trainer.global_step == 3
    assert cli.model.backbone == launch_toys.Backbone("m")
    assert cli.datamodule.sources == [launch_toys.Source("a.jsonl")]
    assert cli.run_folder == Path("runs/toy")


def test_an_include_is_merged_and_options_win(toy, write):
    leaf = write(
        "configs/leaf.yaml", "include: [../toy.yaml]\nmodel:\n  init_args:\n    optimizer: {beta1: 0.5, lr: 1e-5}\n"
    )
    cli = fit(leaf, ["--model.init_args.backbone.compute_dtype", "bfloat16", "--trainer.max_steps", "1"])
    assert cli.model.optimizer == launch_toys.AdamW(lr=1e-5, beta1=0.5)
    assert cli.model.backbone == launch_toys.Backbone("m", "bfloat16")


def test_the_printed_config_stands_alone_and_runs_the_same(toy, write, capsys):
    leaf = write("configs/leaf.yaml", "include: [../toy.yaml]\ntrainer: {max_steps: 1}\n")
    assert main(["fit", "--config", leaf, "--print_config"]) == 0
    printed = capsys.readouterr().out
    assert "include" not in yaml.safe_load(printed)
    again = write("elsewhere/printed.yaml", printed)
    Path(leaf).unlink()
    assert main(["fit", "--config", again, "--print_config"]) == 0
    assert capsys.readouterr().out == printed
    assert fit(again).trainer.global_step == 1


def test_the_run_folder_holds_a_config_that_runs_again(toy):
    first = fit(toy)
    saved = Path("runs/toy/config.yaml")
    config = yaml.safe_load(saved.read_text())
    assert config["trainer"]["max_steps"] == 2
    assert config["seed_everything"] == 1
    assert "include" not in config
    second = fit(saved, ["--trainer.default_root_dir=runs/again"])
    assert [p.tolist() for p in second.model.parameters()] == [p.tolist() for p in first.model.parameters()]
    assert sorted(p.name for p in Path("runs/toy").iterdir()) == ["config.yaml", "config_origin.json", "tensorboard"]
    origin = json.loads(Path("runs/again/config_origin.json").read_text())
    assert origin["files"] == [str(saved)]
    assert origin["files_say"] == config
    assert origin["command_line"] == {"trainer": {"default_root_dir": "runs/again"}}


def test_another_command_leaves_the_fits_config_alone(toy):
    fit(toy, ["--trainer.max_steps=1"])
    before = Path("runs/toy/config.yaml").read_text()
    assert main(["test", "--config", toy]) == 0
    assert Path("runs/toy/config.yaml").read_text() == before
    assert Path("runs/toy/config-test.yaml").is_file()


def test_curves_of_two_starts_lie_in_one_folder(toy):
    folders = [fit(toy).trainer.log_dir for _ in range(2)]
    assert [Path(str(f)).resolve() for f in folders] == [Path("runs/toy/tensorboard").resolve()] * 2
    assert len(list(Path("runs/toy/tensorboard").glob("events.*"))) == 2


def test_a_logger_of_the_users_own_is_kept(toy):
    cli = fit(toy, ["--trainer.logger=false"])
    assert cli.trainer.logger is None


def test_without_a_run_folder_the_config_names_it(toy):
    cli = fit(toy, ["--trainer.default_root_dir=null"])
    assert cli.run_folder == Path("runs/toy")
    assert yaml.safe_load(Path("runs/toy/config.yaml").read_text())["trainer"]["default_root_dir"] == "runs/toy"


def test_a_run_folder_that_cannot_be_written_stops_before_the_model(toy, write):
    write("file", "")
    built = launch_toys.ToyStage.built
    with pytest.raises(InputError, match=r"^file/run: the run folder cannot be written \(Not a directory\)\."):
        fit(toy, ["--trainer.default_root_dir=file/run"])
    assert launch_toys.ToyStage.built == built


def test_auto_starts_fresh_then_goes_on_at_the_newest_checkpoint(toy, capsys):
    first = fit(toy, ["--ckpt_path=auto"])
    assert "fit: starting fresh, run folder runs/toy\n" in capsys.readouterr().out
    assert first.model.batches == [0, 1]
    folder = Path("runs/toy/checkpoints")
    first.trainer.save_checkpoint(folder / "step-2.ckpt")
    (folder / "step-3.ckpt.tmp").touch()  # a save that was cut short
    second = fit(toy, ["--ckpt_path=auto", "--trainer.max_steps=4", "--model.optimizer.lr=0.5"])
    assert "fit: resuming from runs/toy/checkpoints/step-2.ckpt (step 2)\n" in capsys.readouterr().out
    assert second.trainer.global_step == 4
    assert second.model.batches == [2, 3]
    assert second.model.optimizer.lr == 0.5, "the checkpoint overrode the option"
    assert yaml.safe_load(Path("runs/toy/config.yaml").read_text())["ckpt_path"] == "auto"
    assert main(["test", "--config", toy, "--ckpt_path=auto"]) == 0
    assert "test: using runs/toy/checkpoints/step-2.ckpt (step 2)\n" in capsys.readouterr().out


def test_what_a_checkpoint_was_made_with_does_not_override_what_is_asked_for(toy):
    fit(toy, ["--model.fault=none"]).trainer.save_checkpoint("step-2.ckpt")
    again = fit(toy, ["--ckpt_path=step-2.ckpt", "--trainer.max_steps=3", "--model.fault=other"])
    assert again.trainer.global_step == 3
    assert again.model.fault == "other"


def test_a_missing_checkpoint_stops_before_the_model(toy):
    built = launch_toys.ToyStage.built
    with pytest.raises(InputError, match=r"^ckpt_path: there is no checkpoint 'nope\.ckpt'\."):
        fit(toy, ["--ckpt_path=nope.ckpt"])
    assert launch_toys.ToyStage.built == built


def test_the_data_reads_with_the_models_tokenizer_unless_told_otherwise(toy):
    assert fit(toy).datamodule.tokenizer == "m"
    assert fit(toy, ["--model.backbone.path=other"]).datamodule.tokenizer == "other"
    assert fit(toy, ["--data.init_args.tokenizer=mine"]).datamodule.tokenizer == "mine"
    assert fit(toy, ["--data.tokenizer=mine"]).datamodule.tokenizer == "mine"


def test_data_without_a_tokenizer_gets_none(toy, write):
    data = "data:\n  class_path: launch_toys.ToyDataWithoutTokenizer\n"
    cli = fit(write("leaf.yaml", "include: toy.yaml\n" + data))
    assert cli.datamodule.tokenizer == ""


def test_ctrl_c_comes_through_and_the_signal_works_again(toy, capsys):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        fit(toy, ["--model.fault=ctrl-c"])
    assert signal.getsignal(signal.SIGINT) is before
    assert command.main(["fit", "--config", toy, "--model.fault=ctrl-c"]) == 130
    assert capsys.readouterr().err.endswith("tulu: interrupted; run the same command again to go on\n")


def test_a_full_disk_is_told_in_one_line(toy, capsys):
    assert command.main(["fit", "--config", toy, "--model.fault=full"]) == 2
    assert capsys.readouterr().err.endswith(
        "tulu: error: runs/x/step-3.ckpt: No space left on device. Free some space, or choose another folder "
        "(trainer.default_root_dir), and run the same command again; what was finished is kept.\n"
    )


def test_a_bug_keeps_its_traceback(toy):
    with pytest.raises(ValueError, match="a bug of ours"):
        command.main(["fit", "--config", toy, "--model.fault=bug"])


def test_a_bad_config_ends_with_status_2_and_one_line(toy, capsys):
    assert command.main(["fit", "--config", toy, "--trainer.max_stepz=1"]) == 2
    assert capsys.readouterr().err == (
        "tulu: error: command line: no such option: 'trainer.max_stepz'. Did you mean 'trainer.max_steps'?\n"
    )


def test_what_says_nothing_about_the_run_is_left_out(caplog):
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    logger.addHandler(caplog.handler)
    try:
        with without_noise():
            logger.warning("💡 Tip: buy this")
            logger.warning("GPU available: False, used: False")
            logger.warning("GPU available: True (cuda), used: True")
        logger.warning("💡 later")
    finally:
        logger.removeHandler(caplog.handler)
    assert dict.fromkeys(caplog.messages) == dict.fromkeys(["GPU available: True (cuda), used: True", "💡 later"])


def test_a_command_without_rows_says_so_before_it_runs(toy):
    with pytest.raises(
        InputError, match=r"^tulu validate: ToyData has no rows for this command \(no val_dataloader\)\."
    ):
        main(["validate", "--config", toy])


def test_help_of_a_command_names_it_and_ends_well(capsys):
    assert main(["fit", "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: tulu [options] fit ")
    assert "--trainer.max_steps" in out
    assert "--include" not in out


def test_a_list_replaces_the_one_below_entry_by_entry_nothing_is_kept(toy, write):
    parent = write("parent.yaml", "include: toy.yaml\ndata: {init_args: {sources: [{path: a, weight: 3.0}]}}\n")
    leaf = write("leaf.yaml", "include: parent.yaml\ndata: {init_args: {sources: [{path: b}]}}\n")
    assert fit(parent).datamodule.sources == [launch_toys.Source("a", 3.0)]
    assert fit(leaf).datamodule.sources == [launch_toys.Source("b", 1.0)]
    for option in (["--data.init_args.sources=[{path: c}]"], ["--data.sources", "[{path: c}]"]):
        assert fit(parent, option).datamodule.sources == [launch_toys.Source("c", 1.0)]


def test_a_plus_still_appends_to_the_list_below(toy, write):
    leaf = write("leaf.yaml", "include: toy.yaml\ndata: {init_args: {sources+: [{path: b}]}}\n")
    assert [source.path for source in fit(leaf).datamodule.sources] == ["a.jsonl", "b"]
