"""The config of `tulu fit`, parsed and checked as it would be, with nothing built or written."""

from typing import Any

import torch

from tulu_lightning.launch.fit import TuluCLI

__all__ = ["ParsedFit", "processes"]


class ParsedFit(TuluCLI):
    """`tulu fit` up to the parsed config: nothing is seeded, built or written."""

    def _set_seed(self) -> None:
        pass

    def before_instantiate_classes(self) -> None:
        """Leave the run folder alone."""

    def instantiate_classes(self) -> None:
        """Build nothing: what the start checkpoint of a later stage is, is not known yet."""

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def processes(accelerator: Any, devices: Any, nodes: Any) -> int:
    """How many processes the Trainer's settings come to.

    Args:
        accelerator: the Trainer's `accelerator`.
        devices: a number, a list of device indices, the text of either, or `auto` (and -1): all there are.
        nodes: the Trainer's `num_nodes`.
    """
    text = str(devices).strip()
    if isinstance(devices, list | tuple):
        per_node = len(devices)
    elif text in ("auto", "-1"):
        per_node = 1 if accelerator == "cpu" else torch.cuda.device_count()
    elif "," in text:
        per_node = len([index for index in text.split(",") if index.strip()])
    else:
        per_node = int(text) if text.isdecimal() else 1  # the Trainer refuses anything else
    return max(per_node, 1) * int(nodes or 1)
