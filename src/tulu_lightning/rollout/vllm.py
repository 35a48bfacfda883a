"""vLLM inside this process: the only file that imports vllm.

vLLM expects to own its process; `rollout.guard` puts back what it changes. One thing stays: on a machine with several
memory nodes this process takes its memory from one of them from then on.
"""

import importlib.util
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from tulu_lightning.errors import InputError
from tulu_lightning.models.lora import Lora
from tulu_lightning.rollout.adapters import adapter_folder, adapter_options, new_name
from tulu_lightning.rollout.delivered import DeliveredEngine
from tulu_lightning.rollout.delivery import Contents, Delivery, contents_of, dtype_of
from tulu_lightning.rollout.engine import Health, Made, Progress
from tulu_lightning.rollout.guard import ProcessGroup, guarded, quiet_seed
from tulu_lightning.rollout.requests import START_SHARE, check_prompts, check_sequences, completion, reporter, seeds
from tulu_lightning.rollout.stop_texts import StopTexts
from tulu_lightning.types import Completion, Sampling

__all__ = ["VLLMEngine"]

WORKER = "tulu_lightning.rollout.vllm_worker.Worker"
REMEDY = "Make an environment with it (`make setup-vllm` for CPUs, `pip install -e '.[vllm]'` for GPUs)."
_group = ProcessGroup()


