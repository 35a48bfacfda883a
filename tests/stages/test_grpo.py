"""Group advantages in the stage: what is computed equals a plain padded-free reference, and what is left out stays out."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from stage_runs import TINY, even_data, fit, grpo, ppo, prompt_data, weights
from test_rollout_ahead import resumed_equals_whole
from transformers import AutoModelForCausalLM

from tulu_lightning.assets.models import resolve_model
from tulu_lightning.callbacks.refresh import RolloutRefresh
from tulu_lightning.core.correction import Correction
from tulu_lightning.core.groups import GRPO, RLOO, DrGRPO, ReinforcePlusPlus
from tulu_lightning.core.kl import Kl
from tulu_lightning.core.overlong import Overlong
from tulu_lightning.core.policy import ClippedPolicy
from tulu_lightning.data.sources import Source
from tulu_lightning.errors import InputError
from tulu_lightning.rollout import engines, server
from tulu_lightning.rollout.engines import EngineSettings, build_engine
from tulu_lightning.rollout.experience import Group, has_signal, judged, micro_batches
from tulu_lightning.rollout.local import LocalEngine
from tulu_lightning.rollout.transport import Files
from tulu_lightning.stages.collect import further
from tulu_lightning.stages.optimizer import AdamW
from tulu_lightning.stages.ppo import PPO, Critic, DynamicSampling, Rollout
from tulu_lightning.types import Check, Completion, Prompt, Verdict

FREE = AdamW(lr=1e-4, max_grad_norm=0.0)


class Watched(PPO):
    """Keeps what each step collected and learned from."""

    def learn(self, experience):
        self.experience = [e for part in experience for e in part]
        return super().learn(experience)

    def _train(self, batch):
        take = self.rollouts.take

        def watch(batch):
            self.collected = take(batch)
            return self.collected

        self.rollouts.take = watch
        super()._train(batch)
        self.rollouts.take = take


# The whole step against a plain reference ----------------------------------------------------------------------------


def logits_of(model, prompt, response):
    ids = torch.tensor([*prompt, *response])
    return model(ids[None]).logits[0, len(prompt) - 1 : -1].log_softmax(-1)


def plain_loss(collected, *, aggregation, beta, entropy, cap, longest):
    """Token by token, response by response, with transformers' own forward; the ratio is 1 and has the gradient of log π."""
    model = AutoModelForCausalLM.from_pretrained(resolve_model(TINY), attn_implementation="eager")
    total, tokens, responses = 0.0, 0, 0
    for group in collected.groups:
        scores = torch.tensor(group.rewards, dtype=torch.float64)
        advantages = (scores - scores.mean()) / (scores.std() + 1e-8)
        for completion, advantage in zip(group.completions, advantages.tolist(), strict=True):
            logp_LV = logits_of(model, group.prompt.ids, completion.ids_L.tolist())
            logp_L = logp_LV.gather(1, completion.ids_L[:, None])[:, 0]
            own = 0.0
            for at, logp in enumerate(logp_L):
                weight = min(float((logp.detach() - completion.logprobs_L[at]).exp()), cap)
                ratio = (logp - logp.detach()).exp()
                spread = -(logp_LV[at].exp() * logp_LV[at]).sum()
                gap = logp - logp.detach()  # the reference is the start: d = 0, and k2's gradient is d times that of d
                own = own - ratio * advantage * weight + beta * gap**2 / 2 - entropy * spread
            total = total + own / (len(logp_L) if aggregation == "sequence" else 1)
            tokens, responses = tokens + len(logp_L), responses + 1
    whole = {"token": tokens, "sequence": responses, "constant": responses * longest}[aggregation]
    (total / whole).backward()
    return {f"policy.lm.{name}": p.grad for name, p in model.named_parameters()}, float(total / whole)


