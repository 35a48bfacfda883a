import lightning as L
import pytest
import torch
from torch.utils.data import Dataset

from tulu_lightning.data.loader import StepLoader
from tulu_lightning.types import PromptBatch

TOTAL = 6


class Steps(Dataset):
    """Step k is ten times k, and a nested tuple that must stay one."""

    def __getitem__(self, step):
        return PromptBatch(step, (step * 10, (step,)))

    def __len__(self):
        return TOTAL


def expected(start):
    return [PromptBatch(step, (step * 10, (step,))) for step in range(start, TOTAL)]


@pytest.mark.parametrize("workers", [0, 2])
def test_items_are_the_data_sets_own_and_tuples_stay_tuples(workers):
    items = list(StepLoader(Steps(), TOTAL, num_workers=workers))
    assert items == expected(0)
    assert all(type(item) is PromptBatch and type(item.prompts) is tuple for item in items)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("done", range(TOTAL + 1))
def test_a_loader_goes_on_at_the_step_where_its_state_was_taken(done, workers):
    loader = StepLoader(Steps(), TOTAL, num_workers=workers if done in (0, 3) else 0)
    items = iter(loader)
    for _ in range(done):
        next(items)
    state = loader.state_dict()
    assert state == {"step": done}

    resumed = StepLoader(Steps(), TOTAL)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state  # also before its first item
    assert len(resumed) == TOTAL  # the run's length, not the rest's
    assert list(resumed) == expected(done)


class Recorder(L.LightningModule):
    """Notes the steps that it sees and saves a checkpoint after each."""

    def __init__(self, folder=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.automatic_optimization = False
        self.folder, self.seen = folder, []

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)

    def training_step(self, batch, batch_idx):
        self.seen.append(batch.step)
        optimizer = self.optimizers()
        self.manual_backward(self.weight.sum())
        # Two optimiser calls a step, as PPO has: Lightning's global_step runs ahead of ours.
        optimizer.step()
        optimizer.step()
        optimizer.zero_grad()

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if self.folder is not None:
            self.trainer.save_checkpoint(self.folder / f"{batch.step}.ckpt")


def fit(module, folder, workers=0, **options):
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(module, StepLoader(Steps(), TOTAL, num_workers=workers), **options)
    return module.seen


def test_lightning_resumes_exactly_from_the_checkpoint_of_every_step(tmp_path):
    assert fit(Recorder(tmp_path), tmp_path) == list(range(TOTAL))
    for step in range(TOTAL - 1):
        seen = fit(Recorder(), tmp_path, ckpt_path=tmp_path / f"{step}.ckpt")
        assert seen == list(range(step + 1, TOTAL)), f"resumed after step {step}"


def test_lightning_resumes_exactly_with_workers_that_prepare_steps_ahead(tmp_path):
    assert fit(Recorder(tmp_path), tmp_path, workers=1) == list(range(TOTAL))
    assert fit(Recorder(), tmp_path, workers=1, ckpt_path=tmp_path / "2.ckpt") == [3, 4, 5]