class VLLMEngine(DeliveredEngine):
    """Samples with vLLM in this process, on one device; implements `rollout.engine.Engine`.

    What a refresh proves, tensor by tensor: that it arrived as it was sent (a checksum over all elements on both
    sides), and that the layers hold it: vLLM packs and fuses matrices and keeps no original, so `proof_columns` columns
    of each, others at each version, are read back through the layer's own kernel and must be equal. Vectors and
    embeddings are compared whole. That attention, norms and sampling compute rightly with them is for canary log-probs
    to say (`rollout.canary`).

    A trainer that draws from torch's global random state while another thread samples here gets some numbers twice.

    In a distributed run, build it after Lightning has made its process group. Close it last.

    Args:
        llm: a vLLM `LLM` in this process; `from_folder` makes one.
        contents: of the model.
        dtype: of the weights.
        version: of the weights.
        proof_columns: 0 compares whole matrices, at the price of a forward over `hidden size` tokens.
        lora: of an `llm` that is sent adapters alone (`rollout.adapters`).
    """

    def __init__(
        self,
        llm: Any,
        contents: Contents,
        dtype: torch.dtype,
        version: int = 0,
        proof_columns: int = 16,
        lora: Lora | None = None,
    ) -> None:
        positions = min(contents.positions, llm.model_config.max_model_len)
        super().__init__(contents, dtype, version, proof_columns, positions, lora)
        self._llm: Any = llm
        self._adapter: Any = None

    @classmethod
    def from_folder(
        cls,
        folder: str | Path,
        dtype: torch.dtype | str = torch.float32,
        max_model_len: int | None = None,
        version: int = 0,
        kv_cache_mb: int | None = None,
        proof_columns: int = 16,
        seed: int = 0,
        lora: Lora | None = None,
        **settings: Any,
    ) -> Self:
        """An engine with the weights of a Hugging Face folder.

        Args:
            folder: config, weights and tokenizer.
            dtype: float32 or bfloat16, as a torch dtype or its name.
            max_model_len: prompt and new tokens of one sample at most; the model's own limit if left out.
            version: of the weights.
            kv_cache_mb: memory for keys and values, in MB. If left out, 1024 on a CPU; on a GPU vLLM takes what it finds
                (its `gpu_memory_utilization`, which is a setting, too), and does not start beside a trainer.
            proof_columns: see the class.
            seed: vLLM's own; no sample depends on it.
            lora: given, the folder is a base that stays, and a refresh sends adapters.
            settings: further arguments of `vllm.LLM`, e.g. `max_num_seqs`.

        Raises:
            InputError: vLLM is not installed, the folder does not load, or vLLM refuses a setting.
        """
        contents = contents_of(folder, lora)
        kind = dtype_of(dtype)
        on_gpu = torch.cuda.is_available()
        if kv_cache_mb is None and not on_gpu:
            kv_cache_mb = 1024
        beside = {"gpu_memory_utilization": START_SHARE} if on_gpu and kv_cache_mb is not None else {}
        chosen = {
            "dtype": str(kind).removeprefix("torch."),
            "max_model_len": max_model_len,
            "kv_cache_memory_bytes": None if kv_cache_mb is None else kv_cache_mb << 20,
            "seed": seed,
            "enforce_eager": not on_gpu,
            **beside,
            **({} if lora is None else adapter_options(lora, contents)),
            **settings,
        }
        with guarded():
            llm = _build(str(folder), chosen)
        return cls(llm, contents, kind, version, proof_columns, lora)

    def health(self) -> Health:
        """In this process an engine is alive until it is closed."""
        alive = self._llm is not None
        return Health(alive, self._version, "vLLM in this process" if alive else "vLLM in this process: closed")

    def close(self) -> None:
        """Give the memory back. A process group that was there before the engine stays."""
        if self._llm is None:
            return
        _group.leave()
        with guarded():
            self._llm.llm_engine.engine_core.shutdown()
        self._llm = None

    # -- weights --

    def _carry(self, delivery: Delivery, version: int) -> tuple[Mapping[str, Any], bool]:
        with quiet_seed():
            if self._lora is not None:
                report = self._add_adapter(delivery, self._lora, version)
            else:
                (report,) = self._llm.collective_rpc("tulu_load", args=(iter(delivery), self._columns, version))
            return report, self._llm.reset_prefix_cache()

    def _add_adapter(self, delivery: Delivery, lora: Lora, version: int) -> Mapping[str, Any]:
        request: Any = importlib.import_module("vllm.lora.request").LoRARequest
        number = 1 if self._adapter is None else self._adapter.lora_int_id + 1  # a number that is known is not loaded
        with adapter_folder(delivery.complete(), lora) as folder:
            self._adapter = request(new_name(version), number, folder)
            self._llm.llm_engine.add_lora(self._adapter)
            (report,) = self._llm.collective_rpc("tulu_adapter", args=(folder, version))
        return report

    def _read_marks(self) -> dict[str, str]:
        with quiet_seed():
            (found,) = self._llm.collective_rpc("tulu_marks")
        return found

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
        """See `Engine.generate`."""
        self._check_held()
        check_prompts(prompts, n, sampling, self._contents, self._positions)
        greedy = sampling.temperature == 0  # all samples are one
        wanted = [
            _vllm().SamplingParams(
                n=1 if greedy else n,
                seed=own,
                max_tokens=sampling.max_new_tokens,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                stop_token_ids=list(sampling.stop_ids),
                ignore_eos=True,  # else the checkpoint's own EOS would stop too
                logprobs=0,
                detokenize=stop_texts is not None,
                stop=None if stop_texts is None else list(stop_texts.texts),
                include_stop_str_in_output=stop_texts is not None,
            )
            for own in seeds(seed, len(prompts), keys)
        ]
        given = [_vllm().TokensPrompt(prompt_token_ids=list(prompt)) for prompt in prompts]
        answers = self._ask(given, wanted, reporter(progress, len(given), n, n if greedy else 1))
        result = []
        for answer in answers:
            group = []
            for output in sorted(answer.outputs, key=lambda output: output.index):
                # By token: another one may stand beside it.
                logprobs = [
                    place[token].logprob for token, place in zip(output.token_ids, output.logprobs, strict=True)
                ]
                group.append(completion(output.token_ids, logprobs, output.finish_reason, self._version))
            result.append(group * n if greedy else group)
            if made is not None:
                made(len(result) - 1, result[-1])
        return result

    def logprobs(
        self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]], temperature: float = 1.0
    ) -> list[Tensor]:
        """See `Engine.logprobs`. Other temperatures than 1 cost one request a token: vLLM has no scores for them."""
        check_sequences(sequences, temperature, self._contents, self._positions)
        if temperature != 1:
            return [self._one_by_one(prompt, response, temperature) for prompt, response in sequences]
        given = [_vllm().TokensPrompt(prompt_token_ids=[*prompt, *response]) for prompt, response in sequences]
        wanted = _vllm().SamplingParams(max_tokens=1, temperature=1.0, prompt_logprobs=0, detokenize=False, seed=0)
        answers = self._ask(given, [wanted] * len(given))
        return [
            torch.tensor(
                [
                    place[token].logprob
                    for token, place in zip(response, answer.prompt_logprobs[-len(response) :], strict=True)
                ]
            )
            for (_, response), answer in zip(sequences, answers, strict=True)
        ]

    def _one_by_one(self, prompt: Sequence[int], response: Sequence[int], temperature: float) -> Tensor:
        whole = [*prompt, *response]
        given = [_vllm().TokensPrompt(prompt_token_ids=whole[: len(prompt) + i]) for i in range(len(response))]
        wanted = [
            _vllm().SamplingParams(
                max_tokens=1, temperature=temperature, logprobs=1, logprob_token_ids=[token], detokenize=False, seed=0
            )
            for token in response
        ]
        answers = self._ask(given, wanted)
        return torch.tensor([a.outputs[0].logprobs[0][t].logprob for a, t in zip(answers, response, strict=True)])

    def _ask(self, given: list[Any], wanted: list[Any], bar: Any = False) -> list[Any]:
        if not given:
            return []
        with quiet_seed():
            return self._llm.generate(given, wanted, use_tqdm=bar, lora_request=self._adapter)