@pytest.mark.parametrize(
    ("aggregation", "entropy", "dtype", "cap"),
    [
        ("token", 0.0, "float32", 2.0),
        ("sequence", 0.05, "float32", 2.0),
        ("constant", 0.0, "bfloat16", 1.001),
    ],
)
def test_a_steps_loss_and_gradient_are_those_of_every_token_alone(aggregation, entropy, dtype, cap, tmp_path):
    stage = grpo(
        Watched,
        optimizer=FREE,
        rollout=Rollout(max_new_tokens=5, samples_per_prompt=3, engine=EngineSettings(dtype=dtype)),
        aggregation=aggregation,
        entropy_coefficient=entropy,
        correction=Correction(cap=cap),
        mini_batches=1,
    )
    watch = fit(stage, even_data(max_steps=1, examples_per_step=3), tmp_path)
    settings = {"aggregation": aggregation, "beta": 0.01, "entropy": entropy, "cap": cap, "longest": 5}
    gradients, loss = plain_loss(stage.collected, **settings)
    assert watch.history[0]["loss"] == pytest.approx(loss, rel=1e-4, abs=1e-6)
    for name, gradient in watch.gradients.items():
        torch.testing.assert_close(gradient, gradients[name], rtol=2e-3, atol=2e-6)
    if dtype == "bfloat16":
        assert 0 < watch.history[0]["correction_clipped"] < 1


def test_packed_with_a_shared_prompt_the_log_probs_are_those_of_each_response_alone(tmp_path):
    stage = grpo(Watched, micro_tokens=100_000)
    fit(stage, even_data(max_steps=1), tmp_path)
    model = AutoModelForCausalLM.from_pretrained(resolve_model(TINY), attn_implementation="eager")
    seen = 0
    for e in stage.experience:
        for (index, sample), old_L in zip(e.micro.places, e.old_N.split(list(e.micro.lengths_R)), strict=True):
            group = stage.collected.groups[index]
            ids_L = group.completions[sample].ids_L
            with torch.no_grad():
                alone_LV = logits_of(model, group.prompt.ids, ids_L.tolist())
            torch.testing.assert_close(old_L, alone_LV.gather(1, ids_L[:, None])[:, 0], rtol=0, atol=1e-4)
            seen += 1
    assert seen == 16
    prompts = sum(len(g.prompt.ids) for g in stage.collected.groups)
    tokens = sum(e.micro.pack.tokens_T.numel() for e in stage.experience)
    assert tokens == prompts + sum(e.old_N.numel() for e in stage.experience), "each prompt is there once"


# Advantages ----------------------------------------------------------------------------------------------------------


def by_hand(rule, scores):
    mean, n = sum(scores) / len(scores), len(scores)
    deviation = (sum((s - mean) ** 2 for s in scores) / (n - 1)) ** 0.5
    if rule == "GRPO":
        return [(s - mean) / (deviation + 1e-8) for s in scores]
    if rule == "RLOO":
        return [s - (sum(scores) - s) / (n - 1) for s in scores]
    return [s - mean for s in scores]


@pytest.mark.parametrize("rule", [GRPO(), DrGRPO(), RLOO(), ReinforcePlusPlus()])
def test_every_token_of_a_response_has_its_advantage(rule, tmp_path):
    stage = grpo(Watched, advantage=rule)
    watch = fit(stage, even_data(max_steps=1), tmp_path)
    assert watch.history[0]["first_ratio_error"] == 0
    expected = [by_hand(type(rule).__name__, g.rewards) for g in stage.collected.groups]
    every_N = torch.tensor(
        [a for e in stage.experience for g, i in e.micro.places for a in [expected[g][i]] * length(e, g, i)]
    )
    mean, std = every_N.mean(), every_N.std()
    assert watch.history[0]["advantage_std"] == pytest.approx(float(std), rel=1e-4), "before any whitening"
    for e in stage.experience:
        for (index, sample), part_L in zip(e.micro.places, e.advantages_N.split(list(e.micro.lengths_R)), strict=True):
            wanted = expected[index][sample]
            wanted = (wanted - mean) / std if isinstance(rule, ReinforcePlusPlus) else wanted
            assert part_L.tolist() == pytest.approx([float(wanted)] * len(part_L), rel=1e-4, abs=1e-5)


