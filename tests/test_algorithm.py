"""The numbers of the algorithm: GAE, losses, update, normalisers, rewards, policy, and what collect makes of steps.

test_environments.py has the rest: workers, seeds, checkpoints, evaluation, whole trainings.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import math
import threading
import time
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from torch import Tensor
from torch.distributions import Normal

import ppo_vec
from ppo_vec import Agent, Normalizer, Options, Rollout, State, gae, policy_loss, update, value_loss

CPU = torch.device("cpu")
OBS, ACTIONS = 5, 3  # sizes of the made-up task
any_seed = st.integers(0, 2**32 - 1)
assert_same = functools.partial(torch.testing.assert_close, rtol=0, atol=0)  # also nested dicts and lists of tensors
both_kinds_of_std = pytest.mark.parametrize("state_dependent_std", [False, True])

# ---- Helpers ---------------------------------------------------------------------------------------------------------


def make_args(**changed: Any) -> Options:
    small: dict[str, Any] = {
        "num_envs": 4, "num_steps": 32, "num_minibatches": 4, "update_epochs": 2, "anneal_lr": False,
        "anneal_share": 1.0, "actor_hidden_sizes": (16, 16), "critic_hidden_sizes": (16, 16),
    }  # fmt: skip
    args = Options(**{**small, "critic_learning_rate": changed.get("learning_rate", 5e-4), **changed})
    ppo_vec.validate(args)
    return args


def make_state(args: Options, task: ppo_vec.Task | None = None, seed: int = 0) -> State:
    """A state whose networks are far from their initialisation, and whose normaliser has seen something."""
    bound = np.ones(ACTIONS, np.float32)
    state = State(args, task or ppo_vec.Task(OBS, -bound, bound, None, None), CPU)
    rng = torch.Generator().manual_seed(seed)
    for parameter in state.agent.parameters():
        parameter.data.normal_(0, 0.4, generator=rng)
    state.agent.normalizer.update(1 + 2 * torch.randn(50, len(state.agent.normalizer.mean), generator=rng))
    return state


def mean_logstd(agent: Agent, x: Tensor) -> tuple[Tensor, Tensor]:
    return agent.distribution.mean_logstd(agent.policy(x))


def log_prob(agent: Agent, x: Tensor, actions: Tensor) -> Tensor:
    return agent.distribution.log_prob_entropy(agent.policy(x), actions)[0]


def actors(agent: Agent) -> list[torch.nn.Parameter]:
    return [*agent.distribution.parameters(), *agent.actor.parameters()]


def random_flags(rng: np.random.Generator, T: int, N: int, p: float = 0.15) -> tuple[Tensor, Tensor]:
    """terminated and truncated; here and there both."""
    return tuple(torch.from_numpy(rng.random((2, T, N)) < p))


def fake_rollout(state: State, seed: int = 0) -> Rollout:
    """A rollout of random numbers, as collect() would fill it, with log probabilities off those of the agent."""
    rng, (T, N) = np.random.default_rng(seed), (state.args.num_steps, state.args.num_envs)

    def normal(*shape: int) -> Tensor:
        return torch.from_numpy(rng.normal(size=shape).astype(np.float32))

    agent, D = state.agent, len(state.agent.normalizer.mean)
    rollout = Rollout(
        normal(T + 1, N, D), normal(T, N, D), normal(T, N, ACTIONS), normal(T, N), *random_flags(rng, T, N),
        torch.zeros(N, dtype=torch.bool), [],
    )  # fmt: skip
    with torch.no_grad():
        rollout.normalized_obs = x = agent.normalizer(rollout.obs)
        values = agent.value(x) + normal(T + 1, N)
        rollout.logprobs = log_prob(agent, x[:-1], rollout.actions) + 0.2 * normal(T, N)
    rollout.values, rollout.next_values = values[:-1], torch.where(rollout.truncated, normal(T, N), values[1:])
    return rollout


def steps_taken(state: State) -> list[int]:
    """By the actor and by the critic."""
    return [int(optimizer.state["step"]) for optimizer in state.optimizers]


def naive_gae(r: Any, v: Any, next_v: Any, terminated: Any, truncated: Any, gamma: float, lam: float) -> np.ndarray:
    """The sum of equation 16 written out, in float64."""
    advantages = np.zeros(r.shape)
    for t, n in np.ndindex(*r.shape):
        weight = 1.0
        for k in range(t, len(r)):
            bootstrap = 0.0 if terminated[k, n] else gamma * float(next_v[k, n])
            advantages[t, n] += weight * (float(r[k, n]) + bootstrap - float(v[k, n]))
            if terminated[k, n] or truncated[k, n]:
                break
            weight *= gamma * lam
    return advantages


class Recorder:
    """A loss function that notes what it is given, and what comes of each minibatch."""

    def __init__(self, loss: Any) -> None:
        self.loss, self.__name__ = loss, loss.__name__
        self.minibatches: list[dict[str, Tensor]] = []
        self.metrics: list[dict[str, float]] = []

    def __call__(self, agent: Agent, mb: dict[str, Tensor], args: Options) -> tuple[Tensor, dict[str, Tensor]]:
        parameters = actors(agent) if self.loss is policy_loss else list(agent.critic.parameters())
        self.minibatches.append(mb)
        loss, metrics = self.loss(agent, mb, args)
        grads = torch.autograd.grad(loss, parameters, retain_graph=True)
        norm = math.sqrt(sum(float(grad.double().square().sum()) for grad in grads))
        self.metrics.append({**{k: float(v) for k, v in metrics.items()}, f"{self.__name__}_grad_norm": norm})
        return loss, metrics

    def means(self, until: int | None = None) -> Any:
        means = {k: np.mean([m[k] for m in self.metrics[:until]]) for k in self.metrics[0]}
        return pytest.approx(means, rel=1e-4, abs=1e-6)


Recorders = tuple[Recorder, Recorder]


@pytest.fixture
def recorders(monkeypatch: pytest.MonkeyPatch) -> Recorders:
    """The actor's and the critic's; update() calls them."""
    pair = Recorder(policy_loss), Recorder(value_loss)
    for recorder in pair:
        monkeypatch.setattr(ppo_vec, recorder.__name__, recorder)
    return pair


# ---- Generalized advantage estimation --------------------------------------------------------------------------------

# One environment, rewards 1 1 1, values 1 2 4, next values 2 4 8, gamma 1/2, lambda 1/2 (so the decay is 1/4). If row 1
# ends an episode, its next value is 6, that of the true last observation; in row 2 it is 10.
#   delta 0 = 1 + 2/2 - 1 = 1      delta 1 = 1 + 4/2 - 2 = 1 (6: 2; terminated: -1)      delta 2 = 1 + 8/2 - 4 = 1
GAE_BY_HAND = {
    "running": ((0, 0, 0), (0, 0, 0), (2, 4, 8), (1 + 5 / 16, 1 + 1 / 4, 1)),
    "row 1 truncated": ((0, 0, 0), (0, 1, 0), (2, 6, 8), (1 + 2 / 4, 2, 1)),
    "row 1 terminated": ((0, 1, 0), (0, 0, 0), (2, 6, 8), (1 - 1 / 4, -1, 1)),
    "row 1 both: termination wins": ((0, 1, 0), (0, 1, 0), (2, 6, 8), (1 - 1 / 4, -1, 1)),
    "last row truncated": ((0, 0, 0), (0, 0, 1), (2, 4, 10), (1 + 6 / 16, 1 + 2 / 4, 2)),
    "last row terminated": ((0, 0, 1), (0, 0, 0), (2, 4, 10), (1 + 1 / 16, 1 / 4, -3)),
    "last row both": ((0, 0, 1), (0, 0, 1), (2, 4, 10), (1 + 1 / 16, 1 / 4, -3)),
}


@pytest.mark.parametrize(("terminated", "truncated", "next_values", "expected"), GAE_BY_HAND.values(), ids=GAE_BY_HAND)
def test_gae_by_hand(terminated: tuple, truncated: tuple, next_values: tuple, expected: tuple) -> None:
    rewards, values = torch.ones(3, 1), torch.tensor([[1.0], [2.0], [4.0]])
    flags = (torch.tensor(f, dtype=torch.bool)[:, None] for f in (terminated, truncated))
    advantages = gae(rewards, values, torch.tensor(next_values).float()[:, None], *flags, 0.5, 0.5)
    assert advantages.squeeze(1).tolist() == list(expected)


@given(any_seed, st.integers(1, 12), st.integers(1, 4), st.floats(0, 1), st.floats(0, 1), st.floats(0, 0.6))
def test_gae_equals_the_naive_sum(seed: int, T: int, N: int, gamma: float, lam: float, p: float) -> None:
    rng = np.random.default_rng(seed)
    r, v, next_v = torch.from_numpy(rng.normal(size=(3, T, N)).astype(np.float32))
    flags = random_flags(rng, T, N, p)
    expected = naive_gae(r, v, next_v, *flags, gamma, lam)
    np.testing.assert_allclose(gae(r, v, next_v, *flags, gamma, lam).numpy(), expected, rtol=1e-4, atol=1e-5)


# ---- Networks, probabilities, and the policy in NumPy ----------------------------------------------------------------


@both_kinds_of_std
def test_initialisation(state_dependent_std: bool) -> None:
    """Orthogonal: rows or columns of length `gain`, at right angles to each other. Biases are zero, but for the std."""
    args = make_args(
        state_dependent_std=state_dependent_std, initial_std=0.5, actor_hidden_sizes=(16, 24, 8),
        critic_hidden_sizes=(32,), activation="relu",
    )  # fmt: skip
    torch.manual_seed(0)
    agent = Agent(OBS, ACTIONS, args)
    layers = [[m for m in net if isinstance(m, torch.nn.Linear)] for net in (agent.actor, agent.critic)]
    outputs = 2 * ACTIONS if state_dependent_std else ACTIONS
    assert [(m.in_features, m.out_features) for m in layers[0]] == [(OBS, 16), (16, 24), (24, 8), (8, outputs)]
    assert [(m.in_features, m.out_features) for m in layers[1]] == [(OBS, 32), (32, 1)]
    for net, last_gain in zip(layers, (0.01, 1.0)):
        for layer in net:
            gain, w = last_gain if layer is net[-1] else math.sqrt(2), layer.weight.detach()
            square = w @ w.T if len(w) <= w.shape[1] else w.T @ w
            torch.testing.assert_close(square, gain**2 * torch.eye(len(square)), rtol=1e-4, atol=1e-5 * gain**2)
            if layer is not layers[0][-1]:
                assert not layer.bias.any()
    bias = layers[0][-1].bias.tolist()
    assert bias == pytest.approx([0.0] * ACTIONS + [math.log(0.5)] * (outputs - ACTIONS))
    mean, logstd = mean_logstd(agent, torch.zeros(2, OBS))  # biases are all that is left of it
    assert not mean.any()
    torch.testing.assert_close(logstd.exp().expand(2, ACTIONS), torch.full((2, ACTIONS), 0.5))


@both_kinds_of_std
def test_log_prob_and_entropy_equal_torch_distributions(state_dependent_std: bool) -> None:
    distribution = ppo_vec.Gaussian(ACTIONS, make_args(state_dependent_std=state_dependent_std, initial_std=0.3))
    torch.manual_seed(0)
    out, actions = torch.randn(2, 20, distribution.outputs), 2 * torch.randn(2, 20, ACTIONS)
    std = out[..., ACTIONS:].clamp(-20, 2).exp() if state_dependent_std else torch.full_like(out, 0.3)
    normal = Normal(out[..., :ACTIONS], std)
    log_prob, entropy = distribution.log_prob_entropy(out, actions)
    torch.testing.assert_close(log_prob, normal.log_prob(actions).sum(-1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy, normal.entropy().sum(-1), rtol=1e-5, atol=1e-5)


def test_a_state_dependent_deviation_is_clamped_in_torch_and_in_numpy() -> None:
    out = torch.tensor([[3.0, 0, -1, -30, 0.5, 30]])
    mean, logstd = ppo_vec.Gaussian(ACTIONS, make_args(state_dependent_std=True)).mean_logstd(out)
    assert (mean.tolist(), logstd.tolist()) == ([[3, 0, -1]], [[-20, 0.5, 2]])
    actions = ppo_vec.Gaussian.act(out.numpy(), np.zeros(0, np.float32), np.ones((1, 3), np.float32))
    np.testing.assert_allclose(actions, (mean + logstd.exp()).numpy(), rtol=1e-6)


def test_the_critic_alone_sees_the_progress() -> None:
    agent = make_state(make_args(critic_progress=True)).agent
    x = torch.randn(9, OBS + 2)
    with torch.no_grad():
        assert agent.value(x).shape == (9,)
        for column in range(OBS + 2):
            other = x.clone()
            other[:, column] += 1
            assert (agent.value(x) - agent.value(other)).abs().max() > 0.01
            assert torch.equal(agent.policy(x), agent.policy(other)) == (column >= OBS)


@pytest.mark.parametrize("progress", [False, True])
@both_kinds_of_std
@pytest.mark.parametrize("activation", ["tanh", "relu", "leaky_relu", "elu"])
def test_the_numpy_policy_agrees_with_the_agent(activation: str, state_dependent_std: bool, progress: bool) -> None:
    args = make_args(activation=activation, state_dependent_std=state_dependent_std, critic_progress=progress)
    agent, rng, close = make_state(args, seed=3).agent, np.random.default_rng(0), {"rtol": 1e-5, "atol": 1e-5}
    obs = (1 + 5 * rng.normal(size=(33, OBS + 2 * progress))).astype(np.float32)
    obs[0] = 1e3  # beyond the clip of normalised observations
    noise = rng.normal(size=(33, ACTIONS)).astype(np.float32)
    with torch.no_grad():
        mean, logstd = mean_logstd(agent, agent.normalizer(torch.from_numpy(obs)))
        actions = (mean + logstd.exp() * torch.from_numpy(noise)).numpy()
    assert mean.abs().max() > 0.5
    assert np.ptp(mean.numpy(), axis=0).min() > 0.1
    bound = np.ones(ACTIONS, np.float32)
    policy, obs = ppo_vec.Policy(agent.state_dict(), activation, -bound, bound), obs[:, :OBS]
    for offset in range(ppo_vec.TILE + 1):
        np.testing.assert_allclose(policy.sample(obs, None, offset), mean.numpy(), **close)
        np.testing.assert_allclose(policy.sample(obs, noise, offset), actions, **close)
    # Called, it gives the mean action, ready for the environment; of a batch or of one observation.
    ready = mean.clamp(-1, 1).numpy()
    np.testing.assert_allclose(policy(obs), ready, **close)
    np.testing.assert_allclose(policy(obs[3].astype(np.float64)), ready[3], **close)
    assert (policy(obs[3]).shape, policy(obs).dtype) == ((ACTIONS,), np.float32)


def make_policy(low: Any, high: Any) -> ppo_vec.Policy:
    low, high = (np.broadcast_to(np.asarray(bound, np.float32), 4) for bound in (low, high))
    agent = Agent(1, 4, make_args())
    return ppo_vec.Policy(agent.state_dict(), "tanh", low, high)


def test_env_actions_by_hand() -> None:
    actions = np.array([[-3.0, -1, -0.25, 0], [0.5, 1, 1.0001, 1e9]], np.float32)
    assert np.array_equal(make_policy(-1, 1).env_action(actions), np.clip(actions, -1, 1))
    assert make_policy(-2, 2).env_action(actions).ravel().tolist() == [-2, -2, -0.5, 0, 1, 2, 2, 2]
    lopsided = make_policy(0, [1, 2, 4, 10])
    assert lopsided.env_action(np.zeros((1, 4), np.float32)).tolist() == [[0.5, 1, 2, 5]]
    assert lopsided.env_action(actions).tolist() == [[0, 0, 1.5, 5], [0.75, 2, 4, 10]]
    widest = float(np.finfo(np.float32).max)
    assert make_policy(-widest, widest).env_action(actions)[0].tolist() == [-widest, -widest, -widest / 4, 0]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_env_actions_stay_in_the_action_space(dtype: type) -> None:
    """Half a range and its middle, rounded to float32, may add up to more than the bound; so may the bound itself."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        space = gym.spaces.Box(*np.sort(rng.normal(size=(2, 4)), axis=0).astype(dtype), dtype=dtype)
        policy = make_policy(*ppo_vec.float32_bounds(space))
        for actions in policy.env_action(np.repeat(np.float32([[-1], [0.3], [1]]), 4, axis=1)):
            assert actions.dtype == np.float32
            assert space.contains(actions.astype(dtype)), (space, actions)


