"""The reward model: one step is the textbook's and TRL's, it learns, and what it leaves is anybody's classifier."""

import json
import math
import shutil

import lightning as L
import pytest
import torch
from datasets import Dataset
from stage_runs import ROWS, TINY, fit, ppo, preference_data, reward, settings, sft_data
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tulu_lightning.assets.models import load_tokenizer, resolve_model
from tulu_lightning.callbacks.evaluate import Evaluate
from tulu_lightning.callbacks.promote import Promote
from tulu_lightning.callbacks.records import Records
from tulu_lightning.callbacks.throughput import Throughput
from tulu_lightning.core.preference import Pair, reward_metrics
from tulu_lightning.core.reward import bradley_terry
from tulu_lightning.data.preference import PreferenceData
from tulu_lightning.data.sources import Source
from tulu_lightning.errors import InputError
from tulu_lightning.models.backbone import Backbone
from tulu_lightning.models.lora import Lora
from tulu_lightning.stages import ppo as ppo_file
from tulu_lightning.stages.optimizer import AdamW
from tulu_lightning.stages.ppo import Critic
from tulu_lightning.stages.reward import RewardModel

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


def sides(document):
    """Token ids of both conversations of a pair, each whole."""
    start, chosen, rejected = (segment.ids_L for segment in document.segments)
    return torch.cat([start, chosen]), torch.cat([start, rejected])


def classifier(state, folder=TINY):
    """transformers' own classifier with the weights of a stage."""
    model = AutoModelForSequenceClassification.from_pretrained(
        resolve_model(folder), num_labels=1, dtype=torch.float32, attn_implementation="eager"
    )
    model.load_state_dict({name.removeprefix("policy.lm."): tensor for name, tensor in state.items()})
    return model


# The step -----------------------------------------------------------------------------------------------------------


def test_one_step_is_what_trls_reward_trainer_computes(tmp_path):
    from trl import RewardConfig, RewardTrainer

    data = preference_data(max_steps=1)
    watch = fit(reward(max_grad_norm=0), data, tmp_path / "ours")
    pairs = [[ids.tolist() for ids in sides(data.documents[row])] for row in watch.rows[0]]
    rows = [{"chosen_ids": chosen, "rejected_ids": rejected} for chosen, rejected in pairs]
    model = classifier(watch.start).train()
    trainer = RewardTrainer(
        model=model,
        args=RewardConfig(output_dir=str(tmp_path / "trl"), report_to="none", use_cpu=True, bf16=False),
        train_dataset=Dataset.from_list(rows),
        processing_class=load_tokenizer(TINY),
    )
    assert trainer.args.center_rewards_coefficient is None, "else it adds a term of its own"
    loss = trainer.compute_loss(model, trainer.data_collator(rows))
    loss.backward()
    (step,) = watch.history
    assert step["loss"] == pytest.approx(loss.item(), rel=1e-5)
    for name in ("accuracy", "margin"):
        assert step[name] == pytest.approx(trainer._metrics["train"][name][0], abs=1e-5)
    expected = {f"policy.lm.{name}": p.grad for name, p in model.named_parameters()}
    assert watch.gradients.keys() == expected.keys()
    size = sum(float(grad.square().sum()) for grad in expected.values()) ** 0.5
    apart = sum(float((watch.gradients[name] - grad).square().sum()) for name, grad in expected.items()) ** 0.5
    assert apart < 1e-4 * size, "a difference of two rewards that nearly cancel"
    assert step["grad_norm"] == pytest.approx(size, rel=1e-4)