def length(e, group, sample):
    return e.micro.lengths_R[e.micro.places.index((group, sample))]


def test_a_penalty_in_the_reward_is_taken_off_a_response_before_the_baseline(tmp_path):
    kl = Kl(coefficient=0.5)
    stage = grpo(Watched, advantage=DrGRPO(), kl=kl, optimizer=AdamW(lr=3e-3))
    fit(stage, even_data(max_steps=3), tmp_path)
    found, scores = {}, {}
    for e in stage.experience:
        parts = [x_N.split(list(e.micro.lengths_R)) for x_N in (e.old_N, e.reference_N, e.advantages_N)]
        for place, old_L, reference_L, advantage_L in zip(e.micro.places, *parts, strict=True):
            reward = stage.collected.groups[place[0]].rewards[place[1]]
            scores.setdefault(place[0], []).append(reward - 0.5 * float((old_L - reference_L).sum()))
            found.setdefault(place[0], []).append(float(advantage_L[0]))
    assert any(
        abs(s - r) > 1e-3
        for g, group in enumerate(stage.collected.groups)
        for s, r in zip(scores[g], group.rewards, strict=True)
    )
    for index, own in scores.items():
        assert found[index] == pytest.approx(by_hand("DrGRPO", own), abs=1e-4)


# What leaves before any baseline -------------------------------------------------------------------------------------


def group(rewards, lengths, finishes, row=0):
    completions = [
        Completion(torch.arange(1, n + 1), torch.zeros(n), f, 0) for n, f in zip(lengths, finishes, strict=True)
    ]
    return Group(Prompt((5, 6), (Check("exact", "x", 0.5), Check("exact", "y", 1.5)), "x", row), tuple(completions)), [
        Verdict("right", r) for r in rewards
    ]


def test_rewards_count_the_weights_and_responses_without_tokens_leave():
    made, verdicts = group([1.0, 0.5, 0.0], [2, 0, 3], ["stop", "length", "length"])
    result = judged(made, verdicts, 10.0, Overlong(), 3)
    assert result.rewards == (20.0, -10.0, -10.0), "10 times the score times the weights' sum; cut ones -10"
    assert result.trained == (True, False, True)
    (micro,) = micro_batches([result], [0], 100)
    assert micro.places == ((0, 0), (0, 2))
    assert micro.lengths_R == (2, 3)
    assert micro.pack.target_N.tolist() == [1, 2, 1, 2, 3]


def test_masked_responses_leave_before_the_baseline():
    made, verdicts = group([1.0, 0.0, 0.0], [2, 2, 3], ["stop", "stop", "length"])
    result = judged(made, verdicts, 10.0, Overlong(kind="mask"), 3)
    assert result.trained == (True, True, False)
    assert has_signal(result)
    made, verdicts = group([1.0, 1.0, 0.0], [2, 2, 3], ["stop", "stop", "length"])
    assert not has_signal(judged(made, verdicts, 10.0, Overlong(kind="mask"), 3)), "what differs is not trained on"
    assert (
        micro_batches([judged(made, verdicts, 10.0, Overlong(kind="mask"), 3)._replace(trained=(False,) * 3)], [0], 9)
        == []
    )


@pytest.mark.parametrize("build", [ppo, grpo])
def test_when_every_response_is_masked_the_step_trains_nothing_and_is_counted(build, tmp_path):
    stage = build(overlong=Overlong(kind="mask"), rollout=Rollout(max_new_tokens=1, samples_per_prompt=2))
    watch = fit(stage, prompt_data(max_steps=2), tmp_path)
    assert stage.step == 2
    assert stage.trainer.global_step == 0
    assert all(torch.equal(w, watch.start[name]) for name, w in weights(stage).items())
    assert [step["trained_responses"] for step in watch.history] == [0, 0]
    assert [step["responses"] for step in watch.history] == [8, 8]
    assert all(row["advantage"] is None for row in stage.samples)


