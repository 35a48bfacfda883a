"""A model for lm-evaluation-harness: log-likelihoods on packed attention, what contexts share computed once; our engines' text."""

import hashlib
import io
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from torch.nn.functional import log_softmax

from tulu_lightning.assets.models import generation_eos, load_tokenizer, resolve_model
from tulu_lightning.core.matmul import linear
from tulu_lightning.core.prefix_tree import prefix_pack, prefix_parts
from tulu_lightning.core.step_plan import mix_seed
from tulu_lightning.models.backbone import Backbone, PackedLM
from tulu_lightning.progress import Progress
from tulu_lightning.rollout.engine import Engine
from tulu_lightning.rollout.engines import EngineSettings, build_engine
from tulu_lightning.rollout.local import LocalEngine
from tulu_lightning.rollout.scoring import response_text
from tulu_lightning.rollout.stop_texts import StopTexts
from tulu_lightning.types import Sampling

__all__ = ["HarnessLM"]

Ids = list[int]
PACK_TOKENS = 4096
"""Of a pass, about; a longer text is a pass of its own."""
ROWS = 512
"""Rows of logits at once."""
PROMPTS = 64
"""Prompts that an engine is given at once."""
GENERATED = 256
"""Tokens of an answer where a task does not say; the harness's own default."""


