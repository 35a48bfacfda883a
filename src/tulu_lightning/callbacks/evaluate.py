"""When the held-out prompts are scored: before a stage's first step, after its last, and in between if asked for."""

import io
from pathlib import Path
from typing import Any

import lightning as L

from tulu_lightning.core.settings import require
from tulu_lightning.data.prompts import PromptData, PromptSource
from tulu_lightning.errors import InputError
from tulu_lightning.evaluation.heldout import HeldOut, Scores
from tulu_lightning.progress import Progress
from tulu_lightning.rollout.scoring import Scorer
from tulu_lightning.types import Prompt, Sampling
from tulu_lightning.verifiers.registry import Verifiers

__all__ = ["Evaluate"]


class Evaluate(L.Callback):
    """Greedy answers to held-out prompts, scored by their verifier; written to `scores/before.json`, `after.json`.

    Random state and batches of training are not touched: sampling is greedy and the engine has its own weights.

    Args:
        sources: prompt rows (`messages`, `ground_truth`, `verifier`) that no training row repeats.
        max_new_tokens: cap of an answer.
        max_tokens: longest prompt, in tokens.
        every_n_steps: also score after so many steps each, to `scores/step_<n>.json` and, as `heldout_accuracy`, to the
            Trainer's logger; 0 for only before and after.

    Raises:
        InputError: `every_n_steps` is below 0.
    """

    def __init__(
        self, sources: list[PromptSource], max_new_tokens: int, max_tokens: int = 2048, every_n_steps: int = 0
    ) -> None:
        super().__init__()
        require(every_n_steps >= 0, "Evaluate.every_n_steps", every_n_steps, "Use 0 for only before and after the run.")
        self.every_n_steps = every_n_steps
        self.sources, self.max_new_tokens, self.max_tokens = sources, max_new_tokens, max_tokens
        self.before: Scores | None = None
        self.after: Scores | None = None
        self._prompts: tuple[Prompt, ...] = ()
        self._stop_ids: tuple[int, ...] = ()
        self._verifiers = Verifiers()

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Read and check the prompts before any weights load.

        Raises:
            InputError: what is trained cannot answer.
        """
        if not pl_module.speaks:
            what = f"Evaluate asks for answers, and {type(pl_module).__name__} trains a model that gives none"
            raise InputError("callbacks", what, "Leave Evaluate out; validation rows score a reward model.")
        if stage != "fit" or self._prompts:
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        prompts = PromptData(
            sources=self.sources,
            tokenizer=pl_module.folder,
            template=data.template.name,
            max_tokens=self.max_tokens,
            examples_per_step=1,
            on_overflow="error",
            verifiers=getattr(data, "own_verifiers", None),
            routes=getattr(data, "own_routes", None),
        )
        prompts.setup()
        self._verifiers = prompts.verifiers
        self._prompts, self._stop_ids = prompts.prompts, prompts.stop_ids

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Score the start weights, once: a resumed run has the record already.

        Raises:
            InputError: a resumed run has the record, but of other prompts or another sampling.
        """
        path = self._path(trainer, "before")
        kept = Scores.from_json(path) if path.exists() else None
        if kept is not None and kept.settings == self._task.settings:
            self.before = kept
        elif pl_module.step == 0:
            self.before = self._score(trainer, pl_module, path)
        elif kept is not None:
            what = f"its scores are of other held-out prompts or sampling, and training is at step {pl_module.step}"
            remedy = "Set Evaluate back to what it was at the start, or give another run folder."
            raise InputError(str(path), what, remedy)
        elif trainer.is_global_zero:
            print(f"no scores of the start weights in {path}: this run cannot show a gain, so it will not be promoted")

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: object, **__: object) -> None:
        """Score the present weights if it is time to; the final ones are scored when the run has ended."""
        if not self.every_n_steps or pl_module.step % self.every_n_steps or pl_module.finished:
            return
        scores = self._score(trainer, pl_module, self._path(trainer, f"step_{pl_module.step:06d}"))
        for logger in trainer.loggers:
            logger.log_metrics({"heldout_accuracy": scores.accuracy}, step=pl_module.step)

    def on_fit_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Score the final weights, if the run came to its end."""
        if pl_module.finished:
            self.after = self._score(trainer, pl_module, self._path(trainer, "after"))

    @property
    def _task(self) -> HeldOut:
        return HeldOut(self._prompts, Sampling(self.max_new_tokens, 0.0, self._stop_ids))

    def _path(self, trainer: L.Trainer, when: str) -> Path:
        return Path(trainer.default_root_dir, "scores", f"{when}.json")

    def _score(self, trainer: L.Trainer, pl_module: Any, path: Path) -> Scores:
        engine = pl_module.make_engine()
        tokenizer: Any = trainer.datamodule.tokenizer  # type: ignore[attr-defined]
        stream = None if trainer.is_global_zero else io.StringIO()  # one rank speaks for all
        label = f"{type(pl_module).__name__} {path.stem}"
        with Progress(label, len(self._prompts), stream=stream) as progress, Scorer(self._verifiers) as scorer:
            told = lambda done, total: progress.update(done)  # noqa: E731
            scores = self._task.evaluate(engine, tokenizer, progress=told, scorer=scorer)
        engine.close()
        if trainer.is_global_zero:
            scores.to_json(path)
            low, high = scores.interval
            print(f"{path.stem}: accuracy {scores.accuracy:.3f} [{low:.3f}, {high:.3f}], n = {scores.n}", flush=True)
        return scores