# Dynamic sampling ----------------------------------------------------------------------------------------------------


def half_dead_rows(count):
    """Every other prompt is judged by a verifier that none of its responses can please."""
    from stage_runs import even_rows

    return [{**row, "verifier": "exact"} if i % 2 else row for i, row in enumerate(even_rows(count))]


def half_dead_data(**changes):
    return prompt_data(sources=[Source("half", rows="test_grpo.half_dead_rows", args={"count": 24})], **changes)


def dynamic(kind=PPO, **changes):
    return grpo(kind, dynamic_sampling=DynamicSampling(max_refills=3), **changes)


def test_groups_without_signal_are_replaced_by_further_prompts(tmp_path):
    stage = dynamic(Watched)
    watch = fit(stage, half_dead_data(max_steps=4), tmp_path)
    (*_, last) = watch.history
    assert any(step.get("refills", 0) > 0 for step in watch.history)
    for step in watch.history:
        assert step["responses"] >= step["trained_responses"]
    assert all(has_signal(g) for g in stage.collected.groups)
    assert len(stage.collected.groups) <= 4
    rows = [g.prompt.row for g in stage.collected.raw]
    assert len(rows) == len(set(rows)), "no prompt twice in a step"
    dead = sum(not has_signal(g) for g in stage.collected.raw)
    assert last["zero_signal_share"] == pytest.approx(dead / len(rows)), "of all that was sampled"
    right = [v.outcome == "right" for g in stage.collected.raw for v in g.verdicts]
    assert last["pass_rate_raw"] == pytest.approx(sum(right) / len(right))


def test_refills_are_the_same_after_a_stop_and_with_one_step_ahead(tmp_path):
    rollout = Rollout(max_new_tokens=6, samples_per_prompt=4, staleness=1)
    saved = resumed_equals_whole(lambda: dynamic(rollout=rollout), half_dead_data, tmp_path, steps=4)
    assert len(saved["ahead"]["groups"]) > 4, "with refills"


def test_further_prompts_are_a_function_of_the_seed_without_those_taken():
    prompts = [Prompt((1,), (Check("exact", "x"),), "", row) for row in range(20)]
    first = further(prompts, {3, 4}, 6, seed=1)
    assert further(prompts, {3, 4}, 6, seed=1) == first != further(prompts, {3, 4}, 6, seed=2)
    assert len({p.row for p in first} - {3, 4}) == 6
    assert further(prompts, range(18), 6, seed=1) == tuple(p for p in further(prompts, (), 20, seed=1) if p.row >= 18)


def test_when_all_groups_are_dead_after_the_refills_nothing_is_trained(tmp_path):
    data = prompt_data(
        max_steps=1, sources=[Source("sums", rows="tulu_lightning.assets.arithmetic.prompt_rows", args={"count": 40})]
    )
    stage = dynamic(Watched, rollout=Rollout(max_new_tokens=1, samples_per_prompt=2), overlong=Overlong())
    watch = fit(stage, data, tmp_path)
    assert watch.history[0]["refills"] == 3
    assert watch.history[0]["responses"] == 4 * 2 * 4, "four prompts, and three rounds of four more"
    assert watch.history[0]["zero_signal_share"] == 1
    assert stage.trainer.global_step == 0


# KL ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [ppo, grpo])
def test_without_a_coefficient_there_is_no_reference(build, tmp_path):
    stage = build(kl=Kl(coefficient=0.0))
    watch = fit(stage, even_data(max_steps=2), tmp_path)
    assert stage._reference == []
    assert all("kl" not in step and "entropy" in step for step in watch.history)


