"""The backbone: any transformers causal LM, with packed segment attention and without surprises.

`Backbone` is its config; `PackedLM` is what the stages call: a pack in, one number per scored token out. The log-prob
function runs inside its forward because FSDP gathers the head's weight only there. `models.heads` has its scalar kin.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from tulu_lightning.core.logprobs import TokenStats, token_logprobs
from tulu_lightning.core.nll import weighted_nll
from tulu_lightning.errors import InputError
from tulu_lightning.models import attention
from tulu_lightning.models.backends import Chooser, Requested, check_request
from tulu_lightning.models.compiled import head_kernels
from tulu_lightning.models.liger import Loss, head_loss
from tulu_lightning.models.linear import recompute_mlps, use_fast_layers
from tulu_lightning.models.loading import decoder_layers, load_causal_lm, load_scorer
from tulu_lightning.models.lora import Lora, adapt, save_trained_only
from tulu_lightning.models.probe import check_packed
from tulu_lightning.models.quantize import Quantize, quantize
from tulu_lightning.models.skeleton import building_without_weights, mark
from tulu_lightning.types import Pack

__all__ = ["Backbone", "Packed", "PackedLM"]


@dataclass(frozen=True)
class Backbone:
    """Which weights to start from, and how to compute with them."""

    path: str
    """A Hugging Face model folder, a name that `assets.models` knows, or a hub id such as meta-llama/Llama-3.1-8B."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the matrix products."""
    weights_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype in which trained weights, and with them gradients and optimiser state, are kept. bfloat16 halves their
    memory, and at small learning rates updates round away: a weight of 0.02 has neighbours 0.0001 apart."""
    lora: Lora | None = None
    """Train adapters on the decoder's linear layers, and nothing else."""
    quantize: Quantize | None = None
    """Keep the decoder's matrices, frozen, in 4 bits (QLoRA); needs `lora`, which trains beside them."""
    compile: bool = False
    """Compile each decoder layer (`torch.compile`): faster steps for a slow first one. `data.pad_to` keeps shapes few."""
    activation_checkpointing: bool = False
    """Recompute each decoder layer in backward: less memory, about a third more time."""
    recompute_mlps: bool = False
    """Recompute only what is inside each decoder layer's gated MLP: saves a third (bf16) to two fifths (fp32) of what
    a pass keeps for backward, for two more of an MLP's nine products."""
    layers: int | None = None
    """Keep only the first so many decoder layers (a critic smaller than its policy)."""
    attention: Requested = "auto"
    """How packed attention is computed: `auto` takes the fastest that the machine can run and that passes a trial
    (CPU: compiled functions, or matrix products; CUDA: `varlen`, flash attention, and `flex` where answers share a
    prompt; else `sdpa`, PyTorch's kernel document by document). The others insist."""

    def __post_init__(self) -> None:
        if self.weights_dtype == "bfloat16" and self.compute_dtype != "bfloat16":
            what = "is bfloat16 while compute_dtype is float32, whose digits such weights do not have"
            raise InputError("backbone.weights_dtype", what, "Set compute_dtype to bfloat16 too, or keep float32.")
        if self.quantize is not None and self.lora is None:
            what = "is set without lora, and a base in 4 bits does not train"
            raise InputError("backbone.quantize", what, "Set backbone.lora too ({r: 16} will do), or leave it out.")
        if self.recompute_mlps and self.activation_checkpointing:
            what = "does nothing beside activation_checkpointing, which recomputes whole layers"
            raise InputError("backbone.recompute_mlps", what, "Leave one of them out.")

    def load(self, folder: str) -> PreTrainedModel:
        """Load a causal LM from a local folder, with packed attention, no KV cache and no dropout.

        Raises:
            InputError: the machine cannot run `attention`, the weights do not load, `layers` is more than the model
                has, or the architecture does not compute the same packed as alone.
        """
        return self._load(load_causal_lm, folder)

    def load_scorer(self, folder: str) -> PreTrainedModel:
        """Load a one-label classifier likewise, from a reward model or a causal LM (then its head is any numbers).

        Raises:
            InputError: as above, or the architecture has no such classifier.
        """
        return self._load(load_scorer, folder)

    def _load(self, load: Callable[[str, torch.dtype, str], PreTrainedModel], folder: str) -> PreTrainedModel:
        check_request(self.attention, getattr(torch, self.compute_dtype))
        level = transformers_logging.get_verbosity()
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        try:
            return self._prepare(load(folder, torch.float32, attention.NAME), folder)
        finally:
            transformers_logging.set_verbosity(level)

    def _prepare(self, lm: PreTrainedModel, folder: str) -> PreTrainedModel:
        lm.config.use_cache = False  # a cache makes transformers attend across documents without a word
        for name in ("attention_dropout", "resid_pdrop", "embd_pdrop", "hidden_dropout"):
            if getattr(lm.config, name, 0.0):
                raise InputError(folder, f"{name} is {getattr(lm.config, name)}", "Set it to 0 in its config.json.")
        if self.layers is not None:
            self._cut(lm, folder, self.layers)
        use_fast_layers(lm)
        check_packed(lm, folder)
        # After the check, which wants digits; and 4 bits are taken of all the digits there are.
        if self.quantize is not None:
            quantize(lm, self.quantize, folder)
        if self.weights_dtype == "bfloat16":
            _store_low(lm)
        if self.lora is not None:
            adapt(lm, self.lora, folder)
        if self.quantize is not None:
            for part in (lm, lm.get_decoder()):  # a critic takes the decoder alone
                save_trained_only(part)
        self._switch(lm, folder)
        if building_without_weights():
            mark(lm, folder)
        return lm.train()

    def _switch(self, lm: PreTrainedModel, folder: str) -> None:
        """Turn on what changes memory and speed alone."""
        if self.activation_checkpointing:
            lm.gradient_checkpointing_enable({"use_reentrant": False})
        if self.recompute_mlps and not recompute_mlps(lm):
            what = f"recompute_mlps is true, and {type(lm).__name__} has no gated MLP that is known here"
            raise InputError(folder, what, "Set activation_checkpointing in its place.")
        if self.compile:
            for layer in decoder_layers(lm.get_decoder(), folder):  # type: ignore[arg-type]
                layer.compile()

    @staticmethod
    def _cut(lm: PreTrainedModel, folder: str, layers: int) -> None:
        decoder: Any = lm.get_decoder()
        present = decoder_layers(decoder, folder)
        if not 1 <= layers <= len(present):
            raise InputError(folder, f"layers is {layers}, the model has {len(present)}", f"Use 1 to {len(present)}.")
        decoder.layers = present[:layers]
        lm.config.num_hidden_layers = layers

    def autocast(self, device: torch.device) -> AbstractContextManager:
        """The context in which forward runs on one device (under FSDP2 the mixed-precision policy does this)."""
        if self.compute_dtype == "float32":
            return nullcontext()
        return torch.autocast(device.type, dtype=torch.bfloat16)