class HarnessLM(TemplateLM):
    """One model folder.

    Args:
        path: folder, name or hub id.
        settings: what samples, and in which dtype; log-likelihoods are computed in that dtype, too.
        seed: of samples, where a task asks for any.
    """

    def __init__(self, path: str, settings: EngineSettings, seed: int = 0) -> None:
        super().__init__()
        self.folder = str(resolve_model(path))
        self.tokenizer: Any = load_tokenizer(path)
        self._settings, self._seed = settings, seed
        self._packed: PackedLM | None = None
        self._engine: Engine | None = None

    # What the harness asks about the model ----------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """Where log-likelihoods are computed."""
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context."""
        bos = self.tokenizer.bos_token_id
        return int(self.eot_token_id if bos is None else bos)

    @property
    def max_length(self) -> int:
        """Positions of the model."""
        return int(self._model.lm.config.max_position_embeddings)

    @property
    def tokenizer_name(self) -> str:
        """For the harness's cache of requests."""
        return self.folder.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> Ids:
        """Token ids; special tokens as the tokenizer's own settings have them, and not twice."""
        bos = self.tokenizer.bos_token
        if add_special_tokens is None:
            add_special_tokens = not (bos and string.startswith(bos))
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text, by the tokenizer's own template."""
        more = {"continue_final_message": not add_generation_prompt}
        return self.tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt, **more
        )

    # Log-likelihoods --------------------------------------------------------------------------------------------------

    @property
    def _model(self) -> PackedLM:
        if self._packed is None:
            low = self._settings.dtype == "bfloat16"
            backbone = Backbone(self.folder, compute_dtype="bfloat16" if low else "float32")
            self._packed = PackedLM(backbone, self.folder).to(self.device).eval()
        return self._packed

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, Ids, Ids]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Summed log-prob of each continuation, and whether it is what greedy decoding would write.

        What several contexts begin with is computed once for all of a pass.
        """
        room, first = self.max_length + 1, [self.prefix_token_id]  # a text's last token is not read
        pairs = [((c or first)[-max(1, room - len(scored)) :], scored) for _, c, scored in requests]
        found: dict[int, tuple[float, bool]] = {}
        with Progress("log-likelihoods", len(requests), stream=None if not disable_tqdm else io.StringIO()) as progress:
            for part in prefix_parts(pairs, PACK_TOKENS):
                found.update(zip(part, self._pass([pairs[place] for place in part]), strict=True))
                progress.update(len(found))
        return [found[place] for place in range(len(requests))]

    @torch.no_grad()
    def _pass(self, pairs: Sequence[tuple[Ids, Ids]]) -> Iterator[tuple[float, bool]]:
        model = self._model
        made = move_data_to_device(prefix_pack(pairs), self.device)
        hidden_ND = model.source_hidden(model.lm.get_decoder(), made)  # type: ignore[arg-type]
        head: Any = model.lm.get_output_embeddings()
        logps, greedy = list[Tensor](), list[Tensor]()
        for hidden, target in zip(hidden_ND.split(ROWS), made.target_N.split(ROWS), strict=True):
            logits = linear(hidden, head.weight.to(hidden.dtype)).float()
            logps.append(log_softmax(logits, -1).gather(1, target[:, None])[:, 0].double().cpu())
            greedy.append((logits.argmax(-1) == target).cpu())
        lengths = [len(continuation) for _, continuation in pairs]
        for logp_L, greedy_L in zip(torch.cat(logps).split(lengths), torch.cat(greedy).split(lengths), strict=True):
            yield float(logp_L.sum()), bool(greedy_L.all())

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-prob of whole texts; longer ones than the model has positions in windows."""
        asked, owners = [], []
        for place, request in enumerate(requests):
            (text,) = request.args
            windows = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
            for context, continuation in map(make_disjoint_window, windows):
                asked.append((None, context, continuation))
                owners.append(place)
        totals = [0.0] * len(requests)
        for place, (value, _) in zip(owners, self._loglikelihood_tokens(asked, disable_tqdm), strict=True):
            totals[place] += value
        return totals

    # Text -------------------------------------------------------------------------------------------------------------

    def _sampler(self) -> Engine:
        if self._engine is None:
            device = str(self.device)
            self._engine = build_engine(
                self._settings, lambda dtype: LocalEngine.from_folder(self.folder, dtype, device), self.folder
            )
        return self._engine

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Text up to the first of a task's stops, or a token that ends a text."""
        stops = tuple(sorted({*generation_eos(self.folder), self.eot_token_id}))
        asked: dict[tuple[Sampling, tuple[str, ...]], list[int]] = defaultdict(list)
        for place, request in enumerate(requests):
            wanted = request.args[1]
            sample = wanted.get("do_sample", False) or wanted.get("temperature", 0) > 0
            temperature = float(wanted.get("temperature", 1.0)) if sample else 0.0
            tokens = int(wanted.get("max_gen_toks", GENERATED))
            sampling = Sampling(tokens, temperature, stops, float(wanted.get("top_p", 1.0)))
            asked[sampling, _texts(wanted.get("until"))].append(place)
        made: dict[int, str] = {}
        with Progress("answers", len(requests), stream=None if not disable_tqdm else io.StringIO()) as progress:
            for (sampling, until), places in asked.items():
                ends = StopTexts(until, self.tokenizer) if until else None
                for at in range(0, len(places), PROMPTS):
                    part = places[at : at + PROMPTS]
                    room = self.max_length - sampling.max_new_tokens
                    prompts = [self.tok_encode(requests[p].args[0])[-room:] for p in part]
                    keys = [_key(requests[p].args[0]) for p in part]
                    groups = self._sampler().generate(
                        prompts, 1, sampling, mix_seed(self._seed), keys=keys, stop_texts=ends
                    )
                    for place, (completion,) in zip(part, groups, strict=True):
                        text = response_text(completion, self.tokenizer)
                        made[place] = _until(text, until)
                    progress.update(len(made))
        return [made[place] for place in range(len(requests))]

    def close(self) -> None:
        """Give the memory back."""
        if self._engine is not None:
            self._engine.close()
        self._engine = self._packed = None


def _texts(until: str | Sequence[str] | None) -> tuple[str, ...]:
    """A request's stops, of which the harness has one or several, and at times an empty one."""
    return tuple(text for text in ([until] if isinstance(until, str) else until or ()) if text)


def _until(text: str, stops: Sequence[str]) -> str:
    for stop in stops:
        text = text.split(stop)[0]
    return text


def _key(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:6], "big")
