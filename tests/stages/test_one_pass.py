"""What a step leaves out when it may: the forward before its only update, and groups that teach nothing."""

import pytest
import torch
from stage_runs import fit, grpo, prompt_data, weights

from tulu_lightning.core.groups import RLOO, ReinforcePlusPlus
from tulu_lightning.core.kl import Kl
from tulu_lightning.data.sources import Source
from tulu_lightning.stages.ppo import PPO


class Plain(PPO):
    """Computes everything: log-probs before the update, and every micro-batch in it."""

    one_pass = False

    def _live(self, part):
        return list(range(len(part)))


class Counted(PPO):
    """Counts the policy's passes in the steps, with and without gradients; those of a refresh's proof come before."""

    def _train(self, batch):
        self.passes = getattr(self, "passes", {True: 0, False: 0})
        hook = self.model.register_forward_pre_hook(lambda *_: self.count())
        super()._train(batch)
        hook.remove()

    def count(self):
        self.passes[torch.is_grad_enabled()] += 1


def data(steps):
    """Half of the prompts are such that a random model never answers them right."""
    taught = Source("even", rows="stage_runs.even_rows", args={"count": 20})
    dead = Source("sums", rows="tulu_lightning.assets.arithmetic.prompt_rows", args={"count": 20})
    return prompt_data(sources=[taught, dead], max_steps=steps)


def run(kind, folder, **settings):
    stage = grpo(kind, epochs=1, mini_batches=1, micro_tokens=1, **settings)  # a pack a group
    watch = fit(stage, data(3), folder)
    return stage, watch


def dead_packs(watch):
    return [round(step["zero_signal_share"] * 4) for step in watch.history]


@pytest.mark.parametrize("advantage", [None, RLOO(), ReinforcePlusPlus()])
@pytest.mark.parametrize("kl", [Kl(0.0), Kl(0.1, "loss", "k3")], ids=["free", "held"])
def test_leaving_them_out_changes_nothing(advantage, kl, tmp_path):
    settings = {"kl": kl} | ({} if advantage is None else {"advantage": advantage})
    (short, brief), (whole, full) = run(PPO, tmp_path / "a", **settings), run(Plain, tmp_path / "b", **settings)
    assert short.one_pass
    for name, tensor in weights(short).items():
        torch.testing.assert_close(tensor, weights(whole)[name], rtol=0, atol=1e-7)
    for name in ("loss", "policy_loss", "grad_norm", "trained_tokens", "advantage_std"):
        found, wanted = ([step[name] for step in watch.history] for watch in (brief, full))
        assert found == pytest.approx(wanted, rel=1e-5, abs=1e-7), name
    assert [step["first_ratio_error"] for step in brief.history] == [0.0] * 3


def test_the_only_pass_is_the_updates_and_dead_groups_have_none(tmp_path):
    stage, watch = run(Counted, tmp_path, kl=Kl(0.0))
    dead = dead_packs(watch)
    assert 0 < sum(dead) < 12, "the rows no longer give both kinds of groups"
    assert stage.passes == {True: sum(max(4 - n, 1) for n in dead), False: 0}


def test_a_second_update_needs_the_log_probs_before_the_first(tmp_path):
    stage = grpo(Counted, epochs=1, mini_batches=2, micro_tokens=1, kl=Kl(0.0))
    fit(stage, data(1), tmp_path)
    assert not stage.one_pass
    assert stage.passes[False] == 4, "one pass a pack"


def test_with_the_kl_in_the_loss_every_group_teaches(tmp_path):
    stage, watch = run(Counted, tmp_path, kl=Kl(0.1, "loss", "k2"))
    assert sum(dead_packs(watch)) > 0
    assert stage.passes[True] == 12
