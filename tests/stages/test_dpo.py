"""DPO: training starts at the reference, which is a property of the row, and goes on from it whatever the cut."""

import math
import shutil

import lightning as L
import pytest
import torch
from stage_faults import Interrupt
from stage_runs import ROWS, TINY, dpo, fit, preference_data, sft_data, weights
from transformers import AutoModelForCausalLM

from tulu_lightning import cli
from tulu_lightning.assets.models import load_tokenizer, resolve_model
from tulu_lightning.callbacks.checkpoints import Checkpoints, checkpoint_path
from tulu_lightning.callbacks.records import Records
from tulu_lightning.core.packing import filler, pack
from tulu_lightning.core.pairs import side_lengths
from tulu_lightning.core.preference import ConservativeDPO, SimPO
from tulu_lightning.core.step_plan import StepPlan
from tulu_lightning.data.loader import StepLoader
from tulu_lightning.data.preference import PreferenceData
from tulu_lightning.data.sources import Source
from tulu_lightning.errors import InputError
from tulu_lightning.models.backbone import Backbone
from tulu_lightning.models.lora import Lora
from tulu_lightning.stages.dpo import DPO, KL, METRICS
from tulu_lightning.stages.optimizer import AdamW
from tulu_lightning.stages.reference import Reference, pair_logps

LOG_2 = math.log(2)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A reference cache of its own for each test."""
    monkeypatch.setenv("TULU_REFERENCE", str(tmp_path / "reference"))
    return tmp_path / "reference"


def stage(lora=None, loss=None, reference=None, lr=1e-3, **settings):
    return DPO(Backbone(TINY, lora=lora), AdamW(lr=lr, **settings), loss, reference)


def table(trained, rows="train"):
    return trained.reference._tables[rows]


# The reference ------------------------------------------------------------------------------------------------------


def test_its_log_probs_are_those_of_the_start_weights_by_row_whatever_the_packs(tmp_path, monkeypatch):
    tables = []
    for place, cut in enumerate(({"micro_tokens": 1}, {"micro_tokens": 512, "pad_to": 512, "seed": 5})):
        monkeypatch.setenv("TULU_REFERENCE", str(tmp_path / f"cache {place}"))
        trained = dpo()
        fit(trained, preference_data(**cut), tmp_path / str(place))
        tables.append(table(trained))
    assert tables[0].shape == (40, 2)
    torch.testing.assert_close(*tables, rtol=1e-5, atol=1e-5)
    model = AutoModelForCausalLM.from_pretrained(resolve_model(TINY), dtype=torch.float32)
    for row, document in list(enumerate(preference_data().documents))[::13]:
        start, *sides = document.segments
        for column, side in enumerate(sides):
            ids, scored = (torch.cat([a, b]) for a, b in zip(start[:2], side[:2], strict=True))
            with torch.no_grad():
                logp = model(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
            expected = float(logp[scored[1:] > 0].sum())
            assert float(tables[0][row, column]) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("lora", [None, Lora(r=4, alpha=8)], ids=["full", "lora"])
def test_the_first_steps_loss_is_log_2_and_live_is_cached(lora, tmp_path, folder, capfd):
    cached = fit(stage(lora), preference_data(max_steps=3, micro_tokens=1), tmp_path / "cached")
    assert cached.history[0]["loss"] == pytest.approx(LOG_2, abs=1e-6)
    assert cached.history[0]["margin"] == pytest.approx(0, abs=1e-5)
    assert cached.history[0]["kl_chosen"] == pytest.approx(0, abs=1e-5)
    assert cached.history[1]["loss"] != pytest.approx(LOG_2, abs=1e-6)
    assert capfd.readouterr().err.count("reference: 24 pairs") == 1, "three steps of eight"

    other = fit(stage(lora), preference_data(max_steps=3, micro_tokens=600), tmp_path / "other packs")
    assert "reference: log-probs of 24 pairs found" in capfd.readouterr().err
    assert other.history[0]["loss"] == pytest.approx(LOG_2, abs=1e-5)
    shutil.rmtree(folder)

    live = stage(lora, reference="live")
    asked = fit(live, preference_data(max_steps=3, micro_tokens=600), tmp_path / "live")
    assert not folder.exists()
    assert asked.history[0]["loss"] == pytest.approx(LOG_2, abs=1e-6)
    for one, two, three in zip(cached.history, other.history, asked.history, strict=True):
        assert one["loss"] == pytest.approx(two["loss"], abs=1e-5)
        assert two["loss"] == pytest.approx(three["loss"], abs=1e-5)
        assert two["kl_rejected"] == pytest.approx(three["kl_rejected"], abs=1e-5)
    if lora is None:
        start = {f"policy.{name}": value for name, value in live.reference._copy.state_dict().items()}
        assert all(torch.equal(value, start[name]) for name, value in asked.start.items()), "it has not moved"
        assert len(list(live.parameters())) == len(list(live.model.parameters())), "nor is it the stage's own"
    else:
        assert live.reference._copy is None
    kept = torch.load(checkpoint_path(tmp_path / "live", 3), weights_only=False)
    assert kept["reference"] == {}
    assert kept["state_dict"].keys() == asked.start.keys()


def test_a_resumed_run_needs_no_cache_and_never_asks_trained_weights(tmp_path, folder):
    whole = stage()
    fit(whole, preference_data(max_steps=3), tmp_path / "whole")
    fit(stage(), preference_data(max_steps=3), tmp_path / "half", callbacks=[Interrupt(1)])
    shutil.rmtree(folder)
    resumed = stage()
    fit(resumed, preference_data(max_steps=3), tmp_path / "half", ckpt_path=checkpoint_path(tmp_path / "half", 1))
    assert not folder.exists()
    torch.testing.assert_close(table(resumed), table(whole), rtol=0, atol=0, equal_nan=True)
    after = weights(whole)
    assert all(torch.equal(value, after[name]) for name, value in weights(resumed).items())


@pytest.mark.parametrize("lora", [None, Lora(r=4, alpha=8)], ids=["full", "lora"])
def test_weights_changed_in_python_make_no_reference_of_their_folder(lora, tmp_path, folder):
    """The cache knows the start by its folder: numbers of other weights in it would be every later run's reference."""
    trained = stage(lora)
    trained.configure_model()
    with torch.no_grad():
        base = next(p for n, p in trained.model.named_parameters() if "down_proj" in n and "lora" not in n)
        base[-1] += 1e-3
    with pytest.raises(InputError, match=r"changed after they were loaded \(.*down_proj.*Save the model into a folder"):
        fit(trained, preference_data(), tmp_path)
    assert not list(folder.rglob("logps.bin"))


