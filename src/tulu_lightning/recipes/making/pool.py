"""The models that write, as settings: checkpoints, and servers of OpenAI's chat interface."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from tulu_lightning.assets.models import resolve_model
from tulu_lightning.checkpoints.identity import weights_digest
from tulu_lightning.core.settings import require
from tulu_lightning.data.chat import Message
from tulu_lightning.errors import InputError
from tulu_lightning.verifiers.chat_server import check_server

__all__ = ["Answer", "Decoding", "Model", "Question", "identity", "version"]


@dataclass(frozen=True)
class Model:
    """A model that writes: a checkpoint (`path`) or a server (`url`).

    Raises:
        InputError: neither or both of `path` and `url`, a key that is not set, or a number out of its range.
    """

    name: str
    """How rows call it."""
    path: str | None = None
    """Model folder, or a known name."""
    url: str | None = None
    """Server of OpenAI's chat interface, such as http://localhost:8000/v1."""
    served: str | None = None
    """The model as the server names it; `name` if left out."""
    template: str | None = None
    """Of a checkpoint: one of our chat templates; the model's own if left out."""
    engine: Literal["local", "vllm"] = "local"
    """Of a checkpoint: what samples from it in this process."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of a checkpoint."""
    api_key_env: str | None = None
    """Environment variable that holds the server's key. The key itself is written nowhere."""
    concurrency: int = 16
    """Requests at a time."""
    requests_per_minute: float | None = None
    """Most requests that are begun in a minute; no limit if left out."""
    timeout_seconds: float = 300.0
    """Longest wait for one answer."""
    retries: int = 5
    """Further tries of a request that failed for a reason that may pass."""
    backoff_seconds: float = 1.0
    """First pause between two tries; each further one is twice as long."""
    give_up: int = 20
    """Requests in a row that come to nothing, after which the command stops; what is done is kept. Of one prompt they
    count once, and not at all where a server that answers others refuses them."""
    price_prompt: float = 0.0
    """Of a million prompt tokens, in your currency; for the cost that rows and summary tell."""
    price_tokens: float = 0.0
    """Of a million written tokens."""

    def __post_init__(self) -> None:
        where = f"model {self.name!r}"
        if (self.path is None) == (self.url is None):
            raise InputError(where, "has neither or both of path and url", "Give exactly one.")
        if self.url is not None:
            check_server(where, self.url, self.api_key_env)
        for name, least in (("concurrency", 1), ("retries", 0), ("give_up", 1), ("backoff_seconds", 0)):
            require(getattr(self, name) >= least, f"{where}.{name}", getattr(self, name), f"Use at least {least}.")
        for name in ("requests_per_minute", "timeout_seconds"):
            value = getattr(self, name)
            require(value is None or value > 0, f"{where}.{name}", value, "Use a number above 0.")

    def cost(self, answer: "Answer") -> float:
        """Of an answer and its prompt, in the currency of the prices."""
        return (answer.prompt_tokens * self.price_prompt + answer.tokens * self.price_tokens) / 1e6


@dataclass(frozen=True)
class Decoding:
    """How answers are sampled; the defaults are those of Tülu 3's preference data (its release, `scripts/synth_pref`).

    Raises:
        InputError: a number is out of its range.
    """

    max_new_tokens: int = 7500
    temperature: float = 1.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        require(self.max_new_tokens >= 1, "decoding.max_new_tokens", self.max_new_tokens, "Use at least 1.")
        require(self.temperature >= 0, "decoding.temperature", self.temperature, "Use 0 (greedy) or more.")
        require(0 < self.top_p <= 1, "decoding.top_p", self.top_p, "It is a share: above 0, to 1.")


class Question(NamedTuple):
    """A conversation that a model is to go on with."""

    key: str
    """Hexadecimal; decides the seed, with the number of the answer."""
    messages: Sequence[Message]
    numbers: Sequence[int] = (0,)
    """Which answers are wanted: 0 to 3 are four of them, 2 alone is the third."""
    about: Any = None
    """What whoever asks wants back with the answers."""


class Answer(NamedTuple):
    """One answer of a model."""

    number: int
    """Which of the question's it is."""
    text: str
    finish: str
    """"stop"; or why it is not whole: "length", or of a server "content_filter" or "abort"."""
    prompt_tokens: int
    tokens: int
    ids: list[int] | None = None
    """Token ids, where an engine of ours sampled them."""
    prompt_ids: list[int] | None = None
    version: str | None = None
    """What a server says which model it was; None where it says nothing, and of our engines."""


def version(who: Mapping[str, Any], answer: Answer) -> str:
    """Which model wrote an answer: the digest of a checkpoint's weights; a server's word, or what it was asked for."""
    return who["weights"] if "weights" in who else answer.version or who["served"]


def identity(model: Model) -> dict[str, Any]:
    """What makes other answers of a model: which weights, how they are asked; not where a server is."""
    if model.path is None:
        return {"name": model.name, "served": model.served or model.name}
    folder = resolve_model(model.path)
    return {
        "name": model.name,
        "weights": weights_digest(folder),
        "template": model.template,
        "dtype": model.dtype,
        "engine": model.engine,
    }