def test_an_adaptive_coefficient_moves_and_goes_on_where_it_was(tmp_path):
    def build():
        kl = Kl(coefficient=0.1, target=1e-3, horizon=100)
        return ppo(kl=kl, optimizer=AdamW(lr=1e-3), critic=Critic(AdamW(lr=1e-3), layers=2))

    saved = resumed_equals_whole(build, prompt_data, tmp_path, stop=3)
    lines = (tmp_path / "straight" / "metrics.jsonl").read_text().splitlines()
    used = [json.loads(line)["kl_coefficient"] for line in lines]
    assert used[0] == 0.1
    # The first step's KL is 0, below the target: -0.2 x 12 responses / 100. Later ones are far above: +0.2 x 12 / 100.
    assert used[1] == pytest.approx(0.1 * (1 - 0.2 * 12 / 100))
    assert used[2] == pytest.approx(used[1] * (1 + 0.2 * 12 / 100))
    assert saved["kl_coefficient"] == used[3]


def test_while_only_the_critic_learns_beta_stays(tmp_path):
    kl = Kl(coefficient=0.1, target=1e-3, horizon=100)
    critic = Critic(AdamW(lr=1e-3), layers=2, warmup_steps=2)
    fit(ppo(kl=kl, critic=critic), prompt_data(max_steps=4), tmp_path)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    # The third step is the policy's first: its KL of 0 is below the target.
    assert [json.loads(line)["kl_coefficient"] for line in lines] == [0.1, 0.1, 0.1, pytest.approx(0.0976)]


# The sampler is the trainer's ----------------------------------------------------------------------------------------


def test_the_sampler_has_the_trainers_temperature_and_stop_set(tmp_path, monkeypatch):
    asked, trained = [], []
    generate = LocalEngine.generate

    def spy(self, prompts, n, sampling, *args, **more):
        asked.append((n, sampling))
        return generate(self, prompts, n, sampling, *args, **more)

    monkeypatch.setattr(LocalEngine, "generate", spy)
    rollout = Rollout(max_new_tokens=4, samples_per_prompt=3, temperature=0.8, top_k=50, allow=("temperature", "top_k"))
    stage = grpo(rollout=rollout)
    stage.configure_model()
    forward = stage.model.forward

    def watch(pack, temperature=1.0, *args, **more):
        trained.append(temperature)
        return forward(pack, temperature, *args, **more)

    stage.model.forward = watch
    data = even_data(max_steps=1)
    fit(stage, data, tmp_path)
    ((n, sampling),) = asked
    assert n == 3
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.max_new_tokens) == (0.8, 1.0, 50, 4)
    assert set(sampling.stop_ids) == set(stage.stop_ids()) >= set(data.stop_ids)
    assert set(trained) == {0.8}


def test_canaries_are_the_trainers_own_log_probs_at_the_rollouts_temperature(tmp_path):
    sequences = [([5, 6, 7], [8, 9]), ([10], [11, 12, 13]), ([3] * 40, [4] * 20)]
    kept = {}

    class Asked(PPO):
        def _train(self, batch):
            kept["trainer"] = self.canary_logprobs(sequences)
            kept["engine"] = self.engine.logprobs(sequences, self.rollout.temperature)
            super()._train(batch)

    rollout = Rollout(max_new_tokens=4, samples_per_prompt=2, temperature=0.5, allow=("temperature",))
    stage = grpo(Asked, rollout=rollout, micro_tokens=50)
    fit(stage, even_data(max_steps=1), tmp_path)
    model = AutoModelForCausalLM.from_pretrained(resolve_model(TINY), attn_implementation="eager")
    for (prompt, response), own_L, engines_L in zip(sequences, kept["trainer"], kept["engine"], strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1] / 0.5
        plain_L = logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0]
        torch.testing.assert_close(own_L, plain_L, rtol=0, atol=1e-4)
        torch.testing.assert_close(own_L, engines_L, rtol=0, atol=1e-4)
        assert own_L.requires_grad is False


