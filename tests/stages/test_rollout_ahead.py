"""Sampling one step ahead, refreshing every n steps, engines that die: which weights sample which step."""

import threading
from types import SimpleNamespace

import pytest
import torch
from stage_faults import Interrupt
from stage_runs import TINY, even_data, fit, grpo, ppo, prompt_data, weights
from test_resume import assert_same, records
from transformers import AutoModelForCausalLM

from tulu_lightning.assets.models import resolve_model
from tulu_lightning.callbacks.checkpoints import checkpoint_path
from tulu_lightning.callbacks.refresh import RolloutRefresh
from tulu_lightning.errors import InputError, RunStopped
from tulu_lightning.rollout.elsewhere import Elsewhere
from tulu_lightning.rollout.engine import EngineError
from tulu_lightning.stages.collect import pack_up, unpack
from tulu_lightning.stages.ppo import PPO, Rollout
from tulu_lightning.stages.rollouts import Rollouts, expected_version


@pytest.mark.parametrize(
    ("every", "staleness", "versions"),
    [
        (1, 0, [0, 1, 2, 3, 4, 5]),
        (1, 1, [0, 0, 1, 2, 3, 4]),
        (2, 0, [0, 0, 2, 2, 4, 4]),
        (3, 0, [0, 0, 0, 3, 3, 3]),
        (2, 1, [0, 0, 0, 2, 2, 4]),
    ],
)
def test_which_weights_sample_which_step(every, staleness, versions):
    assert [expected_version(step, every, staleness) for step in range(6)] == versions


def stale(**changes):
    return grpo(**{"rollout": Rollout(max_new_tokens=6, samples_per_prompt=4, staleness=1), **changes})


class ByHand(PPO):
    """What staleness 1 should do, without a thread: before each update, batch k + 1 is sampled from the weights of step k."""

    kept = None

    def _train(self, batch):
        rollouts, step = self.rollouts, batch.step
        now = self.kept or rollouts.collector.collect(self.engine, batch, step)
        following = self.following(step)
        self.kept = following and rollouts.collector.collect(self.engine, following, step)
        rollouts.take = lambda batch: now
        super()._train(batch)


def test_one_step_ahead_equals_the_same_schedule_without_a_thread(tmp_path):
    ahead, by_hand = stale(), grpo(ByHand)
    one = fit(ahead, even_data(max_steps=4), tmp_path / "ahead")
    other = fit(by_hand, even_data(max_steps=4), tmp_path / "by hand")
    assert [step["version"] for step in one.history] == [0, 0, 1, 2] == [step["version"] for step in other.history]
    assert_same(weights(ahead), weights(by_hand))
    assert [step["score"] for step in one.history] == [step["score"] for step in other.history]
    synchronous = grpo()
    fit(synchronous, even_data(max_steps=4), tmp_path / "synchronous")
    assert any(not torch.equal(w, weights(ahead)[name]) for name, w in weights(synchronous).items())


def resumed_equals_whole(build, data, folder, every=1, stop=2, steps=5):
    callbacks = [RolloutRefresh(every)]
    whole, half, resumed = build(), build(), build()
    fit(whole, data(max_steps=steps), folder / "straight", callbacks=callbacks, refresh=False)
    fit(half, data(max_steps=steps), folder / "halves", callbacks=[*callbacks, Interrupt(stop)], refresh=False)
    assert half.step == stop
    torch.manual_seed(99)
    path = checkpoint_path(folder / "halves", stop)
    fit(resumed, data(max_steps=steps), folder / "halves", ckpt_path=path, callbacks=callbacks, refresh=False)
    assert_same(whole.state_dict(), resumed.state_dict())
    assert_same(*[[o.state_dict() for o in stage.trainer.optimizers] for stage in (whole, resumed)])
    assert records(folder / "halves") == records(folder / "straight")
    return torch.load(path, weights_only=False)["tulu_ppo"]


@pytest.mark.parametrize("name", [pytest.param("grpo", marks=pytest.mark.slow), "ppo"])
def test_stopped_one_step_ahead_and_resumed_is_never_stopped(name, tmp_path):
    rollout = Rollout(max_new_tokens=6, samples_per_prompt=3, staleness=1)
    build, data = (stale, even_data) if name == "grpo" else (lambda: ppo(rollout=rollout), prompt_data)
    saved = resumed_equals_whole(build, data, tmp_path)
    assert saved["ahead"]["step"] == 2
    assert saved["ahead"]["version"] == 1
    assert saved["engine"] is None


def test_stopped_between_two_refreshes_and_resumed_is_never_stopped(tmp_path):
    saved = resumed_equals_whole(stale, even_data, tmp_path, every=3, stop=2)
    assert saved["ahead"]["version"] == 0
    assert saved["engine"][0] == 0, "the engine still holds the weights of step 0 there"


