"""Loss and gradients beside TRL's DPOTrainer and CPOTrainer: the same rows, the same weights, its own loss functions.

Theirs reads padded rows, prompt and all for each answer; ours a pack in which the prompt stands once. Where TRL names a
loss as we do and means another, the test's name says so.
"""

import pytest
import torch
from transformers import AutoModelForCausalLM

from tulu_lightning.assets.tiny import byte_tokenizer
from tulu_lightning.core.packing import pack
from tulu_lightning.core.preference import DPO, IPO, ConservativeDPO, Pair, SimPO
from tulu_lightning.core.reduce import pair_sum
from tulu_lightning.models.backbone import Backbone, PackedLM
from tulu_lightning.types import Document, Segment

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

LENGTHS = [(30, 8, 7), (12, 90, 5), (60, 3, 40), (5, 1, 2)]
"""Tokens of prompt, chosen and rejected."""


def rows():
    """Random bytes, as TRL's collator takes them."""
    generator = torch.Generator().manual_seed(0)
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return [
        {name: torch.randint(0, 256, (n,), generator=generator).tolist() for name, n in zip(names, counts, strict=True)}
        for counts in LENGTHS
    ]


@pytest.fixture(scope="module")
def policy(tiny, tmp_path_factory) -> str:
    """The tiny model, some way off: every weight moved by about a twentieth of its size."""
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.05 * weight.std().nan_to_num() * torch.randn(weight.shape, generator=generator)
    folder = tmp_path_factory.mktemp("policy")
    model.save_pretrained(folder)
    return str(folder)


# Ours ----------------------------------------------------------------------------------------------------------------


def ours(folder, start, loss):
    """Mean loss and gradients by name; the reference's log-probs are 0 without start weights."""
    documents = []
    for row in rows():
        prompt, chosen, rejected = (torch.tensor(ids) for ids in row.values())
        answers = (Segment(ids, torch.ones(len(ids)), 0) for ids in (chosen, rejected))
        documents.append(Document((Segment(prompt, torch.zeros(len(prompt))), *answers)))
    packed = pack(documents)

    def sums(model):
        return Pair(*pair_sum(model(packed).logp_N, packed.segment_N, len(documents)))

    model = PackedLM(Backbone(folder), folder)
    zero = torch.zeros(len(documents))
    with torch.no_grad():
        reference = sums(PackedLM(Backbone(start), start)) if start else Pair(zero, zero)
    lengths = Pair(*pair_sum(packed.weight_N, packed.segment_N, len(documents)))
    value = loss(sums(model), reference, lengths).loss_B.mean()
    value.backward()
    return value.item(), {name: weight.grad for name, weight in model.lm.named_parameters()}


# Theirs --------------------------------------------------------------------------------------------------------------


def arguments(folder):
    return {"output_dir": str(folder), "use_cpu": True, "bf16": False, "report_to": "none"}


def text_rows():
    """A trainer wants rows of text to start with; the losses below are called with rows of ids."""
    return datasets.Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])


def dpo_trainer(folder, policy, reference, **settings):
    models = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (policy, reference)]
    config = trl.DPOConfig(**arguments(folder), gradient_checkpointing=False, **settings)
    return trl.DPOTrainer(*models, config, train_dataset=text_rows(), processing_class=byte_tokenizer())


def theirs(trainer, inputs):
    value = trainer.compute_loss(trainer.model, inputs)
    value.backward()
    return value.item(), {name: weight.grad for name, weight in trainer.model.named_parameters()}


def assert_same(found, expected):
    """To 1e-5: the loss relative to itself, the gradient as one vector relative to its length."""
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert found[1].keys() == expected[1].keys()
    mine, other = (
        torch.cat([by_name[name].double().flatten() for name in expected[1]]) for by_name in (found[1], expected[1])
    )
    assert other.norm() > 0
    assert (mine - other).norm() <= 1e-5 * other.norm()


@pytest.mark.parametrize(
    ("loss", "settings"),
    [
        (DPO(0.1, length_normalised=False), {"loss_type": "sigmoid", "beta": 0.1}),
        (DPO(5.0), {"loss_type": "sigmoid_norm", "beta": 5.0}),
        (IPO(0.1, length_normalised=True), {"loss_type": "ipo", "beta": 0.1}),  # TRL has no IPO on summed log-probs
    ],
    ids=lambda x: x.get("loss_type") if isinstance(x, dict) else "",
)
def test_dpo_and_ipo_per_token_are_trls(loss, settings, policy, tiny, tmp_path):
    trainer = dpo_trainer(tmp_path, policy, tiny, **settings)
    assert_same(ours(policy, tiny, loss), theirs(trainer, trainer.data_collator(rows())))


def cpo_trainer(folder, policy, **settings):
    """Its `cpo_alpha` adds an SFT term, off here."""
    cpo = pytest.importorskip("trl.experimental.cpo")
    off = {"cpo_alpha": 0.0, "gradient_checkpointing": False}
    config = cpo.CPOConfig(**arguments(folder), max_length=256, **off, **settings)
    model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32)
    return cpo.CPOTrainer(model, config, train_dataset=text_rows(), processing_class=byte_tokenizer())


def cpo_inputs():
    inputs = {}
    for side in ("chosen", "rejected"):
        ids = [row["prompt_ids"] + row[f"{side}_ids"] for row in rows()]
        labels = [[-100] * len(row["prompt_ids"]) + row[f"{side}_ids"] for row in rows()]
        inputs[f"{side}_input_ids"] = padded(ids, 0)
        inputs[f"{side}_attention_mask"] = padded([[1] * len(x) for x in ids], 0)
        inputs[f"{side}_labels"] = padded(labels, -100)
    return inputs


def test_simpo_is_trls_with_gamma_as_it_is(policy, tmp_path):
    """`simpo_gamma` is γ in units of the reward, as ours: TRL divides it by β itself."""
    trainer = cpo_trainer(tmp_path, policy, loss_type="simpo", beta=2.0, simpo_gamma=1.0)
    assert_same(ours(policy, None, SimPO(2.0, gamma=1.0)), theirs(trainer, cpo_inputs()))


def test_conservative_dpo_with_a_reference_of_zero_is_trls_cpo_with_label_smoothing(policy, tmp_path):
    """DPOTrainer smooths labels in `robust` alone, which is another loss (it subtracts the flipped label's term)."""
    trainer = cpo_trainer(tmp_path, policy, loss_type="sigmoid", beta=0.1, label_smoothing=0.2)
    loss = ConservativeDPO(0.1, label_smoothing=0.2, length_normalised=False)
    assert_same(ours(policy, None, loss), theirs(trainer, cpo_inputs()))


def padded(lists, value):
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(x) for x in lists], batch_first=True, padding_value=value)
