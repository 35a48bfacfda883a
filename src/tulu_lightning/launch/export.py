"""`tulu export`: a training checkpoint as a Hugging Face folder, or its adapter alone, without loading the network."""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tulu_lightning.checkpoints.card import COPY
from tulu_lightning.errors import InputError, nearest

__all__ = ["main", "parser"]

DTYPES = ("float32", "bfloat16", "float16")
STAGES = ("SFT", "DPO", "PPO", "RewardModel")
CONFIGS = ("config.json", "adapter_config.json")
"""What an export has one of."""


def parser() -> argparse.ArgumentParser:
    """The command line's."""
    found = argparse.ArgumentParser(prog="tulu export", description=__doc__)
    found.add_argument("--ckpt", required=True, metavar="PATH", help="run folder (its newest checkpoint) or checkpoint")
    found.add_argument("--out", required=True, metavar="DIR", help="folder to write")
    found.add_argument("--dtype", metavar="NAME", help=f"of the weights: {', '.join(DTYPES)}; as trained by default")
    found.add_argument("--adapter", action="store_true", help="write the LoRA adapter alone, for peft")
    found.add_argument("--max_shard_size", default="5GB", metavar="SIZE", help="largest file of weights (%(default)s)")
    found.add_argument("--config", metavar="FILE", help="of the run; RUN/config.yaml by default")
    found.add_argument("--force", action="store_true", help="replace the folder if it is there")
    return found


def main(argv: Sequence[str]) -> int:
    """Run the command.

    Args:
        argv: arguments.

    Returns:
        Exit status.

    Raises:
        InputError: no checkpoint, one of another model, an unknown dtype, an output that is there already.
    """
    options = parser().parse_args(list(argv))
    if options.dtype is not None and options.dtype not in DTYPES:
        raise InputError("--dtype", f"is {options.dtype!r}", nearest(options.dtype, DTYPES))
    if options.adapter and options.dtype is not None:
        raise InputError("--dtype", "is given with --adapter, which is written as trained", "Leave one of them out.")
    from tulu_lightning.checkpoints.reading import TrainingCheckpoint, newest_checkpoint
    from tulu_lightning.checkpoints.shards import parse_size
    from tulu_lightning.models.saved import header_of

    size = parse_size("--max_shard_size", options.max_shard_size)
    given, out = Path(options.ckpt), Path(options.out)
    if not given.exists():
        raise InputError("--ckpt", f"there is no {given}", "Give a run folder or a checkpoint in RUN/checkpoints.")
    is_run = given.is_dir() and not given.name.endswith(".ckpt")
    path = newest_checkpoint(given) if is_run else given
    run = given if is_run else path.parent.parent
    _check_out(out, options.force, {"the run": run, "the checkpoint": path})
    config = _read_config(Path(options.config) if options.config else run / "config.yaml")
    header_of(path)  # also of a file whose tensors would load: what it holds may have changed since
    checkpoint = TrainingCheckpoint(path)
    folder = _write(checkpoint, config, run, out, options, size)
    print(f"{checkpoint.stage['class']} after {checkpoint.stage['step']:,} steps: {folder}")
    return 0


def _check_out(out: Path, force: bool, kept: Mapping[str, Path]) -> None:
    """Refuse to write over anything but an earlier export, and over what the export is made of even then."""
    place, run = out.resolve(), kept.get("the run")
    if run is not None and place.is_relative_to((run / "checkpoints").resolve()):
        raise InputError("--out", f"{out} lies among the run's checkpoints", "Give a folder elsewhere.")
    if out.exists() and not force:
        raise InputError("--out", f"{out} is there already", "Give another folder, or --force to replace it.")
    for name, folder in kept.items():
        if folder.resolve().is_relative_to(place):
            raise InputError("--out", f"{out} holds {name}, which --force would remove", "Give a folder elsewhere.")
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        what = f"{out} is {'a link' if out.is_symlink() else 'a file'}, and --force replaces folders"
        raise InputError("--out", what, "Give another folder.")
    if (out / COPY).is_file():
        raise InputError("--out", f"{out} was promoted, and records name it", "Give another folder.")
    if out.exists() and any(out.iterdir()) and not any((out / name).is_file() for name in CONFIGS):
        what = f"{out} holds other things than a model (no {' and no '.join(CONFIGS)})"
        raise InputError("--out", what, "Give another folder; --force replaces earlier exports.")


