"""The gradient does not depend on how a step is cut into micro-batches, and it is the textbook one."""

import math

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from stage_runs import (
    ROWS,
    TINY,
    dpo,
    even_data,
    fit,
    grpo,
    ppo,
    preference_data,
    prompt_data,
    reward,
    settings,
    sft,
    sft_data,
    weights,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from tulu_lightning.assets.arithmetic import sft_rows
from tulu_lightning.assets.models import resolve_model
from tulu_lightning.core.reduce import document_of
from tulu_lightning.data.sft import SFTData
from tulu_lightning.data.sources import Source
from tulu_lightning.errors import InputError
from tulu_lightning.models.backbone import Backbone
from tulu_lightning.stages.optimizer import AdamW
from tulu_lightning.stages.ppo import Critic
from tulu_lightning.stages.sft import SFT

SPLITS = (1, 200, 100_000)
"""Limits of a pass: every document alone, a few together, the whole step at once."""
ROUNDING = {"sft": 1e-6, "dpo": 3e-6, "reward": 4e-5, "ppo": 1e-6, "grpo": 1e-6}
"""Relative to the gradient. On pairs it is the difference of two that nearly cancel: answers share all but a digit. A
reward model's is 160 times smaller than either of the two, which differ by 2e-7 between splits."""
LINEAR = {"eps": 1.0, "lr": 0.1}
"""With a large eps AdamW's update is nearly proportional to the gradient, so weights show what gradients were."""


def run(name, micro_tokens, folder):
    if name == "sft":
        stage, data = sft(**LINEAR), sft_data(micro_tokens=micro_tokens, max_steps=4)
    elif name == "dpo":
        stage, data = dpo(**LINEAR), preference_data(micro_tokens=micro_tokens, max_steps=4)
    elif name == "reward":
        stage, data = reward(**LINEAR), preference_data(micro_tokens=micro_tokens, max_steps=4)
    elif name == "grpo":
        stage, data = grpo(optimizer=AdamW(**LINEAR), micro_tokens=micro_tokens), even_data(max_steps=4)
    else:
        settings = AdamW(**LINEAR)
        stage = ppo(optimizer=settings, critic=Critic(settings, layers=2), micro_tokens=micro_tokens)
        data = prompt_data(max_steps=4)
    return stage, fit(stage, data, folder)


def distance(one, other):
    """Relative distance of two dictionaries of tensors, as one vector each."""
    assert one.keys() == other.keys()
    square = sum(float((one[k].double() - other[k].double()).square().sum()) for k in one)
    return (square / sum(float(one[k].double().square().sum()) for k in one)) ** 0.5


def update(stage, watch):
    """What training changed: rounding has to be small next to this, not next to the weights."""
    return {name: tensor - watch.start[name] for name, tensor in weights(stage).items()}


@pytest.mark.parametrize(
    "name",
    ["sft", "dpo", "ppo", pytest.param("reward", marks=pytest.mark.slow), pytest.param("grpo", marks=pytest.mark.slow)],
)
def test_any_split_of_a_step_gives_the_same_gradient_weights_and_curve(name, tmp_path):
    stage, reference = run(name, SPLITS[0], tmp_path / "0")
    learned = update(stage, reference)
    assert len(reference.history) == 4
    for micro_tokens in SPLITS[1:]:
        stage, watch = run(name, micro_tokens, tmp_path / str(micro_tokens))
        assert distance(reference.gradients, watch.gradients) < ROUNDING[name]
        assert distance(learned, update(stage, watch)) < 3 * ROUNDING[name], "after four steps"
        for one, other in zip(reference.history, watch.history, strict=True):
            assert one["trained_tokens"] == other["trained_tokens"]
            for key in ("loss", "grad_norm"):
                assert other[key] == pytest.approx(one[key], rel=ROUNDING[name], abs=1e-6)


def test_splits_are_what_they_claim():
    def passes(micro_tokens):
        data = sft_data(micro_tokens=micro_tokens)
        return len(data.train_dataloader().dataset[0].packs)

    assert [passes(n) for n in SPLITS] == [8, 4, 1]


def padded(rows):
    """The batch as anyone would build it: right-padded, prompt and padding masked with -100."""
    tokenizer = AutoTokenizer.from_pretrained(resolve_model(TINY))
    sequences = []
    for row in rows:
        question, answer = (message["content"] for message in row["messages"])
        prompt = tokenizer.encode(f"<|user|>\n{question}\n<|assistant|>\n", add_special_tokens=False)
        reply = [*tokenizer.encode(answer, add_special_tokens=False), tokenizer.eos_token_id]
        sequences.append((prompt + reply, [-100] * len(prompt) + reply))
    width = max(len(ids) for ids, _ in sequences)
    ids = torch.tensor([ids + [tokenizer.pad_token_id] * (width - len(ids)) for ids, _ in sequences])
    labels = torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in sequences])
    mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in sequences])
    return ids, labels, mask


