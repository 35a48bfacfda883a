"""GRPO beside TRL's GRPOTrainer: rollouts that it made and scored itself, its own advantages, its own loss and gradients.

Theirs reads padded rows, the prompt in front of each response; ours a pack in which each prompt stands once. Rollouts come
in through TRL's `rollout_func`, so that their lengths differ; everything after that is TRL's.
"""

import pytest
import torch
from transformers import AutoModelForCausalLM

from tulu_lightning.assets.tiny import byte_tokenizer
from tulu_lightning.core.aggregate import denominator, token_weights
from tulu_lightning.core.groups import GRPO, DrGRPO
from tulu_lightning.core.kl import k3, kl_loss
from tulu_lightning.core.packing import pack
from tulu_lightning.core.policy import ClippedPolicy
from tulu_lightning.models.backbone import Backbone, PackedLM
from tulu_lightning.types import Document, Segment

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
pytestmark = pytest.mark.filterwarnings("ignore:.*rollout_func.*experimental")

PROMPTS = [[72, 105, 33], [65, 32, 108, 111, 110, 103, 101, 114]]
LENGTHS = [[5, 1, 9, 12], [3, 12, 7, 2]]
"""Tokens of the four responses to each prompt; the limit is 12."""
REWARDS = [[10.0, 0.0, 0.0, 2.0], [0.0, 10.0, 10.0, 1.0]]
LIMIT, BETA = 12, 0.1
PLAIN_CLIP = ClippedPolicy()


def responses():
    generator = torch.Generator().manual_seed(0)
    return [[torch.randint(0, 256, (n,), generator=generator).tolist() for n in row] for row in LENGTHS]


def moved(folder, seed, share):
    """The model with every weight moved by some share of its size: another policy, not another subject."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight += share * weight.std().nan_to_num() * torch.randn(weight.shape, generator=generator)
    return model


@pytest.fixture(scope="module")
def policy(tiny, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("policy")
    moved(tiny, 1, 0.2).save_pretrained(folder)
    return str(folder)


# Theirs ---------------------------------------------------------------------------------------------------------------


def rollout(prompts, trainer):
    flat = [ids for row in responses() for ids in row]
    return {
        "prompt_ids": [PROMPTS[i // 4] for i in range(8)],
        "completion_ids": flat,
        "logprobs": [[-5.5] * len(ids) for ids in flat],
    }


def flat_rewards(completions, **_):
    return [r for row in REWARDS for r in row]


def theirs(tiny, policy, folder, on_policy=False, **settings):
    """TRL's rollouts and advantages, its loss and gradients. Unless `on_policy`, old log-probs are some way off."""
    config = trl.GRPOConfig(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        report_to="none",
        gradient_checkpointing=False,
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=LIMIT,
        **{"beta": BETA, "use_bias_correction_kl": False, **settings},
    )
    rows = datasets.Dataset.from_list([{"prompt": "a"}])
    trainer = trl.GRPOTrainer(tiny, flat_rewards, config, rows, processing_class=byte_tokenizer(), rollout_func=rollout)
    trainer.model.load_state_dict(AutoModelForCausalLM.from_pretrained(policy).state_dict())  # the reference stays tiny
    trainer.model.eval()  # no accumulation window outside train(); the model has no dropout
    inputs = trainer._generate_and_score_completions([{"prompt": "a"}] * 8)
    if not on_policy:
        inputs["old_per_token_logps"] = far_off(inputs["completion_mask"])
    value = trainer._compute_loss(trainer.model, inputs)
    value.backward()
    return inputs, value.item(), {name: weight.grad for name, weight in trainer.model.named_parameters()}


def far_off(mask):
    """Old log-probs about those of the policy, so that ratios lie on both sides of the clip and far beyond it."""
    return -5.6 + 0.6 * torch.randn(mask.shape, generator=torch.Generator().manual_seed(2))


# Ours -----------------------------------------------------------------------------------------------------------------