# ---- Normalisers and rewards -----------------------------------------------------------------------------------------


def assert_has_seen(normalizer: Normalizer, rows: np.ndarray) -> None:
    """These rows, each once."""
    assert normalizer.count == len(rows)
    np.testing.assert_allclose(normalizer.mean.numpy(), rows.mean(0), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(normalizer.var.numpy(), rows.var(0), rtol=1e-9, atol=1e-9)


@given(any_seed, st.integers(1, 6), st.sampled_from([0.0, 30.0, -1000.0]))
def test_normalizer_equals_mean_and_variance_of_all_rows(seed: int, rollouts: int, centre: float) -> None:
    rng, normalizer, parts = np.random.default_rng(seed), Normalizer(3), []
    for _ in range(rollouts):
        parts.append((centre + rng.normal(size=(rng.integers(1, 30), 3)) * [0.1, 1, 20]).astype(np.float32))
        normalizer.update(torch.from_numpy(parts[-1]))
    assert_has_seen(normalizer, np.concatenate(parts).astype(np.float64))


def test_normalizer_by_hand() -> None:
    normalizer, raw = Normalizer(1), torch.tensor([[4.0], [8.0], [-1e6], [1e6]])
    torch.testing.assert_close(normalizer(raw), torch.tensor([[4.0], [8.0], [-10.0], [10.0]]))  # it has seen nothing
    normalizer.update(torch.tensor([[2.0], [6.0]]))  # mean 4, deviation 2
    torch.testing.assert_close(normalizer(raw), torch.tensor([[0.0], [2.0], [-10.0], [10.0]]))


def reference_scaling(parts: list[tuple[Any, Any, Any]], gamma: float) -> list[np.ndarray]:
    """Rollouts of (rewards, done, restarted) -> their scaled rewards, from all discounted returns so far, in NumPy."""
    last, seen, scaled = np.zeros(parts[0][0].shape[1]), [], []
    for rewards, done, restarted in parts:
        last = np.where(restarted, 0, last)
        for t in range(len(rewards)):
            last = gamma * last + rewards[t]
            seen.append(last)
            last = np.where(done[t], 0, last)
        scaled.append(np.clip(rewards / np.sqrt(np.var(seen)), -10, 10))
    return scaled


def test_tiny_rewards_are_scaled_as_others_and_rewards_that_are_all_zero_stay_so() -> None:
    def scaled(factor: float) -> Tensor:
        state = SimpleNamespace(discounted_return=torch.zeros(3, dtype=torch.float64), return_statistics=Normalizer(1))
        rewards = factor * torch.randn(40, 3, generator=torch.Generator().manual_seed(1))
        done = torch.zeros(40, 3, dtype=torch.bool)
        return ppo_vec.scale_rewards(
            state, rewards, SimpleNamespace(terminated=done, truncated=done, restarted=done[0]), 0.9
        )

    assert scaled(1.0).std() > 0.1
    torch.testing.assert_close(scaled(1e-7), scaled(1.0))
    assert (scaled(0.0) == 0).all()


@given(any_seed, st.integers(1, 4), st.sampled_from([0.0, 0.9, 1.0]), st.floats(0, 0.5))
def test_scaled_rewards_equal_numpys(seed: int, rollouts: int, gamma: float, p: float) -> None:
    rng, T, N, parts, found = np.random.default_rng(seed), 70, 3, [], []
    state = SimpleNamespace(discounted_return=torch.zeros(N, dtype=torch.float64), return_statistics=Normalizer(1))
    for _ in range(rollouts):
        rewards = torch.from_numpy(rng.normal(1, 3, (T, N)).astype(np.float32))
        rewards[0, 0] += 300  # with gamma 0 it is more than 10 deviations, and clipped
        (terminated, truncated), restarted = random_flags(rng, T, N, p), torch.from_numpy(rng.random(N) < 0.4)
        flags = SimpleNamespace(terminated=terminated, truncated=truncated, restarted=restarted)
        found.append(ppo_vec.scale_rewards(state, rewards, flags, gamma).numpy())
        parts.append((rewards.double().numpy(), (terminated | truncated).numpy(), restarted.numpy()))
    assert state.return_statistics.count == rollouts * T * N
    assert found[0].dtype == np.float32
    np.testing.assert_allclose(found, reference_scaling(parts, gamma), rtol=1e-5, atol=1e-6)


def test_training_rewards_by_hand() -> None:
    """Of seven steps only the second is a fall: a termination with -100. Effort: |action| up to 1, over all joints."""
    raw = torch.tensor([4.0, -100, -100, -100, -99.9, -5, 300])[:, None]
    actions = torch.tensor([[0.5, -3, 0]] + 6 * [[0.0, -0.25, 0.25]])[:, None]
    terminated, truncated = torch.zeros(2, 7, 1, dtype=torch.bool)
    terminated[[1, 4, 5]], truncated[3] = True, True
    flags = {"terminated": terminated, "truncated": truncated, "restarted": torch.zeros(1, dtype=torch.bool)}
    rollout = SimpleNamespace(rewards=raw, actions=actions, **flags)
    charged = np.array([4 - 0.6, -100.2, -100.2, -100.2, -100.1, -5.2, 299.8])  # 0.4 times 1.5; 0.4 times 0.5
    for price in (None, -1.0, -20.0):
        args = make_args(num_envs=1, num_steps=7, num_minibatches=1, gamma=0.0, action_cost=0.4, fall_reward=price)
        state = make_state(args)
        expected = charged / charged.std()  # with gamma 0 the discounted returns are the rewards
        expected[1] = expected[1] if price is None else price
        np.testing.assert_allclose(ppo_vec.training_rewards(state, rollout, args).numpy()[:, 0], expected, rtol=1e-5)
    assert_same(rollout.rewards, raw)


# ---- Discrete actions ------------------------------------------------------------------------------------------------


@given(any_seed, st.integers(1, 6), st.integers(1, 5))
def test_a_categorical_is_torchs(seed: int, n: int, rows: int) -> None:
    """Log probabilities of one-hot actions, entropies, and their gradients."""
    rng = torch.Generator().manual_seed(seed)
    out = (3 * torch.randn(rows, n, generator=rng, dtype=torch.float64)).requires_grad_()
    chosen = torch.randint(n, (rows,), generator=rng)
    ours, theirs = ppo_vec.Categorical(n, make_args()), torch.distributions.Categorical(logits=out)
    pairs = zip(ours.log_prob_entropy(out, torch.eye(n)[chosen]), (theirs.log_prob(chosen), theirs.entropy()))
    for found, expected in pairs:
        torch.testing.assert_close(found, expected, check_dtype=False, rtol=1e-6, atol=1e-9)
        grads = (torch.autograd.grad(each.sum(), out, retain_graph=True)[0] for each in (found, expected))
        torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-7)
    assert ours.bounds_loss(out).tolist() == [0.0] * rows