REDUCTIONS = ("token_mean", "sum", "sequence_mean")


class Weighed(SFT):
    """Rows whose number is a multiple of five are all masked, other tokens weigh 1 or 1/2 by their id; and a filler."""

    def training_step(self, batch, batch_idx):
        packs = [pack._replace(weight_N=weighed(pack)) for pack in batch.packs]
        total = float(sum(pack.weight_N.sum() for pack in packs))
        filler = packs[0]._replace(weight_N=torch.zeros_like(packs[0].weight_N), rows=())
        super().training_step(batch._replace(packs=(*packs, filler), denominator=total), batch_idx)


def weighed(pack):
    rows_N = torch.tensor(pack.rows)[torch.tensor(document_of(pack.spans))[pack.segment_N]]
    return torch.where(rows_N % 5 == 0, 0.0, torch.where(pack.target_N % 2 == 0, 1.0, 0.5))


@pytest.mark.parametrize(
    "reduction", [pytest.param(r, marks=[pytest.mark.slow] if i else []) for i, r in enumerate(REDUCTIONS)]
)
def test_each_reduction_is_the_same_over_every_split_with_masked_rows_fillers_and_a_short_last_step(
    reduction, tmp_path
):
    def run(micro_tokens):
        stage = Weighed(Backbone(TINY), AdamW(**LINEAR), reduction)
        data = sft_data(examples_per_step=12, micro_tokens=micro_tokens)
        return stage, fit(stage, data, tmp_path / str(micro_tokens))

    stage, reference = run(1)
    assert [len(rows) for rows in reference.rows] == [12, 12, 12, 4]
    assert any(row % 5 == 0 for row in reference.rows[0]), "a micro-batch of the first step is all masked"
    learned = update(stage, reference)
    for micro_tokens in SPLITS[1:]:
        stage, watch = run(micro_tokens)
        assert distance(reference.gradients, watch.gradients) < 1e-6
        assert distance(learned, update(stage, watch)) < 3e-6, "after four steps"
        for one, other in zip(reference.history, watch.history, strict=True):
            assert other["loss"] == pytest.approx(one["loss"], rel=1e-6)
            assert other["loss/sums"] == pytest.approx(one["loss/sums"], rel=1e-6)
            assert (other["tokens"], other["trained_tokens"]) == (one["tokens"], one["trained_tokens"])


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_one_step_is_what_plain_transformers_computes(reduction, tmp_path):
    stage = Weighed(Backbone(TINY), AdamW(lr=1e-3, max_grad_norm=0), reduction)
    watch = fit(stage, sft_data(max_steps=1), tmp_path)
    rows = sft_rows(count=40)
    step = watch.rows[0]
    ids, labels, mask = padded([rows[row] for row in step])
    labels[torch.tensor([row % 5 == 0 for row in step])] = -100
    model = AutoModelForCausalLM.from_pretrained(resolve_model(TINY), dtype=torch.float32)
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
    targets = labels[:, 1:]
    nll = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
    weights = (targets != -100) * torch.where(targets % 2 == 0, 1.0, 0.5)
    loss = {
        "token_mean": (weights * nll).sum() / weights.sum(),
        "sum": (weights * nll).sum() / len(step),
        "sequence_mean": ((weights * nll).sum(1) / weights.sum(1).clamp(min=0.5)).sum() / len(step),
    }[reduction]
    loss.backward()
    expected = {f"policy.lm.{name}": p.grad for name, p in model.named_parameters()}
    assert distance(expected, watch.gradients) < 1e-5
    assert watch.history[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert watch.history[0]["trained_tokens"] == (weights > 0).sum()
    assert watch.history[0]["loss/sums"] == pytest.approx(float((weights * nll).sum() / weights.sum()), rel=1e-5)


def test_by_default_it_is_the_mean_cross_entropy_of_all_trained_tokens(tmp_path):
    watch = fit(sft(max_grad_norm=0), sft_data(max_steps=1), tmp_path)
    rows = sft_rows(count=40)
    ids, labels, mask = padded([rows[row] for row in watch.rows[0]])
    model = AutoModelForCausalLM.from_pretrained(resolve_model(TINY), dtype=torch.float32)
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
    targets = labels[:, 1:]
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") / (targets != -100).sum()
    loss.backward()
    expected = {f"policy.lm.{name}": p.grad for name, p in model.named_parameters()}
    assert distance(expected, watch.gradients) < 1e-5
    assert watch.history[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert watch.history[0]["trained_tokens"] == (targets != -100).sum()


def test_the_sources_losses_make_up_the_mean(tmp_path):
    def rows(seed):
        return Source(f"sums {seed}", rows=ROWS + "sft_rows", args={"count": 20, "seed": seed})

    data = SFTData(sources=[rows(1), rows(2)], **settings(micro_tokens=256, max_steps=1))
    watch = fit(sft(), data, tmp_path)
    (step,), (numbers,) = watch.history, watch.rows
    trained = {"sums 1": 0, "sums 2": 0}
    for row in numbers:
        trained[data.source_of(row)] += int(data.documents[row].segments[0].weights_L.sum())
    assert all(trained.values())
    mean = sum(step[f"loss/{name}"] * count for name, count in trained.items()) / sum(trained.values())
    assert step["loss"] == pytest.approx(mean, rel=1e-6)
    assert step["loss/sums 1"] != step["loss/sums 2"]


def test_a_step_without_a_trained_token_is_refused_with_its_rows(tmp_path):
    class Masked(SFT):
        def training_step(self, batch, batch_idx):
            super().training_step(batch._replace(denominator=0.0), batch_idx)

    with pytest.raises(InputError, match=r"no token of step 0 is trained \(rows \d+ of 'sums', .*…\)"):
        fit(Masked(Backbone(TINY), AdamW(lr=1e-3)), sft_data(max_steps=1), tmp_path)


def test_val_loss_is_the_mean_over_all_tokens_of_all_batches(tmp_path):
    """Batches of 12, 12, 12 and 4 rows: a mean of their means would be another number."""
    data, stage = sft_data(examples_per_step=12), sft()
    data.val_dataloader = data.train_dataloader
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(accelerator="cpu", default_root_dir=tmp_path, enable_model_summary=False, **quiet)
    (found,) = trainer.validate(stage, data, verbose=False)
    with torch.no_grad():
        packs = list(data.packs(range(40), 100_000))
        total = sum(float((pack.weight_N * stage.model(pack).logp_N).sum()) for pack in packs)
    assert found["val_loss"] == pytest.approx(-total / sum(float(pack.weight_N.sum()) for pack in packs), rel=1e-5)


def test_a_pass_without_a_number_shows_in_the_val_loss(tmp_path):
    """The third pass of four gives NaN."""

    class Broken(SFT):
        def validation_step(self, batch, batch_idx):
            if batch_idx == 2:
                with torch.no_grad():
                    self.model.lm.get_output_embeddings().weight[:] = float("nan")
            super().validation_step(batch, batch_idx)
            if batch_idx == 2:
                with torch.no_grad():
                    self.model.lm.get_output_embeddings().weight[:] = 1.0

    data = sft_data(examples_per_step=12, micro_tokens=100_000)
    data.val_dataloader = data.train_dataloader
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(accelerator="cpu", default_root_dir=tmp_path, enable_model_summary=False, **quiet)
    (found,) = trainer.validate(Broken(Backbone(TINY), AdamW(lr=1e-3)), data, verbose=False)
    assert math.isnan(found["val_loss"])
