"""Whether a model computes the same packed as alone, asked once when its weights load.

Packed attention is plain causal attention over a chain of segments, and the head is a bare matrix. An architecture
that needs more (soft caps, attention sinks, a logit scale, a recurrent state that runs on over the next document)
would train on wrong numbers without an error. A few random tokens through both paths tell.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tulu_lightning.core.packing import pack
from tulu_lightning.errors import InputError
from tulu_lightning.models import attention
from tulu_lightning.models.linear import use_fast_layers
from tulu_lightning.models.skeleton import NotStreamedError
from tulu_lightning.types import Document, Pack, Segment

__all__ = ["check_packed"]

TOLERANCE = 1e-3
"""Largest difference of two logits, relative to the largest logit; fp32 leaves about 1e-5."""
REMEDY = "Give a model with plain causal attention and a bare output head (Llama, Qwen 2 and 3, Mistral and the like)."


LARGEST = 300_000_000
"""Parameters of the largest model that is made for a trial alone."""


@torch.no_grad()
def check_packed(lm: PreTrainedModel, folder: str) -> None:
    """Refuse a model whose logits differ between a pack and each of its chains run alone by its own forward.

    Of a model without an output head (a reward model) the hidden states are compared.

    The pack holds a plain document and a prompt with two children, 20 tokens in all. In place of a model without weights
    (`models.skeleton`) a small one of its kind is asked, with random weights.

    Args:
        lm: with packed attention.
        folder: where it came from, for the message.

    Raises:
        InputError: they differ, or the architecture cannot run packed at all.
        NotStreamedError: no small one of its kind can be made, or it fails: then the model itself has to be asked.
    """
    if not any(parameter.is_meta for parameter in lm.parameters()):
        _check(lm, folder)
        return
    try:
        _check(_small(lm), folder)
    except InputError as error:
        raise NotStreamedError(f"a small one of its kind fails a trial ({error.what})") from error


def _check(lm: PreTrainedModel, folder: str) -> None:
    speaks = lm.can_generate()  # else it is a reward model, whose head is `load_scorer`'s to check
    head: Any = lm.get_output_embeddings()
    cap = getattr(lm.config, "final_logit_softcapping", None)
    if speaks and (head is None or getattr(head, "bias", None) is not None or cap):
        raise InputError(folder, "its output head is more than one matrix (a bias or a soft cap)", REMEDY)
    packed, chains = _example(lm.config.get_text_config(decoder=True).vocab_size)
    training = lm.training
    lm.eval()
    try:
        found_TV = _packed(lm, packed)
        found_TV = found_TV @ head.weight.T if speaks else found_TV
        with _own_attention(lm):
            expected_TV = torch.cat([_alone(lm, ids_L, speaks)[at:] for ids_L, at in chains])
    except InputError as error:
        raise InputError(folder, error.what, error.remedy) from error
    except (TypeError, ValueError, AttributeError, RuntimeError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise InputError(folder, f"its architecture does not run packed ({reason})", REMEDY) from error
    finally:
        lm.train(training)
    difference = float((found_TV - expected_TV).abs().max() / expected_TV.abs().max())
    if not difference <= TOLERANCE:
        numbers = "logits" if speaks else "hidden states"
        what = f"packed, its {numbers} are off by {difference:.1g} of the largest one from what they are alone"
        raise InputError(folder, what, REMEDY)


def _small(lm: PreTrainedModel) -> PreTrainedModel:
    """A model of the same class with few heads, layers and words, and random weights."""
    config: Any = copy.deepcopy(lm.config)
    try:
        heads = config.num_attention_heads
        key_heads = getattr(config, "num_key_value_heads", None) or heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        few = min(key_heads, 2)
        kinds = getattr(config, "layer_types", None) or []
        layers = max((kinds.index(kind) + 1 for kind in set(kinds)), default=2)
        layers = min(max(layers, 2), config.num_hidden_layers)
        changes: dict[str, Any] = {
            **{"num_attention_heads": few * (heads // key_heads), "num_key_value_heads": few},
            **{"hidden_size": few * (heads // key_heads) * width, "intermediate_size": 256},
            **{"num_hidden_layers": layers, "layer_types": kinds[:layers], "vocab_size": 64},
            **{"pad_token_id": None, "bos_token_id": None, "eos_token_id": None},
        }
        for name, value in changes.items():
            if hasattr(config, name) and value != []:
                setattr(config, name, value)
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in type(lm)(config).parameters())
        if size > LARGEST:
            raise ValueError(f"a small one has {size} parameters")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            small = type(lm)._from_config(config, dtype=torch.float32, attn_implementation=attention.NAME)
    except (AttributeError, TypeError, ValueError, RuntimeError, KeyError, ZeroDivisionError) as error:
        raise NotStreamedError(f"no small {type(lm).__name__} can be made for a trial ({error})") from error
    use_fast_layers(small)
    return small


def _example(vocabulary: int) -> tuple[Pack, list[tuple[Tensor, int]]]:
    """A pack, and its chains with the number of tokens of each that another chain has shown already."""
    generator = torch.Generator().manual_seed(0)  # its own: the run's random state stays as it was
    ids = torch.randint(0, vocabulary, (20,), generator=generator)
    plain, prompt, first, second = ids.split([6, 6, 4, 4])
    whole = torch.ones(6)
    packed = pack(
        [
            Document((Segment(plain, whole),)),
            Document((Segment(prompt, whole), Segment(first, whole[:4], 0), Segment(second, whole[:4], 0))),
        ]
    )
    return packed, [(plain, 0), (torch.cat([prompt, first]), 0), (torch.cat([prompt, second]), 6)]


def _alone(lm: Any, ids_L: Tensor, speaks: bool) -> Tensor:
    if speaks:
        return lm(ids_L[None], use_cache=False).logits[0]
    return lm.get_decoder()(ids_L[None], use_cache=False).last_hidden_state[0]


def _packed(lm: PreTrainedModel, packed: Pack) -> Tensor:
    decoder: Any = lm.get_decoder()
    return decoder(
        input_ids=packed.tokens_T[None],
        position_ids=packed.positions_T[None],
        use_cache=False,
        segments=attention.layout(packed.spans),
    ).last_hidden_state[0]


@contextmanager
def _own_attention(lm: PreTrainedModel) -> Iterator[None]:
    """The architecture's own, in its plainest form, which has all of its parts."""
    lm.set_attn_implementation("eager")
    try:
        yield
    finally:
        lm.set_attn_implementation(attention.NAME)
