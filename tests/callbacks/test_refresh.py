"""When RolloutRefresh pushes, what it proves, and how a fault in the push ends the run."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from tulu_lightning.callbacks.refresh import RolloutRefresh
from tulu_lightning.errors import InputError
from tulu_lightning.models.weights import plain_weights
from tulu_lightning.rollout.engine import RefreshError
from tulu_lightning.rollout.local import LocalEngine

SQUARE = "model.layers.1.self_attn.o_proj.weight"
TRAINER = SimpleNamespace(world_size=1)


class ScoringEngine(LocalEngine):
    """With log-probs by a plain forward, whatever the engine under test makes them with."""

    def logprobs(self, sequences, temperature=1.0):
        return scores(self._model, sequences, temperature)


def scores(model, sequences, temperature):
    result = []
    for prompt, response in sequences:
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *response]]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        logp = torch.log_softmax(logits.float() / temperature, -1)
        result.append(logp.gather(1, torch.tensor(response)[:, None])[:, 0])
    return result


class Stage:
    """As much of a stage as the callback sees; `fault` changes what is sent."""

    def __init__(self, folder, fault=None, temperature=1.0):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.folder, self.step, self.fault = folder, 0, fault or (lambda weights: weights)
        self.model = SimpleNamespace(lm=model)
        self.rollout = SimpleNamespace(temperature=temperature)
        self.backbone = SimpleNamespace(compute_dtype="float32")
        self.engine = ScoringEngine.from_model(model)
        self.pushed, self.scored = [], 0

    def refresh(self):
        self.pushed.append(self.step)
        self.engine.refresh(self.fault(dict(plain_weights(self.model.lm))).items(), self.step)

    def canary_logprobs(self, sequences):
        self.scored += 1
        return scores(self.model.lm, sequences, self.rollout.temperature)

    def learn(self):
        with torch.no_grad():
            for weight in self.model.lm.parameters():
                weight.add_(0.3 * weight.std(correction=0) + 0.01)
        self.step += 1


def run(callback, stage, steps):
    for _ in range(steps):
        callback.on_train_batch_start(TRAINER, stage, None, 0)
        assert stage.sync_seconds >= 0
        stage.learn()


@pytest.mark.parametrize(("every", "pushed"), [(1, [1, 2, 3, 4]), (2, [2, 4]), (3, [3]), (9, [])])
def test_pushes_when_due_and_not_what_the_engine_has(tiny, every, pushed):
    stage = Stage(tiny)
    run(RolloutRefresh(every), stage, 5)
    assert stage.pushed == pushed
    assert stage.scored == len(pushed)


def test_the_stage_says_which_version_is_due(tiny):
    stage = Stage(tiny)
    stage.wanted_version = lambda every: 3 if stage.step == 3 else 0
    run(RolloutRefresh(7), stage, 4)
    assert stage.pushed == [3]


@pytest.mark.parametrize(("settings", "scored"), [({"canary": False}, 0), ({"canary_every": 3}, 2)])
def test_canaries_may_be_rare_or_left_out(tiny, settings, scored):
    stage = Stage(tiny)
    run(RolloutRefresh(**settings), stage, 5)
    assert (len(stage.pushed), stage.scored) == (4, scored)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_good_push_leaves_its_proof(tiny, temperature):
    stage = Stage(tiny, temperature=temperature)
    run(RolloutRefresh(), stage, 2)
    assert stage.sync_proof.maximum < 1e-4
    assert stage.sync_proof.tokens == 24


def shift(stage):
    exact = stage.canary_logprobs
    stage.canary_logprobs = lambda given: [logprobs + 0.02 for logprobs in exact(given)]


def test_a_trainer_that_computes_in_bf16_is_held_to_what_bf16_can_tell(tiny):
    stage = Stage(tiny)
    shift(stage)
    with pytest.raises(RefreshError, match="log-probs of given tokens differ"):
        run(RolloutRefresh(), stage, 2)
    stage = Stage(tiny)
    shift(stage)
    stage.backbone.compute_dtype = "bfloat16"
    run(RolloutRefresh(), stage, 2)
    assert stage.sync_proof.mean == pytest.approx(0.02, abs=1e-3)


def without(weights):
    del weights[SQUARE]
    return weights


def transposed(weights):
    return {**weights, SQUARE: weights[SQUARE].T}


def other_head(weights):
    return {**weights, "lm_head.weight": weights["lm_head.weight"] * 1.1}


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (without, f"not delivered: {SQUARE}"),
        (transposed, f"not held as sent: {SQUARE}; log-probs"),
        (other_head, r"not held as sent: (lm_head|model.embed_tokens).weight"),
    ],
)
def test_a_fault_in_the_push_stops_the_run_with_the_tensors_name(tiny, fault, words):
    stage = Stage(tiny, fault)
    with pytest.raises(RefreshError, match=words):
        run(RolloutRefresh(), stage, 2)


def test_a_given_tolerance_is_of_the_mean(tiny):
    stage = Stage(tiny, transposed)
    with pytest.raises(RefreshError, match=r"allowed 0\.0001 on average"):
        run(RolloutRefresh(tolerance=1e-4), stage, 2)
    run(RolloutRefresh(tolerance=100.0), Stage(tiny, transposed), 2)


def test_a_stage_or_an_engine_that_cannot_score_is_left_alone(tiny):
    stage = Stage(tiny, transposed)
    stage.canary_logprobs = None
    run(RolloutRefresh(), stage, 2)
    assert stage.pushed == [1]


@pytest.mark.parametrize("settings", [{"every_n_steps": 0}, {"canary_every": 0}, {"tolerance": 0.0}])
def test_settings_out_of_their_range_are_refused(settings):
    with pytest.raises(InputError, match="RolloutRefresh"):
        RolloutRefresh(**settings)
