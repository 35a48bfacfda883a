"""Every message a bad config gives, in full; and none of them builds a model."""

import launch_toys
import pytest
import yaml

from tulu_lightning.errors import InputError
from tulu_lightning.launch.fit import fit, main
from tulu_lightning.launch.schema import suggest
from tulu_lightning.launch.signatures import known_classes


def failure(action, *arguments) -> str:
    built = launch_toys.ToyStage.built
    with pytest.raises(InputError) as caught:
        action(*arguments)
    assert launch_toys.ToyStage.built == built, "a model was built before the config was refused"
    assert "\n" not in str(caught.value)
    return str(caught.value)


DROP = object()
STAGE, DATA = ("model", "init_args"), ("data", "init_args")
CALLBACK = "lightning.pytorch.callbacks.ModelCheckpoint"


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("trainer", "max_stepz"), 1, "no such option: 'trainer.max_stepz'. Did you mean 'trainer.max_steps'?"),
        (("trainre",), {}, "no such option: 'trainre'. Did you mean 'trainer'?"),
        (
            (*STAGE, "optimizer", "lrr"),
            1,
            "no such option: 'model.init_args.optimizer.lrr'. Did you mean 'model.init_args.optimizer.lr'?",
        ),
        (
            (*STAGE, "optimzer"),
            {},
            "no such option: 'model.init_args.optimzer'. Did you mean 'model.init_args.optimizer'?",
        ),
        (
            (*STAGE, "critic"),
            {"optimizer": {"lrr": 1}},
            "no such option: 'model.init_args.critic.optimizer.lrr'. "
            "Did you mean 'model.init_args.critic.optimizer.lr'?",
        ),
        ((*DATA, "sourcez"), [], "no such option: 'data.init_args.sourcez'. Did you mean 'data.init_args.sources'?"),
        (
            (*DATA, "sources", 0, "wieght"),
            1,
            "no such option: 'data.init_args.sources[0].wieght'. Did you mean 'data.init_args.sources[0].weight'?",
        ),
        ((*DATA, "zzz"), 1, "no such option: 'data.init_args.zzz'. Known here: micro_tokens, sources, tokenizer."),
        (("model", "init_argz"), {}, "no such option: 'model.init_argz'. Did you mean 'model.init_args'?"),
        (
            ("trainer", "callbacks"),
            [{"class_path": CALLBACK, "init_args": {"dirpat": "x"}}],
            "no such option: 'trainer.callbacks[0].init_args.dirpat'. "
            "Did you mean 'trainer.callbacks[0].init_args.dirpath'?",
        ),
        (
            ("trainer", "logger"),  # takes **kwargs: refused by the parser, not by the signature
            {"class_path": "lightning.pytorch.loggers.TensorBoardLogger", "init_args": {"save_dirr": "x"}},
            "no such option: 'trainer.logger.init_args.save_dirr'. Did you mean 'trainer.logger.init_args.save_dir'?",
        ),
        ((*STAGE, "optimizer", "lr"), "abc", "'model.init_args.optimizer.lr' is 'abc'. It must be a number."),
        ((*DATA, "micro_tokens"), "x", "'data.init_args.micro_tokens' is 'x'. It must be a whole number."),
        (("trainer", "max_steps"), "x", "'trainer.max_steps' is 'x'. It must be a whole number."),
        (
            (*STAGE, "backbone", "compute_dtype"),
            "fp8",
            "'model.init_args.backbone.compute_dtype' is 'fp8'. Use one of 'float32', 'bfloat16'.",
        ),
        (
            ("trainer",),
            5,
            "'trainer' is 5, not a mapping. Put its settings below it, one `key: value` a line.",
        ),
        (("model",), 3, "'model' is 3, not a mapping. Put its settings below it, one `key: value` a line."),
    ],
)
def test_a_bad_key_or_value_is_named_with_file_line_and_remedy(toy, write, path, value, message):
    line = set_in(toy, write, path, value)
    assert failure(fit, toy) == f"toy.yaml, line {line}: {message}"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (
            (*STAGE, "optimizer", "lr"),
            "'model.init_args.optimizer.lr' is missing. Give it in the config file or as an option.",
        ),
        (
            (*STAGE, "backbone"),
            "'model.init_args.backbone.path' is missing. Give it in the config file or as an option.",
        ),
        ((*DATA, "sources", 0, "path"), "'data.init_args.sources[0].path' is missing. Give it in this entry."),
    ],
)
def test_a_missing_key_is_named_in_full(toy, write, path, message):
    set_in(toy, write, path, DROP)
    assert failure(fit, toy).partition(": ")[2] == message


def test_a_config_without_a_model_says_so(toy, write):
    set_in(toy, write, ("model",), DROP)
    assert (
        failure(fit, toy)
        == "toy.yaml: 'model' is missing. Give its class_path and init_args, or include a file that does."
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "launch_toys.ToyStagee",
            "there is no class 'launch_toys.ToyStagee' (launch_toys has no 'ToyStagee'). "
            "Did you mean 'launch_toys.ToyStage'?",
        ),
        (
            "lunch_toys.ToyStage",
            "there is no class 'lunch_toys.ToyStage' (no module named 'lunch_toys'). "
            "Did you mean 'launch_toys.ToyStage'?",
        ),
        ("ToyStagee", "there is no class 'ToyStagee'. Did you mean 'launch_toys.ToyStage'?"),
    ],
)
def test_the_nearest_class_is_offered(toy, write, name, message):
    line = set_in(toy, write, ("model", "class_path"), name)
    assert failure(fit, toy) == f"toy.yaml, line {line} (model.class_path): {message}"


