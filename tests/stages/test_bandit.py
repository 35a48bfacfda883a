"""Policies small enough for pencil and paper, trained with the functions that the stage uses, against known optima.

A response has one or two tokens of three: a first token 0 ends it, any other is followed by a second. So there are seven
responses, the lengths are ragged, and credit has to find its way from the last token to the first. The policy that
maximises E[r] - β KL(π || π_ref) gives a response y the probability π_ref(y) e^{r(y) / β} / Z.
"""

import pytest
import torch

from tulu_lightning.core.advantages import gae, moments, response_rewards, token_rewards, whiten
from tulu_lightning.core.aggregate import denominator, token_weights
from tulu_lightning.core.estimators import GAE, GRPO, RLOO, DrGRPO, ReinforcePlusPlus
from tulu_lightning.core.kl import Kl, k1, k3, kl_loss
from tulu_lightning.core.policy import ClippedPolicy, ClippedValue

FIRST = torch.tensor([0.0, 0.5, -0.5])
SECOND = torch.tensor([[0.0, 0.0, 0.0], [0.3, 0.0, -0.3], [-1.0, 0.5, 0.0]])  # row: the first token
START = torch.cat([FIRST[None], SECOND])
"""Logits of the reference by state: nothing yet, or after a first token."""
RESPONSES = [(0,), (1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2)]
REWARDS = torch.tensor([0.2, 0.0, 0.4, 0.1, 0.0, 1.0, 0.3])
BEST = RESPONSES.index((2, 1))
LENGTHS = torch.tensor([len(y) for y in RESPONSES])
STATES = [[0, *(1 + a for a in y[:-1])] for y in RESPONSES]


def chances(logits):
    """Probability of each response."""
    logp = torch.log_softmax(logits, -1)
    per_response = [
        sum(logp[s, a] for s, a in zip(states, y, strict=True)) for states, y in zip(STATES, RESPONSES, strict=True)
    ]
    return torch.stack(per_response).exp()


def optimum(beta):
    """The closed form."""
    return torch.softmax(chances(START).log() + REWARDS / beta, 0)


def distance(p, q):
    """Total variation."""
    return float((p - q).abs().sum() / 2)


def sample(logits, count, generator):
    """Which responses, their lengths, and state and token of each of their tokens end to end."""
    drawn = torch.multinomial(chances(logits.detach()), count, replacement=True, generator=generator).tolist()
    states_N = torch.tensor([s for i in drawn for s in STATES[i]])
    tokens_N = torch.tensor([a for i in drawn for a in RESPONSES[i]])
    return torch.tensor(drawn), LENGTHS[drawn].tolist(), states_N, tokens_N


def logps(logits, states_N, tokens_N):
    return torch.log_softmax(logits, -1)[states_N, tokens_N]


class Run:
    """Adam on a table of logits; the rate falls to 0, so that the end is not the last step's noise."""

    def __init__(self, steps, lr):
        self.steps, self.generator = steps, torch.Generator().manual_seed(0)
        self.logits = START.clone().requires_grad_(True)
        self.values = torch.zeros(4, requires_grad=True)
        self.optimizer = torch.optim.Adam([self.logits], lr=lr)
        self.critic = torch.optim.Adam([self.values], lr=0.05)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1 - step / steps)

    def step(self, optimizer, loss):
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def ppo(beta, advantage, steps=80, lr=0.05, count=128):
    """Critic, then policy, two epochs of two mini-batches: the order of the stage."""
    run, policy, value = Run(steps, lr), ClippedPolicy(), ClippedValue()
    for _ in range(steps):
        drawn, lengths, states, tokens = sample(run.logits, count, run.generator)
        old, reference = logps(run.logits, states, tokens).detach(), logps(START, states, tokens)
        values = run.values.detach()[states]
        rewards = token_rewards(REWARDS[drawn], old, reference, lengths, beta)
        advantages, returns = gae(rewards, values, lengths, advantage.gamma, advantage.lam)
        if advantage.whiten_batch:
            advantages = whiten(advantages, moments(advantages))
        response_N = torch.arange(count).repeat_interleave(torch.tensor(lengths))
        first = True
        for _ in range(2):
            for part in (response_N % 2 == 0, response_N % 2 == 1):
                loss_N = value(run.values[states[part]], values[part], returns[part]).loss_N
                run.step(run.critic, loss_N.mean())
                terms = policy(logps(run.logits, states[part], tokens[part]), old[part], advantages[part])
                assert not first or (terms.ratio_N == 1).all()
                first = False
                run.step(run.optimizer, terms.loss_N.sum() / denominator("token", int(part.sum()), count / 2, 2))
        run.schedule.step()
    return chances(run.logits.detach())