def test_adapters_set_in_python_leave_the_reference_alone(tmp_path, monkeypatch):
    trained = stage(Lora(r=4, alpha=8))
    trained.configure_model()
    with torch.no_grad():
        next(p for n, p in trained.model.named_parameters() if "lora_B" in n).add_(0.1)
    fit(trained, preference_data(), tmp_path / "adapted")
    plain = stage()
    monkeypatch.setenv("TULU_REFERENCE", str(tmp_path / "another"))
    fit(plain, preference_data(), tmp_path / "plain")
    torch.testing.assert_close(table(trained), table(plain), rtol=0, atol=0)


def test_a_loss_without_a_reference_computes_none(tmp_path, folder, capfd):
    watch = fit(stage(loss=SimPO()), preference_data(max_steps=2), tmp_path / "run")
    assert not folder.exists()
    assert "reference" not in capfd.readouterr().err
    assert "accuracy" in watch.history[0]
    assert "kl_chosen" not in watch.history[0]


@pytest.mark.parametrize("reference", ["live", "cached", Reference()])
def test_a_reference_that_nobody_reads_is_refused(reference):
    with pytest.raises(InputError, match=r"^model\.reference: is set, and SimPO compares with no reference\. Leave it"):
        stage(loss=SimPO(), reference=reference)