def test_gumbel_noise_samples_the_softmax() -> None:
    """And without noise the likeliest action is taken."""
    logits = np.log(np.array([[0.1, 0.6, 0.3]], np.float32)).repeat(40_000, 0)
    noise = ppo_vec.Categorical.noise(torch.Generator().manual_seed(0), 40_000, 3).numpy()
    actions = ppo_vec.Categorical.act(logits, np.empty(0), noise)
    assert (actions.dtype, actions.shape) == (np.float32, (40_000, 3))
    assert set(actions.ravel().tolist()) == {0.0, 1.0}
    np.testing.assert_array_equal(actions.sum(1), 1)
    np.testing.assert_allclose(actions.mean(0), [0.1, 0.6, 0.3], atol=0.01)  # four standard deviations
    np.testing.assert_array_equal(ppo_vec.Categorical.act(logits[:2], np.empty(0), None), [[0, 1, 0]] * 2)


# ---- Losses ----------------------------------------------------------------------------------------------------------


def reference_losses(agent: Agent, mb: dict[str, Tensor], args: Options) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """PPO's losses of policy and values in float64, row by row where it is plainer."""
    clip, logstd = args.clip_coef, agent.distribution.logstd
    mean = agent.actor(mb["obs"][:, :OBS])
    if args.state_dependent_std:
        mean, logstd = mean[:, :ACTIONS], mean[:, ACTIONS:].clamp(-20, 2)
    distribution = Normal(mean, logstd.exp().expand_as(mean))
    logratio = distribution.log_prob(mb["actions"]).sum(-1) - mb["logprobs"]
    ratio, advantages = logratio.exp(), mb["advantages"].numpy()
    if args.norm_adv == "minibatch":
        advantages = (advantages - advantages.mean()) / advantages.std(ddof=1)
    surrogates = [torch.min(r * a, r.clamp(1 - clip, 1 + clip) * a) for r, a in zip(ratio, advantages.tolist())]
    entropy = distribution.entropy().sum(-1)
    excess = sum(max(abs(m) - 1, 0.0 * m) ** 2 for m in mean.flatten()) / len(mean)
    loss = -sum(surrogates) / len(mean)
    value = agent.critic(mb["obs"])[:, 0]
    errors = (value - mb["returns"]) ** 2
    if args.clip_vloss:
        moved = torch.min(torch.max(value, mb["values"] - clip), mb["values"] + clip)
        errors = torch.max(errors, (moved - mb["returns"]) ** 2)
    policy_metrics = {
        "policy_loss": loss, "entropy": entropy.mean(), "old_approx_kl": -logratio.mean(),
        "approx_kl": (ratio - 1 - logratio).mean(), "clipfrac": ((ratio - 1).abs() > clip).float().mean(),
    }  # fmt: skip
    total = loss - args.ent_coef * entropy.mean() + args.bounds_loss_coef * excess
    return [(total, policy_metrics), (errors.mean() / 4, {"value_loss": errors.mean() / 2})]