def test_a_steps_record_is_the_mean_over_its_pairs_and_by_source(tmp_path):
    def rows(seed):
        return Source(f"sums {seed}", rows=ROWS + "pair_rows", args={"count": 20, "seed": seed})

    data = PreferenceData(sources=[rows(1), rows(2)], **settings(micro_tokens=256, max_steps=1))
    watch = fit(reward(), data, tmp_path)
    model = classifier(watch.start)
    both = [[model(ids[None]).logits[0, 0].detach() for ids in sides(data.documents[row])] for row in watch.rows[0]]
    found = Pair(*(torch.stack(list(side)) for side in zip(*both, strict=True)))
    values = {
        "loss": bradley_terry(found),
        "accuracy": (found.chosen_B > found.rejected_B).float(),
        "margin": found.chosen_B - found.rejected_B,
        "rewards_chosen": found.chosen_B,
        "rewards_rejected": found.rejected_B,
    }
    (step,) = watch.history
    sources = [data.source_of(row) for row in watch.rows[0]]
    for name, value_B in values.items():
        assert step[name] == pytest.approx(float(value_B.mean()), abs=1e-5)
        for source in set(sources):
            mine_B = torch.tensor([other == source for other in sources])
            assert step[f"{name}/{source}"] == pytest.approx(float(value_B[mine_B].mean()), abs=1e-5)
    documents = [data.documents[row].segments for row in watch.rows[0]]
    for index, side in ((1, "chosen"), (2, "rejected")):
        scored = sum(float((d[0].weights_L[1:] > 0).sum() + (d[index].weights_L > 0).sum()) for d in documents)
        assert step[f"length_{side}"] == pytest.approx(scored / len(documents))
    assert step["pairs"] == len(documents) == 8
    assert step["tokens"] == sum(len(segment.ids_L) for document in documents for segment in document)


def test_a_tie_is_no_win():
    rewards = Pair(torch.tensor([1.0, 0.5, -1.0]), torch.tensor([0.0, 0.5, 1.0]))
    assert reward_metrics(rewards, torch.zeros(3))["accuracy"].tolist() == [1, 0, 0]


def test_padded_packs_and_fillers_count_for_nothing(tmp_path):
    class Filled(RewardModel):
        def training_step(self, batch, batch_idx):
            filler = batch.packs[0]._replace(rows=(), weight_N=torch.zeros_like(batch.packs[0].weight_N))
            super().training_step(batch._replace(packs=(filler, *batch.packs)), batch_idx)

    plain = fit(reward(), preference_data(max_steps=1), tmp_path / "plain")
    other = Filled(Backbone(TINY), AdamW(lr=1e-3))
    padded = fit(other, preference_data(max_steps=1, micro_tokens=512, pad_to=64), tmp_path / "padded")
    for key in ("loss", "accuracy", "margin", "pairs", "tokens", "trained_tokens", "length_chosen", "length_rejected"):
        assert padded.history[0][key] == pytest.approx(plain.history[0][key], abs=1e-5), key
    assert padded.history[0]["grad_norm"] == pytest.approx(plain.history[0]["grad_norm"], rel=1e-4)


def test_it_learns_which_sums_are_right(tmp_path):
    rows = Source("sums", rows=ROWS + "pair_rows", args={"count": 16})
    data = preference_data(sources=[rows], examples_per_step=16, micro_tokens=2048, max_steps=16)
    watch = fit(reward(schedule="constant"), data, tmp_path)
    accuracies = [step["accuracy"] for step in watch.history]
    assert accuracies[0] < 0.6, "it knows nothing of sums"
    assert sum(accuracies[-4:]) / 4 > 0.9
    assert watch.history[-1]["loss"] < 0.5 * watch.history[0]["loss"]


def test_validation_is_over_all_pairs_of_all_batches(tmp_path):
    """Batches of 12, 12, 12 and 4 pairs: a mean of their means would be another number."""
    data, stage = preference_data(examples_per_step=12), reward()
    data.val_dataloader = data.train_dataloader
    trainer = L.Trainer(accelerator="cpu", default_root_dir=tmp_path, **QUIET)
    (found,) = trainer.validate(stage, data, verbose=False)
    with torch.no_grad():
        rewards = [stage.rewards(pack) for pack in data.packs(range(40), 100_000)]
    every = Pair(*(torch.cat(list(side)) for side in zip(*rewards, strict=True)))
    values = reward_metrics(every, bradley_terry(every))
    assert found.keys() == {"val_loss", "val_accuracy", "val_margin"}
    for name in ("loss", "accuracy", "margin"):
        assert found[f"val_{name}"] == pytest.approx(float(values[name].mean()), rel=1e-5, abs=1e-6)