def test_a_chosen_folder_with_a_reference_of_other_weights_is_refused(tmp_path):
    at = str(tmp_path / "chosen")
    fit(stage(reference=Reference(folder=at)), preference_data(max_steps=1), tmp_path / "one")
    other = DPO(Backbone(TINY, layers=1), AdamW(lr=1e-3), reference=Reference(folder=at))
    with pytest.raises(
        InputError, match=r"holds the reference log-probs of source 'sums' .* layers was None and is 1\."
    ):
        fit(other, preference_data(max_steps=1), tmp_path / "two")
    assert other.policy is None, "before any weights load"


# Rows ---------------------------------------------------------------------------------------------------------------


def test_rows_of_another_tokenizer_are_refused_and_a_saved_copy_is_the_same_one(tmp_path):
    copy, changed = tmp_path / "copy", tmp_path / "changed"
    for place in (copy, changed):
        shutil.copytree(resolve_model(TINY), place)
    load_tokenizer(TINY).save_pretrained(copy)
    tokenizer = load_tokenizer(TINY)
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(changed)
    fit(stage(), preference_data(max_steps=1, tokenizer=str(copy)), tmp_path / "same")
    said = rf"^data\.tokenizer: .*with that of {changed}, and the start checkpoint {resolve_model(TINY)} has another one\. Leave it out"
    with pytest.raises(InputError, match=said):
        fit(stage(), preference_data(max_steps=1, tokenizer=str(changed)), tmp_path / "other")


def test_rows_that_are_no_pairs_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"the rows of source 'sums' are not pairs"):
        fit(stage(), sft_data(max_steps=1), tmp_path)


# The step -----------------------------------------------------------------------------------------------------------


class WithFiller(DPO):
    """A step that ends with a filler, as that of a rank which is one micro-batch short."""

    def training_step(self, batch, batch_idx):
        extra = filler(self.trainer.datamodule.documents[batch.rows[0]])
        super().training_step(batch._replace(packs=(*batch.packs, extra)), batch_idx)


def sources():
    return [Source(f"sums {seed}", rows=ROWS + "pair_rows", args={"count": 20, "seed": seed}) for seed in (1, 2)]


def test_padding_and_fillers_count_for_nothing_and_sources_make_up_the_mean(tmp_path):
    data = preference_data(sources=sources(), max_steps=2, micro_tokens=256)
    plain = fit(stage(), data, tmp_path / "plain")
    padded = WithFiller(Backbone(TINY), AdamW(lr=1e-3))
    watch = fit(padded, preference_data(sources=sources(), max_steps=2, micro_tokens=256, pad_to=256), tmp_path / "pad")
    for step, (one, two) in enumerate(zip(plain.history, watch.history, strict=True)):
        assert one.keys() == two.keys()
        # At the reference itself rewards are 0 but for rounding, and that decides which one is higher.
        noise = {"seconds", *(name for name in one if step == 0 and name.startswith("accuracy"))}
        for name in one.keys() - noise:
            assert two[name] == pytest.approx(one[name], rel=1e-5, abs=1e-5), name
    for step, rows in zip(plain.history, plain.rows, strict=True):
        pairs = {name: sum(data.source_of(row) == name for row in rows) for name in data.source_names}
        assert all(pairs.values())
        assert step["pairs"] == 8
        for name in (*METRICS, *KL):
            mean = sum(step[f"{name}/{source}"] * count for source, count in pairs.items()) / 8
            assert step[name] == pytest.approx(mean, rel=1e-6, abs=1e-6)


class HeldOut(PreferenceData):
    """Validates on 11 pairs that are not trained on, in batches of 4, 4 and 3."""

    def setup(self, stage="fit"):
        super().setup(stage)
        rows = Source("held out", rows=ROWS + "pair_rows", args={"count": 11, "seed": 7})
        self.held_out = preference_data(sources=[rows]).documents

    @property
    def document_sets(self):
        return (self.documents, self.held_out)

    def val_dataloader(self):
        plan = StepPlan(self.held_out.lengths, 4, 128)
        return StepLoader([self._batch(self.held_out, plan, step, 0) for step in range(3)], 3)