def _store_low(lm: PreTrainedModel) -> None:
    """Parameters in bf16; buffers stay fp32, and so does a scalar head, which is small."""
    for part in (lm.get_decoder(), lm.get_output_embeddings()):
        for parameter in part.parameters() if part is not None else ():
            if parameter.is_floating_point():  # not the codes of 4-bit layers
                parameter.data = parameter.data.bfloat16()


class Packed(nn.Module):
    """Runs the decoder over a pack and hands out the hidden states that are asked for."""

    def __init__(self, config: Backbone) -> None:
        super().__init__()
        self.config = config
        self.attention = Chooser(config.attention, getattr(torch, config.compute_dtype))

    def source_hidden(self, decoder: nn.Module, pack: Pack, noise_TD: Tensor | None = None) -> Tensor:
        """Hidden states at `pack.source_N`: as `hidden_at`."""
        return self.hidden_at(decoder, pack, pack.source_N, noise_TD)

    def hidden_at(self, decoder: nn.Module, pack: Pack, at_N: Tensor, noise_TD: Tensor | None = None) -> Tensor:
        """Hidden states at some places, in the compute dtype.

        Args:
            decoder: of this module.
            pack: documents on one token axis.
            at_N: int64, index into T of each.
            noise_TD: added to the embeddings.
        """
        trees, device = any(span.parent >= 0 for span in pack.spans), pack.tokens_T.device
        config: Any = decoder.config
        backend = self.attention.backend(trees, device, config)
        # A sharded module's mixed-precision policy casts by itself; autocast on top would cast a second time.
        sharded = isinstance(self, FSDPModule)
        with nullcontext() if sharded else self.config.autocast(device):
            hidden_TD = decoder(
                **_input(decoder, pack, noise_TD),
                position_ids=pack.positions_T[None],
                use_cache=False,
                segments=attention.layout(pack.spans, pack.padding, device, backend),
            ).last_hidden_state[0]
        hidden_ND = hidden_TD[at_N]
        return hidden_ND.to(torch.bfloat16) if self.config.compute_dtype == "bfloat16" else hidden_ND


def _input(decoder: Any, pack: Pack, noise_TD: Tensor | None) -> dict[str, Tensor]:
    if noise_TD is None:
        return {"input_ids": pack.tokens_T[None]}
    embedded_TD = decoder.get_input_embeddings()(pack.tokens_T)
    return {"inputs_embeds": (embedded_TD + noise_TD.to(embedded_TD))[None]}


class PackedLM(Packed):
    """A causal LM that answers with log-probs of a pack's scored tokens."""

    def __init__(self, config: Backbone, folder: str) -> None:
        """Load the weights.

        Args:
            config: how to compute.
            folder: resolved model folder.
        """
        super().__init__(config)
        self.lm = config.load(folder)
        self._head_loss: Loss | None = None  # chosen at the first micro-batch that trains

    def forward(
        self,
        pack: Pack,
        temperature: float = 1.0,
        entropy: bool = False,
        weight_N: Tensor | None = None,
        noise_TD: Tensor | None = None,
    ) -> TokenStats:
        """Log-probs of the scored tokens; the head is not computed for any other.

        Args:
            pack: documents on one token axis.
            temperature: what logits are divided by.
            entropy: also give entropies.
            weight_N: give the weighted sum of -log p as `nll`, for less work; only it has a gradient then, and
                temperature and entropy must be left as they are.
            noise_TD: added to the embeddings.
        """
        hidden_ND = self.source_hidden(self.lm.get_decoder(), pack, noise_TD)  # type: ignore[arg-type]
        head: Any = self.lm.get_output_embeddings()
        if weight_N is None:
            maths = head_kernels(hidden_ND, head.weight)
            return token_logprobs(hidden_ND, head.weight, pack.target_N, temperature, entropy, maths=maths)
        if temperature != 1 or entropy:
            raise ValueError("with weights there is neither a temperature nor an entropy")
        if self._head_loss is None and torch.is_grad_enabled():
            self._head_loss = head_loss(hidden_ND, head.weight, pack.target_N)
        nll = (self._head_loss or weighted_nll)(hidden_ND, head.weight, pack.target_N, weight_N)
        return TokenStats(nll.logp_N, None, nll.loss)