def test_a_class_of_the_wrong_kind_is_refused(toy, write):
    line = set_in(toy, write, ("model", "class_path"), "launch_toys.ToyData")
    text = failure(fit, toy)
    where = f"toy.yaml, line {line} (model.class_path): "
    assert text.startswith(where + "'launch_toys.ToyData' is no LightningModule. ")


def test_a_class_whose_module_lacks_a_package_says_which(toy, write, monkeypatch):
    write("needs.py", "import no_such_package\n")
    monkeypatch.syspath_prepend(".")
    line = set_in(toy, write, ("model", "class_path"), "needs.Stage")
    assert failure(fit, toy) == (
        f"toy.yaml, line {line}: 'needs.Stage' cannot be imported (No module named 'no_such_package'). "
        "Install what it needs, or choose another class."
    )


def test_our_own_stages_are_among_the_classes_offered():
    from lightning.pytorch import LightningModule

    assert "tulu_lightning.stages.sft.SFT" in known_classes(LightningModule)


def test_the_file_named_is_the_one_that_holds_the_key(toy, write):
    write("base.yaml", "trainer:\n  max_stepz: 3\n")
    leaf = write("leaf.yaml", "include: [toy.yaml, base.yaml]\nseed_everything: 1\n")
    assert failure(fit, leaf) == (
        "base.yaml, line 2: no such option: 'trainer.max_stepz'. Did you mean 'trainer.max_steps'?"
    )


def test_keys_are_held_against_the_class_of_their_own_file(toy, write):
    leaf = write("leaf.yaml", "include: toy.yaml\ndata:\n  class_path: launch_toys.ToyDataWithoutTokenizer\n")
    write("base.yaml", "data:\n  init_args:\n    micro_tokens: 7\n")  # fits ToyData only
    cli = fit(leaf)
    assert type(cli.datamodule) is launch_toys.ToyDataWithoutTokenizer
    late = write("late.yaml", f"include: [{leaf}, base.yaml]\n")
    assert failure(fit, late).startswith("base.yaml, line 3: no such option: 'data.init_args.micro_tokens'.")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--trainer.max_stepz", "2"], "no such option: 'trainer.max_stepz'. Did you mean 'trainer.max_steps'?"),
        (
            ["--model.init_args.optimizer.lrr=2"],
            "no such option: 'model.init_args.optimizer.lrr'. Did you mean 'model.init_args.optimizer.lr'?",
        ),
        (
            ["--model.optimizer.lrr=2"],
            "no such option: 'model.optimizer.lrr'. Did you mean 'model.optimizer.lr'?",
        ),
        (["--trainer.max_steps=x"], "'trainer.max_steps' is 'x'. It must be a whole number."),
        (["--trainer.max_steps"], "'--trainer.max_steps' is given without a value. Write --trainer.max_steps=VALUE."),
        (["--config"], "'--config' is given without a value. Write --config=VALUE."),
        (["x.yaml"], "unexpected argument 'x.yaml'. Config files are given as --config x.yaml."),
        (["foo"], "unexpected argument 'foo'. Remove it."),
    ],
)
def test_a_bad_option_is_the_command_lines_fault(toy, options, message):
    assert failure(fit, toy, options) == f"command line: {message}"


def test_a_command_without_a_config_says_what_to_write():
    assert failure(main, ["test"]) == "command line: no config is given. Write `tulu test --config FILE`."


def test_an_option_that_ends_the_process_is_no_override(toy):
    assert failure(fit, toy, ["--help"]) == "overrides: --help ends the process. Use it on the command line."


def test_what_a_dataclass_refuses_reaches_the_user_as_it_is(toy):
    assert failure(fit, toy, ["--model.optimizer.lr=-1"]) == "optimizer.lr: is -1.0. It must be above 0."


def test_what_lightning_refuses_becomes_one_line(toy):
    with pytest.raises(InputError) as caught:
        fit(toy, ["--trainer.accelerator=abacus"])
    assert str(caught.value).startswith("trainer: You selected an invalid accelerator name: `accelerator='abacus'`.")
    assert str(caught.value).endswith("Change the trainer's settings; `tulu fit --help` lists them.")


def test_a_short_class_name_is_found_and_its_keys_are_checked(toy):
    cli = fit(toy, ['--trainer.callbacks=[{"class_path": "RichModelSummary", "init_args": {"max_depth": 2}}]'])
    callbacks: list = cli.trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
    assert "RichModelSummary" in [type(callback).__name__ for callback in callbacks]
    option = '--trainer.callbacks=[{"class_path": "RichModelSummary", "init_args": {"maxdepth": 2}}]'
    assert failure(fit, toy, [option]).endswith("Did you mean 'trainer.callbacks[0].init_args.max_depth'?")


def test_without_a_near_name_all_are_listed():
    assert suggest("zzz", ("data",), ["b", "a"]) == "Known here: a, b."
    assert suggest("zzz", ("data",), []) == "'data' takes no options."


def set_in(name, write, path, value) -> int | None:
    """Change one value of a YAML file; returns the line it (or, for a list or mapping, what is wrong in it) is on."""
    with open(name) as file:
        config = yaml.safe_load(file)
    inner = config
    for key in path[:-1]:
        inner = inner[key]
    if value is DROP:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    write(name, config)
    deepest = path[-1]
    while isinstance(value, dict | list) and value:
        deepest, value = list(value.items())[-1] if isinstance(value, dict) else (deepest, value[0])
    with open(name) as file:
        return next((i for i, line in enumerate(file, 1) if line.strip(" -").startswith(f"{deepest}:")), None)