def ours(tiny, policy, inputs, aggregation, rule, policy_loss=PLAIN_CLIP, kl=None):
    documents = []
    for prompt, group in zip(PROMPTS, responses(), strict=True):
        children = (Segment(torch.tensor(ids), torch.ones(len(ids)), 0) for ids in group)
        documents.append(Document((Segment(torch.tensor(prompt), torch.zeros(len(prompt))), *children)))
    packed = pack(documents)
    lengths = [n for row in LENGTHS for n in row]
    model = PackedLM(Backbone(policy), policy)
    logp = model(packed).logp_N
    with torch.no_grad():
        reference = PackedLM(Backbone(tiny), tiny)(packed).logp_N
    advantages = rule(torch.tensor(flat_rewards(None)), torch.arange(2).repeat_interleave(4))
    old = inputs["old_per_token_logps"][inputs["completion_mask"].bool()] if "old_per_token_logps" in inputs else None
    terms = policy_loss(
        logp, logp.detach() if old is None else old, advantages.repeat_interleave(torch.tensor(lengths))
    )
    loss = terms.loss_N if kl is None else terms.loss_N + BETA * kl(logp, reference, terms.ratio_N)
    assert old is None or 0.1 < terms.clipped_N.float().mean() < 0.9, "both branches have to be seen"
    value = (token_weights(lengths, aggregation) * loss).sum() / denominator(aggregation, sum(lengths), 8, LIMIT)
    value.backward()
    return advantages, value.item(), {name: weight.grad for name, weight in model.lm.named_parameters()}


def gap(found, expected):
    """Distance of two gradients, as one vector each, relative to the length of the second."""
    assert found.keys() == expected.keys()
    mine, other = (torch.cat([x[name].double().flatten() for name in expected]) for x in (found, expected))
    assert other.norm() > 0
    return float((mine - other).norm() / other.norm())


def plain(logp, reference, ratio):
    return k3(logp, reference)


def straight_through(logp, reference, ratio):
    return kl_loss(logp, reference, "k3")


def weighted(logp, reference, ratio):
    return kl_loss(logp, reference, "k3", ratio)


@pytest.mark.parametrize(
    ("loss_type", "aggregation", "settings", "rule", "policy_loss"),
    [
        ("grpo", "sequence", {}, GRPO(1e-4), PLAIN_CLIP),
        ("bnpo", "token", {"epsilon_high": 0.28}, GRPO(1e-4), ClippedPolicy(0.2, 0.28)),
        ("dapo", "token", {"delta": 1.5}, GRPO(1e-4), ClippedPolicy(dual_clip=1.5)),
        ("dr_grpo", "constant", {"scale_rewards": "none"}, DrGRPO(), PLAIN_CLIP),
    ],
)
def test_value_and_gradient_are_trls(loss_type, aggregation, settings, rule, policy_loss, tiny, policy, tmp_path):
    """With plain k3, as TRL's `use_bias_correction_kl: false` back-propagates it. Its ε of the deviation is 1e-4."""
    inputs, value, gradient = theirs(tiny, policy, tmp_path, loss_type=loss_type, **settings)
    advantages, own_value, own_gradient = ours(tiny, policy, inputs, aggregation, rule, policy_loss, plain)
    torch.testing.assert_close(advantages, inputs["advantages"], atol=1e-5, rtol=1e-5)
    assert own_value == pytest.approx(value, rel=1e-5, abs=1e-6)
    assert gap(own_gradient, gradient) < 1e-5


@pytest.mark.parametrize("on_policy", [True, False])
def test_straight_through_k3_has_the_value_of_the_plain_one_and_another_gradient(on_policy, tiny, policy, tmp_path):
    """(1 - exp(-d)) ∇log π there, d ∇log π here."""
    inputs, value, gradient = theirs(tiny, policy, tmp_path, on_policy, loss_type="grpo")
    _, own_value, own_gradient = ours(tiny, policy, inputs, "sequence", GRPO(1e-4), kl=straight_through)
    assert own_value == pytest.approx(value, rel=1e-5, abs=1e-6)
    assert gap(own_gradient, gradient) > 1e-3


@pytest.mark.parametrize("on_policy", [True, False])
def test_straight_through_k3_with_the_ratio_is_trls_default(on_policy, tiny, policy, tmp_path):
    """TRL multiplies plain k3 by the ratio with its gradient: (k3 + 1 - exp(-d)) ρ ∇log π, which is ρ d ∇log π."""
    inputs, value, gradient = theirs(tiny, policy, tmp_path, on_policy, loss_type="grpo", use_bias_correction_kl=True)
    kl = straight_through if on_policy else weighted  # the ratio is 1 on policy
    _, own_value, own_gradient = ours(tiny, policy, inputs, "sequence", GRPO(1e-4), kl=kl)
    assert own_value == pytest.approx(value, rel=1e-5, abs=1e-6)
    assert gap(own_gradient, gradient) < 1e-5


def test_without_a_kl_there_is_nothing_to_differ_about(tiny, policy, tmp_path):
    inputs, value, gradient = theirs(tiny, policy, tmp_path, loss_type="dr_grpo", scale_rewards="none", beta=0.0)
    _, own_value, own_gradient = ours(tiny, policy, inputs, "constant", DrGRPO())
    assert own_value == pytest.approx(value, rel=1e-5, abs=1e-6)
    assert gap(own_gradient, gradient) < 1e-5
