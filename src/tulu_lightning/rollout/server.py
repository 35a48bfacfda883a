"""An engine in a process of its own: a vLLM server, asked over HTTP.

Nothing here needs vLLM in the trainer's environment. Start the server with `rollout.server_process.start_server`, or by
hand with `--worker-extension-cls tulu_lightning.rollout.vllm_worker.Worker --logprobs-mode processed_logprobs
--generation-config vllm` and `VLLM_SERVER_DEV_MODE=1`, which opens the routes that refresh it to whoever reaches its port.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from tulu_lightning.models.lora import Lora
from tulu_lightning.rollout.adapters import adapter_folder, adapter_options, new_name
from tulu_lightning.rollout.client import Client
from tulu_lightning.rollout.delivered import DeliveredEngine
from tulu_lightning.rollout.delivery import Delivery, contents_of, dtype_of, joined
from tulu_lightning.rollout.engine import EngineError, Health, Made, Progress
from tulu_lightning.rollout.requests import check_prompts, check_sequences, completion, seeds
from tulu_lightning.rollout.server_process import Server, start_server
from tulu_lightning.rollout.stop_texts import StopTexts
from tulu_lightning.rollout.transport import Files, Transport
from tulu_lightning.types import Completion, Sampling

__all__ = ["ServerEngine"]


class ServerEngine(DeliveredEngine):
    """Samples on a vLLM server; implements `rollout.engine.Engine`, with the proofs of `rollout.vllm.VLLMEngine`.

    Weights get there by a transport: files in shared memory on the same machine, or a broadcast. The version is kept on
    the server too: one that was started again, or that somebody else refreshed, is not sampled from.

    Args:
        url: of the server.
        folder: the model folder that it was started with.
        dtype: that it was started with.
        version: of the weights in that folder; only of a `server` that was started here and so is known to hold them.
            Another one has version -1, and is not sampled from, until it got its first refresh.
        server: the process, if it is this engine's to end.
        max_model_len: prompt and new tokens of one sample at most; the server's own limit if left out.
        proof_columns: columns of each matrix that a refresh reads back; 0 for all.
        seconds: longest wait for one prompt's samples, or for a refresh.
        connections: prompts in flight at once.
        transport: how weights get there; `Files()` if left out.
        lora: given, the server keeps its base, and a refresh sends adapters, as files. It must have been started with
            `--enable-lora` and `VLLM_ALLOW_RUNTIME_LORA_UPDATING=1` then.

    Raises:
        EngineError: no server answers at the url, or one that lacks what the module's first lines ask for.
    """

    def __init__(
        self,
        url: str,
        folder: str | Path,
        dtype: torch.dtype | str = torch.float32,
        *,
        version: int = 0,
        server: Server | None = None,
        max_model_len: int | None = None,
        proof_columns: int = 16,
        seconds: float = 600,
        connections: int = 64,
        transport: Transport | None = None,
        lora: Lora | None = None,
    ) -> None:
        self._client, self._server = Client(url), server
        contents, kind = contents_of(folder, lora), dtype_of(dtype)
        self._seconds, self._connections = seconds, connections
        self._transport = transport or Files()
        model, *_ = self._client.get("/v1/models", 30)["data"]  # adapters of an earlier run come after it
        positions = min(contents.positions, model["max_model_len"], max_model_len or math.inf)
        super().__init__(contents, kind, -1, proof_columns, positions, lora)
        self._model = model["id"]
        self._adapter: str | None = None
        self._held()
        if server is not None:
            self._rpc("tulu_version", version)
            self._version = version

    @classmethod
    def started(
        cls,
        folder: str | Path,
        dtype: torch.dtype | str = torch.float32,
        *,
        version: int = 0,
        seconds: float = 600,
        transport: Transport | None = None,
        lora: Lora | None = None,
        **settings: Any,
    ) -> Self:
        """Start a server and return its engine, which ends it on `close`; settings of `start_server`."""
        if lora is not None:
            given = settings.pop("options", ())
            settings["options"] = (*_flags(adapter_options(lora, contents_of(folder, lora))), *given)
        server = start_server(folder, str(dtype).removeprefix("torch."), **settings)
        more: Any = {"version": version, "server": server, "seconds": seconds, "transport": transport, "lora": lora}
        try:
            return cls(server.url, folder, dtype, **more)
        except BaseException:
            server.close()
            raise

    def health(self) -> Health:
        """Asks the server, for at most five seconds."""
        place = f"vLLM server at {self._client.url}"
        try:
            self._client.get("/health", 5)
        except (EngineError, RuntimeError) as error:
            ended = "" if self._server is None else self._server.state()
            return Health(False, self._version, f"{place}: {error}{ended}")
        return Health(True, self._version, place)

    def close(self) -> None:
        """End the server if it was started here."""
        if self._server is not None:
            self._server.close()

    # -- weights --

    def _carry(self, delivery: Delivery, version: int) -> tuple[Mapping[str, Any], bool]:
        if self._lora is not None:
            report = self._add_adapter(delivery, self._lora, version)
        else:
            shapes = {name: list(shape) for name, shape in self._contents.shapes.items()}
            report = self._transport.carry(iter(delivery), shapes, self._rpc, self._columns, version)
        return report, self._client.post("/reset_prefix_cache", {}, self._seconds)["success"]

    def _add_adapter(self, delivery: Delivery, lora: Lora, version: int) -> Mapping[str, Any]:
        name, before = new_name(version), self._adapter
        with adapter_folder(delivery.complete(), lora) as folder:
            body = {"lora_name": name, "lora_path": folder}
            try:
                self._client.post("/v1/load_lora_adapter", body, self._seconds, reads=False)
            except RuntimeError as error:
                if isinstance(error, EngineError):
                    raise
                text = "was it started with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1?"
                raise EngineError(f"{error}; {text}") from error
            report = self._rpc("tulu_adapter", folder, version)
        self._adapter = name
        if before is not None:  # vLLM has dropped its weights; this is its name
            self._client.post("/v1/unload_lora_adapter", {"lora_name": before}, self._seconds, reads=False)
        return report

    def _read_marks(self) -> dict[str, str]:
        return self._rpc("tulu_marks")

    def _rpc(self, method: str, *arguments: Any) -> Any:
        body = {"method": method, "args": arguments, "timeout": self._seconds}
        return joined(self._client.post("/collective_rpc", body, self._seconds)["results"])

    def _held(self) -> int | None:
        """Version that the server says it holds; None since its start."""
        try:
            return self._rpc("tulu_version")["version"]
        except RuntimeError as error:
            if isinstance(error, EngineError):
                raise
            text = "was it started with --worker-extension-cls and VLLM_SERVER_DEV_MODE=1 (see rollout.server)?"
            raise EngineError(f"{error}; {text}") from error

    def _check_version(self) -> None:
        self._check_held()
        held = self._held()
        if held != self._version:
            self._version = -1
            what = "was started again" if held is None else f"holds the weights of version {held}"
            raise EngineError(f"the server at {self._client.url} {what} since its last refresh from here: refresh it")

    # -- sampling --

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        n: int,
        sampling: Sampling,
        seed: int,
        *,
        keys: Sequence[int] | None = None,
        progress: Progress | None = None,
        made: Made | None = None,
        stop_texts: StopTexts | None = None,
    ) -> list[list[Completion]]:
        """See `Engine.generate`.

        Raises:
            EngineError: the server died or did not answer in time; nothing was returned.
        """
        self._check_version()
        check_prompts(prompts, n, sampling, self._contents, self._positions)
        greedy = sampling.temperature == 0  # all samples are one
        bodies = [
            {
                "prompt": list(prompt),
                "n": 1 if greedy else n,
                "seed": own,
                "max_tokens": sampling.max_new_tokens,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": sampling.top_k,
                "stop_token_ids": list(sampling.stop_ids),
                "ignore_eos": True,  # else the checkpoint's own EOS would stop too
                "logprobs": 0,
                **({} if stop_texts is None else {"stop": stop_texts.texts, "include_stop_str_in_output": True}),
            }
            for prompt, own in zip(prompts, seeds(seed, len(prompts), keys), strict=True)
        ]

        def group(answer: Any) -> list[Completion]:
            choices = sorted(answer["choices"], key=lambda choice: choice["index"])
            found = [
                completion(c["token_ids"], c["logprobs"]["token_logprobs"], c["finish_reason"], self._version)
                for c in choices
            ]
            return found * n if greedy else found

        groups: dict[int, list[Completion]] = {}

        def report(done: int, place: int, answer: Any) -> None:
            groups[place] = group(answer)
            if made is not None:
                made(place, groups[place])
            if progress is not None:
                progress(done * n, len(prompts) * n)

        self._ask(bodies, report)
        return [groups[place] for place in range(len(bodies))]

    def logprobs(
        self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]], temperature: float = 1.0
    ) -> list[Tensor]:
        """See `Engine.logprobs`. Other temperatures than 1 cost one request a token: vLLM has no scores for them."""
        check_sequences(sequences, temperature, self._contents, self._positions)
        common = {"max_tokens": 1, "seed": 0, "temperature": temperature}
        if temperature == 1:
            bodies = [{**common, "prompt": [*p, *r], "prompt_logprobs": 0} for p, r in sequences]
            answers = self._ask(bodies)
            return [_prompt_scores(a["choices"][0], r) for a, (_, r) in zip(answers, sequences, strict=True)]
        places = [([*p, *r[:i]], token) for p, r in sequences for i, token in enumerate(r)]
        bodies = [{**common, "prompt": ids, "logprobs": 1, "logprob_token_ids": [token]} for ids, token in places]
        bodies = [{**body, "return_tokens_as_token_ids": True} for body in bodies]
        found = [a["choices"][0]["logprobs"]["top_logprobs"][0] for a in self._ask(bodies)]
        scores = torch.tensor([at[f"token_id:{token}"] for at, (_, token) in zip(found, places, strict=True)])
        return list(scores.split([len(response) for _, response in sequences]))

    def _ask(
        self, bodies: Sequence[dict[str, Any]], report: Callable[[int, int, Any], None] | None = None
    ) -> list[Any]:
        """Answers in the order of the bodies. The first error ends it; what is in flight is left to its own limit.

        `report` gets each as it comes: how many there are, the body's place, the answer.
        """
        pool = ThreadPoolExecutor(self._connections)
        try:
            common = {"model": self._adapter or self._model, "return_token_ids": True}
            path, seconds = "/v1/completions", self._seconds
            asked = [pool.submit(self._client.post, path, {**common, **body}, seconds) for body in bodies]
            places = {one: place for place, one in enumerate(asked)}
            for done, one in enumerate(as_completed(asked), 1):
                answer = one.result()
                if report is not None:
                    report(done, places[one], answer)
            return [one.result() for one in asked]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _flags(options: Mapping[str, Any]) -> list[str]:
    """vLLM's arguments on a command line."""
    words = list[str]()
    for name, value in options.items():
        words.append(f"--{name.replace('_', '-')}")
        words += [] if value is True else map(str, value if isinstance(value, list) else [value])
    return words


def _prompt_scores(choice: Mapping[str, Any], response: Sequence[int]) -> Tensor:
    places = choice["prompt_logprobs"][-len(response) :]
    return torch.tensor([place[str(token)]["logprob"] for token, place in zip(response, places, strict=True)])