def test_only_a_rank_with_an_engine_keeps_a_copy_of_its_weights(tmp_path):
    """A copy of a large policy on each rank of a machine is more than its memory holds."""
    kept = {}

    class Both(PPO):
        def keep_weights(self):
            super().keep_weights()
            kept["engine here"] = self._kept
            own, self.engine, self._kept = self.engine, Elsewhere(self.step), None
            super().keep_weights()
            kept["engine elsewhere"], self._kept = self._kept, kept["engine here"]
            self._push(self.engine, self.step)
            self.step += 1
            self._kept = kept["engine elsewhere"]
            self._push(self.engine, self.step - 1)  # after an update, as when an engine died over a batch ahead
            assert self.engine.version == self.step - 1
            self.step -= 1
            self.engine, self._kept = own, kept["engine here"]

    fit(stale(kind=Both), even_data(max_steps=1), tmp_path)
    names = {name for name, _ in AutoModelForCausalLM.from_pretrained(resolve_model(TINY)).named_parameters()}
    assert kept["engine here"][0] == kept["engine elsewhere"][0] == 0
    assert set(kept["engine here"][1]) >= names
    assert kept["engine elsewhere"][1] == {}


def test_a_run_with_another_interval_is_another_run(tmp_path):
    fit(grpo(), even_data(max_steps=4), tmp_path, callbacks=[RolloutRefresh(2), Interrupt(2)], refresh=False)
    with pytest.raises(InputError, match=r"refresh every_n_steps was 2 and is 1"):
        fit(grpo(), even_data(max_steps=4), tmp_path, ckpt_path=checkpoint_path(tmp_path, 2))


def test_rollouts_of_other_weights_or_another_step_are_refused(tmp_path):
    class Shifted(PPO):
        def on_fit_start(self):
            super().on_fit_start()
            begin = self.rollouts.begin

            def spoil(batch):
                begin(batch)
                self.rollouts.wait()
                self.rollouts._ready = self.rollouts._ready._replace(version=7)

            self.rollouts.begin = spoil

    stage = stale(kind=Shifted)
    with pytest.raises(
        RuntimeError, match="rollouts at hand are of step 1 and version 7, and step 1 learns from version 0"
    ):
        fit(stage, even_data(max_steps=3), tmp_path)
    assert stage.step == 1


def test_what_is_saved_of_rollouts_is_what_they_were(tmp_path):
    taken = []

    class Kept(PPO):
        def _train(self, batch):
            super()._train(batch)
            taken.append(pack_up(self.rollouts.collector.collect(self.engine, batch, batch.step)))

    fit(grpo(Kept), even_data(max_steps=1), tmp_path)
    (state,) = taken
    torch.save(state, tmp_path / "state")
    again = pack_up(unpack(torch.load(tmp_path / "state", weights_only=True)))
    assert_same(state, again)
    assert len(state["groups"]) == 4


# Engines that die ---------------------------------------------------------------------------------------------------


class Mortal:
    """An engine that dies at some of its calls, counted over all that take its place."""

    def __init__(self, engine, deaths, calls):
        self.inside, self.deaths, self.calls = engine, deaths, calls

    def _call(self, name):
        self.calls[name] = self.calls.get(name, 0) + 1
        if (name, self.calls[name]) in self.deaths:
            raise EngineError(f"no answer to {name} {self.calls[name]}")

    def generate(self, *args, **more):
        self._call("generate")
        return self.inside.generate(*args, **more)

    def refresh(self, *args, **more):
        self._call("refresh")
        return self.inside.refresh(*args, **more)

    def logprobs(self, *args, **more):
        self._call("logprobs")
        return self.inside.logprobs(*args, **more)

    def __getattr__(self, name):
        return getattr(self.inside, name)


UNPROVED = {"callbacks": [RolloutRefresh(canary=False)], "refresh": False}
"""A canary samples too; without it, the n-th call is the n-th batch."""


def mortal(deaths):
    calls = {}

    class Dying(PPO):
        built = 0

        def build_engine(self):
            self.built += 1
            return Mortal(super().build_engine(), deaths, calls)

    return Dying


MORE_DEATHS = [(("generate", 3), 0), (("refresh", 2), 1), (("logprobs", 2), 0)]


