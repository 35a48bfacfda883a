"""Scalar heads over the decoder: a reward model, and PPO's critic, which may start from one.

Both are one vector without a bias. Its arithmetic and its weights are fp32 in any compute dtype, and its forward is a
module's own, because FSDP gathers it there.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from tulu_lightning.errors import InputError
from tulu_lightning.models.backbone import Backbone, Packed
from tulu_lightning.models.limits import read_config
from tulu_lightning.models.loading import SCORE, is_classifier
from tulu_lightning.types import Pack

__all__ = ["PackedReward", "PackedValue", "has_reward_head"]


def has_reward_head(folder: str, layers: int | None = None) -> bool:
    """Whether a model folder is a reward model, whose head can be gone on with; no weights are read.

    Args:
        folder: the model folder.
        layers: how many decoder layers are kept; None for all.

    Raises:
        InputError: it is a classifier with several labels, its head has another width than its decoder, or the head
            would read another layer than the one it was trained on.
    """
    if not is_classifier(folder):
        return False
    config: Any = read_config(folder)
    if config.num_labels != 1:
        what = f"it is a classifier with {config.num_labels} labels, and a reward is one number"
        raise InputError(folder, what, "Give a reward model (num_labels: 1 in its config.json) or a language model.")
    text = config.get_text_config(decoder=True)
    shape = _stored_shape(folder, SCORE)
    if shape is not None and shape != [1, text.hidden_size]:
        what = (
            f"its {SCORE} has the shape {shape}, and its config.json says that the decoder is {text.hidden_size} wide"
        )
        raise InputError(folder, what, "Save the reward model again, head and decoder together.")
    if layers is not None and layers < text.num_hidden_layers:
        what = f"it is a reward model whose head reads all {text.num_hidden_layers} layers, and layers is {layers}"
        raise InputError(folder, what, "Leave out layers, or start from a language model.")
    return True


def _stored_shape(folder: str, name: str) -> list[int] | None:
    """Shape of a tensor by the headers of a folder's weights; None for what is not there or cannot be read."""
    try:
        for path in sorted(Path(folder).glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                if name in file.keys():  # noqa: SIM118  it is no dictionary
                    return list(file.get_slice(name).get_shape())
    except (SafetensorError, OSError):  # loading says it better
        return None
    return None


class PackedReward(Packed):
    """A reward model: a decoder with a scalar head, giving the reward of everything up to the end of each segment."""

    def __init__(self, config: Backbone, folder: str, seed: int = 0) -> None:
        """Load the decoder, and the head where the folder is a reward model.

        A fresh head is normal with standard deviation 1 / √(width + 1) (Tülu 3, table 36). It is drawn from its own
        seed: the same on all ranks, and the run's random state stays as it was.

        Args:
            config: how to compute.
            folder: resolved folder of a causal LM or a reward model.
            seed: of a fresh head.

        Raises:
            InputError: what `has_reward_head` refuses, or the model does not load.
        """
        super().__init__(config)
        goes_on = has_reward_head(folder, config.layers)
        self.lm = config.load_scorer(folder)
        weight = self.head.weight.requires_grad_(True)  # adapters have frozen it
        if not goes_on:
            generator = torch.Generator().manual_seed(seed)
            nn.init.normal_(weight, std=(weight.shape[1] + 1) ** -0.5, generator=generator)

    @property
    def head(self) -> nn.Linear:
        """The scalar head."""
        score: Any = self.lm.score
        return score

    def forward(self, pack: Pack) -> Tensor:
        """rewards_S, float32: what the last token of each segment is worth, after all that it sees."""
        ends_S = torch.tensor([span.end - 1 for span in pack.spans], device=pack.tokens_T.device)
        hidden_SD = self.hidden_at(self.lm.get_decoder(), pack, ends_S)  # type: ignore[arg-type]
        return _read(self.head, hidden_SD)


class PackedValue(Packed):
    """A critic: a decoder with a scalar head, giving the value of the state before each scored token."""

    def __init__(self, config: Backbone, folder: str) -> None:
        """Load the decoder, and the head where the folder is a reward model.

        A fresh head starts near 0 (std 1 / (width + 1)), so that first values are small.

        Args:
            config: how to compute.
            folder: resolved folder of a causal LM or a reward model.

        Raises:
            InputError: what `has_reward_head` refuses, or the model does not load.
        """
        super().__init__(config)
        goes_on = has_reward_head(folder, config.layers)
        model: Any = config.load_scorer(folder) if goes_on else config.load(folder)
        self.decoder = model.get_decoder()
        width = self.decoder.config.hidden_size
        self.head = nn.Linear(width, 1, bias=False)
        if goes_on:
            self.head.load_state_dict(model.score.state_dict())
        else:
            nn.init.normal_(self.head.weight, std=1 / (width + 1))

    def forward(self, pack: Pack) -> Tensor:
        """values_N, float32."""
        return _read(self.head, self.source_hidden(self.decoder, pack))


def _read(head: nn.Linear, hidden_ND: Tensor) -> Tensor:
    return head(hidden_ND.float())[:, 0].clone()  # FSDP hangs its hook on what comes out, and wants no view