def test_a_reward_that_is_no_number_shows_in_the_validation(tmp_path):
    class Broken(RewardModel):
        def rewards(self, pack):
            chosen_B, rejected_B = super().rewards(pack)
            chosen_B[torch.tensor([row == 3 for row in pack.rows])] = float("nan")
            return Pair(chosen_B, rejected_B)

    data = preference_data()
    data.val_dataloader = data.train_dataloader
    trainer = L.Trainer(accelerator="cpu", default_root_dir=tmp_path, **QUIET)
    (found,) = trainer.validate(Broken(Backbone(TINY), AdamW(lr=1e-3)), data, verbose=False)
    assert [math.isnan(found[f"val_{name}"]) for name in ("loss", "margin", "accuracy")] == [True, True, False]


# What it leaves -----------------------------------------------------------------------------------------------------


def padded_with_eos(folder):
    """The tiny model with the token that ends an answer as its padding, as many models have it."""
    folder = shutil.copytree(resolve_model(TINY), folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder)
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"pad_token_id": 256', '"pad_token_id": 258'))
    return str(folder)


@pytest.mark.parametrize("start", ["tiny", "eos pads", "lora"])
def test_the_export_is_a_classifier_with_the_same_rewards_alone_and_in_a_batch(start, tmp_path):
    path = padded_with_eos(tmp_path / "start") if start == "eos pads" else TINY
    stage = RewardModel(Backbone(path, lora=Lora(r=4) if start == "lora" else None), AdamW(lr=1e-3))
    data = preference_data(max_steps=2, tokenizer=path)
    fit(stage, data, tmp_path / "run", callbacks=[Promote()])
    folder = tmp_path / "run" / "promoted"
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert model.num_labels == 1
    assert model.dtype == torch.float32
    assert model.state_dict().keys() == classifier_keys()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == data.template.jinja
    assert model.config.pad_token_id == tokenizer.pad_token_id == 256, "none that ends an answer"
    assert data.tokenizer.pad_token_id == (258 if start == "eos pads" else 256), "the run's own is as it was"
    (pack,) = data.packs(range(6), 100_000)
    every = [ids for row in pack.rows for ids in sides(data.documents[row])]
    batch = tokenizer.pad({"input_ids": [ids.tolist() for ids in every]}, return_tensors="pt")
    with torch.no_grad():
        ours = torch.stack(list(stage.rewards(pack)), 1).flatten()
        alone = torch.cat([model(ids[None]).logits[0] for ids in every])
        together = model(**batch).logits[:, 0]
    torch.testing.assert_close(alone, ours, atol=1e-5, rtol=0)
    torch.testing.assert_close(together, ours, atol=1e-5, rtol=0)
    assert ours.std() > 1e-3