def test_the_score_is_told_by_source(tmp_path):
    sources = [
        Source("even", rows="stage_runs.even_rows", args={"count": 8}),
        Source("sums", rows="tulu_lightning.assets.arithmetic.prompt_rows", args={"count": 8}),
    ]
    stage = grpo(Watched)
    watch = fit(stage, prompt_data(sources=sources, max_steps=1, examples_per_step=16), tmp_path)
    (step,) = watch.history
    for name in ("even", "sums"):
        own = [v.score for g in stage.collected.raw if g.prompt.source == name for v in g.verdicts]
        assert step[f"score/{name}"] == pytest.approx(sum(own) / len(own))
    assert step["score/even"] > step["score/sums"]


# Settings that clash -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "changes", "said"),
    [
        (ppo, {"critic": None}, "model.critic: is missing, and GAE needs a critic"),
        (ppo, {"dynamic_sampling": DynamicSampling()}, "model.dynamic_sampling: drops groups"),
        (grpo, {"critic": Critic(AdamW(lr=1e-3))}, "model.critic: does nothing: GRPO compares"),
        (grpo, {"value_coefficient": 0.1}, "model.value_coefficient: does nothing"),
        (grpo, {"rollout": Rollout(max_new_tokens=4)}, "rollout.samples_per_prompt: is 1, and GRPO compares"),
        (grpo, {"overlong": Overlong(kind="ramp", ramp_tokens=6)}, "overlong.ramp_tokens: "),
    ],
)
def test_settings_that_clash_or_would_do_nothing(build, changes, said):
    with pytest.raises(InputError) as caught:
        build(**changes)
    assert str(caught.value).startswith(said)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"temperature": 0.7}, r"rollout\.temperature: is 0\.7, so the sampler .* rollout\.allow: \[temperature\]"),
        ({"top_p": 0.9}, r"rollout\.top_p: is 0\.9"),
        ({"top_k": 40, "allow": ("top_p",)}, r"rollout\.allow: names top_p, which is 1\.0"),
        ({"allow": ("min_p",)}, r"rollout\.allow: is 'min_p'"),
    ],
)
def test_sampling_filters_have_to_be_allowed_by_name(settings, said):
    with pytest.raises(InputError, match=said):
        Rollout(max_new_tokens=4, **settings)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"kind": "servr"}, r"rollout\.engine\.kind: is 'servr'\. Did you mean 'server'"),
        ({"url": "http://127.0.0.1:1"}, r"rollout\.engine\.url: is http.*kind local does not read it"),
        ({"max_model_len": 64}, r"rollout\.engine\.max_model_len: is 64, and .* kind vllm or server"),
        ({"kind": "vllm", "python": "python3"}, r"rollout\.engine\.python: is python3"),
        ({"kind": "server", "url": "http://x", "python": "python3"}, r"rollout\.engine\.python: .*a server that runs"),
        ({"kind": "server", "seconds": 0.0}, r"rollout\.engine\.seconds: is 0\.0"),
        ({"kind": "vllm", "kv_cache_mb": 0}, r"rollout\.engine\.kv_cache_mb: is 0"),
    ],
)
def test_engine_settings_that_do_nothing(settings, said):
    with pytest.raises(InputError, match=said):
        EngineSettings(**settings)


