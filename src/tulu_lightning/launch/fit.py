"""`tulu fit`, `validate`, `test`, `predict`: Lightning's own commands with strict configs and runs that go on.

A config is checked in full (keys, classes, values, the run folder) before any weights are read.
"""

import argparse
import json
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.cli import LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.model_helpers import is_overridden

import tulu_lightning.models.sharding  # noqa: F401  registers `strategy: fsdp2`
from tulu_lightning.callbacks.checkpoints import Checkpoints
from tulu_lightning.errors import InputError, Preempted
from tulu_lightning.files import write_whole
from tulu_lightning.launch.arguments import (
    linked_options,
    read_layers,
    with_classes_anew,
    with_lists_anew,
    with_nulls_as_files,
)
from tulu_lightning.launch.compose import Layer, merge, origin
from tulu_lightning.launch.parser import IncludingConfigFile, TuluParser, in_own_words
from tulu_lightning.launch.preemption import preemptible, requeue, started_by_lightning
from tulu_lightning.launch.quiet import without_noise
from tulu_lightning.launch.resuming import ACCEPT_HELP, CKPT_HELP, header_for, start_line, tell_checkpoints
from tulu_lightning.launch.run_folder import ensure_writable, resolve_checkpoint
from tulu_lightning.launch.schema import check_keys
from tulu_lightning.launch.signatures import parameters
from tulu_lightning.launch.trainer_settings import check_trainer_settings
from tulu_lightning.models.saved import Header

__all__ = ["SaveConfig", "TuluCLI", "fit", "main"]

SEED = 1
LOADERS = {"validate": "val_dataloader", "test": "test_dataloader", "predict": "predict_dataloader"}