def _vllm() -> Any:
    """The package, imported when it is needed: it takes seconds."""
    return importlib.import_module("vllm")


def _take_this_gpu() -> None:
    """Have vLLM run on the GPU of this process: with one worker it takes the first of the machine, on every rank.

    Read in vLLM's code (`UniProcExecutor._distributed_args`); not run on several GPUs.
    """
    if not torch.cuda.is_available():
        return
    executor: Any = importlib.import_module("vllm.v1.executor.uniproc_executor").UniProcExecutor
    if not hasattr(executor, "_tulu_arguments"):
        executor._tulu_arguments = executor._distributed_args
        executor._distributed_args = lambda self: (*self._tulu_arguments()[:2], torch.cuda.current_device())


def _build(folder: str, settings: dict[str, Any]) -> Any:
    """An `LLM` in this process, without its log lines. The caller guards."""
    if importlib.util.find_spec("vllm") is None:
        raise InputError("engine", "vLLM is not installed", REMEDY)
    # Read when vllm is imported and when an engine is built. Threads stay where they are: the trainer runs on them too.
    chosen = {
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    os.environ.update({name: os.environ.get(name, value) for name, value in chosen.items()})
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    core: Any = importlib.import_module("vllm.v1.engine.core")
    if not hasattr(core, "_tulu_cleanup"):
        core._tulu_cleanup = cleanup = core.cleanup_dist_env_and_memory
        core.cleanup_dist_env_and_memory = lambda *_, **__: _group.clean(cleanup)
    _group.join()
    _take_this_gpu()
    try:
        return _vllm().LLM(
            folder,
            logprobs_mode="processed_logprobs",
            generation_config="vllm",
            worker_extension_cls=WORKER,
            disable_log_stats=True,
            use_tqdm_on_load=False,
            **settings,
        )
    except (ValueError, RuntimeError, OSError) as error:
        _group.leave()
        reason = str(error).strip().splitlines()[0]
        raise InputError(folder, f"vLLM does not start on it ({reason})", "See vLLM's documentation.") from error