@pytest.mark.parametrize("sanity", [0, 2])
def test_validation_is_the_mean_over_its_pairs_against_their_own_reference(sanity, tmp_path):
    settings = {"tokenizer": TINY, "template": "tulu", "max_tokens": 256, "examples_per_step": 8, "max_steps": 2}
    data, trained = HeldOut(sources=sources(), **settings), stage()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=1, enable_model_summary=False, num_sanity_val_steps=sanity,
        default_root_dir=tmp_path, **quiet,
    )  # fmt: skip
    trainer.fit(trained, data)
    with torch.no_grad():
        terms = [one_pair(trained, data.held_out, row) for row in range(11)]
    for name, value in zip(("loss", "accuracy", "margin"), torch.tensor(terms).mean(0), strict=True):
        assert float(trainer.callback_metrics[f"val_{name}"]) == pytest.approx(float(value), abs=1e-5)
    assert abs(float(trainer.callback_metrics["val_loss"]) - LOG_2) > 1e-4, "it has learned something"

    # The weights have moved: rows that have no numbers yet get none from them.
    known = trained.reference._known
    trained.reference.load({name: value for name, value in known.items() if len(value) != 11})
    shutil.rmtree(tmp_path / "reference")
    with pytest.raises(
        InputError, match=r"of source 'held out' under the start weights, which have been trained since"
    ):
        trainer.validate(trained, data, verbose=False)


def one_pair(trained, documents, row):
    """Loss, accuracy and margin of one pair by itself."""
    alone = pack([documents[row]], [row])
    policy = torch.stack(list(pair_logps(trained.model, alone)))[:, 0]
    lengths = torch.stack(list(side_lengths(alone)))[:, 0]
    chosen, rejected = 5.0 * (policy - table(trained, "validation")[row]) / lengths
    margin = float(chosen - rejected)
    return math.log1p(math.exp(-margin)), float(margin > 0), margin


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], Reference()),
        (["--model.init_args.reference=live"], Reference("live")),
        (["--model.init_args.reference.folder=there"], Reference(folder="there")),
    ],
)
def test_loss_and_reference_are_chosen_in_a_config(options, expected, tmp_path):
    config = tmp_path / "mine.yaml"
    loss = "{class_path: tulu_lightning.core.preference.ConservativeDPO, init_args: {beta: 2.0}}"
    config.write_text(
        f"model:\n  class_path: tulu_lightning.stages.dpo.DPO\n  init_args:\n    backbone: {{path: {TINY}}}\n"
        f"    optimizer: {{lr: 1.0e-4}}\n    loss: {loss}\n"
        "data:\n  class_path: tulu_lightning.data.preference.PreferenceData\n  init_args:\n"
        f"    {{sources: [{{name: sums, rows: {ROWS}pair_rows, args: {{count: 8}}}}], max_tokens: 256,"
        " examples_per_step: 8, template: tulu, max_steps: 1}\n"
        f"trainer: {{default_root_dir: {tmp_path / 'run'}, logger: false, enable_checkpointing: false, accelerator: cpu}}\n"
    )
    made = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(L.Trainer, "fit", lambda trainer, model, **_: made.append(model))
        assert cli.main(["fit", "--config", str(config), *options]) == 0
    (trained,) = made
    assert trained.loss == ConservativeDPO(beta=2.0)
    assert trained.reference.settings == expected


@pytest.mark.parametrize(
    ("settings", "keeps"), [({}, True), ({"reference": "live"}, False), ({"loss": SimPO()}, False)]
)
def test_only_a_cached_reference_ties_a_run_to_its_rows(settings, keeps):
    assert stage(**settings).keeps_rows == keeps