def test_the_closed_form_is_where_the_objective_is_flat():
    """Of E[r] - β KL at the optimum, every probability of a response has the same marginal worth."""
    best = optimum(0.5)
    worth = REWARDS - 0.5 * (best / chances(START)).log()
    assert worth.max() - worth.min() < 1e-6
    assert chances(START).sum().item() == pytest.approx(1)
    assert chances(START)[BEST] < 0.15


def test_ppo_reaches_the_best_response():
    assert ppo(0.0, GAE())[BEST] > 0.95


@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_ppo_with_a_penalty_reaches_the_closed_form(beta):
    found = ppo(beta, GAE(whiten=False))
    assert distance(found, optimum(beta)) < 0.01
    assert distance(chances(START), optimum(beta)) > 0.06


def test_ppo_with_a_large_penalty_stays_at_the_reference():
    assert distance(ppo(50.0, GAE()), chances(START)) < 0.01


def critic_free(rule, kl, steps=150, lr=0.05, prompts=16, samples=16):
    """One update per batch of groups; the KL is in the score or in the loss, as `kl` says."""
    run, policy, count = Run(steps, lr), ClippedPolicy(), prompts * samples
    group_R = torch.arange(prompts).repeat_interleave(samples)
    for _ in range(steps):
        drawn, lengths, states, tokens = sample(run.logits, count, run.generator)
        logp, reference = logps(run.logits, states, tokens), logps(START, states, tokens)
        scores = REWARDS[drawn]
        if kl.place == "reward":
            scores = response_rewards(scores, logp.detach(), reference, lengths, kl.coefficient)
        advantages = rule(scores, group_R).repeat_interleave(torch.tensor(lengths))
        if rule.whiten_batch:
            advantages = whiten(advantages, moments(advantages))
        loss_N = policy(logp, logp.detach(), advantages).loss_N
        if kl.place == "loss":
            loss_N = loss_N + kl.coefficient * kl_loss(logp, reference, kl.estimator)
        weight_N = token_weights(lengths, "constant")
        run.step(run.optimizer, (weight_N * loss_N).sum() / denominator("constant", len(weight_N), count, 2))
        run.schedule.step()
    return chances(run.logits.detach())


@pytest.mark.parametrize("rule", [GRPO(), DrGRPO(), RLOO(), ReinforcePlusPlus()], ids=str)
def test_without_a_critic_the_best_response_is_reached_too(rule):
    assert critic_free(rule, Kl(0.0))[BEST] > 0.95


def test_leave_one_out_with_a_penalty_reaches_the_closed_form():
    assert distance(critic_free(RLOO(), Kl(0.3)), optimum(0.3)) < 0.01


def test_grpo_with_a_large_penalty_in_the_loss_stays_at_the_reference():
    assert distance(critic_free(GRPO(), Kl(50.0, "loss", "k3")), chances(START)) < 0.01


# One token, where a loss per token sees the whole KL ----------------------------------------------------------------------


def one_token(loss_of, beta=0.3, steps=150, lr=0.05):
    """RLOO with the KL in the loss on a bandit of three arms; also its closed form."""
    reward, reference = torch.tensor([0.0, 0.3, 0.6]), torch.log_softmax(torch.tensor([1.0, 0.0, -1.0]), 0)
    logits, generator = reference.clone().requires_grad_(True), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam([logits], lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for _ in range(steps):
        arms = torch.multinomial(torch.softmax(logits.detach(), 0), 256, replacement=True, generator=generator)
        logp = torch.log_softmax(logits, 0)[arms]
        advantages = RLOO()(reward[arms], torch.arange(16).repeat_interleave(16))
        loss = ClippedPolicy()(logp, logp.detach(), advantages).loss_N + beta * loss_of(logp, reference[arms])
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
        schedule.step()
    return torch.softmax(logits.detach(), 0), torch.softmax(reference + reward / beta, 0)


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_the_kl_in_the_loss_reaches_the_closed_form(estimator):
    found, expected = one_token(lambda logp, reference: kl_loss(logp, reference, estimator))
    assert distance(found, expected) < 0.01


@pytest.mark.parametrize("plain", [k1, k3], ids=["k1", "k3"])
def test_a_plain_estimator_in_the_loss_ends_elsewhere(plain):
    found, expected = one_token(plain)
    assert distance(found, expected) > 0.06