def classifier_keys():
    return AutoModelForSequenceClassification.from_pretrained(resolve_model(TINY), num_labels=1).state_dict().keys()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run: its stage and its folder."""
    run = tmp_path_factory.mktemp("trained")
    stage = reward()
    fit(stage, preference_data(max_steps=2), run, callbacks=[Promote()])
    return stage, str(run / "promoted")


def test_ppos_critic_starts_with_its_rewards_as_values(trained, monkeypatch):
    stage, folder = trained
    said = []
    monkeypatch.setattr(ppo_file, "rank_zero_info", said.append)
    started = ppo(critic=Critic(AdamW(lr=1e-3), path=folder))
    started.configure_model()
    (pack,) = preference_data().packs(range(4), 100_000)
    with torch.no_grad():
        values_N, rewards = started.critic(pack), stage.rewards(pack)
        hidden = stage.model.hidden_at(stage.model.lm.get_decoder(), pack, pack.source_N)
        expected_N = hidden @ stage.model.head.weight[0]
        torch.testing.assert_close(values_N, expected_N, atol=1e-5, rtol=0)
        # The same without anything of ours: a conversation that ends where the state ends.
        chosen, _ = sides(preference_data().documents[pack.rows[0]])
        short = AutoModelForSequenceClassification.from_pretrained(folder)(chosen[None, :-1]).logits[0, 0]
    last = int((pack.segment_N == 1).nonzero()[-1])
    assert float(values_N[last]) == pytest.approx(float(short), abs=1e-5), "the state before the last token"
    assert float(values_N[last]) != pytest.approx(float(rewards.chosen_B[0]), abs=1e-5)
    assert said == [f"PPO's critic starts from {started.critic_folder}: the reward model's head goes on"]
    ppo().configure_model()
    assert said[1].endswith("a language model, with a fresh head")


def test_another_run_goes_on_from_its_head(trained):
    stage, folder = trained
    again = RewardModel(Backbone(folder), AdamW(lr=1e-3))
    again.configure_model()
    assert torch.equal(again.model.head.weight, stage.model.head.weight)
    with pytest.raises(InputError, match=r"^model\.head_seed: .* goes on: leave it out"):
        RewardModel(Backbone(folder), AdamW(lr=1e-3), head_seed=1)


def test_a_critic_of_fewer_layers_or_of_several_labels_is_refused_before_weights_load(trained, tmp_path):
    _, folder = trained
    with pytest.raises(InputError, match="whose head reads all 4 layers, and layers is 2"):
        ppo(critic=Critic(AdamW(lr=1e-3), path=folder, layers=2))
    two = shutil.copytree(folder, tmp_path / "two")
    config = json.loads((two / "config.json").read_text())
    labels = {"id2label": {"0": "bad", "1": "good"}, "label2id": {"bad": 0, "good": 1}}
    (two / "config.json").write_text(json.dumps(config | labels))
    with pytest.raises(InputError, match="a classifier with 2 labels"):
        ppo(critic=Critic(AdamW(lr=1e-3), path=str(two)))


# Bad input ----------------------------------------------------------------------------------------------------------


def test_rows_that_are_no_pairs_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"^data: is SFTData\. RewardModel compares two answers: use PreferenceData"):
        fit(reward(), sft_data(), tmp_path)


def test_held_out_prompts_are_refused_for_it_answers_none(tmp_path):
    prompts = Source("held out", rows=ROWS + "heldout_rows", args={"count": 4})
    trainer = L.Trainer(
        accelerator="cpu", default_root_dir=tmp_path, callbacks=[Records(), Evaluate([prompts], 4)], **QUIET
    )
    with pytest.raises(InputError, match="Evaluate asks for answers, and RewardModel trains a model that gives none"):
        trainer.fit(reward(), preference_data(max_steps=1))


def test_speed_is_counted_without_an_output_head(tmp_path):
    stage, data = reward(), preference_data(max_steps=1, micro_tokens=100_000)
    trainer = L.Trainer(
        accelerator="cpu",
        default_root_dir=tmp_path,
        callbacks=[Throughput(peak=1e12), Records()],
        max_epochs=1,
        **QUIET,
    )
    trainer.fit(stage, data)
    rows = data.train_dataloader().dataset[0].rows
    flops = 0.0
    for start, *rests in ([len(s.ids_L) for s in data.documents[row].segments] for row in rows):
        # 4 layers of width 256: queries 256², keys and values 128 · 256 each, output 256², three of 256 · 512
        flops += 6 * 4 * (2 * 256**2 + 2 * 128 * 256 + 3 * 256 * 512) * (start + sum(rests))
        seen = start * (start + 1) / 2 + sum(rest * start + rest * (rest + 1) / 2 for rest in rests)
        flops += 12 * 4 * 256 * seen
    assert stage.metrics["mfu"] == pytest.approx(flops / stage.metrics["seconds"] / 1e12)


def test_other_heads_are_another_run():
    one, other = (RewardModel(Backbone(TINY), AdamW(lr=1e-3), head_seed=seed) for seed in (0, 1))
    assert one.settings() != other.settings()