@given(any_seed, *[st.booleans()] * 5, st.sampled_from(["minibatch", "rollout"]))
def test_losses_and_gradients_equal_a_plain_reference(
    seed: int, clip_vloss: bool, bounds: bool, bonus: bool, state_dependent_std: bool, progress: bool, norm_adv: str
) -> None:
    flags = {"clip_vloss": clip_vloss, "ent_coef": 0.1 * bonus, "bounds_loss_coef": 0.2 * bounds, "norm_adv": norm_adv}
    args = make_args(**flags, state_dependent_std=state_dependent_std, critic_progress=progress)
    agent = copy.deepcopy(make_state(args, seed=seed % 1000).agent).double()
    rng = torch.Generator().manual_seed(seed)
    shapes = {"obs": (24, OBS + args.extra_dim), "actions": (24, ACTIONS)}
    names = "obs", "actions", "logprobs", "advantages", "returns", "values"
    mb = {k: torch.randn(*shapes.get(k, (24,)), generator=rng, dtype=torch.float64) for k in names}
    mb["advantages"] = 3 + 5 * mb["advantages"]
    with torch.no_grad():  # near enough to the current policy and values that some rows are clipped and some are not
        mb["logprobs"] = log_prob(agent, mb["obs"], mb["actions"]) + 0.3 * mb["logprobs"]
        mb["values"] = agent.value(mb["obs"]) + 0.3 * mb["values"]
        mb["returns"] = mb["values"] + 0.5 * mb["returns"]
    close = {"rtol": 1e-7, "atol": 1e-8}
    pairs = zip((policy_loss(agent, mb, args), value_loss(agent, mb, args)), reference_losses(agent, mb, args))
    networks = actors(agent), list(agent.critic.parameters())
    for parameters, ((loss, metrics), (expected, expected_metrics)) in zip(networks, pairs):
        torch.testing.assert_close(loss, expected, **close)
        assert metrics.keys() == expected_metrics.keys()
        for name, metric in metrics.items():
            assert not metric.requires_grad
            torch.testing.assert_close(metric, expected_metrics[name].detach(), rtol=1e-6, atol=1e-8, check_dtype=False)
        gradients = (torch.autograd.grad(each, parameters) for each in (loss, expected))
        torch.testing.assert_close(*gradients, **close)


# ---- Update ----------------------------------------------------------------------------------------------------------


def test_defaults_and_tuned_values_that_were_chosen_apart() -> None:
    """A rate of the critic and normalisation by minibatch suit what nobody tuned, and not what was tuned without."""
    assert (Options().critic_learning_rate, Options().norm_adv) == (1e-3, "minibatch")
    assert {values["norm_adv"] for values in ppo_vec.TUNED.values()} == {"rollout"}
    assert {ppo_vec.TUNED[walker]["critic_learning_rate"] for walker in ppo_vec.WALKERS} == {None}


@pytest.mark.parametrize(("target_lambda", "norm_adv"), [(None, "minibatch"), (1.0, "minibatch"), (1.0, "rollout")])
def test_an_update_uses_each_row_once_an_epoch_with_its_gae(
    target_lambda: float | None, norm_adv: str, recorders: Recorders
) -> None:
    """The critic's targets have their own lambda; with 1 they are Monte Carlo returns."""
    shape = {"num_steps": 30, "num_minibatches": 5, "update_epochs": 3}
    args = make_args(**shape, gae_lambda=0.8, value_lambda=target_lambda, norm_adv=norm_adv)
    state = make_state(args)
    rollout, (actor, critic) = fake_rollout(state), recorders
    rollout.logprobs = torch.arange(args.batch_size).view(30, 4) / 1000  # tells the rows apart
    obs = state.agent.normalizer(rollout.obs[:-1])  # as the policy saw them: the update has not changed that yet
    metrics = update(state, rollout, args)
    assert steps_taken(state) == [15, 15]
    steps = rollout.rewards, rollout.values, rollout.next_values, rollout.terminated, rollout.truncated
    advantages, errors = (naive_gae(*steps, args.gamma, lam) for lam in (0.8, target_lambda or 0.8))
    returns = errors + rollout.values.numpy()
    if norm_adv == "rollout":
        advantages = (advantages - advantages.mean()) / advantages.std(ddof=1)
    expected = {
        "obs": obs, "actions": rollout.actions, "logprobs": rollout.logprobs, "values": rollout.values,
        "returns": torch.from_numpy(returns).float(),
        "advantages": torch.from_numpy(advantages).float(),
    }  # fmt: skip
    orders = []
    for recorder in recorders:
        given = {k: torch.stack([mb[k] for mb in recorder.minibatches]) for k in expected}
        rows = (given["logprobs"] * 1000).round().long()
        assert rows.shape == (15, 24)
        for name, tensor in given.items():
            torch.testing.assert_close(tensor, expected[name].flatten(0, 1)[rows], rtol=1e-4, atol=1e-5)
        orders.append(rows.view(3, 120))
        assert_same(orders[-1].sort().values, torch.arange(120).expand(3, 120))
    assert_same(*orders)  # both networks see the same minibatches
    assert not torch.equal(orders[0][0], orders[0][1])
    assert not torch.equal(orders[0][1], orders[0][2])
    explained = metrics.pop("explained_variance")
    assert explained == pytest.approx(1 - np.var(errors) / np.var(returns), abs=1e-4)
    assert {k: v for k, v in metrics.items() if k in actor.metrics[0]} == actor.means()
    assert {k: v for k, v in metrics.items() if k not in actor.metrics[0]} == critic.means()