def _read_config(file: Path) -> dict[str, Any]:
    import yaml

    if not file.is_file():
        raise InputError(str(file), "there is no config of the run", "Give the run's config: --config FILE.")
    found = yaml.safe_load(file.read_text(encoding="utf-8"))
    if not isinstance(found, dict) or "backbone" not in (found.get("model", {}).get("init_args") or {}):
        raise InputError(str(file), "names no model.init_args.backbone", "Give the config of a run of tulu fit.")
    return found


def _write(checkpoint: Any, config: dict[str, Any], run: Path, out: Path, options: Any, size: int) -> Path:
    import torch

    from tulu_lightning.assets.models import generation_eos, load_tokenizer, resolve_model
    from tulu_lightning.checkpoints.card import LINEAGE, chain_behind, model_card
    from tulu_lightning.checkpoints.offline import Layout, write_adapter, write_model
    from tulu_lightning.data import chat
    from tulu_lightning.progress import Progress

    kind = checkpoint.stage["class"]
    if kind not in STAGES:
        raise InputError(str(checkpoint.path), f"is of a {kind}", f"Give one of {', '.join(STAGES)}.")
    backbone = config["model"]["init_args"]["backbone"]
    start = str(resolve_model(backbone["path"]))
    _check_out(out, options.force, {"the start": Path(start)})
    _check_start(checkpoint, start, backbone["path"])
    layout = _layout(Layout, backbone, start, kind)
    data = config.get("data", {}).get("init_args", {})
    texts = str(data.get("tokenizer") or start)
    tokenizer = load_tokenizer(texts)
    template = chat.chat_template(data.get("template", "chatml"), tokenizer)
    stops = chat.stop_ids(tokenizer, template, (*generation_eos(texts), *generation_eos(start)))
    chain = [*chain_behind(start), _entry(checkpoint, backbone["path"], run)]
    base = chain[0]["start"]

    def extra(folder: Path) -> None:
        (folder / LINEAGE).write_text(json.dumps(chain, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(model_card(chain, base, _note(options, layout)), encoding="utf-8")

    if options.adapter:
        return write_adapter(checkpoint, layout, backbone["path"], tokenizer, out, template.jinja, extra)
    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    with Progress("export", 1, unit="tensors") as progress:

        def told(done: int, total: int) -> None:
            progress.total = total
            progress.update(done)

        return write_model(checkpoint, layout, tokenizer, out, template.jinja, stops, dtype, size, extra, told)


def _layout(kind: Any, backbone: dict[str, Any], start: str, stage: str) -> Any:
    from tulu_lightning.models.lora import Lora
    from tulu_lightning.models.quantize import Quantize

    return kind(
        start=start,
        layers=backbone.get("layers"),
        lora=Lora(**backbone["lora"]) if backbone.get("lora") else None,
        quantize=Quantize(**backbone["quantize"]) if backbone.get("quantize") else None,
        scorer=stage == "RewardModel",
        weights_dtype=backbone.get("weights_dtype", "float32"),
    )


def _check_start(checkpoint: Any, start: str, named: str) -> None:
    """What the start gives to an export (config, tokenizer, a 4-bit base) has to be what the run started from."""
    from tulu_lightning.checkpoints.identity import weights_digest

    recorded = checkpoint.stage.get("identity", {}).get("start weights")
    if recorded and recorded != weights_digest(start):
        what = f"was started from other weights than {named} holds now"
        raise InputError(str(checkpoint.path), what, "Give back the start, or name it with --config.")


def _entry(checkpoint: Any, start: str, run: Path) -> dict[str, Any]:
    from tulu_lightning.checkpoints.card import entry, told
    from tulu_lightning.checkpoints.promoted import read_record, record_path

    def read(name: str) -> dict[str, Any]:
        path = run / name
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    stage = checkpoint.stage
    record = record_path(run, stage["step"])  # of these weights: the run's last decision may be about others
    scores = read_record(record)["scores"]["after"] if record.is_file() else {}
    texts = {name: told(score) for name, score in scores.items()}
    return entry(stage["class"], stage["step"], start, stage.get("identity", {}), read("data_manifest.json"), texts)


def _note(options: Any, layout: Any) -> str:
    told = []
    if options.adapter:
        told.append("A LoRA adapter for peft; the base is not in it.")
    elif layout.lora is not None:
        told.append("The LoRA adapters of training are merged.")
    if layout.quantize is not None:
        how = f"{layout.quantize.kind}, blocks of {layout.quantize.blocksize}"
        told.append(f"They were trained on a base in 4 bits ({how}), whose values the matrices hold."
                    if not options.adapter else f"It was trained on the base in 4 bits ({how}).")  # fmt: skip
    if options.dtype:
        told.append(f"Weights are written in {options.dtype}.")
    return " ".join(told)