@pytest.mark.parametrize(
    ("death", "staleness"),
    [
        (("generate", 1), 0),
        (("generate", 3), 1),
        *(pytest.param(*more, marks=pytest.mark.slow) for more in MORE_DEATHS),
    ],
)
def test_a_step_whose_engine_died_is_done_again_and_nothing_is_trained_twice(death, staleness, tmp_path):
    rollout = Rollout(max_new_tokens=6, samples_per_prompt=4, staleness=staleness)
    calm, hit = grpo(rollout=rollout), grpo(mortal({death}), rollout=rollout)
    proved = {} if death[0] == "logprobs" else UNPROVED
    one = fit(calm, even_data(max_steps=4), tmp_path / "calm")
    other = fit(hit, even_data(max_steps=4), tmp_path / "hit", **proved)
    assert hit.built == (1 if death[0] == "logprobs" else 2), "a refresh that works needs no other engine"
    assert hit.step == 4
    assert [step["version"] for step in one.history] == [step["version"] for step in other.history]
    assert_same(weights(calm), weights(hit))


@pytest.mark.parametrize(
    ("what", "staleness"),
    [
        ("generate", 0),
        pytest.param("generate", 1, marks=pytest.mark.slow),
        pytest.param("refresh", 0, marks=pytest.mark.slow),
    ],
)
def test_an_engine_that_dies_twice_stops_the_run_which_can_be_gone_on_with(what, staleness, tmp_path):
    rollout = Rollout(max_new_tokens=6, samples_per_prompt=4, staleness=staleness)
    calm = grpo(rollout=rollout)
    fit(calm, even_data(max_steps=4), tmp_path / "calm")
    first = 3 if what == "generate" else 2
    # The engine that takes the place of one that died at a refresh is filled by its builder: it does not start.
    hit = grpo(mortal({(what, first), (what, first + 1)}), rollout=rollout)
    if what == "refresh":
        build = hit.build_engine
        hit.build_engine = lambda: build() if hit.built == 0 else exec_raise(EngineError("no memory"))
    with pytest.raises(RunStopped, match=rf"failed twice at the \w+ of step 2: no answer to {what} .*last checkpoint"):
        fit(hit, even_data(max_steps=4), tmp_path / "hit", every_n_steps=1, **UNPROVED)
    assert hit.step == 2
    # A checkpoint holds the batch that is sampled ahead: without it, that of the step before is the last one.
    last = 1 if (what, staleness) == ("generate", 1) else 2
    assert sorted((tmp_path / "hit" / "checkpoints").glob("*.ckpt"))[-1] == checkpoint_path(tmp_path / "hit", last)
    go_on = grpo(mortal(set()), rollout=rollout)
    fit(go_on, even_data(max_steps=4), tmp_path / "hit", ckpt_path=checkpoint_path(tmp_path / "hit", last))
    assert_same(weights(calm), weights(go_on))


def exec_raise(error):
    raise error


def test_an_error_of_the_thread_is_raised_where_it_is_waited_for(tmp_path):
    class Broken(PPO):
        def on_fit_start(self):
            super().on_fit_start()
            collect, self.collected = self.rollouts.collector.collect, []

            def fail(engine, batch, version):
                if batch.step == 2:
                    raise InputError("verifier", "is gone", "Bring it back.")
                return collect(engine, batch, version)

            self.rollouts.collector.collect = fail

    stage = stale(kind=Broken)
    with pytest.raises(InputError, match="verifier: is gone"):
        fit(stage, even_data(max_steps=4), tmp_path)
    assert stage.step == 2


def test_waiting_costs_are_told(tmp_path):
    watch = fit(stale(), even_data(max_steps=3), tmp_path)
    for step in watch.history:
        assert {"seconds_wait", "seconds_sync", "seconds_generate", "seconds_score", "seconds_update"} <= step.keys()
        assert step["seconds"] >= step["seconds_wait"] + step["seconds_sync"] + step["seconds_update"]
    assert watch.history[0]["seconds_wait"] == 0


def test_an_engine_that_does_not_end_a_batch_ahead_is_named():
    """The trainer waits `rollout.wait_seconds` for it, and then says for which step's rollouts."""
    never = threading.Event()
    collector = SimpleNamespace(collect=lambda engine, batch, version: never.wait(60))
    rollouts = Rollouts(collector, lambda: None, lambda version: None, staleness=1, seconds=0.05)
    rollouts.begin(SimpleNamespace(step=7))
    with pytest.raises(RunStopped, match=r"has waited 0s for the rollouts of step 7.* rollout\.wait_seconds"):
        rollouts.wait()
    never.set()
    rollouts.wait()  # nothing is under way any more


def test_weights_that_were_kept_as_adapters_do_not_go_on_as_merged_ones():
    stage = grpo()
    stage.engine, stage.rollouts = SimpleNamespace(version=0), SimpleNamespace(restore=lambda state: None)
    kept = (2, {"model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(4, 64)})
    with pytest.raises(InputError, match=r"push: is merged, and the checkpoint keeps the weights of step 2 as adapter"):
        stage.restore_engine({"engine": kept})