@both_kinds_of_std
def test_every_parameter_is_trained(state_dependent_std: bool) -> None:
    state = make_state(make_args(state_dependent_std=state_dependent_std, critic_progress=True))
    before = copy.deepcopy(state.agent)
    update(state, fake_rollout(state), state.args)
    for (name, new), old in zip(state.agent.named_parameters(), before.parameters(), strict=True):
        assert (new != old).all(), name


def test_a_parameter_beside_actor_and_critic_is_trained_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    state, policy = make_state(make_args()), Agent.policy
    rollout, state.agent.shift = fake_rollout(state), torch.nn.Parameter(torch.zeros(ACTIONS))
    state.optimizers = ppo_vec.make_optimizers(state.agent)
    with pytest.raises(RuntimeError, match="not have been used in the graph"):
        update(state, rollout, state.args)
    monkeypatch.setattr(Agent, "policy", lambda self, x: policy(self, x) + self.shift)
    update(state, rollout, state.args)
    assert (state.agent.shift != 0).all()


@pytest.mark.parametrize("amd", [False, True])
def test_tanh_and_its_gradient_are_those_of_torch(amd: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ppo_vec, "AMD", amd)
    x = torch.cat((torch.linspace(-9, 9, 1001), torch.tensor([-100.0, -1e-3, 0.0, 1e-3, 100.0])))
    grads, values = [], []
    for module in (ppo_vec.Tanh(), torch.nn.Tanh()):
        leaf = x.clone().requires_grad_()
        values.append(module(leaf))
        grads.append(torch.autograd.grad(values[-1].sum(), leaf)[0])
    torch.testing.assert_close(*values, rtol=0, atol=5e-7)
    torch.testing.assert_close(*grads, rtol=0, atol=5e-7)


def test_actor_and_critic_are_clipped_each_on_its_own() -> None:
    """With one minibatch, Adam's first moments are a tenth of the gradients of its only step."""
    norms, directions = {}, []
    for limit in (1e9, 1e-3):
        args = make_args(num_minibatches=1, update_epochs=1, max_grad_norm=limit)
        state = make_state(args)
        metrics = update(state, fake_rollout(state), args)
        left = [10 * optimizer.state["exp_avg"] for optimizer in state.optimizers]
        norms[limit] = [float(grad.norm()) for grad in left]
        directions.append([grad / grad.norm() for grad in left])
        logged = [metrics[f"{name}_loss_grad_norm"] for name in ("policy", "value")]  # before they are clipped
        assert logged == pytest.approx(norms[1e9], rel=1e-4)
    assert min(norms[1e9]) > 0.01
    assert norms[1e9][0] != pytest.approx(norms[1e9][1], rel=0.05)
    assert norms[1e-3] == pytest.approx([1e-3, 1e-3], rel=1e-3)
    torch.testing.assert_close(*directions, rtol=1e-4, atol=1e-6)


def test_actor_and_critic_are_stepped_by_adam_with_their_own_rates() -> None:
    """Its first step is g / (|g| + 1e-5), times the rate; clipping makes some of the gradients g as small as 1e-5."""
    rates = {"learning_rate": 1e-3, "critic_learning_rate": 1e-2}
    args = make_args(num_minibatches=1, update_epochs=1, max_grad_norm=1e-3, **rates)
    state = make_state(args)
    before = [optimizer.flat.clone() for optimizer in state.optimizers]
    update(state, fake_rollout(state), args)
    for old, optimizer, rate in zip(before, state.optimizers, rates.values()):
        gradient = 10 * optimizer.state["exp_avg"]  # of the clipped loss: see above
        expected = old - rate * gradient / (gradient.abs() + 1e-5)
        torch.testing.assert_close(optimizer.flat, expected, rtol=0, atol=1e-2 * rate)


def test_the_deviation_does_not_fall_below_its_floor() -> None:
    free = make_args(initial_std=0.5, learning_rate=0.02)
    agents = {}
    for args in (free, dataclasses.replace(free, min_std=0.5)):
        state = make_state(args)
        state.agent.distribution.logstd.data.copy_(torch.tensor([0.5, 0.5, 0.9]).log())
        update(state, fake_rollout(state), args)
        agents[args.min_std] = state.agent
        stepped = state.optimizers[0].flat  # what Adam steps
        assert stepped[:ACTIONS].tolist() == state.agent.distribution.logstd.tolist()
    assert set((agents[0.0].distribution.logstd < math.log(0.5)).tolist()) == {True, False}
    assert torch.equal(agents[0.5].distribution.logstd, agents[0.0].distribution.logstd.clamp(min=math.log(0.5)))
    assert torch.equal(agents[0.5].actor[0].weight, agents[0.0].actor[0].weight)


@pytest.mark.parametrize("target_kl", [1e-4, 0.01, 0.05])
def test_target_kl_stops_the_actor_before_the_offending_step(target_kl: float, recorders: Recorders) -> None:
    """The critic takes all its steps, those of an update without a target."""
    args = make_args(update_epochs=20, learning_rate=0.003, target_kl=target_kl)
    state, free, (actor, critic) = make_state(args), make_state(args), recorders
    rollout = fake_rollout(state)
    with torch.no_grad():
        x = state.agent.normalizer(rollout.obs[:-1])
        rollout.logprobs = log_prob(state.agent, x, rollout.actions)
    metrics = update(state, rollout, args)
    kl = [minibatch["approx_kl"] for minibatch in actor.metrics]
    assert 1 < len(kl) < 80
    assert max(kl[:-1]) <= target_kl < kl[-1]
    assert steps_taken(state) == [len(kl) - 1, 80]
    assert {k: metrics[k] for k in actor.metrics[0]} == actor.means(until=-1)
    assert {k: metrics[k] for k in critic.metrics[0]} == critic.means()

    update(free, rollout, dataclasses.replace(args, target_kl=None))
    assert steps_taken(free) == [80, 80]
    assert_same(dict(state.agent.critic.state_dict()), dict(free.agent.critic.state_dict()))
    assert not torch.equal(state.agent.actor[0].weight, free.agent.actor[0].weight)


def test_target_kl_may_leave_the_actor_as_it_was() -> None:
    args = make_args(target_kl=1e-5)
    state = make_state(args)
    before = copy.deepcopy(dict(state.agent.actor.state_dict()))
    metrics = update(state, fake_rollout(state), args)  # too far from the agent from the start
    assert steps_taken(state) == [0, 8]
    assert_same(dict(state.agent.actor.state_dict()), before)
    assert metrics["policy_loss"] == metrics["approx_kl"] == 0
    assert min(metrics["value_loss"], metrics["value_loss_grad_norm"]) > 0.01