def test_a_trial_of_two_steps_computes_the_reference_of_their_pairs_alone(tmp_path, capfd):
    fit(dpo(), preference_data(max_steps=2, examples_per_step=4), tmp_path)
    assert "reference: 8 pairs" in capfd.readouterr().err
    fit(dpo(), preference_data(max_steps=2, examples_per_step=4), tmp_path / "again")
    assert "reference: log-probs of 8 pairs found" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("data.seed", {"seed": 9}),
        ("total steps", {"max_steps": 5}),
        ("data.examples_per_step", {"examples_per_step": 16}),
    ],
)
def test_a_resumed_run_that_reaches_other_pairs_is_refused_or_has_their_reference(name, changed, tmp_path, folder):
    """The checkpoint has the numbers of the first plan's 24 pairs; the weights that made them are gone, but for LoRA's base."""

    def go_on(stage, run):
        accepting = Checkpoints(0, accept_changes=[name])
        data = preference_data(**{"max_steps": 3, **changed})
        trainer = L.Trainer(
            accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            default_root_dir=run, callbacks=[Records(), accepting],
        )  # fmt: skip
        trainer.fit(stage, data, ckpt_path=checkpoint_path(run, 1))
        return stage

    for run, lora in ((tmp_path / "full", None), (tmp_path / "lora", Lora(r=4))):
        fit(stage(lora), preference_data(max_steps=3), run, callbacks=[Interrupt(1)])
    with pytest.raises(
        InputError, match=r"neither it nor the checkpoint has .* 'sums' .*Set model\.init_args\.reference"
    ):
        go_on(stage(), tmp_path / "full")
    for again in (go_on(stage(reference="live"), tmp_path / "full"), go_on(stage(Lora(r=4)), tmp_path / "lora")):
        assert math.isfinite(again.metrics["loss"])
        assert again.metrics["skipped_updates"] == 0
    plan = preference_data(**{"max_steps": 3, **changed})._plan(1)
    later = sorted({row for step in range(1, plan.total_steps) for row in plan.examples(step)})
    assert torch.isfinite(table(again)[later]).all()


def test_pairs_that_are_trained_on_and_validated_have_a_reference_in_both(tmp_path):
    """One hash for the two sets, of which the plan reaches 16 pairs and the validation all 40."""
    rows = Source("sums", rows=ROWS + "pair_rows", args={"count": 40})
    trained = stage()
    fit(trained, preference_data(max_steps=2, validation=[rows]), tmp_path)
    assert torch.isfinite(table(trained, "validation")).all()
    values = [float(trained.trainer.callback_metrics[f"val_{name}"]) for name in ("loss", "margin")]
    assert all(map(math.isfinite, values)), values


def test_changed_pairs_are_refused_with_advice_that_works(tmp_path):
    """The cached reference is of rows; live keeps none, and so does LoRA, whose base is the start for ever."""
    assert dpo().keeps_rows
    assert not DPO(Backbone(TINY), AdamW(lr=1e-4), reference="live").keeps_rows
    assert not DPO(Backbone(TINY, lora=Lora(r=2)), AdamW(lr=1e-4)).keeps_rows
    fit(dpo(), preference_data(max_steps=1), tmp_path, every_n_steps=1)
    with pytest.raises(InputError) as refused:
        fit(dpo(), preference_data(max_steps=1, seed=3), tmp_path)
    assert "accept_changed_data" not in str(refused.value)


def test_a_loss_by_name_in_python_is_refused_with_what_would_do():
    with pytest.raises(InputError, match=r"model.loss.*'IPO'.*such as DPO\(\) or IPO\(\)"):
        DPO(Backbone(TINY), AdamW(lr=1e-4), loss="IPO")


def test_an_interval_of_validation_that_the_run_does_not_reach_is_refused(tmp_path):
    held_out = Source("held out", rows=ROWS + "pair_rows", args={"count": 8, "seed": 7})
    data = preference_data(max_steps=2, validation=[held_out])
    trainer = L.Trainer(
        accelerator="cpu", default_root_dir=tmp_path, max_epochs=1, logger=False, enable_checkpointing=False,
        val_check_interval=3,
    )  # fmt: skip
    with pytest.raises(InputError, match=r"val_check_interval: is 3, and the run has 2 steps"):
        trainer.fit(dpo(), data)
