"""PPO: whose weights sampled, whose log-probs count, what a response earns, and what a step is."""

import pytest
import torch
from stage_runs import TINY, fit, ppo, prompt_data, weights

from tulu_lightning.assets.models import load_tokenizer
from tulu_lightning.callbacks.checkpoints import checkpoint_path
from tulu_lightning.rollout.experience import Group
from tulu_lightning.rollout.local import LocalEngine
from tulu_lightning.rollout.scoring import Scorer
from tulu_lightning.stages.optimizer import AdamW
from tulu_lightning.stages.ppo import PPO, Critic, Rollout
from tulu_lightning.types import Check, Completion, Prompt


class Watched(PPO):
    """Keeps the experience of every step, and the ratios of its first pass over each pack."""

    def learn(self, experience):
        self.experience = experience
        self.ratios = []
        policy_loss = self.policy_loss

        def watch(logp_N, old_N, advantages_N):
            self.ratios.append((logp_N.detach() - old_N).exp())
            return policy_loss(logp_N, old_N, advantages_N)

        self.policy_loss = watch
        try:
            return super().learn(experience)
        finally:
            self.policy_loss = policy_loss


@pytest.mark.parametrize("micro_tokens", [1, 100_000])
def test_the_first_ratio_is_exactly_one_in_every_pack(micro_tokens, tmp_path):
    stage = ppo(Watched, micro_tokens=micro_tokens)
    watch = fit(stage, prompt_data(max_steps=2), tmp_path)
    packs = len(stage.experience[0])
    assert packs == (4 if micro_tokens == 1 else 1)
    assert all(bool((ratio_N == 1).all()) for ratio_N in stage.ratios[:packs])
    assert [step["first_ratio_error"] for step in watch.history] == [0.0, 0.0]
    assert any(bool((ratio_N != 1).any()) for ratio_N in stage.ratios[packs:]), "the second epoch has moved on"


def test_with_two_mini_batches_the_first_one_meets_ratio_one(tmp_path):
    stage = ppo(Watched, micro_tokens=1, mini_batches=2)
    watch = fit(stage, prompt_data(max_steps=2), tmp_path)
    first, second = stage.ratios[:2], stage.ratios[2:4]
    assert all(bool((ratio_N == 1).all()) for ratio_N in first)
    assert any(bool((ratio_N != 1).any()) for ratio_N in second), "the first update came before it"
    assert [step["first_ratio_error"] for step in watch.history] == [0.0, 0.0]