@pytest.mark.parametrize("broken", ["rewards", "logprobs", "actor", "critic", "gradient"])
def test_a_loss_that_is_not_finite_is_named(broken: str) -> None:
    state, message = make_state(make_args()), "policy_loss is nan"
    rollout = fake_rollout(state)
    if broken in ("rewards", "logprobs"):
        getattr(rollout, broken)[3, 1] = math.nan
    elif broken == "actor":
        state.agent.actor[0].weight.data[0, 0] = math.nan
    elif broken == "critic":
        state.agent.critic[0].weight.data[0, 0], message = math.nan, "value_loss is nan"
    else:  # the loss is just finite, the square of its gradient is not
        state.agent.critic[-1].weight.data.mul_(1e18)
        message = "value_loss_grad_norm is inf"
    with pytest.raises(ppo_vec.TrainingError, match=f"^losses/{message}$"):
        update(state, rollout, state.args)


def test_a_state_moves_to_another_device() -> None:
    """Nothing but the place of its networks changes, and its environments stay the same object. (cpu:0 is the CPU.)"""
    args = make_args()
    moved, other = make_state(args), make_state(args)
    rollout = fake_rollout(other)
    for state in (moved, other):
        update(state, rollout, args)
    snapshot, agent = moved.snapshot, moved.agent
    moved.move_to(torch.device("cpu:0"))
    assert moved.agent is not agent
    assert moved.snapshot is snapshot
    assert_same(update(moved, rollout, args), update(other, rollout, args))
    assert_same(dict(moved.agent.state_dict()), dict(other.agent.state_dict()))


# ---- Side by side ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("failing", [0, 1])
def test_a_failing_network_is_told_when_the_other_has_ended(
    failing: int, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the other would go on to change weights while its caller saves them."""
    state, failed, ended = make_state(make_args()), threading.Event(), []

    def descend(optimizer: Any, *_: Any) -> dict[str, Tensor]:
        if optimizer is state.optimizers[failing]:
            failed.set()
            raise error("a job")
        assert failed.wait(20)  # one after the other would not get past it
        time.sleep(0.2)
        ended.append(True)
        return {}

    monkeypatch.setattr(ppo_vec, "descend", descend)
    with pytest.raises(error, match="a job"):
        update(state, fake_rollout(state), state.args)
    assert ended == [True]


def test_each_network_has_one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a thread that torch has not seen yet, MKL computes a product on all cores."""
    state, x = make_state(make_args()), torch.randn(128, 128)

    def descend(optimizer: Any, *_: Any) -> dict[str, Tensor]:
        if optimizer is state.optimizers[0]:
            return {"steps": torch.ones(()), "own": torch.ones(())}
        began = time.process_time(), time.thread_time()
        for _ in range(2000):
            x @ x
        whole, own = time.process_time() - began[0], time.thread_time() - began[1]
        return {"steps": torch.ones(()), "cores": torch.tensor(whole / own)}

    monkeypatch.setattr(ppo_vec, "descend", descend)
    assert update(state, fake_rollout(state), state.args)["cores"] < 1.2


# ---- Recordings ------------------------------------------------------------------------------------------------------

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {}, "state_dependent_std": {"state_dependent_std": True}, "clip_vloss": {"clip_vloss": True},
    "bounds_loss": {"bounds_loss_coef": 0.5}, "relu": {"activation": "relu"}, "elu": {"activation": "elu"},
    "target_kl": {"target_kl": 0.02, "learning_rate": 3e-3}, "one": {"num_minibatches": 1}, "discrete": {},
    "wide": {"actor_hidden_sizes": (256, 256), "critic_hidden_sizes": (256, 256)},  # more than one block of a product
}  # fmt: skip


def by_autograd(optimizers: Any, batch: Any, minibatches: Tensor, args: Any) -> list[dict[str, Tensor]]:
    """descend_all, one network after the other and never recorded."""
    now = dataclasses.replace(args, **{k: torch.tensor(getattr(args, k) or 0.0) for k in ppo_vec.SCALARS})
    return [ppo_vec.descend(optimizer, batch, minibatches, now) for optimizer in optimizers]


def pair(args: Options, task: ppo_vec.Task | None = None) -> tuple[State, State]:
    states = make_state(args, task), make_state(args, task)
    states[1].descend_all = by_autograd
    return states


def recorded(state: State) -> list[bool]:
    return [optimizer.recording is not None for optimizer in state.optimizers]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_recording_has_the_bits_of_autograd(variant: str, capsys: pytest.CaptureFixture) -> None:
    """From the second update on, with other rates, entropy bonus, clip range and data in each; and after a load."""
    args, choices = make_args(ent_coef=0.01, **VARIANTS[variant]), np.arange(ACTIONS)
    states = pair(args, ppo_vec.Task(OBS, choices, choices, None, None) if variant == "discrete" else None)
    for i in range(5):
        rates = {"learning_rate": args.learning_rate / 2**i, "critic_learning_rate": 1e-3 / 2 ** (i + 1)}
        now = dataclasses.replace(args, **rates, ent_coef=0.1 / 2**i, clip_coef=0.02 / 2**i)
        rollouts = [fake_rollout(state, i) for state in states]
        if variant == "discrete":
            for rollout in rollouts:
                rollout.actions = torch.eye(ACTIONS)[rollout.actions.argmax(-1)]
        assert_same(*(update(state, rollout, now) for state, rollout in zip(states, rollouts)))
        assert_same(*(dict(state.agent.state_dict()) for state in states))
        assert recorded(states[0]) == [i > 0] * 2
        if i == 2:
            states[0].load(copy.deepcopy(states[1].state_dict()))
    assert not any(recorded(states[1]))
    assert capsys.readouterr().err == ""


def test_another_argument_or_shape_is_recorded_anew() -> None:
    args = make_args()
    states, smaller = pair(args), dataclasses.replace(args, num_envs=2)
    for i, change in enumerate(({}, {}, {"clip_vloss": True}, {"clip_vloss": True}, {"num_minibatches": 2}, {})):
        now = dataclasses.replace(args, **change)
        assert_same(*(update(state, fake_rollout(states[1], i), now) for state in states))
        assert recorded(states[0]) == [i in (1, 3)] * 2
    few = [SimpleNamespace(**{**vars(state), "args": smaller}) for state in states]
    for i in range(2):
        assert_same(*(update(state, fake_rollout(few[1], i), smaller) for state in states))
        assert recorded(states[0]) == [i == 1] * 2
    assert_same(*(dict(state.agent.state_dict()) for state in states))


def ask(loss: Tensor) -> Tensor:
    return loss * (1.0 if loss.item() < 1e9 else 0.5)


def draw(loss: Tensor) -> Tensor:
    return loss * torch.rand(())


def rank_rows(loss: Tensor) -> Tensor:
    return loss * float(np.exp(-loss.detach().numpy()))