@pytest.mark.parametrize(
    ("settings", "asked"),
    [
        ({}, (None, {"python": None, "max_model_len": None, "kv_cache_mb": 256, "seconds": 600.0})),
        (
            {"python": "p", "max_model_len": 64},
            (None, {"python": "p", "max_model_len": 64, "kv_cache_mb": 256, "seconds": 600.0}),
        ),
        ({"url": "http://x", "seconds": 5.0}, ("http://x", {"max_model_len": None, "seconds": 5.0})),
    ],
)
def test_a_server_is_started_unless_it_runs(settings, asked, monkeypatch):
    class Server:
        def __init__(self, url, folder, dtype, **more):
            self.asked = (url, more)
            assert (folder, dtype) == ("folder", "bfloat16")

        @classmethod
        def started(cls, folder, dtype, **more):
            return cls(None, folder, dtype, **more)

    monkeypatch.setattr(server, "ServerEngine", Server)
    made = build_engine(EngineSettings("server", "bfloat16", **settings), pytest.fail, "folder")
    url, more = made.asked
    assert isinstance(more.pop("transport", None), Files) is (url is not None)
    assert (url, more) == asked


def test_vllm_in_this_process_needs_vllm_here(monkeypatch):
    monkeypatch.setattr(engines, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"rollout\.engine\.kind: is vllm, and there is no vLLM in this environment"):
        build_engine(EngineSettings("vllm"), pytest.fail, "folder")
    stage = ppo(rollout=Rollout(max_new_tokens=4, engine=EngineSettings("server")))
    stage.backbone = replace(stage.backbone, layers=2)
    with pytest.raises(InputError, match=r"loads whole models, and backbone\.layers cuts the policy"):
        stage.check_engine()


def with_ranks(count, device="cpu"):
    return SimpleNamespace(world_size=count, strategy=SimpleNamespace(root_device=torch.device(device)))


def test_vllm_without_a_limit_on_the_trainers_gpu_is_refused():
    stage = ppo(rollout=Rollout(max_new_tokens=4, engine=EngineSettings("vllm", kv_cache_mb=None)))
    stage._trainer = with_ranks(1)
    stage.check_engine()
    stage._trainer = with_ranks(1, "cuda")
    with pytest.raises(InputError, match=r"rollout\.engine\.kv_cache_mb: is null, .*Give a number, or use"):
        stage.check_engine()


def test_vllm_within_one_of_several_ranks_is_refused():
    """Its start makes process groups over all ranks: the first would wait for the others, and they for it."""
    stage = ppo(rollout=Rollout(max_new_tokens=4, engine=EngineSettings("vllm"), engines="one"))
    stage._trainer = with_ranks(1)
    stage.check_engine()
    stage._trainer = with_ranks(2)
    with pytest.raises(
        InputError, match=r"rollout\.engines: is one, and vLLM within the first rank .*Use per_rank, or"
    ):
        stage.check_engine()


def test_an_engine_that_is_found_to_have_too_little_room_is_refused_before_the_first_step(tmp_path):
    class Short(LocalEngine):
        positions = 20  # as a server that somebody started may have

    class Given(PPO):
        def build_engine(self):
            return Short.from_folder(self.folder)

    stage, data = grpo(Given), even_data(max_steps=2)
    longest = max(len(prompt.ids) for prompt in data.prompts)
    said = rf"max_model_len: gives 20 positions, and the longest prompt has {longest} tokens with 6 new ones\. Raise it"
    with pytest.raises(InputError, match=said):
        fit(stage, data, tmp_path)
    assert stage.step == 0
    assert not list(tmp_path.glob("metrics.jsonl"))


def test_dual_clip_and_every_option_together_run(tmp_path):
    stage = grpo(
        policy_loss=ClippedPolicy(clip_low=0.2, clip_high=0.28, dual_clip=3.0),
        correction=Correction(kind="mask"),
        aggregation="sequence",
        entropy_coefficient=0.01,
        overlong=Overlong(kind="ramp", ramp_tokens=3),
        dynamic_sampling=DynamicSampling(1),
        epochs=2,
    )
    watch = fit(stage, even_data(max_steps=2), tmp_path, callbacks=[RolloutRefresh(2)], refresh=False)
    assert all(torch.isfinite(torch.tensor(step["loss"])) for step in watch.history)
    assert [step["version"] for step in watch.history] == [0, 0]