def test_the_reported_ratio_error_is_of_all_packs_before_the_first_update(tmp_path):
    class Tampered(PPO):
        def learn(self, experience):
            *others, last = experience[0]
            return super().learn([[*others, last._replace(old_N=last.old_N - 0.5)]])

    watch = fit(ppo(Tampered, micro_tokens=1), prompt_data(max_steps=1), tmp_path)
    assert watch.history[0]["first_ratio_error"] == pytest.approx(torch.tensor(0.5).exp().item() - 1, rel=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_samplers_log_probs_are_the_trainers(temperature, tmp_path):
    allow = () if temperature == 1 else ("temperature",)
    rollout = Rollout(max_new_tokens=12, samples_per_prompt=3, temperature=temperature, allow=allow)
    watch = fit(ppo(rollout=rollout), prompt_data(max_steps=3), tmp_path)
    assert max(step["mismatch_max"] for step in watch.history) < 1e-4


def test_token_ids_reach_the_trainer_as_they_were_sampled(tmp_path, monkeypatch):
    sampled = []
    generate = LocalEngine.generate

    def spy(self, prompts, *args, **kwargs):
        result = generate(self, prompts, *args, **kwargs)
        sampled.extend(
            (tuple(p), tuple(c.ids_L.tolist())) for p, group in zip(prompts, result, strict=True) for c in group
        )
        return result

    monkeypatch.setattr(LocalEngine, "generate", spy)
    stage = ppo(Watched, micro_tokens=150)
    fit(stage, prompt_data(max_steps=1), tmp_path)
    trained = []
    for e in (e for part in stage.experience for e in part):
        pack = e.micro.pack
        for span in pack.spans:
            if span.parent >= 0:
                prompt = pack.spans[span.parent]
                text = [tuple(pack.tokens_T[s.start : s.end].tolist()) for s in (prompt, span)]
                trained.append(tuple(text))
        scored = [target for _, response in trained[-len(e.micro.lengths_R) :] for target in response]
        assert pack.target_N.tolist() == scored, "every sampled token is scored, the stop token too"
    assert len(sampled) == 12
    assert sorted(trained) == sorted(sampled)


@pytest.mark.parametrize(
    ("text", "finish", "expected"),
    [("59", "stop", 10.0), ("58", "stop", 0.0), ("no idea", "stop", 0.0), ("59", "length", -10.0)],
)
def test_a_right_answer_earns_ten_a_wrong_one_nothing_and_a_cut_one_costs_ten(text, finish, expected):
    tokenizer = load_tokenizer(TINY)
    ids_L = torch.tensor(
        tokenizer.encode(text, add_special_tokens=False) + [tokenizer.eos_token_id] * (finish == "stop")
    )
    completion = Completion(ids_L, torch.zeros(len(ids_L)), finish, 0)
    prompt = Prompt((1, 2), (Check("last_number", "59"),), "What is 31 + 28?", 0)
    (group,) = ppo().collector(Scorer()).score([Group(prompt, (completion,))])
    assert group.rewards == (expected,)


def test_sampling_from_stale_weights_is_refused(tmp_path):
    stage = ppo()
    with pytest.raises(
        RuntimeError, match=r"holds the weights of step 0, training is at step 1: add the RolloutRefresh"
    ):
        fit(stage, prompt_data(max_steps=2), tmp_path, refresh=False)
    assert stage.step == 1


def test_every_rollout_carries_the_step_of_its_weights(tmp_path):
    stage = ppo()
    watch = fit(stage, prompt_data(max_steps=3), tmp_path)
    assert [step["version"] for step in watch.history] == [0, 1, 2]
    assert {sample["version"] for sample in stage.samples} == {2}


def test_a_step_is_one_rollout_batch_however_often_the_optimisers_are_called(tmp_path):
    stage = ppo(epochs=3, mini_batches=2)
    watch = fit(stage, prompt_data(max_steps=2), tmp_path)
    assert stage.step == len(watch.history) == 2
    assert stage.trainer.global_step == 2 * 3 * 2 * 2, "2 steps, 3 epochs, 2 mini-batches, 2 optimisers"
    assert checkpoint_path(tmp_path, 2).exists()


def test_while_the_critic_warms_up_the_policy_stays_as_it_was(tmp_path):
    critic = Critic(AdamW(lr=1e-3), layers=2, warmup_steps=2)
    stage = ppo(critic=critic)
    watch = fit(stage, prompt_data(max_steps=2), tmp_path)
    changed = {name.partition(".")[0] for name, w in weights(stage).items() if not torch.equal(w, watch.start[name])}
    assert changed == {"critic"}
    assert stage.trainer.global_step == 2 * 2, "2 steps of 2 epochs, the critic's optimiser alone"
    longer = ppo(critic=critic)
    watch = fit(longer, prompt_data(max_steps=3), tmp_path / "longer")
    changed = {name.partition(".")[0] for name, w in weights(longer).items() if not torch.equal(w, watch.start[name])}
    assert changed == {"critic", "policy"}


def test_reference_and_engine_are_neither_trained_nor_saved(tmp_path):
    stage = ppo()
    fit(stage, prompt_data(max_steps=1), tmp_path)
    modules = {name.partition(".")[0] for name in stage.state_dict()}
    assert modules == {"policy", "critic"}
    saved = torch.load(checkpoint_path(tmp_path, 1), weights_only=False)["state_dict"]
    assert saved.keys() == stage.state_dict().keys()
    start = ppo()
    start.configure_model()
    reference, untrained = stage._reference[0].state_dict(), start.model.state_dict()
    assert all(torch.equal(tensor, untrained[name]) for name, tensor in reference.items())