@pytest.mark.parametrize("name", ["learning_rate", "critic_learning_rate", "gamma", "ent_coef", "clip_coef"])
def test_a_recorded_loss_sees_arguments_change(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that `scheduled` changes of Args."""

    def edited(agent: Any, mb: Any, args: Any) -> Any:
        loss, metrics = value_loss(agent, mb, args)
        return loss, {**metrics, "seen": torch.as_tensor(getattr(args, name)) + 0 * loss.detach()}

    edited.__name__ = "value_loss"
    monkeypatch.setattr(ppo_vec, "value_loss", edited)
    state = make_state(make_args(num_minibatches=2))
    for i in range(4):
        metrics = update(state, fake_rollout(state, i), dataclasses.replace(state.args, **{name: 0.01 / 2**i}))
        assert metrics["seen"] == pytest.approx(0.01 / 2**i)
    assert recorded(state) == [True, True]


@pytest.mark.parametrize("edit", [ask, draw, rank_rows])
def test_a_loss_that_cannot_be_recorded(
    edit: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """One warning, and the update goes on by autograd."""

    def edited(*args: Any) -> Any:
        loss, metrics = value_loss(*args)
        return edit(loss), metrics

    edited.__name__ = "value_loss"
    monkeypatch.setattr(ppo_vec, "value_loss", edited)
    states = pair(make_args())
    for i in range(3):
        rows = [update(state, fake_rollout(states[1], i), state.args) for state in states]
        if edit is not draw:
            assert_same(*rows)
    text = capsys.readouterr().err
    warning = "warning: updates take twice as long, for value_loss cannot be recorded: "
    assert text.count(warning) == text.count("\n") == 1


def test_the_line_that_cannot_be_recorded(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def value_loss(agent: Any, mb: Any, args: Any) -> Any:
        ask(mb["returns"].sum())  # the second line
        return before(agent, mb, args)

    before, first = ppo_vec.value_loss, value_loss.__code__.co_firstlineno
    monkeypatch.setattr(ppo_vec, "value_loss", value_loss)
    state = make_state(make_args())
    for i in range(2):
        update(state, fake_rollout(state, i), state.args)
    assert f", for value_loss, line {first + 1}, cannot be recorded: " in capsys.readouterr().err


def test_a_layer_that_torchscript_does_not_know(capsys: pytest.CaptureFixture) -> None:
    """LayerNorm in the critic: its recording is played, though in Python."""
    states = pair(make_args())
    for state in states:
        layers: Any = state.agent.critic
        state.agent.critic = torch.nn.Sequential(layers[0], torch.nn.LayerNorm(layers[0].out_features), *layers[1:])
        state.optimizers = ppo_vec.make_optimizers(state.agent)
    for i in range(3):
        assert_same(*(update(state, fake_rollout(states[1], i), state.args) for state in states))
        assert_same(*(dict(state.agent.state_dict()) for state in states))
    assert recorded(states[0]) == [True] * 2
    assert capsys.readouterr().err == ""


# ---- What changes over a run -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("step", "left"), [(0, 1), (250, 0.75), (999, 0.001), (1000, 0), (1500, 0)])
def test_learning_rates_and_entropy_bonus_fall_linearly(step: int, left: float) -> None:
    args = make_args(learning_rate=0.1, critic_learning_rate=0.4, ent_coef=0.2, anneal_lr=True, total_timesteps=1000)
    for changed, expected in (
        ({}, (0.1 * left, 0.4 * left, 0.2 * left)),
        ({"critic_learning_rate": None}, (0.1 * left, 0.1 * left, 0.2 * left)),
        ({"anneal_lr": False}, (0.1, 0.4, 0.2)),
        ({"anneal_share": 0.5}, (0.1 * min(1, 2 * left), 0.4 * min(1, 2 * left), 0.2 * min(1, 2 * left))),
    ):
        now = ppo_vec.scheduled(dataclasses.replace(args, **changed), step)
        assert (now.learning_rate, now.critic_learning_rate, now.ent_coef) == pytest.approx(expected, abs=1e-12)


def test_what_else_changes_over_a_run_by_hand() -> None:
    args = make_args(total_timesteps=1000, fall_reward=-0.1, final_fall_reward=-10)
    for step, price in ((0, -0.1), (500, -1), (1000, -10)):
        now = ppo_vec.scheduled(args, step)
        assert now.fall_reward == pytest.approx(price)
    assert ppo_vec.scheduled(args, 5000) == now
    costly = make_args(total_timesteps=1000, action_cost=0.4)
    costs = [ppo_vec.scheduled(costly, step).action_cost for step in (0, 250, 500, 1000)]
    assert costs == pytest.approx([0, 0.1, 0.4, 0.4])
    assert ppo_vec.scheduled(make_args(total_timesteps=1000), 500).fall_reward is None
    assert ppo_vec.scheduled(make_args(total_timesteps=1000, fall_reward=-0.1), 500).fall_reward == -0.1


def test_the_mean_of_the_weights_begins_with_the_last_share_of_training() -> None:
    args = make_args(total_timesteps=1000, swa_share=0.25)
    state = make_state(args)

    def after(args: Options, step: int, value: float) -> tuple[int, set[float]]:
        for tensor in state.agent.state_dict().values():
            tensor.fill_(value)
        state.global_step = step
        ppo_vec.average_weights(state, args)
        weights = state.average.module.state_dict().values()
        return int(state.average.n_averaged), {x for tensor in weights for x in tensor.flatten().tolist()}

    assert after(args, 700, 1.0)[0] == after(args, 750, 2.0)[0] == 0
    assert after(args, 760, 3.0) == (1, {3.0})
    assert after(args, 900, 4.0) == (2, {3.5})
    assert after(args, 1010, 6.5) == (3, {4.5})
    longer = dataclasses.replace(args, total_timesteps=2000)  # the run goes on: what was its end is so no more
    assert after(longer, 1020, 7.0)[0] == 0
    assert after(longer, 1501, 8.0) == (1, {8.0})
    assert after(dataclasses.replace(args, swa_share=0.0), 999, 9.0)[0] == 0


# ---- Collect ---------------------------------------------------------------------------------------------------------


class Tiny(gym.Env):
    """An episode takes 4, 5 or 6 steps, by its seed; it ends with a termination, a truncation, or both."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,))
    action_space = gym.spaces.Box(np.array([-2, 0], np.float32), np.array([2, 1], np.float32))
    episode = -1

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        self.kind, self.steps, self.sum, self.total = seed % 3, 0, 0.0, 0.0
        return self.obs(), {}

    def begin(self, seed: int, n: int) -> None:
        """The next episode of environment n."""
        self.episode += 1
        self.reset(seed=ppo_vec.episode_seed(seed, n, self.episode))

    def obs(self) -> np.ndarray:
        return np.array([3 * self.steps, self.kind, self.sum], np.float32)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.steps, self.sum = self.steps + 1, self.sum + float(action[0] - action[1])
        done, reward = self.steps == 4 + self.kind, self.steps - 3 * float(action[0])
        self.total += reward
        return self.obs(), reward, done and self.kind != 1, done and self.kind != 0, {}


gym.register("ByHand-v0", Tiny)


def step_by_hand(envs: list[Tiny], actions: np.ndarray, seed: int, progress: bool) -> list[np.ndarray]:
    """obs, final_obs, rewards, terminated and truncated of a rollout with these actions in [-1, 1]."""

    def seen() -> np.ndarray:
        return np.array([[*env.obs(), *[env.steps, env.total] * progress] for env in envs])

    rows = []
    for chosen in actions:
        obs, steps = seen(), [env.step((2 * a, 0.5 + 0.5 * b)) for env, (a, b) in zip(envs, chosen)]
        rows.append((obs, seen(), *(np.array(column) for column in list(zip(*steps))[1:4])))
        for n, env in enumerate(envs):
            if rows[-1][3][n] or rows[-1][4][n]:
                env.begin(seed, n)
    obs, *others = (np.stack(column) for column in zip(*rows))
    return [np.concatenate((obs, seen()[None])), *others]


@pytest.mark.parametrize("progress", [False, True])
@both_kinds_of_std
def test_collect_and_update_by_hand(state_dependent_std: bool, progress: bool, recorders: Recorders) -> None:
    """Three iterations on real workers; every number of a rollout but the noise from elsewhere."""
    args = make_args(
        env_id="ByHand-v0", num_envs=6, num_workers=2, num_steps=14, learning_rate=3e-3, gamma=0.9, action_cost=0.3,
        state_dependent_std=state_dependent_std, critic_progress=progress,
    )  # fmt: skip
    envs, parts, pooled = [Tiny() for _ in range(6)], [], []
    for n, env in enumerate(envs):
        env.begin(args.seed, n)
    state = make_state(args, ppo_vec.make_task(args))
    agent = state.agent
    agent.normalizer.load_state_dict(Normalizer(3 + 2 * progress).state_dict())
    vec = ppo_vec.VecEnv(args, state.task, state.snapshot)
    with contextlib.closing(vec):
        for iteration in range(1, 4):
            noise = torch.randn(14, 6, 2, generator=copy.deepcopy(state.noise_rng))
            frozen = copy.deepcopy(dict(agent.normalizer.state_dict()))
            rollout = ppo_vec.collect(vec, state, args)
            assert_same(dict(agent.normalizer.state_dict()), frozen)
            assert state.global_step == iteration * args.batch_size

            actions = rollout.actions.clamp(-1, 1).numpy()
            obs, final_obs, rewards, terminated, truncated = step_by_hand(envs, actions, args.seed, progress)
            done = terminated | truncated
            assert 0 < truncated.sum() < done.sum() > terminated.sum() > 0
            assert_same([rollout.terminated.numpy(), rollout.truncated.numpy()], [terminated, truncated])
            np.testing.assert_allclose(rollout.obs.numpy(), obs, rtol=1e-5, atol=1e-4)
            cut = truncated & ~terminated
            np.testing.assert_allclose(rollout.final_obs.numpy()[cut], final_obs[cut], rtol=1e-5, atol=1e-4)

            # Actions: mean and deviation times noise, stored unclipped, whose density the update will ask for.
            with torch.no_grad():
                mean, logstd = mean_logstd(agent, agent.normalizer(rollout.obs[:-1]))
                values, last_values = (agent.value(agent.normalizer(o)) for o in (rollout.obs, rollout.final_obs))
            torch.testing.assert_close(rollout.actions, mean + logstd.exp() * noise, rtol=1e-4, atol=1e-5)
            assert rollout.actions.abs().max() > 1.5

            # Values: of the next observation; in truncated rows of the true last one.
            torch.testing.assert_close(rollout.values, values[:-1], rtol=1e-4, atol=1e-5)
            cut, running = rollout.truncated, torch.from_numpy(~done)
            torch.testing.assert_close(rollout.next_values[running], values[1:][running], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(rollout.next_values[cut], last_values[cut], rtol=1e-4, atol=1e-5)
            assert (last_values[cut] - values[1:][cut]).abs().max() > 0.1

            # Rewards: less the cost of the action, scaled once.
            parts.append((rewards - 0.3 * np.abs(actions).sum(-1), done, np.zeros(6, bool)))
            np.testing.assert_allclose(rollout.rewards.numpy(), reference_scaling(parts, 0.9)[-1], rtol=1e-4, atol=1e-5)

            # The update begins with the policy that acted; the normaliser takes the rollout in, once.
            for recorder in recorders:
                recorder.minibatches.clear(), recorder.metrics.clear()
            before = copy.deepcopy(agent)
            pooled.append(rollout.obs[:-1].flatten(0, 1).double().numpy().copy())
            update(state, rollout, args)
            with torch.no_grad():
                mb = recorders[0].minibatches[0]
                ratio = (log_prob(before, mb["obs"], mb["actions"]) - mb["logprobs"]).exp()
            torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=0, atol=1e-5)
            first, *others = recorders[0].metrics
            assert max(abs(first[name]) for name in ("old_approx_kl", "approx_kl", "clipfrac")) < 1e-5
            assert min(m["approx_kl"] for m in others) > 1e-6
            assert_has_seen(agent.normalizer, np.concatenate(pooled))


# ---- What the policy has shown ---------------------------------------------------------------------------------------


def test_what_a_policy_has_shown_by_hand() -> None:
    state = SimpleNamespace(smoothed_return=None, shown=0.0, task=SimpleNamespace(goal=300.0))

    def note(*returns: float) -> tuple[float, float]:
        episodes = [{"return": ret} for ret in returns]
        ppo_vec.note_returns(state, SimpleNamespace(episodes=episodes))
        return state.smoothed_return, state.shown

    assert note(-100.0) == (-100, 0)
    assert note(285.0) == (pytest.approx(-92.3), 0)  # .98 * -100 + .02 * 285
    state.smoothed_return = 57.0
    assert note() == (57, pytest.approx(0.2))  # nearly the goal: 285
    assert note(-200.0) == (pytest.approx(51.86), pytest.approx(0.2))  # the best so far
    assert note(*[400.0] * 500)[1] == 1
    state.shown, state.task.goal = 0.3, None  # lost while the run was interrupted
    assert note(1.0)[1] == 0.3
    state.shown = None
    note(1.0)
    assert state.shown is None


def test_prices_follow_what_was_shown_and_rates_the_clock() -> None:
    args = make_args(
        total_timesteps=1000, anneal_lr=True, fall_reward=-1.0, final_fall_reward=-16.0,
        action_cost=0.4, learning_rate=0.1, ent_coef=0.2,
    )  # fmt: skip
    now = ppo_vec.scheduled(args, 750, shown=0.25)
    assert (now.learning_rate, now.ent_coef) == pytest.approx((0.025, 0.05))
    assert (now.fall_reward, now.action_cost) == pytest.approx((-2.0, 0.1))  # 16 ** .25 and .5 ** 2 * .4
    assert ppo_vec.scheduled(args, 750) == ppo_vec.scheduled(args, 750, shown=0.75)


# ---- The acting copy cannot drift ------------------------------------------------------------------------------------


def no_mean(normalizer: Normalizer, x: Tensor) -> Tensor:
    return (x * (normalizer.var + 1e-8).rsqrt().float()).clamp(-10, 10)


def with_layer_norm(sizes: tuple[int, ...], activation: str, last_gain: float) -> torch.nn.Sequential:
    first, *others = real_mlp(sizes, activation, last_gain)
    return torch.nn.Sequential(first, torch.nn.LayerNorm(sizes[1]), *others)


real_mlp = ppo_vec.mlp
DRIFTS: dict[str, tuple[Any, str, Any]] = {
    "the mean is not taken off": (Normalizer, "forward", no_mean),
    "no clip of observations": (Normalizer, "forward", lambda n, x: ((x - n.mean) * (n.var + 1e-8).rsqrt()).float()),
    "a layer that NumPy does not know": (ppo_vec, "mlp", with_layer_norm),
    "squashed means": (Agent, "policy", lambda agent, x: agent.actor(x[..., : agent.obs_dim]).tanh()),
}


def test_without_a_drift_the_check_is_content() -> None:
    for std in (False, True):
        make_state(make_args(state_dependent_std=std, critic_progress=True))


@pytest.mark.parametrize("drift", DRIFTS)
def test_a_policy_that_acts_otherwise_than_its_copy_is_refused(drift: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*DRIFTS[drift])
    with pytest.raises(ppo_vec.TrainingError, match="does not act as"):
        make_state(make_args())


def wider(out: np.ndarray, std: np.ndarray, noise: np.ndarray | None) -> np.ndarray:
    return out if noise is None else out + 1.1 * std * noise


def test_samples_of_another_distribution_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ppo_vec.Gaussian, "act", staticmethod(wider))
    with pytest.raises(ppo_vec.TrainingError, match=r"Gaussian\.act draws other actions"):
        make_state(make_args())
    choices = np.arange(ACTIONS)
    task = ppo_vec.Task(OBS, choices, choices, None, None)
    make_state(make_args(), task)
    monkeypatch.setattr(ppo_vec.Categorical, "act", staticmethod(lambda out, std, noise: np.eye(3)[noise.argmax(-1)]))
    with pytest.raises(ppo_vec.TrainingError, match=r"Categorical\.act draws other actions"):
        make_state(make_args(), task)
