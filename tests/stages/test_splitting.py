"""The gradient does not depend on how a step is cut into micro-batches, and it is the textbook one."""

import pytest
import torch
import torch.nn.functional as F
from stage_runs import TINY, dpo, fit, ppo, preference_data, prompt_data, sft, sft_data, weights
from transformers import AutoModelForCausalLM, AutoTokenizer

from tulu_lightning.assets.arithmetic import sft_rows
from tulu_lightning.assets.models import resolve_model
from tulu_lightning.stages.optimizer import AdamW
from tulu_lightning.stages.ppo import Critic

SPLITS = (1, 200, 100_000)
"""Limits of a pass: every document alone, a few together, the whole step at once."""
ROUNDING = {"sft": 1e-6, "dpo": 3e-6, "ppo": 1e-6}
"""Relative to the gradient. DPO's is the difference of two that nearly cancel: the answers share all but a digit."""
LINEAR = {"eps": 1.0, "lr": 0.1}
"""With a large eps AdamW's update is nearly proportional to the gradient, so weights show what gradients were."""


def run(name, micro_tokens, folder):
    if name == "sft":
        stage, data = sft(**LINEAR), sft_data(micro_tokens=micro_tokens, max_steps=4)
    elif name == "dpo":
        stage, data = dpo(**LINEAR), preference_data(micro_tokens=micro_tokens, max_steps=4)
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


@pytest.mark.parametrize("name", ["sft", "dpo", "ppo"])
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


def test_one_step_is_the_mean_cross_entropy_of_all_trained_tokens(tmp_path):
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