class SaveConfig(SaveConfigCallback):
    """Writes the whole config into the run folder: `config.yaml` for fit, `config-test.yaml` and so on for the others.

    For fit also `config_origin.json`: what the files say, and what the command line (or a recipe) set over them.
    """

    def save_config(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Write it whole or not at all."""
        name = "config.yaml" if stage == "fit" else f"config-{getattr(stage, 'value', stage)}.yaml"
        path = Path(trainer.default_root_dir, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, self.parser.dump(self.config, skip_unset=False))
        if stage == "fit":
            layers: Sequence[Layer] = getattr(self.parser, "layers", ())
            files, told = ([layer for layer in layers if (layer.path is None) is said] for said in (False, True))
            found = {"files": [layer.name for layer in files], "files_say": merge(files), "command_line": merge(told)}
            write_whole(path.with_name("config_origin.json"), json.dumps(found, indent=1, default=str))


class TuluCLI(LightningCLI):
    """LightningCLI with `include`, strict keys, one-line errors, a run folder and resuming.

    Args:
        argv: arguments, the subcommand first.
    """

    def __init__(self, argv: Sequence[str]) -> None:
        self.layers: list[Layer] = []
        super().__init__(
            save_config_callback=SaveConfig,
            save_config_kwargs={"overwrite": True, "save_to_log_dir": False},
            seed_everything_default=SEED,
            parser_kwargs={"prog": "tulu"},
            parser_class=TuluParser,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            args=list(argv),
        )

    def add_arguments_to_parser(self, parser: Any) -> None:
        """What is ours beside Lightning's own."""
        parser.add_argument("--accept_changes", type=list[str] | str, default=[], help=ACCEPT_HELP)

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> Any:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        for action in parser._actions:
            if action.dest == "ckpt_path":
                action.help = CKPT_HELP
        return parser

    # Parsing ----------------------------------------------------------------------------------------------------

    def init_parser(self, **kwargs: Any) -> TuluParser:
        """A parser whose `--config` follows `include`."""
        parser = TuluParser(**kwargs)
        parser.add_argument(
            "-c", "--config", action=IncludingConfigFile, help="YAML file; its `include` lists parents."
        )
        parser.add_argument("--include", type=list[str] | str, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        return parser

    def parse_arguments(self, parser: Any, args: Any) -> None:
        """Check keys and classes ourselves, then let the parser check values."""
        subcommand, *rest = args
        if not rest:
            raise InputError("command line", "no config is given", f"Write `tulu {subcommand} --config FILE`.")
        known: Any = self._subcommand_parsers[subcommand]
        self.layers = read_layers(rest)
        check_keys(self.layers, self._top_level(known))
        if self.layers and "model" not in merge(self.layers):
            remedy = "Give its class_path and init_args, or include a file that does."
            raise InputError(origin(self.layers, ("model",)), "'model' is missing", remedy)
        parser.layers = known.layers = self.layers
        options = with_classes_anew(with_lists_anew(args), self.layers)
        with with_nulls_as_files([*options, *linked_options(self.layers)]) as arguments:
            self.config = parser.parse_args(arguments)

    @staticmethod
    def _top_level(parser: TuluParser) -> dict[str, Any]:
        names = {action.dest.partition(".")[0] for action in parser._actions}
        known = dict.fromkeys(names - {"help", "config", "print_config", "include"}, Any)
        return {
            **known,
            "trainer": parameters(pl.Trainer),
            "model": pl.LightningModule,
            "data": pl.LightningDataModule,
        }

    def _parse_ckpt_path(self) -> None:
        """Leave the config alone: Lightning would let a checkpoint's hyperparameters override what the user asks for."""

    # Building ---------------------------------------------------------------------------------------------------

    @property
    def run_folder(self) -> Path:
        """`trainer.default_root_dir`."""
        return Path(self._get(self.config, "trainer").default_root_dir)

    @property
    def stop_requested(self) -> bool:
        """Whether `Checkpoints` took a Ctrl-C; in the last step the run is finished all the same."""
        return any(callback.stop_requested for callback in self._checkpoints)

    @property
    def preempted(self) -> bool:
        """Whether that was a scheduler's signal, not Ctrl-C."""
        return any(callback.stopping.preempted for callback in self._checkpoints)

    def stopped(self) -> KeyboardInterrupt:
        """What to raise for a run that was stopped before its end; after a scheduler's signal its job is queued again."""
        if not self.preempted:
            return KeyboardInterrupt()
        if self.trainer.is_global_zero and any(callback.requeue for callback in self._checkpoints):
            requeue()
        return Preempted()

    def before_instantiate_classes(self) -> None:
        """Settle the run folder, and prove that it can be written, before anything is built."""
        settings = self._get(self.config, "trainer")
        check_trainer_settings(settings)
        if not settings.default_root_dir:
            files = [layer.path for layer in self.layers if layer.path is not None]
            settings.default_root_dir = str(Path("runs", files[-1].stem if files else "default"))
        ensure_writable(self.run_folder)
        resolve_checkpoint(self._get(self.config, "ckpt_path"), self.run_folder)

    def instantiate_classes(self) -> None:
        """Build data, model and trainer; what their constructors refuse reaches the user as they said it."""
        with in_own_words():
            super().instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """A Trainer that logs below the run folder; one folder for all starts, so that curves go on after a resume.

        Raises:
            InputError: Lightning refuses the combination of settings.
        """
        if self._get(self.config, "trainer").get("logger") in (True, None):
            kwargs["logger"] = TensorBoardLogger(save_dir=self.run_folder / "tensorboard", name="", version="")
        try:
            return super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, ModuleNotFoundError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            remedy = "Change the trainer's settings; `tulu fit --help` lists them."
            raise InputError("trainer", " ".join(str(error).split()).rstrip("."), remedy) from error

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        self._refuse_without_rows(subcommand)
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        config = self._plain_config()
        kwargs["ckpt_path"] = resolve_checkpoint(kwargs.get("ckpt_path"), self.run_folder)
        header = header_for(kwargs["ckpt_path"], type(self.model).__name__)
        if subcommand == "fit":
            accepted = self._get(self.config, "accept_changes")
            tell_checkpoints(self._checkpoints, config, kwargs["ckpt_path"], header, accepted)
        self._announce(subcommand, kwargs["ckpt_path"], header, config)
        return kwargs

    @property
    def _checkpoints(self) -> list[Checkpoints]:
        callbacks: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
        return [callback for callback in callbacks if isinstance(callback, Checkpoints)]

    def _plain_config(self) -> dict[str, Any]:
        parser: Any = self._parser(self.subcommand)
        return yaml.safe_load(parser.dump(self.config.get(str(self.subcommand), self.config), skip_unset=False))

    def _refuse_without_rows(self, subcommand: str) -> None:
        """A loop that the data has no rows for; Lightning would say so with a traceback."""
        loader = LOADERS.get(subcommand)
        data: Any = self.datamodule
        if data is not None and loader is not None and not is_overridden(loader, data):
            what = f"{type(data).__name__} has no rows for this command (no {loader})"
            remedy = "Score held-out prompts with the Evaluate callback in `tulu fit`, or give data that has them."
            raise InputError(f"tulu {subcommand}", what, remedy)

    @rank_zero_only
    def _announce(
        self, subcommand: str, checkpoint: str | None, header: Header | None, config: Mapping[str, Any]
    ) -> None:
        print(start_line(subcommand, checkpoint, header, config, self.run_folder), flush=True)


def fit(config: str | Path, overrides: Sequence[str] = ()) -> TuluCLI:
    """Train one stage in this process.

    Args:
        config: the YAML file.
        overrides: options as on the command line, e.g. `["--trainer.max_steps=5"]`; they win over the file.

    Returns:
        The finished command: its `trainer`, `model`, `datamodule` and `run_folder`.

    Raises:
        InputError: the config or the run folder is bad.
        KeyboardInterrupt: Ctrl-C; the run is saved where a `Checkpoints` callback had time for it.
    """
    try:
        return _run(["fit", "--config", str(config), *overrides])
    except SystemExit as leaving:
        what = f"{' '.join(overrides)} ends the process"
        raise InputError("overrides", what, "Use it on the command line.") from leaving


def main(argv: Sequence[str]) -> int:
    """Run `fit`, `validate`, `test` or `predict`.

    Args:
        argv: arguments, the subcommand first.

    Returns:
        Exit status.

    Raises:
        InputError: the config or the run folder is bad.
    """
    try:
        _run(argv)
    except KeyboardInterrupt:
        if started_by_lightning():
            return (
                0  # Lightning's launcher kills the first rank when another has a status, and that rank's is the run's
            )
        raise
    except SystemExit as leaving:  # --help and --print_config
        return leaving.code if isinstance(leaving.code, int) else 0
    return 0


def _run(argv: Sequence[str]) -> TuluCLI:
    with preemptible(), _interruptible(), without_noise():
        cli = TuluCLI(argv)
    if cli.stop_requested and not cli.model.finished:
        raise cli.stopped()
    return cli


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let Ctrl-C through: Lightning ends the process with status 1 instead, and leaves the signal ignored."""
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as leaving:
        if isinstance(leaving.__context__, KeyboardInterrupt):
            signal.signal(signal.SIGINT, before)
            raise type(leaving.__context__) from leaving
        raise
