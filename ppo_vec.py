"""PPO in one file: masters BipedalWalker on an ordinary machine in minutes.

    python ppo_vec.py --num-envs 16 --cuda             # train; without CUDA it says so once and uses the CPU
    tensorboard --logdir runs                          # watch
    python ppo_vec.py --resume runs/NAME               # continue an interrupted run, to the bit
    python ppo_vec.py --evaluate runs/NAME             # 100 test episodes of the policy that a run delivered

A saved policy is a function from raw observations to actions:

    from ppo_vec import load_policy
    act = load_policy("runs/NAME"); action = act(obs)

What stands where. First the algorithm: Args, Agent, Policy (the agent's copy in the workers), gae, policy_loss,
value_loss, update, Rollout, collect, train. Then the engineering: schedules, environments and their workers, the
walkers, checkpoints, evaluation, logs, command line.

PPO: Schulman et al. 2017, arXiv:1707.06347. GAE: Schulman et al. 2015, arXiv:1506.02438. "37 details": Huang et al.
2022, "The 37 Implementation Details of Proximal Policy Optimization". Names follow CleanRL's ppo_continuous_action.py.
"""

from __future__ import annotations

import contextlib
import copy
import csv
import dataclasses
import functools
import hashlib
import importlib
import io
import itertools
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import pickle
import platform
import re
import shlex
import signal
import stat
import subprocess
import sys
import threading
import time
import traceback
import warnings
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

# The policy's matrices are too small to share among threads. Must be set before NumPy is imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))

import Box2D
import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import tyro
from gymnasium.envs.box2d import bipedal_walker as stock
from gymnasium.vector import AsyncVectorEnv, AutoresetMode
from gymnasium.vector.async_vector_env import _async_worker
from gymnasium.wrappers import TimeLimit
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

# ----------------------------------------------------------------------------------------------------------------------
# Arguments
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class Args:
    """The arguments of PPO. `Options`, further down, adds those of the engineering."""

    seed: int = 1  # seed of everything random: environments, action noise, shuffling and initialisation
    cuda: bool = False  # keep the networks and the rollout on the GPU (the environments always run on the CPU)

    total_timesteps: int = 1_000_000  # environment steps to train for; the first rollout that reaches it is the last
    num_envs: int = 16  # the number of environments stepped in parallel
    num_steps: int = 256  # steps of each environment per rollout
    learning_rate: float = 5e-4  # the learning rate of the optimizer (of the actor's, with --critic-learning-rate)
    critic_learning_rate: float | None = None  # the critic's own learning rate; default --learning-rate
    anneal_lr: bool = True  # let the learning rates and --ent-coef fall linearly to zero over --total-timesteps
    gamma: float = 0.99  # the discount factor
    gae_lambda: float = 0.95  # the lambda of generalized advantage estimation
    value_lambda: float | None = None  # the lambda of the critic's target; default --gae-lambda; 1: Monte Carlo returns
    num_minibatches: int = 8  # minibatches per epoch
    update_epochs: int = 10  # epochs over each rollout
    clip_coef: float = 0.2  # the clip range of the probability ratio
    clip_vloss: bool = False  # also clip the change of the value, by --clip-coef
    ent_coef: float = 0.0  # the weight of the entropy bonus
    bounds_loss_coef: float = 0.0  # the weight of the penalty on means beyond the action bounds (rl_games)
    max_grad_norm: float = 0.5  # the largest gradient norm, of actor and critic each
    target_kl: float | None = None  # end the actor's update before the minibatch whose approximate KL exceeds this

    initial_std: float = 1.0  # the standard deviation of the first actions, in units of the action bounds
    min_std: float = 0.0  # the standard deviation never falls below this
    state_dependent_std: bool = False  # let the actor also output the log standard deviation, clamped to [-20, 2]
    actor_hidden_sizes: tuple[int, ...] = (64, 64)  # the widths of the actor's hidden layers
    critic_hidden_sizes: tuple[int, ...] = (64, 64)  # the widths of the critic's hidden layers
    activation: Literal["tanh", "relu", "leaky_relu", "elu"] = "tanh"  # the activation of the hidden layers

    @property
    def batch_size(self) -> int:
        return self.num_envs * self.num_steps

    @property
    def minibatch_size(self) -> int:
        return self.batch_size // self.num_minibatches


# ----------------------------------------------------------------------------------------------------------------------
# Agent
# ----------------------------------------------------------------------------------------------------------------------


class TanhFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = torch.sigmoid(x + x).mul_(2).sub_(1)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return torch.ops.aten.tanh_backward(grad, *ctx.saved_tensors)


class Tanh(nn.Module):
    """2 sigmoid(2x) - 1, which is tanh(x). On a CPU torch's own costs as much as the matrix product before it."""

    def forward(self, x: Tensor) -> Tensor:
        return TanhFunction.apply(x)


ACTIVATIONS: dict[str, tuple[type[nn.Module], Callable[[np.ndarray], np.ndarray]]] = {  # in torch and in NumPy
    "tanh": (Tanh, np.tanh),
    "relu": (nn.ReLU, lambda x: np.maximum(x, 0)),
    "leaky_relu": (nn.LeakyReLU, lambda x: np.maximum(x, np.float32(0.01) * x)),
    "elu": (nn.ELU, lambda x: np.where(x > 0, x, np.expm1(np.minimum(x, 0)))),
}
LOGSTD_MIN, LOGSTD_MAX = -20.0, 2.0  # of a state-dependent deviation
OBS_CLIP = 10.0  # of normalised observations


class Normalizer(nn.Module):
    """Running mean and variance as buffers of a module, so that no checkpoint can lose them (CleanRL #425).

    They are frozen through a rollout and its update; `update` merges the rollout's rows once an iteration.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(size, dtype=torch.float64))
        self.register_buffer("var", torch.ones(size, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        """(..., size) raw -> (..., size) float32 of about zero mean and unit variance, clipped to +-10."""
        mean, scale = self.mean_and_scale()
        return ((x - mean) * scale).clamp(-OBS_CLIP, OBS_CLIP)

    def mean_and_scale(self) -> tuple[Tensor, Tensor]:
        return self.mean.float(), (self.var + 1e-8).rsqrt().float()

    def update(self, rows: Tensor) -> None:
        """Merges the mean and variance of `rows` (n, size) (Chan et al. 1979)."""
        rows = rows.double()
        if len(rows) == 0:
            return
        mean, var, n = rows.mean(0), rows.var(0, unbiased=False), float(len(rows))
        if self.count == 0:
            total, new_mean, new_var = n, mean, var
        else:
            total = self.count + n
            delta = mean - self.mean
            new_mean = self.mean + delta * (n / total)
            new_var = (self.var * self.count + var * n + delta**2 * (self.count * n / total)) / total
        self.mean.copy_(new_mean)
        self.var.copy_(new_var)
        self.count.fill_(total)


def mlp(sizes: Sequence[int], activation: str, last_gain: float) -> nn.Sequential:
    """Linear layers with `activation` between them; orthogonal initialisation, biases zero (37 details, no. 2)."""
    layers: list[nn.Module] = []
    for i, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes)):
        linear = nn.Linear(fan_in, fan_out)
        last = i == len(sizes) - 2
        nn.init.orthogonal_(linear.weight, last_gain if last else math.sqrt(2))
        nn.init.zeros_(linear.bias)
        layers += [linear] if last else [linear, ACTIVATIONS[activation][0]()]
    return nn.Sequential(*layers)


# The kind of action: a diagonal Gaussian over actions in units of the bounds, not clipped. It is made of the actor's
# output and, unless that holds the log deviation too, the parameter `logstd`. The next three functions are all that
# knows it: its parameters, its density in torch, and how it is sampled in NumPy, where the environments are.


def gaussian(out: Tensor, logstd: Tensor | None) -> tuple[Tensor, Tensor]:
    """The actor's output (..., action_dim or twice that) -> mean (..., action_dim) and log standard deviation."""
    if logstd is not None:
        return out, logstd
    mean, logstd = out.chunk(2, dim=-1)
    return mean, logstd.clamp(LOGSTD_MIN, LOGSTD_MAX)


def log_prob_entropy(mean: Tensor, logstd: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
    """The log density of `actions` (..., action_dim) and the entropy, (...) each, in nats."""
    z = (actions - mean) * (-logstd).exp()
    volume = logstd.sum(-1) + 0.5 * math.log(2 * math.pi) * actions.shape[-1]
    log_prob = -0.5 * z.square().sum(-1) - volume
    return log_prob, (volume + 0.5 * actions.shape[-1]).expand_as(log_prob)


def sample(out: np.ndarray, std: np.ndarray, noise: np.ndarray | None) -> np.ndarray:
    """The actor's output (n, ...), `std` (action_dim,) or (0,), standard normal noise or None for the mean -> actions."""
    mean = out if len(std) else out[:, : out.shape[1] // 2]
    if noise is None:
        return mean
    return mean + (std if len(std) else np.exp(np.clip(out[:, mean.shape[1] :], LOGSTD_MIN, LOGSTD_MAX))) * noise


class Agent(nn.Module):
    """Actor and critic, two networks that share nothing, and the normalisers of what they see.

    `extra_dim` numbers beside the observation are shown to the critic only (Pinto et al. 2017, arXiv:1710.06542); for
    most tasks there are none.
    """

    def __init__(self, obs_dim: int, extra_dim: int, action_dim: int, args: Args) -> None:
        super().__init__()
        outputs = action_dim * (2 if args.state_dependent_std else 1)
        self.normalizer = Normalizer(obs_dim)
        self.extra_normalizer = Normalizer(extra_dim)
        self.actor = mlp((obs_dim, *args.actor_hidden_sizes, outputs), args.activation, last_gain=0.01)
        self.critic = mlp((obs_dim + extra_dim, *args.critic_hidden_sizes, 1), args.activation, last_gain=1.0)
        logstd = torch.full((action_dim,), math.log(args.initial_std))
        self.actor.logstd = None if args.state_dependent_std else nn.Parameter(logstd)
        if args.state_dependent_std:
            self.actor[-1].bias.data[action_dim:] = logstd

    def policy(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised observations (..., obs_dim) -> the Gaussian's mean and log standard deviation."""
        return gaussian(self.actor(x), self.actor.logstd)

    def critic_input(self, x: Tensor, extras: Tensor) -> Tensor:
        """Normalised observations (..., obs_dim), raw extras (..., extra_dim) -> what `value` takes."""
        return torch.cat((x, self.extra_normalizer(extras)), -1)

    def value(self, critic_input: Tensor) -> Tensor:
        """(..., obs_dim + extra_dim) -> values (...)."""
        return self.critic(critic_input).squeeze(-1)

    def update_normalizers(self, rollout: Rollout) -> None:
        """Merges the statistics of a rollout's steps."""
        self.normalizer.update(rollout.obs[:-1][rollout.valid])
        self.extra_normalizer.update(rollout.extras[:-1][rollout.valid])

    def policy_arrays(self) -> list[np.ndarray]:
        """What Policy is made of, as float32 arrays: mean, scale, std, then each layer's weight.T and bias."""
        return policy_arrays(self.state_dict())


def policy_arrays(weights: dict[str, Tensor]) -> list[np.ndarray]:
    """An agent's state dict, the critic's part may be missing -> the arrays that Policy takes."""
    mean, scale = weights["normalizer.mean"].float(), (weights["normalizer.var"] + 1e-8).rsqrt().float()
    logstd = weights.get("actor.logstd")
    arrays = [mean, scale, torch.empty(0) if logstd is None else logstd.exp()]
    for name in weights:
        if name.startswith("actor.") and name.endswith(".weight"):
            arrays += [weights[name].T, weights[name.replace("weight", "bias")]]
    return [a.detach().cpu().numpy().astype(np.float32, order="C") for a in arrays]


TILE = 4


class Policy:
    """The actor's copy in NumPy, for where the environments are: raw observation in, action out.

    One row of a float32 matrix product can have other bits in a batch of another size. So rows are computed in tiles
    of fixed shape, and `offset` puts a row into the same place of its tile whatever worker it is in.
    """

    def __init__(self, arrays: list[np.ndarray], activation: str, low: np.ndarray, high: np.ndarray) -> None:
        self.mean, self.scale, self.std, *layers = arrays
        self.layers = list(zip(layers[0::2], layers[1::2]))
        self.activation, self.low, self.high = activation, low, high
        self.middle = ((high.astype(np.float64) + low) / 2).astype(np.float32)
        self.half = ((high.astype(np.float64) - low) / 2).astype(np.float32)

    def sample(self, obs: np.ndarray, noise: np.ndarray | None = None, offset: int = 0) -> np.ndarray:
        """Raw observations (n, obs_dim) float32 and noise (n, action_dim) -> actions; without noise, their mean."""
        activation, n = ACTIVATIONS[self.activation][1], len(obs)
        padded = -(-(offset % TILE + n) // TILE) * TILE
        rows = slice(offset % TILE, offset % TILE + n)
        x = np.zeros((padded, len(self.mean)), np.float32)
        np.clip((obs - self.mean) * self.scale, -OBS_CLIP, OBS_CLIP, out=x[rows])
        x = x.reshape(padded // TILE, TILE, len(self.mean))  # a leading dimension: NumPy multiplies tile by tile
        for weight, bias in self.layers[:-1]:
            x = activation(x @ weight + bias)
        weight, bias = self.layers[-1]
        return sample((x @ weight + bias).reshape(padded, len(bias))[rows], self.std, noise)

    def env_action(self, action: np.ndarray) -> np.ndarray:
        """Clips to [-1, 1] and maps to the environment's bounds."""
        action = self.middle + self.half * np.clip(action, -1, 1)
        return np.clip(action, self.low, self.high)  # rounding may have left them

    def __call__(self, obs: np.ndarray) -> np.ndarray:
        """Raw observation (obs_dim,) or batch (n, obs_dim) -> deterministic actions ready for step()."""
        obs = np.asarray(obs, np.float32)
        return self.env_action(self.sample(obs.reshape(-1, len(self.mean)))).reshape(*obs.shape[:-1], len(self.low))


# ----------------------------------------------------------------------------------------------------------------------
# Generalized advantage estimation
# ----------------------------------------------------------------------------------------------------------------------


def gae(
    rewards: Tensor, values: Tensor, terminated: Tensor, truncated: Tensor, gamma: float, gae_lambda: float
) -> Tensor:
    """Generalized advantage estimation (arXiv:1506.02438, equation 16).

    Gymnasium resets on the step *after* an episode's end, so values[t + 1] of a done row t is the value of the true
    last observation: a truncated episode is bootstrapped from it, a terminated one is not (termination wins if both
    are set), and neither lets the sum run on into the next episode. The row after a done one is not a step; its
    advantage is meaningless and masked by whoever uses it.

    Args: rewards, terminated, truncated (T, N); values (T + 1, N), the last row that of the next observation.
    Returns: advantages (T, N).
    """
    delta = rewards + gamma * values[1:] * ~terminated - values[:-1]
    decay = gamma * gae_lambda * ~(terminated | truncated)
    advantages = delta.clone()
    for t in reversed(range(len(rewards) - 1)):
        advantages[t].addcmul_(decay[t], advantages[t + 1])
    return advantages


# ----------------------------------------------------------------------------------------------------------------------
# Update
# ----------------------------------------------------------------------------------------------------------------------


def policy_loss(agent: Agent, mb: dict[str, Tensor], args: Args) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped loss of one minibatch (arXiv:1707.06347, equation 7), less the entropy bonus.

    Beyond the action bounds an environment cannot tell two actions apart: a mean that has drifted out there meets no
    gradient of the reward that would bring it back. With bounds_loss_coef its squared excess is part of the loss.

    Args: mb, a minibatch of normalised obs (B, obs_dim), actions (B, action_dim); logprobs, advantages, weights (B,).
    Returns: the loss, and metrics without gradient.
    """
    mean, logstd = agent.policy(mb["obs"])
    logprob, entropy = log_prob_entropy(mean, logstd, mb["actions"])
    weights = mb["weights"]
    logratio = (logprob - mb["logprobs"]) * (weights > 0)
    ratio = logratio.exp()
    advantages = mb["advantages"] - mb["advantages"] @ weights
    advantages = advantages / ((advantages.square() @ weights).sqrt() + 1e-8)
    clipped = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
    pg_loss = -torch.minimum(advantages * ratio, advantages * clipped) @ weights
    entropy = entropy @ weights
    loss = pg_loss - args.ent_coef * entropy
    if args.bounds_loss_coef:
        loss = loss + args.bounds_loss_coef * ((mean.abs() - 1).clamp(min=0).square().sum(-1) @ weights)
    with torch.no_grad():  # http://joschu.net/blog/kl-approx.html
        metrics = {
            "policy_loss": pg_loss,
            "entropy": entropy,
            "old_approx_kl": -logratio @ weights,
            "approx_kl": (ratio - 1 - logratio) @ weights,
            "clipfrac": (ratio != clipped).float() @ weights,
        }
    return loss, metrics


def value_loss(agent: Agent, mb: dict[str, Tensor], args: Args) -> tuple[Tensor, dict[str, Tensor]]:
    """A quarter of the mean squared error: CleanRL's half, times its vf_coef of a half, only affects gradient clipping.

    Args: mb, a minibatch of critic_input (B, obs_dim + extra_dim); returns, values, weights (B,).
    Returns: the loss, and metrics without gradient.
    """
    value = agent.value(mb["critic_input"])
    error = (value - mb["returns"]).square()
    if args.clip_vloss:
        clipped = mb["values"] + (value - mb["values"]).clamp(-args.clip_coef, args.clip_coef)
        error = torch.maximum(error, (clipped - mb["returns"]).square())
    loss = 0.5 * (error @ mb["weights"])
    return 0.5 * loss, {"value_loss": loss.detach()}


def update(state: State, rollout: Rollout, args: Args) -> dict[str, float]:
    """One PPO update: epochs of shuffled minibatches over the rollout. Returns means over its minibatches.

    Advantages are computed once. Actor and critic share nothing but the minibatches: each is clipped and stepped on
    its own, the two side by side. The normalisers have been frozen until here; then they take the rollout in.
    Raises TrainingError for a loss or gradient that is not finite.
    """
    agent = state.agent
    rewards = torch.where(rollout.valid, rollout.rewards, 0.0)
    flags = rollout.terminated, rollout.truncated
    advantages = gae(rewards, rollout.values, *flags, args.gamma, args.gae_lambda)
    value_lambda = args.gae_lambda if args.value_lambda is None else args.value_lambda
    returns = gae(rewards, rollout.values, *flags, args.gamma, value_lambda) + rollout.values[:-1]

    def flat(rows: Tensor) -> Tensor:  # (T, N, ...) -> (T * N, ...)
        valid = rollout.valid.view(*rollout.valid.shape, *[1] * (rows.ndim - 2))
        return torch.where(valid, rows, 0.0).flatten(0, 1)

    obs = agent.normalizer(rollout.obs[:-1])
    weights = rollout.valid.float().flatten()
    actor_batch = {
        "obs": obs.flatten(0, 1), "actions": flat(rollout.actions), "logprobs": flat(rollout.logprobs),
        "advantages": flat(advantages), "weights": weights,
    }  # fmt: skip
    critic_batch = {
        "critic_input": agent.critic_input(obs, rollout.extras[:-1]).flatten(0, 1), "returns": flat(returns),
        "values": flat(rollout.values[:-1]), "weights": weights,
    }  # fmt: skip
    shuffles = [torch.randperm(args.batch_size, generator=state.shuffle_rng) for _ in range(args.update_epochs)]
    actor, critic = state.optimizers
    actor.param_groups[0]["lr"] = args.learning_rate
    critic.param_groups[0]["lr"] = args.critic_learning_rate or args.learning_rate
    metrics = side_by_side(
        lambda: descend(agent, actor, policy_loss, minibatches(actor_batch, shuffles, args), args),
        lambda: descend(agent, critic, value_loss, minibatches(critic_batch, shuffles, args), args),
    )
    if args.min_std:
        agent.actor.logstd.data.clamp_(min=math.log(args.min_std))
    agent.update_normalizers(rollout)
    y, pred = returns[rollout.valid], rollout.values[:-1][rollout.valid]
    explained = float(1 - (y - pred).var() / y.var()) if y.numel() > 1 and y.var() > 0 else 0.0
    return {**metrics[0], **metrics[1], "explained_variance": explained}


def minibatches(batch: dict[str, Tensor], shuffles: list[Tensor], args: Args) -> Iterator[dict[str, Tensor]]:
    """The minibatches of every epoch, gathered an epoch at a time."""
    for shuffle in shuffles:
        rows = shuffle.view(args.num_minibatches, args.minibatch_size).to(batch["weights"].device)
        epoch = {name: tensor[rows] for name, tensor in batch.items()}
        epoch["weights"] = epoch["weights"] / epoch["weights"].sum(1, keepdim=True).clamp(min=1)
        for i in range(args.num_minibatches):
            yield {name: tensor[i] for name, tensor in epoch.items()}


def descend(
    agent: Agent, optimizer: torch.optim.Optimizer, loss_of: Callable[..., tuple[Tensor, dict[str, Tensor]]],
    minibatches: Iterable[dict[str, Tensor]], args: Args,
) -> dict[str, float]:  # fmt: skip
    """Steps an optimizer's parameters down the loss of each minibatch. Returns the means of its metrics."""
    (flat,), parameters = optimizer.param_groups[0]["params"], optimizer.parameters
    rows = []
    for mb in minibatches:
        loss, metrics = loss_of(agent, mb, args)
        # Before the step, so that no step is taken on a policy that has gone too far already (SB3).
        if args.target_kl is not None and metrics.get("approx_kl", 0) > args.target_kl:
            break
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])
        metrics[f"{loss_of.__name__}_grad_norm"] = norm = gradient.norm()
        flat.grad = gradient.mul_((args.max_grad_norm / (norm + 1e-6)).clamp(max=1.0))
        optimizer.step()
        rows.append(torch.stack(list(metrics.values())))
    if not rows:
        return {name: 0.0 for name in metrics}
    table = torch.stack(rows).cpu()
    for row, column in (~table.isfinite()).nonzero().tolist():
        raise TrainingError(f"losses/{list(metrics)[column]} is {table[row, column]} in minibatch {row}")
    return dict(zip(metrics, table.mean(0).tolist()))


def side_by_side(first: Callable[[], Any], second: Callable[[], Any]) -> tuple[Any, Any]:
    """Both results; `second` is computed in a thread: torch lets go of the interpreter while it works."""
    if usable_cores() == 1:
        return first(), second()
    with ThreadPoolExecutor(1) as pool:  # waits for `second`, whatever `first` raises
        other = pool.submit(second)
        return first(), other.result()


def make_optimizers(agent: Agent) -> tuple[torch.optim.Adam, torch.optim.Adam]:
    """One Adam for the critic and one for all other parameters, the actor. The agent must be on its device already.

    Each steps one flat tensor that the parameters are views of: on networks this small most of an optimizer's time is
    the handling of many little tensors.
    """

    def adam(parameters: list[nn.Parameter]) -> torch.optim.Adam:
        flat = nn.Parameter(nn.utils.parameters_to_vector(parameters).detach())
        nn.utils.vector_to_parameters(flat.data, parameters)  # sets each p.data to its view
        optimizer = torch.optim.Adam([flat], eps=1e-5, fused=True)  # eps: 37 details, no. 3
        optimizer.parameters = parameters
        return optimizer

    critic = list(agent.critic.parameters())
    return adam([p for p in agent.parameters() if all(p is not c for c in critic)]), adam(critic)


# ----------------------------------------------------------------------------------------------------------------------
# Rollout
# ----------------------------------------------------------------------------------------------------------------------

REWARD_CLIP = 10.0
CHUNK = 1024  # rows of a forward pass: more of them at once would leave the processor's cache


@dataclass
class Rollout:
    """What the environments did in num_steps steps, and what `collect` makes of it. T = num_steps, N = num_envs."""

    obs: Tensor  # (T + 1, N, obs_dim) raw; the last row is the observation after the rollout
    extras: Tensor  # (T + 1, N, extra_dim) raw, what only the critic sees
    actions: Tensor  # (T, N, action_dim) in units of the bounds, not clipped
    rewards: Tensor  # (T, N) raw; then what training makes of them
    terminated: Tensor  # (T, N) bool
    truncated: Tensor  # (T, N) bool
    valid: Tensor  # (T, N) bool; False in the row after a done one, where the environment only resets
    restarted: Tensor  # (N,) bool; a new episode began before row 0, for the old one could not be continued
    episodes: list[dict[str, Any]]  # those that ended, in order
    values: Tensor | None = None  # (T + 1, N)
    logprobs: Tensor | None = None  # (T, N) of the policy that acted

    def to(self, device: torch.device) -> Rollout:
        moved = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return dataclasses.replace(self, **moved)


def scale_rewards(state: State, rewards: np.ndarray, rollout: Rollout, gamma: float) -> np.ndarray:
    """Divides rewards (T, N) by the running deviation of the discounted return, and clips them to +-10.

    37 details, continuous control no. 8; but all of a rollout's rewards are divided by the same deviation, into which
    they have been merged already.
    """
    state.discounted_return[rollout.restarted.numpy()] = 0.0
    valid, returns = rollout.valid.numpy(), np.empty(rewards.shape)
    for t in range(len(rewards)):
        state.discounted_return = state.discounted_return * (gamma * valid[t]) + np.where(valid[t], rewards[t], 0.0)
        returns[t] = state.discounted_return
    state.return_statistics.update(torch.from_numpy(returns[valid][:, None]))
    deviation = math.sqrt(float(state.return_statistics.var) + 1e-8)
    return np.clip(rewards / deviation, -REWARD_CLIP, REWARD_CLIP).astype(np.float32)


@torch.no_grad()
def collect(envs: VecEnv, state: State, args: Args) -> Rollout:
    """Lets every environment take num_steps steps with the current policy.

    The workers act with a NumPy copy of the policy on noise drawn here, one message per rollout. Values and log
    probabilities are then computed in one pass by the network that the update differentiates, from the same raw
    observations and unclipped actions. A rollout that fails raises TrainingError and leaves the state as it was.
    """
    agent = state.agent
    noise = state.noise_rng.standard_normal((args.num_steps, args.num_envs, envs.task.action_dim), dtype=np.float32)
    rollout = envs.rollout(agent.policy_arrays(), noise, state.global_step)
    state.global_step += int(rollout.valid.sum())
    rollout.rewards = torch.from_numpy(training_rewards(state, rollout, args))
    rollout = rollout.to(state.device)
    x = agent.normalizer(rollout.obs)

    @torch.no_grad()
    def values() -> Tensor:
        rows = agent.critic_input(x, rollout.extras).flatten(0, 1).split(CHUNK)
        return torch.cat([agent.value(chunk) for chunk in rows]).view(x.shape[:2])

    @torch.no_grad()
    def logprobs() -> Tensor:
        pairs = zip(x[:-1].flatten(0, 1).split(CHUNK), rollout.actions.flatten(0, 1).split(CHUNK))
        return torch.cat([log_prob_entropy(*agent.policy(o), a)[0] for o, a in pairs]).view(rollout.rewards.shape)

    rollout.values, rollout.logprobs = side_by_side(values, logprobs)
    return rollout


# ----------------------------------------------------------------------------------------------------------------------
# Train
# ----------------------------------------------------------------------------------------------------------------------


def train(args: Options, task: Task, folder: Path, saved: dict[str, Any] | None = None) -> int | None:
    """Trains, or continues from a saved state; evaluates and saves. Returns the signal that stopped it, if one did."""
    state = State(args, task, choose_device(args))
    if saved:
        state.load(saved)
    with (
        stop_signals() as stopped,
        Log(folder, args, state) as log,
        VecEnv(args, task, state.envs, state.agent.policy_arrays()) as envs,
    ):
        save(folder, state, log)
        while state.global_step < args.total_timesteps and not stopped():
            now = scheduled(args, state.global_step)
            rollout = collect(envs, state, now)
            log.lap("rollout")
            metrics = update(state, rollout, now)
            log.lap("update")
            average_weights(state, args)
            log.iteration(state, rollout, metrics, now)
            if should_evaluate(state, args):
                evaluate(envs, state, folder, log)
            if should_save(state):
                save(folder, state, log)
        if not stopped():
            choose_and_test(envs, state, folder, log, stopped)
        save(folder, state, log)
    return None if state.finished else stopped()


# ======================================================================================================================
# You have read PPO. The rest is engineering.
# ======================================================================================================================

# ----------------------------------------------------------------------------------------------------------------------
# Options, schedules and what training makes of rewards
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class Options(Args):
    """Train, resume or evaluate a PPO agent. Tuned defaults depend on --env-id; what you type overrides them."""

    env_id: str = "BipedalWalker-v3"  # a Gymnasium environment with Box observations and bounded Box actions
    runs_dir: str = "runs"  # the folder of the run folders
    run_name: str | None = None  # the run folder's name; default {env_id}__ppo_vec__{seed}__{time}
    resume: str | None = None  # continue this run (its folder; "latest" is the newest)
    evaluate: str | None = None  # evaluate this run (its folder, "latest" or a checkpoint) instead of training
    eval_episodes: int = 100  # test episodes, with --evaluate and after training (there also twice as many to choose)
    stochastic: bool = False  # with --evaluate: sample actions instead of taking their mean
    capture_video: bool = False  # write an mp4 of an episode of the deterministic policy into the run's videos/
    track: bool = False  # also log to Weights and Biases (pip install wandb)
    num_workers: int | None = None  # processes that share the environments; default one per core; changes no result
    worker_timeout: float = 60.0  # seconds without a step after which a worker counts as hung and is replaced

    final_gamma: float | None = None  # let 1 - gamma change in equal ratios to that of this; default: constant
    swa_share: float = 0.0  # average the weights over this last share of training: their mean joins the final choice
    critic_progress: bool = False  # show the critic the episode's length and return so far; the policy never sees them
    fall_reward: float | None = (
        None  # the scaled reward of a fall (raw: -100) at the start; default: what scaling gives
    )
    final_fall_reward: float | None = None  # let it change in equal ratios to this; default: constant
    action_cost: float = 0.0  # reward that training takes off per unit of |action|; rises from 0 over the first half
    practice: float = 0.0  # the share of a walker's training steps that goes back to places shortly before its falls


# What beats the defaults, by environment. Found by experiment; benchmarks/results/ has the runs.
TUNED: dict[str, dict[str, Any]] = {
    "BipedalWalker-v3": {
        "practice": 0.3, "num_steps": 128, "learning_rate": 2.5e-4, "gamma": 0.98, "final_gamma": 0.995,
        "gae_lambda": 0.85, "ent_coef": 0.0025, "bounds_loss_coef": 0.01, "fall_reward": -1.0,
        "final_fall_reward": -20.0, "action_cost": 0.2, "initial_std": 0.5, "critic_progress": True,
        "actor_hidden_sizes": (128, 128), "critic_hidden_sizes": (128, 128),
    },
    "LunarLanderContinuous-v3": {
        "num_steps": 320, "learning_rate": 3e-4, "critic_learning_rate": 1e-3, "num_minibatches": 40,
        "ent_coef": 0.001, "initial_std": 0.5, "activation": "relu", "state_dependent_std": True,
    },
    "BipedalWalkerHardcore-v3": {
        "practice": 0.5, "total_timesteps": 10_000_000, "num_envs": 64, "num_steps": 128, "learning_rate": 2e-4,
        "final_gamma": 0.998, "gae_lambda": 0.9, "update_epochs": 8, "ent_coef": 0.01, "bounds_loss_coef": 0.01,
        "fall_reward": -1.0, "final_fall_reward": -20.0, "action_cost": 0.1, "initial_std": 0.5,
        "swa_share": 0.2, "min_std": 0.25, "critic_progress": True,
        "actor_hidden_sizes": (256, 256), "critic_hidden_sizes": (256, 256),
    },
}  # fmt: skip


class UserError(Exception):
    """Bad input: one line on stderr and exit code 2."""


class TrainingError(Exception):
    """A run that cannot go on: a line on stderr (with a worker's traceback) and exit code 1; checkpoints are kept."""


def scheduled(args: Options, global_step: int) -> Options:
    """The arguments of the iteration that starts at `global_step`.

    Learning rates and entropy bonus fall linearly; discount and the price of a fall change in equal ratios; the action
    cost grows with the square of the steps over the first half. Why is in the README, with what each has been worth.
    """
    progress = min(global_step / args.total_timesteps, 1)

    def geometric(start: float, end: float) -> float:
        return start ** (1 - progress) * end**progress

    left = 1 - progress if args.anneal_lr else 1.0
    fall, final_fall = args.fall_reward, args.final_fall_reward
    return dataclasses.replace(
        args,
        learning_rate=left * args.learning_rate,
        critic_learning_rate=left * (args.critic_learning_rate or args.learning_rate),
        ent_coef=left * args.ent_coef,
        gamma=args.gamma if args.final_gamma is None else 1 - geometric(1 - args.gamma, 1 - args.final_gamma),
        fall_reward=fall if final_fall is None else -geometric(-fall, -final_fall),
        action_cost=min(1, 2 * progress) ** 2 * args.action_cost,
    )


FALL = -100.0  # the reward of a fall or crash in Gymnasium's Box2D environments


def is_fall(terminated: np.ndarray, rewards: np.ndarray) -> np.ndarray:
    """Which steps ended their episode by a fall. `rewards` are raw."""
    return terminated & (rewards <= FALL)


def training_rewards(state: State, rollout: Rollout, args: Options) -> np.ndarray:
    """The (T, N) float32 rewards that training uses: the raw ones less the action cost, scaled; a fall has its price."""
    raw = rollout.rewards.numpy()
    effort = np.abs(rollout.actions.numpy()).clip(max=1).sum(-1)
    scaled = scale_rewards(state, raw - np.float32(args.action_cost) * effort, rollout, args.gamma)
    if args.fall_reward is None:
        return scaled
    return np.where(is_fall(rollout.terminated.numpy(), raw), np.float32(args.fall_reward), scaled)


def average_weights(state: State, args: Options) -> None:
    """Keeps the mean of the weights since the last --swa-share of training began; before that, there is none.

    Late in training a minibatch's gradient is nearly all noise, and the weights wander about what they have learned:
    their mean is nearer to it (Izmailov et al. 2018, arXiv:1803.05407).
    """
    if args.swa_share and state.global_step > (1 - args.swa_share) * args.total_timesteps:
        state.average.update_parameters(state.agent)
    else:
        state.average.n_averaged.zero_()


# ----------------------------------------------------------------------------------------------------------------------
# Environments
# ----------------------------------------------------------------------------------------------------------------------

WALKERS = {"BipedalWalker-v3": False, "BipedalWalkerHardcore-v3": True}  # env id: hardcore
ENDLESS = 10_000  # steps after which an evaluation ends an episode of an environment without a time limit

# Three ranges of episode seeds that never meet. Training seeds are spread over the upper half of 32 bits.
TEST_SEEDS, SELECTION_SEEDS, TRAINING_SEEDS = 0, 2**30, 2**31


def episode_seed(seed: int, env: int, episode: int) -> int:
    """The reset seed of a training episode. With its actions it is all that it takes to have the episode again."""
    sequence = np.random.SeedSequence(seed, spawn_key=(0, env, episode))
    return TRAINING_SEEDS | int(sequence.generate_state(1)[0])


@dataclass(frozen=True)
class Task:
    """What a worker has to know of the environment; checked once, before any process is started."""

    env_id: str
    fast_walker: bool
    obs_dim: int
    extra_dim: int  # what the critic sees beside: the episode's length and return so far, or nothing
    low: np.ndarray  # (action_dim,) float32 action bounds
    high: np.ndarray
    max_episode_steps: int | None
    goal: float | None  # the return at which the environment counts as solved

    @property
    def action_dim(self) -> int:
        return len(self.low)

    def make_env(self, stock: bool = False, render_mode: str | None = None) -> gym.Env:
        """The one place where an environment is made. Walkers have a fresh world at each reset, unless `stock`."""
        if self.env_id in WALKERS and not stock:
            return Walker(WALKERS[self.env_id], self.max_episode_steps, self.fast_walker)
        return gym.make(self.env_id, render_mode=render_mode, disable_env_checker=True)

    def agent(self, args: Args) -> Agent:
        return Agent(self.obs_dim, self.extra_dim, self.action_dim, args)


def make_task(args: Options) -> Task:
    """Raises UserError for an environment that does not exist or that PPO with a Gaussian cannot act in."""
    try:
        with warnings.catch_warnings():  # of an outdated version: the error says it, too
            warnings.simplefilter("ignore")
            env = gym.make(args.env_id, disable_env_checker=True)
    except Exception as error:  # a registry error, a missing dependency, or whatever the environment raises
        raise UserError(f"--env-id {args.env_id}: {one_line(error)}") from error
    obs_space, action_space, spec = env.observation_space, env.action_space, env.spec
    if not isinstance(obs_space, gym.spaces.Box) or not isinstance(action_space, gym.spaces.Box):
        raise UserError(
            f"--env-id {args.env_id} has {type(obs_space).__name__} observations and {type(action_space).__name__} "
            "actions; supported are environments with Box observations and Box actions"
        )
    if not (np.isfinite(action_space.low).all() and np.isfinite(action_space.high).all()):
        raise UserError(f"--env-id {args.env_id} has unbounded actions; supported are finite bounds")
    env.close()
    env_id = spec.id if spec.id in WALKERS else args.env_id  # "BipedalWalker" is the newest version of it
    if args.practice and env_id not in WALKERS:
        raise UserError(f"--practice belongs to {' and '.join(WALKERS)}: {env_id} cannot be put back to a place")
    fast = env_id in WALKERS and not args.evaluate  # which uses the stock one
    if fast and not fast_walker_agrees(env_id):
        warn("the fast walker differs from Gymnasium's on this machine; using Gymnasium's")
        fast = False
    task = Task(
        env_id=env_id,
        fast_walker=fast,
        obs_dim=int(np.prod(obs_space.shape)),
        extra_dim=2 if args.critic_progress else 0,
        low=rounded(action_space.low, np.inf),
        high=rounded(action_space.high, -np.inf),
        max_episode_steps=spec.max_episode_steps,
        goal=spec.reward_threshold,
    )
    if args.capture_video:
        check_rendering(task)
    return task


def check_rendering(task: Task) -> None:
    """Raises UserError for an environment of which no video can be made on this machine."""
    try:
        env = task.make_env(stock=True, render_mode="rgb_array")
        if "rgb_array" not in env.metadata.get("render_modes", ()):
            raise UserError(f"--capture-video: {task.env_id} cannot be rendered to an rgb_array")
        env.reset(seed=0)
        env.render()
        env.close()
    except UserError:
        raise
    except Exception as error:  # no display, no OpenGL, no pygame, ...
        raise UserError(f"--capture-video: {task.env_id} cannot be rendered here: {one_line(error)}") from error


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def rounded(bounds: np.ndarray, inwards: float) -> np.ndarray:
    """An action space's bounds as float32 (action_dim,) that lie in it, whatever its own precision."""
    nearest = bounds.astype(np.float32)
    outside = nearest < bounds if inwards > 0 else nearest > bounds
    return np.where(outside, np.nextafter(nearest, np.float32(inwards)), nearest).ravel()


def reset_env(env: gym.Env, seed: int) -> np.ndarray:
    return np.asarray(env.reset(seed=seed)[0], np.float32).ravel()


def step_envs(
    envs: Sequence[gym.Env], actions: np.ndarray, beat: Callable[[], None]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Steps each environment with its row of env-ready actions (n, action_dim); `beat` is a sign of life.

    Returns: observations (n, obs_dim) float32, rewards (n,) float32, terminated (n,), truncated (n,).
    """
    if isinstance(envs[0], Walker) and envs[0].fast:
        beat()
        return step_walkers(envs, actions)
    space, steps = envs[0].action_space, []
    for env, row in zip(envs, actions):
        steps.append(env.step(row.reshape(space.shape).astype(space.dtype)))
        beat()
    obs, rewards, terminated, truncated, _ = zip(*steps)
    obs = np.stack([np.asarray(o, np.float32).ravel() for o in obs])
    return obs, np.array(rewards, np.float32), np.array(terminated, bool), np.array(truncated, bool)


# ----------------------------------------------------------------------------------------------------------------------
# Workers
# ----------------------------------------------------------------------------------------------------------------------

# An array in shared memory as it is sent to a spawned worker: unnamed memory, which no crash can leave behind.
Shared = tuple[Any, tuple[int, ...], Any]


def share(context: Any, shape: tuple[int, ...], dtype: Any = np.float32) -> Shared:
    return context.RawArray("b", max(1, math.prod(shape) * np.dtype(dtype).itemsize)), shape, dtype


def open_shared(shared: dict[str, Shared]) -> SimpleNamespace:
    """NumPy views of shared arrays, as attributes."""
    views = {k: np.frombuffer(raw, dtype, math.prod(shape)).reshape(shape) for k, (raw, shape, dtype) in shared.items()}
    return SimpleNamespace(**views)


def new_snapshot(num_envs: int, obs_dim: int, memory_size: int) -> dict[str, Any]:
    """Where N environments are between two rollouts: all that it takes to continue them in another process.

    A Box2D world cannot be pickled, but an episode is a function of its reset seed and its actions (a fresh world at
    each reset makes this true of the walkers too). So these are kept, and the episode is replayed.
    """
    return {
        "episode": np.full(num_envs, -1),  # (N,) the number of the running episode; -1: none has begun
        "actions": [[] for _ in range(num_envs)],  # its actions, in chunks (n, action_dim)
        "obs": np.zeros((num_envs, obs_dim), np.float32),  # (N, obs_dim) the next observation
        "returns": np.zeros(num_envs),  # (N,) of the running episode
        "done": np.zeros(num_envs, bool),  # (N,) that observation is an episode's last; the next step resets
        "memory": np.zeros((num_envs, memory_size)),  # (N, M) what a subclass of Worker wants to remember
    }


class Worker(gym.Env):
    """Some of the environments, in a process of their own, and the policy beside them.

    To AsyncVectorEnv a worker is one environment that is only ever `call`ed. Made in the trainer, it is sent to its
    process, where calling it gives itself. Its methods return a traceback's text instead of raising: an exception that
    cannot be pickled would hang the error queue of AsyncVectorEnv.
    """

    memory_size = 0  # float64 numbers for each environment that have to survive a restart

    def __init__(self, index: int, first: int, last: int, args: Options, task: Task, envs: VecEnv) -> None:
        self.index, self.first, self.last, self.args, self.task = index, first, last, args, task
        self.shared, self.snapshot = envs.shared, envs.snapshot
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (task.obs_dim,), np.float32)
        self.action_space = gym.spaces.Box(task.low, task.high)
        self.envs: list[gym.Env] = []

    def __getstate__(self) -> bytes:
        """For spawned workers: AsyncVectorEnv pickles with cloudpickle, which knows nothing of shared memory."""
        return bytes(ForkingPickler.dumps(vars(self)))

    def __setstate__(self, state: bytes) -> None:
        vars(self).update(pickle.loads(state))

    def __call__(self) -> Worker:
        return self

    def close(self) -> None:
        for env in self.envs:
            env.close()

    def beat(self) -> None:
        """Shows that this worker does not hang: after everything that it does for one environment or one row."""
        self.data.beats[self.index] += 1

    def open(self) -> None:
        """On the first call in its process."""
        self.data = open_shared(self.shared)
        arrays = [getattr(self.data, name) for name in self.shared if name.startswith("policy")]
        self.policy = Policy(arrays, self.args.activation, self.task.low, self.task.high)

    def rollout(self) -> list[dict[str, Any]] | str:
        """Steps the environments num_steps times, acting on the shared noise. Returns the episodes that ended."""
        try:
            if not self.envs:
                self.restore()
            data, columns, self.ended = self.data, slice(self.first, self.last), []
            data.obs[0, columns] = obs = self.obs
            self.write_extras(0)
            for t in range(len(data.actions)):
                actions = data.actions[t, columns] = self.policy.sample(obs, data.noise[t, columns], self.first)
                obs, rewards, terminated, truncated = self.step_all(t, self.policy.env_action(actions))
                data.obs[t + 1, columns], data.rewards[t, columns] = obs, rewards
                data.terminated[t, columns], data.truncated[t, columns] = terminated, truncated
                self.write_extras(t + 1)
            self.obs = obs
            data.episode[columns], data.returns[columns], data.memory[columns] = self.episode, self.ret, self.memory
            return self.ended
        except Exception:
            return traceback.format_exc()

    def write_extras(self, t: int) -> None:
        if self.task.extra_dim:
            self.data.extras[t, self.first : self.last, 0] = self.length
            self.data.extras[t, self.first : self.last, 1] = self.ret

    def step_all(self, t: int, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """One row of env-ready actions (k, action_dim). After an episode's end the row only resets."""
        if not self.done.any():
            result = self.step_some(range(len(self.envs)), actions)
        else:
            k = len(self.envs)
            result = np.empty((k, self.task.obs_dim), np.float32), np.zeros(k, np.float32), *np.zeros((2, k), bool)
            for i in np.flatnonzero(self.done):
                result[0][i] = self.begin(i, self.episode[i] + 1)
            running = np.flatnonzero(~self.done)
            if len(running):
                for into, row in zip(result, self.step_some(running, actions[running])):
                    into[running] = row
        self.done = result[2] | result[3]
        for i in np.flatnonzero(self.done):
            self.ended.append({
                "t": t, "env": self.first + int(i), "return": float(self.ret[i]), "length": int(self.length[i]),
                "fell": bool(is_fall(result[2][i], result[1][i])), "practice": self.is_practice(i),
            })  # fmt: skip
        return result

    def step_some(self, some: Any, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """One step of environments `some`, with their rows of env-ready actions."""
        result = step_envs([self.envs[i] for i in some], actions, self.beat)
        self.length[some] += 1
        self.ret[some] += result[1]
        return result

    def begin(self, i: int, episode: int, again: bool = False) -> np.ndarray:
        """Begins the episode of this number in environment i; `again`: one of a snapshot, to be replayed."""
        self.episode[i], self.length[i], self.ret[i] = episode, 0, 0.0
        obs = reset_env(self.envs[i], episode_seed(self.args.seed, self.first + i, int(episode)))
        self.beat()
        return obs

    def is_practice(self, i: int) -> bool:
        return False

    def restore(self) -> None:
        """Brings every environment to where the last complete rollout left it."""
        self.open()
        columns, k = slice(self.first, self.last), self.last - self.first
        self.episode, self.obs, self.done, self.memory = (
            self.snapshot[name][columns].copy() for name in ("episode", "obs", "done", "memory")
        )
        self.length, self.ret = np.zeros(k, int), np.zeros(k)
        for _ in range(k):
            self.envs.append(self.task.make_env())
            self.beat()
        self.prepare()
        for i in np.flatnonzero(~self.done):
            if self.episode[i] < 0:
                self.obs[i] = self.begin(i, 0)
            elif not self.replay(i):  # not the same here, as on another machine: a new episode begins
                self.data.restarted[self.first + i] = True
                self.memory[i] = self.snapshot["memory"][self.first + i]  # what the replay noted is undone
                self.obs[i] = self.begin(i, self.episode[i] + 1)

    @staticmethod
    def check_memory(memory: np.ndarray) -> None:
        """Raises ValueError for a saved memory that is none of this class."""

    def prepare(self) -> None:
        """What a subclass has to do before episodes begin."""

    def replay(self, i: int) -> bool:
        """Takes the running episode of environment i to where it was; false if it comes to another place."""
        obs, running = self.begin(i, self.episode[i], again=True), True
        for action in itertools.chain.from_iterable(self.snapshot["actions"][self.first + i]):
            if not running:
                break
            rows, _, terminated, truncated = self.step_some([i], self.policy.env_action(action[None]))
            obs, running = rows[0], not (terminated[0] or truncated[0])
        return running and np.array_equal(obs, self.obs[i]) and self.ret[i] == self.snapshot["returns"][self.first + i]

    def evaluate(self, seeds: list[int], workers: int, stock: bool, stochastic: bool) -> list[tuple] | str:
        """This worker's share of evaluation episodes: (index into seeds, return, length, fell) of each.

        Its environments, as many as it has for training, are reused; but the stock walkers, whose world remembers
        earlier episodes, are made anew for each.
        """
        try:
            self.open()
            mine = [i for i in range(len(seeds)) if i // TILE % workers == self.index]  # whole tiles
            size = max(1, (self.last - self.first) // TILE) * TILE
            envs, episodes = [], []
            for start in range(0, len(mine), size):
                some = mine[start : start + size]
                if stock and self.task.env_id in WALKERS:
                    envs = []
                while len(envs) < len(some):
                    envs.append(self.task.make_env(stock))
                    self.beat()
                rows = self.play(envs[: len(some)], [seeds[i] for i in some], stochastic)
                episodes += [(i, *row) for i, row in zip(some, rows)]
            for env in envs:
                env.close()
            return episodes
        except Exception:
            return traceback.format_exc()

    def play(self, envs: list[gym.Env], seeds: list[int], stochastic: bool) -> list[tuple[float, int, bool]]:
        """(return, length, fell) of one whole episode per environment, all at once."""
        obs = np.zeros((len(envs), self.task.obs_dim), np.float32)
        for i, (env, seed) in enumerate(zip(envs, seeds)):
            obs[i] = reset_env(env, seed)
            self.beat()
        rngs = [np.random.default_rng((seed, 1)) for seed in seeds] if stochastic else []
        returns, lengths, fell = np.zeros(len(envs)), np.zeros(len(envs), int), np.zeros(len(envs), bool)
        running, limit = np.arange(len(envs)), self.task.max_episode_steps or ENDLESS
        while len(running):
            noise = [rng.standard_normal(self.task.action_dim, np.float32) for rng in rngs]
            actions = self.policy.env_action(self.policy.sample(obs, np.stack(noise) if stochastic else None))
            some = [envs[i] for i in running]
            obs[running], rewards, terminated, truncated = step_envs(some, actions[running], self.beat)
            returns[running] += rewards
            lengths[running] += 1
            fell[running] = is_fall(terminated, rewards)
            running = running[~(terminated | truncated) & (lengths[running] < limit)]
        return list(zip(returns.tolist(), lengths.tolist(), fell.tolist()))


def worker_main(*args: Any) -> None:
    """The process of a worker. It ends with its trainer, and never by a signal that is meant for the trainer.

    A Ctrl-C or a `kill` of the whole group reaches the workers, too: the trainer decides when they end. (A handler that
    does nothing, since ignored signals would be inherited by whatever an environment starts.)
    """
    trainer = os.getppid()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM))  # blocked by VecEnv.start

    def watch() -> None:  # a sibling may keep the pipe open that would have told that the trainer has gone
        while os.getppid() == trainer and multiprocessing.parent_process().is_alive():
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    try:
        _async_worker(*args)
    except (EOFError, OSError):  # the trainer has gone: no traceback about a broken pipe
        os._exit(1)


STARTING = 120.0  # seconds that the start of workers may take, whatever --worker-timeout
CLOSING = 5.0  # seconds that workers have to close their environments
MAX_FAULTS = 3  # attempts at one rollout or evaluation before a run gives up


class VecEnv:
    """num_envs environments in num_workers processes, as (num_envs, ...) arrays; replaces failed workers.

    The workers are AsyncVectorEnv's. A whole rollout is one message: waking a process for each step costs more than
    the stepping itself. What the workers return is the same to the bit for any number of them. No wait is endless.
    """

    def __init__(self, args: Options, task: Task, snapshot: dict[str, Any], policy: list[np.ndarray]) -> None:
        self.args, self.task, self.snapshot = args, task, snapshot
        self.num_workers = min(args.num_workers or usable_cores(), args.num_envs)
        # Forking takes a tenth of a second, spawning many (each worker imports torch). macOS cannot fork safely.
        self.context = "fork" if sys.platform == "linux" else "spawn"
        context, (T, N, A) = multiprocessing.get_context(self.context), (args.num_steps, args.num_envs, task.action_dim)
        self.shared: dict[str, Shared] = {
            "obs": share(context, (T + 1, N, task.obs_dim)),
            "extras": share(context, (T + 1, N, task.extra_dim)),
            "actions": share(context, (T, N, A)),
            "noise": share(context, (T, N, A)),
            "rewards": share(context, (T, N)),
            "terminated": share(context, (T, N), np.bool_),
            "truncated": share(context, (T, N), np.bool_),
            "restarted": share(context, (N,), np.bool_),
            "beats": share(context, (self.num_workers,), np.int64),
            "episode": share(context, (N,), np.int64),  # these three: the next snapshot's
            "returns": share(context, (N,), np.float64),
            "memory": share(context, snapshot["memory"].shape, np.float64),
            **{f"policy{i}": share(context, array.shape) for i, array in enumerate(policy)},
        }
        self.data = open_shared(self.shared)
        self.workers: AsyncVectorEnv | None = None
        self.restarts = 0

    def __enter__(self) -> VecEnv:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def start(self) -> None:
        bounds = np.linspace(0, self.args.num_envs, self.num_workers + 1).astype(int).tolist()
        workers = [
            worker_class(self.args)(i, *pair, self.args, self.task, self)
            for i, pair in enumerate(itertools.pairwise(bounds))
        ]
        # Construction waits for the workers without a limit; a spawned one imports torch first.
        watchdog = threading.Timer(max(self.args.worker_timeout, STARTING), kill_workers)
        watchdog.daemon = True
        watchdog.start()
        blocked = {signal.SIGINT, signal.SIGTERM}  # until a worker has its own handlers
        before = signal.pthread_sigmask(signal.SIG_BLOCK, blocked) if hasattr(signal, "pthread_sigmask") else None
        try:
            self.workers = AsyncVectorEnv(
                workers, shared_memory=False, context=self.context, worker=worker_main,
                autoreset_mode=AutoresetMode.DISABLED,
            )  # fmt: skip
        finally:
            if before is not None:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
            watchdog.cancel()

    def close(self, kill: bool = False) -> None:
        """Lets the workers close their environments, and ends those that do not do it in time, or at once."""
        workers, self.workers = self.workers, None
        if workers is None:
            return
        if not kill:
            with contextlib.suppress(OSError):
                for pipe in workers.parent_pipes:
                    pipe.send(("close", None))
            end = time.monotonic() + CLOSING
            for process in workers.processes:
                process.join(max(0.0, end - time.monotonic()))
        for process in workers.processes:
            process.kill()  # not terminate(): a stopped process would never get to it
            process.join()
        for pipe in workers.parent_pipes:
            pipe.close()
        workers.closed = True

    def call(self, name: str, *args: Any) -> list[Any]:
        """Calls a method of every worker. After a fault, new workers continue where the last rollout ended."""
        for attempt in range(1, MAX_FAULTS + 1):
            result = self.try_to_call(name, *args)
            if isinstance(result, list):
                return result
            self.close(kill=True)
            kill_workers()
            self.restarts += 1
            if attempt < MAX_FAULTS:
                warn(f"{result}; starting new workers where the last rollout ended")
        raise TrainingError(f"gave up after {MAX_FAULTS} attempts without progress: {result}")

    def try_to_call(self, name: str, *args: Any) -> list[Any] | str:
        """The results; or what is wrong with a worker that died, failed, or took no step for --worker-timeout."""
        beats, timeout = self.data.beats, self.args.worker_timeout
        try:
            if self.workers is None:
                self.start()
            self.workers.call_async(name, *args)
            waiting = {pipe: i for i, pipe in enumerate(self.workers.parent_pipes)}
            seen, since = beats.copy(), np.full(len(beats), time.monotonic())
            while waiting:
                for pipe in multiprocessing.connection.wait(list(waiting), timeout=min(0.5, timeout / 4)):
                    del waiting[pipe]
                since[beats != seen] = time.monotonic()
                seen = beats.copy()
                for i in waiting.values():
                    if time.monotonic() - since[i] > timeout:
                        return f"worker {i} took no step for {timeout:g} s"
            results = list(self.workers.call_wait())
        except (EOFError, OSError):
            for process in worker_processes():
                process.join(0.2)
                if code := process.exitcode:
                    i = process.name.split("-")[-1]
                    return f"worker {i} " + (
                        f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
                    )
            return "a worker closed its pipe"
        errors = [f"worker {i} failed:\n{result}" for i, result in enumerate(results) if isinstance(result, str)]
        return errors[0] if errors else results

    def load_policy(self, arrays: list[np.ndarray]) -> None:
        for i, array in enumerate(arrays):
            getattr(self.data, f"policy{i}")[...] = array

    def rollout(self, policy: list[np.ndarray], noise: np.ndarray, global_step: int) -> Rollout:
        """A rollout of all environments with `policy` (Agent.policy_arrays) and `noise` (T, N, action_dim).

        The snapshot moves on when it is complete; the tensors are views of memory that the next one fills again.
        Raises TrainingError if a worker keeps failing, or an observation, action or reward is not finite.
        """
        data = self.data
        self.load_policy(policy)
        data.noise[...] = noise
        data.restarted[...] = False
        shares = self.call("rollout")
        if data.restarted.any():
            warn(f"{data.restarted.sum()} environments cannot be replayed; their episodes start anew")
        for name in ("obs", "actions", "rewards"):
            array = getattr(data, name)
            if not np.isfinite(array).all():
                t, env = np.argwhere(~np.isfinite(array))[0][:2]
                raise TrainingError(
                    f"{name} of environment {env} at step {t} of the rollout are not finite: {array[t, env]}"
                )
        done = data.terminated | data.truncated
        valid = ~np.vstack((self.snapshot["done"][None], done[:-1]))
        steps = global_step + valid.sum(1).cumsum()
        episodes = sorted((e for share in shares for e in share), key=lambda e: (e["t"], e["env"]))
        for episode in episodes:
            episode["global_step"] = int(steps[episode.pop("t")])
        self.advance(valid, done)
        fields = {f.name: getattr(data, f.name, None) for f in dataclasses.fields(Rollout)}
        tensors = {k: torch.from_numpy(v) for k, v in fields.items() if v is not None}
        return Rollout(**{**tensors, "valid": torch.from_numpy(valid), "episodes": episodes})

    def advance(self, valid: np.ndarray, done: np.ndarray) -> None:
        """Moves the snapshot on over a complete rollout."""
        data, snapshot = self.data, self.snapshot
        for i, chunks in enumerate(snapshot["actions"]):
            resets = np.flatnonzero(~valid[:, i])
            if len(resets) or data.restarted[i]:
                chunks.clear()
            chunks.append(data.actions[resets[-1] + 1 if len(resets) else 0 :, i].copy())
        snapshot["obs"], snapshot["done"] = data.obs[-1].copy(), done[-1].copy()
        for name in ("episode", "returns", "memory"):
            snapshot[name] = getattr(data, name).copy()

    def evaluate(
        self, policy: list[np.ndarray], seeds: list[int], stock: bool = False, stochastic: bool = False
    ) -> list[tuple[float, int, bool]]:
        """(undiscounted raw return, length, fell) of one episode per seed, deterministic unless `stochastic`.

        One episode each is a quota that favours no short ones (SB3 #402). The number of workers changes no bit.
        """
        self.load_policy(policy)
        shares = self.call("evaluate", seeds, self.num_workers, stock, stochastic)
        episodes = sorted(row for share in shares for row in share)
        for i, ret, *_ in episodes:
            if not math.isfinite(ret):
                raise TrainingError(f"the return of the evaluation episode with seed {seeds[i]} is {ret}")
        return [(ret, length, fell) for _, ret, length, fell in episodes]


def worker_class(args: Options) -> type[Worker]:
    return Practice if args.practice else Worker


def worker_processes() -> list[Any]:
    return [p for p in multiprocessing.active_children() if p.name.startswith("Worker<AsyncVectorEnv>")]


def kill_workers() -> None:
    for process in worker_processes():
        process.kill()
        process.join()


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ----------------------------------------------------------------------------------------------------------------------
# Walkers
# ----------------------------------------------------------------------------------------------------------------------

RAYS = 10
RAY_X = np.array([math.sin(1.5 * i / 10.0) * stock.LIDAR_RANGE for i in range(RAYS)])
RAY_Y = np.array([math.cos(1.5 * i / 10.0) * stock.LIDAR_RANGE for i in range(RAYS)])
NEAR_EDGES = 14  # edges that the ten rays can reach, the one behind the hull included
NEAR_POLYGONS = 8  # obstacles that they can reach (6 at most, counted over Hardcore terrains), padded
MOTOR_SPEEDS = np.array([stock.SPEED_HIP, stock.SPEED_KNEE] * 2, np.float32)
TORQUE_COST = 0.00035 * stock.MOTORS_TORQUE
FINISH = (stock.TERRAIN_LENGTH - stock.TERRAIN_GRASS) * stock.TERRAIN_STEP


class Walker(stock.BipedalWalker):
    """BipedalWalker with a new Box2D world at each reset, as LunarLander has it; and, if `fast`, with less Python.

    The stock one reuses its world: the order of its contacts, and with it the last bits of a trajectory, depend on the
    episodes before. In a fresh world an episode is a function of its seed and actions alone.

    A fast one is the same to the bit, in less than half the time. The walkers of one worker are stepped together
    (step_walkers): Box2D one by one, their lidars in one NumPy ray cast over the terrain instead of ten Python
    callbacks each. tests/test_walker.py compares every bit, and fast_walker_agrees does so at each start.
    """

    def __init__(self, hardcore: bool, max_episode_steps: int, fast: bool) -> None:
        super().__init__(hardcore=hardcore)
        self.max_episode_steps, self.fast = max_episode_steps, fast

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        self.world.contactListener = None  # breaks the cycle world, listener, environment: it holds C++ memory
        self.world, self.terrain, self.elapsed = Box2D.b2World(), [], 0
        result = super().reset(seed=seed, options=options)
        self.elapsed = 0  # the stock reset takes a step
        return result

    def step(self, action: np.ndarray) -> tuple[np.ndarray, np.floating, bool, bool, dict]:
        if self.fast:
            obs, reward, terminated, truncated = step_walkers([self], np.asarray(action)[None])
            return obs[0], reward[0], bool(terminated[0]), bool(truncated[0]), {}
        obs, reward, terminated, _, info = super().step(action)
        self.elapsed += 1
        return obs, reward, terminated, self.elapsed >= self.max_episode_steps, info

    def _generate_terrain(self, hardcore: bool) -> None:
        super()._generate_terrain(hardcore)
        points = np.array([self.terrain_x, self.terrain_y], np.float32)  # (2, 200)
        # (vertex x, y, edge x, y, normal x, y, squared length) of each edge
        self.edges = np.concatenate((points[:, :-1], *edge_vectors(points[:, :-1], points[:, 1:])))
        bodies = self.terrain[len(self.terrain_x) - 1 :]  # made before the edges, in a list reversed since
        polygons = np.zeros((len(bodies) + 1, 4, 4), np.float32)  # (sides, (normal, vertex)); the last: never hit
        for row, body in zip(polygons, bodies):
            vertices = np.array(body.fixtures[0].shape.vertices, np.float32).T
            _, normal, _ = edge_vectors(vertices, np.roll(vertices, -1, 1))
            row[:, :2], row[:, 2:] = normal.T, vertices.T
        # For each cell of the terrain, the polygons that rays from there can reach.
        left, right = polygons[:-1, :, 2].min(1) - 0.1, polygons[:-1, :, 2].max(1) + 0.1
        cells = np.arange(len(self.terrain_x))[:, None] * stock.TERRAIN_STEP
        reach = (left < cells + stock.TERRAIN_STEP + stock.LIDAR_RANGE) & (right > cells)
        assert reach.sum(1).max(initial=0) <= NEAR_POLYGONS
        nearest = np.argsort(~reach, axis=1, kind="stable")[:, :NEAR_POLYGONS]
        near = np.full((len(cells), NEAR_POLYGONS), len(bodies))
        near[:, : nearest.shape[1]] = np.where(np.take_along_axis(reach, nearest, 1), nearest, len(bodies))
        self.polygons, self.near, self.any_near = polygons, near, reach.any(1)


def edge_vectors(start: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Edges, outward unit normals and squared lengths, (2, n), (2, n), (1, n), in Box2D's order of operations."""
    edge = end - start
    square = edge[0] * edge[0] + edge[1] * edge[1]
    inverse = np.float32(1) / np.sqrt(square)
    return edge, np.stack((edge[1] * inverse, -edge[0] * inverse)), square[None]


def step_walkers(
    walkers: Sequence[Walker], actions: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """One step of each walker with its row of actions (n, 4); what BipedalWalker.step does, in the same arithmetic.

    Returns: observations (n, 24) float32, rewards (n,), terminated (n,), truncated (n,). Rewards have the actions'
    precision, as the stock ones do under NumPy 2.
    """
    n = len(walkers)
    if not np.issubdtype(actions.dtype, np.floating):
        actions = actions.astype(np.float64)
    effort = np.minimum(np.abs(actions), 1)
    speeds, torques = (MOTOR_SPEEDS * np.sign(actions)).tolist(), (stock.MOTORS_TORQUE * effort).tolist()
    obs = np.empty((n, 24), np.float32)
    progress, x, y = np.empty(n), [0.0] * n, [0.0] * n
    terminated, truncated, fell = np.zeros((3, n), bool)
    for i, walker in enumerate(walkers):
        hull, joints, legs = walker.hull, walker.joints, walker.legs
        for joint, speed, torque in zip(joints, speeds[i], torques[i]):
            joint.motorSpeed = speed
            joint.maxMotorTorque = torque
        walker.world.Step(1.0 / stock.FPS, 6 * 30, 2 * 30)
        position, velocity, angle = hull.position, hull.linearVelocity, hull.angle
        px = position.x
        x[i], y[i] = px, position.y
        hip0, knee0, hip1, knee1 = joints
        obs[i, :14] = (
            angle,
            2.0 * hull.angularVelocity / stock.FPS,
            0.3 * velocity.x * (stock.VIEWPORT_W / stock.SCALE) / stock.FPS,
            0.3 * velocity.y * (stock.VIEWPORT_H / stock.SCALE) / stock.FPS,
            hip0.angle,
            hip0.speed / stock.SPEED_HIP,
            knee0.angle + 1.0,
            knee0.speed / stock.SPEED_KNEE,
            legs[1].ground_contact,
            hip1.angle,
            hip1.speed / stock.SPEED_HIP,
            knee1.angle + 1.0,
            knee1.speed / stock.SPEED_KNEE,
            legs[3].ground_contact,
        )
        shaping = 130 * px / stock.SCALE - 5.0 * abs(angle)
        progress[i] = 0.0 if walker.prev_shaping is None else shaping - walker.prev_shaping
        walker.prev_shaping = shaping
        walker.scroll = px - stock.VIEWPORT_W / stock.SCALE / 5
        walker.elapsed += 1
        fell[i] = walker.game_over or px < 0
        terminated[i] = fell[i] or px > FINISH
        truncated[i] = walker.elapsed >= walker.max_episode_steps
    obs[:, 14:] = cast_rays(walkers, np.array(x), np.array(y))
    rewards = progress.astype(actions.dtype)
    cost = actions.dtype.type(TORQUE_COST) * effort
    for j in range(4):  # one after another, as the stock environment does: a sum has other bits
        rewards -= cost[:, j]
    rewards[fell] = FALL
    return obs, rewards, terminated, truncated


@np.errstate(divide="ignore", invalid="ignore")  # a ray parallel to an edge divides by zero, and is a miss
def cast_rays(walkers: Sequence[Walker], x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The lidar fractions (n, 10) float32 of walkers whose hulls are at x, y (n,) float64.

    b2EdgeShape::RayCast and b2PolygonShape::RayCast in float32 and in their order of operations, for the terrain
    within reach at once: shapes are (walkers, rays, edges or polygons). Misses are 1.
    """
    cells = np.clip((x / stock.TERRAIN_STEP).astype(int), 0, len(walkers[0].near) - 1)
    first = np.clip(cells - 1, 0, walkers[0].edges.shape[1] - NEAR_EDGES).tolist()
    px, py = x.astype(np.float32)[:, None, None], y.astype(np.float32)[:, None, None]
    dx = (x[:, None] + RAY_X).astype(np.float32)[:, :, None] - px
    dy = (y[:, None] - RAY_Y).astype(np.float32)[:, :, None] - py

    edges = np.concatenate([w.edges[:, i : i + NEAR_EDGES] for w, i in zip(walkers, first)])
    vx, vy, ex, ey, nx, ny, square = edges.reshape(len(walkers), 7, 1, NEAR_EDGES).swapaxes(0, 1)
    t = (nx * (vx - px) + ny * (vy - py)) / (nx * dx + ny * dy)
    s = ((px + t * dx - vx) * ex + (py + t * dy - vy) * ey) / square
    hit = (t >= 0) & (t <= 1) & (s >= 0) & (s <= 1)  # false for the NaN of a ray along an edge
    fractions = np.where(hit, t, np.float32(1)).min(2)

    some = [i for i, (w, cell) in enumerate(zip(walkers, cells.tolist())) if w.any_near[cell]]
    if some:
        polygons = np.stack([walkers[i].polygons[walkers[i].near[cells[i]]] for i in some])[:, None]
        nx, ny, vx, vy = np.moveaxis(polygons, (-1, -2), (0, 1))  # (4 sides, walkers, 1, polygons) each
        px, py, dx, dy = px[some], py[some], dx[some], dy[some]
        numerators, denominators = nx * (vx - px) + ny * (vy - py), nx * dx + ny * dy
        ratios, entering, leaving = numerators / denominators, denominators < 0, denominators > 0
        missed = ((denominators == 0) & (numerators < 0)).any(0)
        lower, upper, entered = np.float32(0), np.float32(1), np.False_
        for numerator, denominator, ratio, enters, leaves in zip(numerators, denominators, ratios, entering, leaving):
            enters = enters & (numerator < lower * denominator)
            leaves = leaves & (numerator < upper * denominator)
            lower, upper = np.where(enters, ratio, lower), np.where(leaves, ratio, upper)
            entered = entered | enters
        hit = entered & ~missed & (lower <= upper)
        fractions[some] = np.minimum(fractions[some], np.where(hit, lower, np.float32(1)).min(2))
    return fractions


def fast_walker_agrees(env_id: str, steps: int = 200) -> bool:
    """Whether the fast walker gives the stock one's bits on this machine (a fused multiply-add would not)."""
    rng, spec, done = np.random.default_rng(0), gym.spec(env_id), True
    fast = Walker(WALKERS[env_id], spec.max_episode_steps, fast=True)
    for step in range(steps):
        if done:
            published = gym.make(spec, disable_env_checker=True)  # anew: its world must be fresh, too
            pairs = [(env.reset(seed=step)[0], 0, False) for env in (published, fast)]
        else:
            action = rng.uniform(-1, 1, 4).astype(np.float32)
            pairs = [env.step(action)[:3] for env in (published, fast)]
        (obs, reward, done), (fast_obs, fast_reward, fast_done) = pairs
        if not np.array_equal(obs, fast_obs) or reward != fast_reward or done != fast_done:
            return False
    return True


# Practice. A place is a row of float64 numbers: seed of the course (0: no place), episode length and return there, the
# length at which practice is cut off, walker_state, observation.

PLACE = 4 + 33 + 24
PRACTICE_FALLS = 4  # of each environment: the last ones
PRACTICE_BEFORE = (40, 140)  # steps before a fall: where practice begins
PRACTICE_BEYOND = 60  # steps after it: where practice ends
PRACTICE_EVERY = 5  # steps from one place that is kept to the next


class Practice(Worker):
    """A worker that sends its walkers back to where they fell, for a share of their steps (--practice).

    A walker that falls on one course in ten learns nothing about it in most of its steps. So it practises: an episode
    begins shortly before one of its last falls, on that course, in the same place and at the same speed, and is cut off
    shortly after the place of the fall. To PPO it is a truncated episode like others. It has the length and the return
    that the one that fell had there, for --critic-progress. Starting from states on the way is an idea of Salimans &
    Chen 2018 (arXiv:1812.03381), for demonstrations.
    """

    memory_size = (1 + PRACTICE_FALLS) * PLACE + 2

    @staticmethod
    def check_memory(memory: np.ndarray) -> None:
        places = memory[:, :-2].reshape(-1, PLACE)
        if not ((0 <= places[:, 0]) & (places[:, 0] < 2**32) & (np.abs(places[:, 1:]) < 1e4).all(1)).all():
            raise ValueError("a place to practise at is on no course")  # Box2D would not come back from far away

    def prepare(self) -> None:
        k = len(self.envs)
        # Where the running episode began (or no place), then shortly before the last falls: views of self.memory.
        self.places = self.memory[:, :-2].reshape(k, 1 + PRACTICE_FALLS, PLACE)
        self.steps = self.memory[:, -2:]  # (k, 2) of whole courses and of practice, in episodes that have ended
        # The last places of a whole course, as long before a fall as it may be.
        self.recent = [deque(maxlen=PRACTICE_BEFORE[1] // PRACTICE_EVERY) for _ in range(k)]

    def is_practice(self, i: int) -> bool:
        return bool(self.places[i, 0, 0])

    def begin(self, i: int, episode: int, again: bool = False) -> np.ndarray:
        self.recent[i].clear()
        if not again:
            falls = self.places[i, 1:][self.places[i, 1:, 0] > 0]
            due = len(falls) and self.steps[i, 1] < self.args.practice * self.steps[i].sum()
            self.places[i, 0] = falls[episode % len(falls)] if due else 0.0
        place = self.places[i, 0]
        if not place[0]:
            return super().begin(i, episode)
        reset_env(self.envs[i], int(place[0]))
        put_back(self.envs[i], place[4:37])
        self.episode[i], self.length[i], self.ret[i] = episode, place[1], place[2]
        self.beat()
        return place[37:]

    def step_some(self, some: Any, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        obs, rewards, terminated, truncated = super().step_some(some, actions)
        length, practising = self.length[some], self.places[some, 0, 0] > 0
        truncated |= practising & (length >= self.places[some, 0, 3])
        fell = is_fall(terminated, rewards)
        for row in np.flatnonzero(~practising & (fell | (length % PRACTICE_EVERY == 0))):
            i = some[row]
            if not fell[row]:
                seed = episode_seed(self.args.seed, self.first + i, int(self.episode[i]))
                self.recent[i].append((seed, length[row], self.ret[i], 0, *walker_state(self.envs[i]), *obs[row]))
                continue
            before = [place for place in self.recent[i] if length[row] - place[1] >= PRACTICE_BEFORE[0]]
            if before:
                self.places[i, 1:-1] = self.places[i, 2:].copy()
                self.places[i, -1] = before[length[row] % len(before)]  # as good as at random
                self.places[i, -1, 3] = length[row] + PRACTICE_BEYOND
        for row in np.flatnonzero(terminated | truncated):
            i, begun = some[row], self.places[some[row], 0, 1]
            self.steps[i, int(practising[row])] += length[row] - begun
        return obs, rewards, terminated, truncated


def walker_state(env: gym.Env) -> list[float]:
    """What `put_back` needs to continue a walker's episode: 33 numbers."""
    walker = env.unwrapped
    state = [walker.prev_shaping, walker.legs[1].ground_contact, walker.legs[3].ground_contact]
    for body in (walker.hull, *walker.legs):
        state += [*body.position, body.angle, *body.linearVelocity, body.angularVelocity]
    return state


def put_back(env: gym.Env, state: np.ndarray) -> None:
    """Puts a walker that has just been reset to the same course where it was when walker_state() gave `state`.

    It then goes on as it did, but for the impulses that Box2D's solver remembers from one step to the next.
    """
    walker = env.unwrapped
    for body, (x, y, angle, vx, vy, spin) in zip((walker.hull, *walker.legs), state[3:].reshape(5, 6).tolist()):
        body.transform = (x, y), angle
        body.linearVelocity, body.angularVelocity = (vx, vy), spin
    walker.world.Step(0.0, 0, 0)  # no time passes, but the contacts of the reset end, and those of the place begin
    walker.prev_shaping = float(state[0])
    walker.legs[1].ground_contact, walker.legs[3].ground_contact = map(bool, state[1:3])


# ----------------------------------------------------------------------------------------------------------------------
# State and checkpoints
# ----------------------------------------------------------------------------------------------------------------------

FORMAT = "ppo_vec 2"
MAGIC = b"ppo_vec1"  # before the digest that follows the checkpoint's bytes
MAX_BYTES = 2**31  # of a file that is read


class State:
    """Everything that must survive, in one object: a checkpoint holds every attribute that is not in UNSAVED."""

    UNSAVED = {"args", "task", "device", "started", "saved_at", "save_cost"}

    def __init__(self, args: Options, task: Task, device: torch.device) -> None:
        # One seed, four streams that never overlap; `seed + i` would make neighbouring runs share environments
        # (Gymnasium seeds each with its own). Stream 0 belongs to the environments: episode_seed().
        _, noise, shuffle, init = np.random.SeedSequence(args.seed).spawn(4)
        torch.manual_seed(int(init.generate_state(1)[0]))
        self.args, self.task, self.device = args, task, device
        self.agent = task.agent(args).to(device)
        self.average = AveragedModel(self.agent, use_buffers=True)  # average_weights
        self.optimizers = make_optimizers(self.agent)
        self.return_statistics = Normalizer(1)  # scale_rewards
        self.discounted_return = np.zeros(args.num_envs)
        self.noise_rng = np.random.Generator(np.random.PCG64(noise))
        self.shuffle_rng = torch.Generator().manual_seed(int(shuffle.generate_state(1)[0]))
        self.envs = new_snapshot(args.num_envs, task.obs_dim, worker_class(args).memory_size)
        self.global_step = 0
        self.train_time_s = 0.0  # rollouts and updates
        self.wall_time_s = 0.0  # with evaluations and files; of this process and those before it; see wall_time()
        self.evaluations: list[dict[str, Any]] = []
        self.selection_episodes = 0  # evaluation episodes so far, each on a seed of its own
        self.selection_steps = 0  # their steps, without confirmations of a solve and the final choice
        self.evaluation_steps = 0  # all steps of evaluations
        self.candidates: list[dict[str, Any]] = []  # the best policies so far, {"agent": weights, "evaluation": row}
        self.solved_at_step: int | None = None
        self.solved_at_s: float | None = None
        self.finished = False
        self.log_sizes: dict[str, int] = {}  # bytes of each log that belong to this state
        self.started, self.saved_at, self.save_cost = time.perf_counter(), -math.inf, 0.0

    def wall_time(self) -> float:
        return self.wall_time_s + time.perf_counter() - self.started

    def state_dict(self) -> dict[str, Any]:
        """Plain types and tensors."""
        saved = {name: plain(value) for name, value in vars(self).items() if name not in self.UNSAVED}
        return {**policy_dict(self.agent, self.args, self.task), **saved, "wall_time_s": self.wall_time()}

    def load(self, saved: dict[str, Any]) -> None:
        """Raises UserError if `saved` does not fit this agent and environment."""
        own = self.state_dict()
        try:
            if saved.keys() != own.keys():
                raise ValueError(f"it lacks or adds {', '.join(sorted(saved.keys() ^ own.keys()))}")
            for name in ("agent", "average", "return_statistics", "noise_rng"):
                same_shapes(saved[name], own[name], name)
            for state, optimizer in zip(saved["optimizers"], self.optimizers, strict=True):
                # A fused optimizer does not look at shapes: it writes past the end of a tensor that is too small.
                (flat,) = optimizer.param_groups[0]["params"]
                adam = {0: {"step": torch.zeros(()), "exp_avg": flat.data, "exp_avg_sq": flat.data}}
                same_shapes(state, adam if state else {}, "optimizers")
                optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
            for candidate in saved["candidates"]:
                same_shapes(candidate["agent"], own["agent"], "candidates")
                float(candidate["evaluation"]["mean"]), int(candidate["evaluation"]["global_step"])
            for row in saved["evaluations"]:
                float(row["mean"]), int(row["global_step"])
            for name in ("agent", "average", "return_statistics"):
                getattr(self, name).load_state_dict(saved[name])
            self.noise_rng.bit_generator.state = saved["noise_rng"]
            self.shuffle_rng.set_state(saved["shuffle_rng"])
            self.discounted_return[...] = saved["discounted_return"].numpy()
            self.load_snapshot(saved["envs"])
            for name, value in own.items():
                if isinstance(value, (int, float, list, type(None))) and name in vars(self) and name != "optimizers":
                    if type(saved[name]) is not type(value) and value is not None:
                        raise ValueError(f"{name} is a {type(saved[name]).__name__}")
                    setattr(self, name, saved[name])
            self.log_sizes = {name: int(size) for name, size in saved["log_sizes"].items()}
        except Exception as error:
            raise UserError(f"the checkpoint does not fit: {one_line(error)}") from error

    def load_snapshot(self, saved: dict[str, Any]) -> None:
        for name, value in self.envs.items():
            if isinstance(value, np.ndarray):
                same_shapes(saved[name], torch.from_numpy(value), name)
                self.envs[name] = saved[name].numpy().copy()
        for chunks, actions in zip(self.envs["actions"], saved["actions"], strict=True):
            if actions is not None:
                same_shapes(actions, torch.empty(len(actions), self.task.action_dim), "actions")
                chunks.append(actions.numpy())
        worker_class(self.args).check_memory(self.envs["memory"])


def plain(value: Any) -> Any:
    """A part of the state as plain types and tensors."""
    if isinstance(value, torch.optim.Optimizer):
        return value.state_dict()["state"]
    if hasattr(value, "state_dict"):
        return value.state_dict()
    if isinstance(value, np.random.Generator):
        return value.bit_generator.state
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy())
    if isinstance(value, dict):
        if "actions" in value:  # the snapshot: an episode's actions are saved in one piece
            actions = [torch.from_numpy(np.concatenate(chunks)) if chunks else None for chunks in value["actions"]]
            return {**{k: plain(v) for k, v in value.items() if k != "actions"}, "actions": actions}
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, tuple):
        return [plain(v) for v in value]
    return value


def same_shapes(saved: Any, own: Any, name: str) -> None:
    """Raises ValueError unless both have the same keys, types, shapes and dtypes."""
    if isinstance(own, dict):
        if not isinstance(saved, dict) or saved.keys() != own.keys():
            raise ValueError(f"{name} has other entries")
        for key in own:
            same_shapes(saved[key], own[key], f"{name}.{key}")
    elif isinstance(own, Tensor):
        if not isinstance(saved, Tensor) or (saved.shape, saved.dtype) != (own.shape, own.dtype):
            raise ValueError(f"{name} has another shape or type")
    elif type(saved) is not type(own):
        raise ValueError(f"{name} is a {type(saved).__name__}")


def policy_dict(agent: Agent, args: Options, task: Task) -> dict[str, Any]:
    """A policy as plain types and tensors: what best.pt holds and a checkpoint begins with."""
    return {
        "format": FORMAT,
        "args": {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(args).items()},
        "low": torch.from_numpy(task.low),
        "high": torch.from_numpy(task.high),
        "agent": agent.state_dict(),
    }


def open_regular(path: Path, mode: str) -> Any:
    """open() of a regular file that is no link: a run folder may come from a stranger. Raises OSError."""
    flags = {"rb": os.O_RDONLY, "r+b": os.O_RDWR | os.O_CREAT, "wb": os.O_WRONLY | os.O_CREAT | os.O_TRUNC}[mode]
    if mode == "wb":
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        flags |= os.O_EXCL
    flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(0, "is not a regular file", str(path))
    return os.fdopen(descriptor, mode)


def read_file(path: Path) -> bytes:
    """Raises OSError, also for what is no regular file or too large."""
    with open_regular(path, "rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise OSError(0, "is too large", str(path))
    return data


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is none."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        value = json.loads(read_file(path))
        if isinstance(value, dict):
            return value
    return {}


def write_file(path: Path, data: bytes, keep: Path | None = None) -> None:
    """Replaces `path` by `data`; a crash leaves the old file or the new one whole. `keep` becomes the old one.

    Raises TrainingError where that fails, as on a full disk.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open_regular(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if keep is not None and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
        if hasattr(os, "O_DIRECTORY"):  # the renames themselves have to reach the disk, too
            folder = os.open(path.parent, os.O_DIRECTORY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except OSError as error:
        raise cannot_write(path, error) from error


def cannot_write(path: Path, error: OSError) -> TrainingError:
    return TrainingError(f"cannot write {path}: {error.strerror}; with more room, --resume {path.parent} loses nothing")


def encode(tree: dict[str, Any]) -> bytes:
    """torch.save's bytes and their SHA-256 behind them: torch.load ignores the tail, but not a flipped bit's effect."""
    buffer = io.BytesIO()
    torch.save(tree, buffer)
    data = buffer.getvalue()
    return data + MAGIC + hashlib.sha256(data).digest()


def decode(data: bytes) -> dict[str, Any]:
    """Raises ValueError, saying why, for bytes that are not an intact checkpoint. Executes nothing.

    The digest tells that a file is intact, not who made it: a stranger's must cost no more memory than it has bytes.
    """
    body, tail = data[: -len(MAGIC) - 32], data[-len(MAGIC) - 32 :]
    if not tail.startswith(MAGIC):
        raise ValueError("is not a ppo_vec checkpoint, or is cut off")
    if hashlib.sha256(body).digest() != tail[len(MAGIC) :]:
        raise ValueError("is damaged: its digest does not match")
    try:
        with zipfile.ZipFile(io.BytesIO(body)) as archive:
            if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
                raise ValueError("compressed")
        with warnings.catch_warnings():  # torch's about strange pickles
            warnings.simplefilter("ignore")
            tree = torch.load(io.BytesIO(body), map_location="cpu", weights_only=True)
        check_dense(tree)
    except Exception as error:  # whatever a crafted file makes the restricted unpickler raise
        raise ValueError("cannot be read as plain tensors") from error
    if not isinstance(tree, dict) or tree.get("format") not in ("ppo_vec 1", FORMAT):
        raise ValueError(f"is not of the format {FORMAT!r}")
    return tree


def check_dense(tree: Any) -> None:
    """Raises ValueError for a tensor of more elements than its memory holds, as one of stride 0."""
    if isinstance(tree, Tensor):
        if tree.layout != torch.strided or not tree.is_contiguous() or tree.is_quantized:
            raise ValueError("not a dense tensor")
    elif isinstance(tree, (dict, list, tuple)):
        for value in tree.values() if isinstance(tree, dict) else tree:
            check_dense(value)


def run_path(where: str, runs_dir: str) -> Path:
    """A run folder or a file in it; "latest" is the run whose checkpoint is the newest. Raises UserError."""
    if where != "latest":
        return Path(where)
    checkpoints = list(Path(runs_dir).glob("*/checkpoint.pt"))
    if not checkpoints:
        raise UserError(f"there is no run in {runs_dir}")
    return max(checkpoints, key=lambda path: path.stat().st_mtime).parent


def read_checkpoint(where: str | Path, policy: bool = False) -> tuple[Path, dict[str, Any]]:
    """The newest intact checkpoint of a run folder, or of a file and its predecessor; with `policy`, best.pt first.

    Returns the file used and its content. Raises UserError if there is none.
    """
    path = Path(where)
    if os.path.isdir(path):  # Path.is_dir raises for a name that is too long
        names = ["best.pt"] * policy + ["checkpoint.pt", "checkpoint.previous.pt"]
        paths = [path / name for name in names]
    else:
        paths = [path, path.with_name("checkpoint.previous.pt")] if path.name == "checkpoint.pt" else [path]
    complaints = []
    for path in paths:
        try:
            tree = decode(read_file(path))
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            complaints.append(f"{path} {error.strerror if isinstance(error, OSError) else error}")
            continue
        for complaint in complaints:
            warn(f"{complaint}; using {path.name}")
        return path, tree
    raise UserError("; ".join(complaints) or f"there is no checkpoint at {where}")


def saved_args(tree: dict[str, Any]) -> Options:
    """The arguments in a checkpoint. Raises UserError for ones that are not ours."""
    try:
        saved = {k: tuple(v) if isinstance(v, list) else v for k, v in tree["args"].items()}
        if gone := saved.keys() - {f.name for f in dataclasses.fields(Options)}:
            raise ValueError(f"--{min(gone).replace('_', '-')} is no flag of this version")
        args = Options(**saved)
        for f in dataclasses.fields(Options):
            value, plain = getattr(args, f.name), type(getattr(Options(), f.name))
            if plain is type(None):  # optional: int, float or str by the annotation
                plain = type(None) if value is None else {"int": int, "float": float, "str": str}[f.type.split()[0]]
            if type(value) is not plain and not (plain is float and type(value) is int):
                raise TypeError(f"{f.name} is a {type(value).__name__}")
            if isinstance(value, tuple) and not all(type(size) is int for size in value):
                raise TypeError(f"{f.name} is {value}")
    except Exception as error:
        raise UserError(f"the checkpoint's arguments do not fit this version: {one_line(error)}") from error
    args = dataclasses.replace(args, resume=None, evaluate=None, **{name: getattr(Options, name) for name in TYPED})
    validate(args)
    return args


def load_policy(where: str | Path) -> Policy:
    """A run folder (its best policy) or a checkpoint -> a function from raw observations to deterministic actions.

    (obs_dim,) -> (action_dim,), or (n, obs_dim) -> (n, action_dim), float32, ready for env.step().
    Raises UserError if there is no intact checkpoint.
    """
    return policy_of(read_checkpoint(where, policy=True)[1])


def policy_of(tree: dict[str, Any]) -> Policy:
    """The policy in a checkpoint, whatever version of ppo_vec has written it. Raises UserError."""
    try:
        arrays = policy_arrays(tree["agent"])
        if not all(np.isfinite(array).all() for array in arrays):
            raise ValueError("its weights are not finite")
        activation = tree["args"]["activation"]
        policy = Policy(arrays, activation, tree["low"].float().numpy(), tree["high"].float().numpy())
        if policy(np.zeros((1, len(policy.mean)), np.float32)).shape != (1, len(policy.low)):
            raise ValueError("its shapes do not fit")
        return policy
    except Exception as error:
        raise UserError(f"the checkpoint holds no policy of ours: {one_line(error)}") from error


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation
# ----------------------------------------------------------------------------------------------------------------------

EVALUATIONS = 20  # periodic evaluations a run, at most
EVALUATION_SHARE = 0.16  # their steps, as a share of those trained; without an update a step costs a third
PERIODIC_ROUNDS = (10, 20, 100)  # episodes; the second and third only to see whether the task is solved
KEPT, FINALISTS = (
    8,
    3,
)  # candidates of the final choice; those of them that play its last round, beside the last weights
HEAT_EPISODES = 40  # its first round, which chooses the finalists


def summarize(episodes: Sequence[tuple[float, int, bool]], goal: float | None) -> dict[str, Any]:
    returns = np.array([ret for ret, *_ in episodes])
    solved = float((returns >= goal).mean()) if goal is not None else None
    return {
        "episodes": len(returns), "mean": float(returns.mean()), "std": float(returns.std()),
        "min": float(returns.min()), "frac_solved": solved,
    }  # fmt: skip


def describe(result: dict[str, Any]) -> str:
    solved = "" if result["frac_solved"] is None else f", {result['frac_solved']:.0%} solved"
    numbers = f"{result['mean']:.1f} +- {result['std']:.1f} (min {result['min']:.1f}"
    return f"{numbers}{solved}, {result['episodes']} episodes)"


def should_evaluate(state: State, args: Options) -> bool:
    """At most EVALUATIONS a run, and no more than their share. Counted in steps: the same in every run of a seed."""
    last = state.evaluations[-1]["global_step"] if state.evaluations else 0
    if state.global_step >= args.total_timesteps:  # choose_and_test evaluates the last weights
        return False
    spaced = state.global_step - last >= args.total_timesteps / EVALUATIONS
    return spaced and state.selection_steps <= EVALUATION_SHARE * state.global_step


def play(envs: VecEnv, state: State, weights: dict[str, Tensor], first: int, count: int, **how: Any) -> list[tuple]:
    """Episodes of the deterministic policy with these weights on `count` seeds from `first` on."""
    episodes = envs.evaluate(policy_arrays(weights), list(range(first, first + count)), **how)
    state.evaluation_steps += sum(length for _, length, _ in episodes)
    return episodes


def mean_return(episodes: Sequence[tuple[float, int, bool]]) -> float:
    return sum(ret for ret, *_ in episodes) / len(episodes)


def evaluate(envs: VecEnv, state: State, folder: Path, log: Log) -> None:
    """A periodic evaluation, on fresh selection seeds: keeps the best policies, notes when the task is solved."""
    goal, weights, episodes = state.task.goal, copy.deepcopy(state.agent.state_dict()), []
    for count in PERIODIC_ROUNDS:
        part = play(envs, state, weights, SELECTION_SEEDS + state.selection_episodes, count)
        state.selection_episodes += count
        state.selection_steps += sum(length for _, length, _ in part) if count < PERIODIC_ROUNDS[-1] else 0
        episodes += part
        if goal is None or state.solved_at_step is not None or mean_return(episodes) < goal:
            break
    else:
        if mean_return(part) >= goal:  # confirmed by episodes that did not decide whether it is looked for
            state.solved_at_step, state.solved_at_s = state.global_step, state.wall_time()
    row = {"global_step": state.global_step, "time_s": state.wall_time(), **summarize(episodes, goal)}
    state.evaluations.append(row)
    state.candidates.append({"agent": weights, "evaluation": row})
    keep_best(state, folder)
    log.evaluation(state, row)
    write_summary(envs, state, folder, state.candidates[0]["evaluation"], row)


def rank(candidate: dict[str, Any]) -> float:
    """Its mean return less one standard error: between two equal means, the one without a fall was no luck."""
    evaluation = candidate["evaluation"]
    return evaluation["mean"] - evaluation["std"] / math.sqrt(evaluation["episodes"])


def keep_best(state: State, folder: Path) -> None:
    """Keeps the few best candidates; best.pt is the first of them."""
    state.candidates.sort(key=rank, reverse=True)
    del state.candidates[KEPT:]
    write_file(folder / "best.pt", encode({**policy_dict(state.agent, state.args, state.task), **state.candidates[0]}))


def choose_and_test(
    envs: VecEnv, state: State, folder: Path, log: Log, stopped: Callable[[], int | None]
) -> None:  # fmt: skip
    """The end of a run: the choice of what it delivers, and the test of that and of the last weights.

    A few periodic episodes cannot tell a policy that falls once in fifty from one that falls once in ten. So the
    candidates meet on fresh selection seeds, and the best of them, the last policy and, with --swa-share, the mean of
    the last weights on more; the winner is best.pt. The test, on other seeds and the stock environment, chooses
    nothing. A run that is stopped meanwhile begins all of this again on --resume.
    """
    args, goal = state.args, state.task.goal
    last, average = (
        {"agent": copy.deepcopy(net.state_dict()), "evaluation": {"global_step": state.global_step}, "name": name}
        for net, name in ((state.agent, "weights of"), (state.average.module, "mean weights up to"))
    )
    others = [
        dict(c, name="weights of") for c in state.candidates if c["evaluation"]["global_step"] != state.global_step
    ]
    first = SELECTION_SEEDS + state.selection_episodes

    def compete(candidates: list[dict[str, Any]], first: int, count: int) -> None:
        for candidate in candidates:
            if stopped():
                return
            step = candidate["evaluation"]["global_step"]
            result = summarize(play(envs, state, candidate["agent"], first, count), goal)
            candidate["evaluation"] = {"global_step": step, "time_s": state.wall_time(), **result}
            say(f"choosing: {candidate['name']} step {step}: {describe(result)}")

    if len(others) > FINALISTS:
        heat = min(HEAT_EPISODES, args.eval_episodes)
        compete(others, first, heat)
        first += heat
        others.sort(key=rank, reverse=True)
    finalists = [last, *[average] * bool(args.swa_share), *others[:FINALISTS]]
    compete(finalists, first, 2 * args.eval_episodes)
    if stopped():
        return
    best = max(finalists, key=rank)
    tests = {
        id(c): play(envs, state, c["agent"], TEST_SEEDS, args.eval_episodes, stock=True)
        for c in ((last,) if best is last else (last, best)) if not stopped()
    }  # fmt: skip
    video = None
    if args.capture_video and not stopped():
        policy = Policy(policy_arrays(best["agent"]), args.activation, state.task.low, state.task.high)
        video = record_video(state.task, policy, folder / "videos", TEST_SEEDS)
    if stopped():
        return
    row = last["evaluation"]
    if row["episodes"] >= PERIODIC_ROUNDS[-1] and goal is not None and row["mean"] >= goal and not state.solved_at_step:
        state.solved_at_step, state.solved_at_s = state.global_step, state.wall_time()
    state.evaluations.append(row)
    log.evaluation(state, row)
    state.candidates = [{k: c[k] for k in ("agent", "evaluation")} for c in finalists]
    keep_best(state, folder)
    write_episodes(folder / "evaluation.csv", tests[id(best)])
    last_test, best_test = (summarize(tests[id(c)], goal) for c in (last, best))
    say(f"test on unseen episodes of the stock environment: last weights {describe(last_test)}")
    say(f"delivered policy, {best['name']} step {best['evaluation']['global_step']}: {describe(best_test)}")
    if video:
        say(f"video: {video}")
    state.finished = True
    write_summary(envs, state, folder, best_test, last_test)


def write_episodes(path: Path, episodes: Sequence[tuple[float, int, bool]]) -> None:
    """evaluation.csv: a row for each test episode."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(
        [("seed", "return", "length", "fell"), *((TEST_SEEDS + i, *row) for i, row in enumerate(episodes))]
    )
    write_file(path, text.getvalue().encode())


def record_video(task: Task, policy: Policy, folder: Path, seed: int) -> Path:
    """Writes a whole episode of the deterministic policy as an mp4, frame by frame (RecordVideo would keep all).

    Raises TrainingError where that fails.
    """
    import imageio_ffmpeg

    path = folder / f"{file_name(task.env_id)}-seed{seed}.mp4"
    temporary = path.with_name(f"{path.stem}.tmp.mp4")  # a link of that name is replaced, not followed
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)
        with contextlib.closing(task.make_env(stock=True, render_mode="rgb_array")) as env:
            obs, done = reset_env(env, seed), False
            frame = env.render()
            # Two encoder threads; macro_block_size 2: players want even sizes, not the multiples of 16 of the default.
            writer = imageio_ffmpeg.write_frames(
                str(temporary), (frame.shape[1], frame.shape[0]), fps=env.metadata.get("render_fps", 30),
                macro_block_size=2, output_params=["-threads", "2"],
            )  # fmt: skip
            with contextlib.closing(writer):
                writer.send(None)
                for _ in range(task.max_episode_steps or ENDLESS):
                    writer.send(np.ascontiguousarray(frame))
                    if done:
                        break
                    (obs,), _, terminated, truncated = step_envs([env], policy(obs)[None], lambda: None)
                    done = bool(terminated[0] or truncated[0])
                    frame = env.render()
        os.replace(temporary, path)
    except Exception as error:  # a full disk, a renderer that has lost its display, ...
        raise TrainingError(f"cannot write {path}: {one_line(error)}") from error
    return path


# ----------------------------------------------------------------------------------------------------------------------
# The run folder: checkpoints, summary, logs, picture
# ----------------------------------------------------------------------------------------------------------------------


def file_name(env_id: str) -> str:
    """The id as a part of a file's name; Weights and Biases and Windows refuse the colon of "module:Env-v0"."""
    return env_id.replace("/", "_").replace(":", "_")


def warn(message: str) -> None:
    say(f"ppo_vec.py: warning: {message}")


def say(message: str) -> None:
    """One line on stderr, above a progress bar if there is one."""
    with contextlib.suppress(OSError):  # a log file on a full disk, a terminal that has gone
        try:
            from tqdm import tqdm

            tqdm.write(message, file=sys.stderr)
        except ImportError:
            print(message, file=sys.stderr, flush=True)


def should_save(state: State) -> bool:
    """A wall-clock cadence that costs at most a hundredth of the time, whatever the disk."""
    return time.perf_counter() - state.saved_at > max(2.0, 100 * state.save_cost)


def save(folder: Path, state: State, log: Log) -> None:
    """Writes checkpoint.pt, keeping the one before. Raises TrainingError where the disk is full."""
    began = time.perf_counter()
    state.log_sizes = log.flush(sync=True)
    # The first one takes the place of what may be damaged, and what the run was resumed from is kept.
    keep = folder / "checkpoint.previous.pt" if state.saved_at > -math.inf else None
    write_file(folder / "checkpoint.pt", encode(state.state_dict()), keep=keep)
    state.saved_at = time.perf_counter()
    state.save_cost = state.saved_at - began


def write_summary(envs: VecEnv, state: State, folder: Path, best: dict[str, Any], last: dict[str, Any]) -> None:
    """`best`: the evaluation of best.pt, `last`: of the last weights."""
    summary = {
        "env_id": state.args.env_id,
        "seed": state.args.seed,
        "global_step": state.global_step,
        "evaluation_steps": state.evaluation_steps,
        "wall_time_s": round(state.wall_time(), 3),
        "train_time_s": round(state.train_time_s, 3),
        "sps": round(state.global_step / max(state.train_time_s, 1e-9), 1),
        **{f"eval_{k}": best[k] for k in ("episodes", "mean", "std", "min", "frac_solved")},
        **{f"last_eval_{k}": last[k] for k in ("mean", "std", "min")},
        "solved_at_step": state.solved_at_step,
        "solved_at_s": state.solved_at_s,
        "worker_restarts": envs.restarts,
        "finished": state.finished,
    }
    write_file(folder / "summary.json", json.dumps(summary, indent=2).encode())


class Log:
    """TensorBoard's event file, episodes.csv, the progress bar, Weights and Biases; the picture at the end.

    Both files only grow. A resumed run cuts off what was written after its checkpoint, so that there is one event file
    and one axis, and no step comes twice (SB3 #433, #975). Raises TrainingError where the disk is full.
    """

    def __init__(self, folder: Path, args: Options, state: State) -> None:
        self.folder, self.args, self.goal, self.steps_before = folder, args, state.task.goal, state.global_step
        self.started = self.clock = time.perf_counter()
        self.seconds: dict[str, float] = {}
        self.recent: deque[tuple[float, int]] = deque(maxlen=100)  # (return, length) of the last episodes, for the bar
        events = sorted(folder.glob("events.out.tfevents.*"))
        name = events[0].name if events else f"events.out.tfevents.{int(time.time())}.{platform.node()}"
        self.files, self.wandb = {}, None
        header = b"global_step,time_s,return,length,env\n"
        for key, path, first in (("events", folder / name, None), ("episodes", folder / "episodes.csv", header)):
            try:
                file = self.files[key] = open_regular(path, "r+b")
                file.truncate(min(state.log_sizes.get(key, 0), os.fstat(file.fileno()).st_size))
                file.seek(0, os.SEEK_END)
                if file.tell() == 0:  # new, or lost
                    file.write(first or self.record(file_version="brain.Event:2"))
            except OSError as error:
                raise cannot_write(path, error) from error
        if args.track:
            self.wandb = start_wandb(args)

    def __enter__(self) -> Log:
        earlier = []
        if before := read_json(self.folder / "args.json"):
            earlier = [*(before.pop("earlier", None) or []), before]
        info = {**describe_run(self.args), "earlier": earlier}
        write_file(self.folder / "args.json", json.dumps(info, indent=2).encode())
        summary = read_json(self.folder / "summary.json")
        if summary.get("finished"):  # a finished run that goes on
            write_file(self.folder / "summary.json", json.dumps({**summary, "finished": False}, indent=2).encode())
        args = self.args
        say(f"{args.env_id}, seed {args.seed}, in {self.folder}; tuned values: {tuned_flags(args) or 'none'}")
        self.bar = progress_bar(args.total_timesteps, self.steps_before, "step")
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        with contextlib.suppress(OSError, TrainingError):
            if self.bar is not None:
                self.bar.close()
            if kind is None:
                self.draw()
        for file in self.files.values():
            with contextlib.suppress(OSError):
                file.close()
        if self.wandb is not None:
            self.wandb.finish()

    def lap(self, name: str) -> None:
        """The time since the last lap, or since the last log, was spent on `name`."""
        now = time.perf_counter()
        self.seconds[name], self.clock = now - self.clock, now

    def record(self, **fields: Any) -> bytes:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        buffer = io.BytesIO()
        RecordWriter(buffer).write(Event(wall_time=time.time(), **fields).SerializeToString())
        return buffer.getvalue()

    def scalars(self, step: int, values: dict[str, float]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])
        self.files["events"].write(self.record(step=step, summary=summary))
        if self.wandb is not None:
            self.wandb.log(values, step=step)

    def flush(self, sync: bool = False) -> dict[str, int]:
        """Writes everything, to the disk itself with `sync`. Returns the files' sizes."""
        for file in self.files.values():
            try:
                file.flush()
                if sync:
                    os.fsync(file.fileno())
            except OSError as error:
                raise cannot_write(Path(self.folder / str(file.name)), error) from error
        return {name: file.tell() for name, file in self.files.items()}

    def iteration(self, state: State, rollout: Rollout, metrics: dict[str, float], now: Options) -> None:
        """One iteration: TensorBoard, episodes.csv, progress bar. Every tag is explained in the README."""
        rollout_s, update_s = self.seconds["rollout"], self.seconds["update"]
        state.train_time_s += rollout_s + update_s
        steps = int(rollout.valid.sum())
        whole = [e for e in rollout.episodes if not e["practice"]]
        for e in whole:
            tags = {"charts/episodic_return": e["return"], "charts/episodic_length": float(e["length"])}
            self.scalars(e["global_step"], tags)
            line = f"{e['global_step']},{state.wall_time():.3f},{e['return']!r},{e['length']},{e['env']}\n"
            self.files["episodes"].write(line.encode())
            self.recent.append((e["return"], e["length"]))
        values = {
            "time/SPS": steps / (rollout_s + update_s),
            "time/SPS_rollout": steps / rollout_s,
            "time/SPS_total": (state.global_step - self.steps_before) / (time.perf_counter() - self.started),
            "time/rollout_s": rollout_s,
            "time/update_s": update_s,
            "policy/learning_rate": now.learning_rate,
            "policy/action_std": float(agent_std(state.agent, rollout)),
            **{f"losses/{name}": value for name, value in metrics.items()},
        }
        for tag, some in (("fall_rate", whole), ("practice_fall_rate", [e for e in rollout.episodes if e["practice"]])):
            if some:
                values[f"charts/{tag}"] = sum(e["fell"] for e in some) / len(some)
        self.scalars(state.global_step, values)
        self.flush()
        if self.bar is not None:
            with contextlib.suppress(OSError):  # stderr may be a file on a full disk
                self.bar.update(min(state.global_step, self.args.total_timesteps) - self.bar.n)
                shown = {"SPS": f"{values['time/SPS']:.0f}"}
                if self.recent:
                    returns, lengths = zip(*self.recent)
                    shown = {"return": f"{np.mean(returns):.1f}", "length": f"{np.mean(lengths):.0f}", **shown}
                self.bar.set_postfix(shown)
        self.clock = time.perf_counter()

    def evaluation(self, state: State, row: dict[str, Any]) -> None:
        self.scalars(state.global_step, {"charts/eval_return": row["mean"]})
        say(f"step {state.global_step}: evaluation {describe(row)}")
        self.clock = time.perf_counter()

    def draw(self) -> None:
        try:
            self.flush()
            plot_learning_curve(self.folder, self.goal)
        except ImportError:
            warn("no learning_curve.png without matplotlib")
        except ValueError as error:  # episodes.csv has been changed by hand
            warn(f"no learning_curve.png: {one_line(error)}")


@torch.no_grad()
def agent_std(agent: Agent, rollout: Rollout) -> Tensor:
    """The mean standard deviation of the actions, in units of the bounds."""
    return agent.policy(agent.normalizer(rollout.obs[:-1]))[1].exp().mean()


def start_wandb(args: Options) -> Any:
    import wandb

    try:
        name = args.run_name
        return wandb.init(project="ppo_vec", name=name, id=name, resume="allow", config=vars(args))
    except Exception as error:  # not logged in, no network, an id that it refuses
        raise UserError(f"--track: {one_line(error)}") from error


def progress_bar(total: int, initial: int, unit: str) -> Any:
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    interval = 0.5 if sys.stderr.isatty() else 30.0  # a log file needs no redrawing
    return tqdm(total=total, initial=initial, unit=unit, mininterval=interval, dynamic_ncols=True)


def describe_run(args: Options) -> dict[str, Any]:
    """Every argument and everything else that a result depends on."""

    def commit() -> str | None:
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
            return subprocess.run(git, capture_output=True, text=True, timeout=5, check=True).stdout.strip()

    def processor() -> str:
        with contextlib.suppress(OSError):
            for line in Path("/proc/cpuinfo").read_text().splitlines():
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
        return platform.processor() or platform.machine()

    return {
        "args": dataclasses.asdict(args),
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "gymnasium": gym.__version__,
            "box2d": Box2D.__version__,
        },
        "git_commit": commit(),
        "cpu": processor(),
        "cores": usable_cores(),
        "gpu": torch.cuda.get_device_name() if args.cuda and torch.cuda.is_available() else None,
    }


def plot_learning_curve(folder: Path, goal: float | None) -> None:
    """learning_curve.png: the mean return of a window of episodes with its deviation, against steps; evaluations."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about a run without a finished episode
        rows = np.loadtxt(io.BytesIO(read_file(folder / "episodes.csv")), delimiter=",", skiprows=1, ndmin=2)
    if not len(rows):
        return
    from matplotlib.figure import Figure  # no pyplot: no display needed, no global state

    steps, returns = rows[:, 0], rows[:, 2]
    window = max(1, min(100, len(rows) // 10))
    sums = np.cumsum(np.insert(np.stack((returns, returns**2)), 0, 0, axis=1), axis=1)
    mean, square = (sums[:, window:] - sums[:, :-window]) / window
    std = np.sqrt(np.maximum(square - mean**2, 0))
    x = steps[window - 1 :]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.fill_between(x, mean - std, mean + std, alpha=0.25, lw=0, label="±1 standard deviation")
    axes.plot(x, mean, lw=1.5, label=f"training return, mean of {window} episodes")
    tree = read_checkpoint(folder)[1]
    if points := [(e["global_step"], e["mean"]) for e in tree["evaluations"]]:
        axes.plot(*zip(*points), "o", ms=5, color="C1", label="evaluation, deterministic")
    if tree["solved_at_step"] is not None:
        axes.axvline(tree["solved_at_step"], color="C2", lw=1, ls=":", label="solved")
    if goal is not None:
        axes.axhline(goal, color="0.4", lw=1, ls="--", label=f"goal {goal:g}")
    axes.set(xlabel="environment steps", ylabel="return", title=folder.name)
    axes.legend(loc="lower right", fontsize="small")
    axes.grid(alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=120)
    write_file(folder / "learning_curve.png", buffer.getvalue())


# ----------------------------------------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------------------------------------

CHANGEABLE = {  # on --resume; whatever else changed would make it another run
    "total_timesteps", "num_workers", "worker_timeout", "track", "capture_video", "eval_episodes", "cuda", "resume",
    "runs_dir",
}  # fmt: skip
CHOSEN = {"evaluate", "eval_episodes", "stochastic", "capture_video", "num_workers", "worker_timeout", "runs_dir"}
TYPED = {"track", "num_workers", "capture_video"}  # never from a checkpoint, which may be a stranger's
GRACE = 5.0  # seconds that an iteration has to finish after a signal


def validate(args: Options) -> None:
    """Raises UserError, naming the flag, where a value or a combination cannot work."""

    def check(ok: bool, message: str) -> None:
        if not ok:
            raise UserError(message)

    positive = "learning_rate", "critic_learning_rate", "clip_coef", "max_grad_norm", "target_kl", "worker_timeout", \
        "initial_std"  # fmt: skip
    for f in dataclasses.fields(args):
        value, flag = getattr(args, f.name), "--" + f.name.replace("_", "-")
        if isinstance(value, float):
            check(math.isfinite(value), f"{flag} must be a finite number, not {value}")
        if f.name.startswith("num_") or f.name in ("total_timesteps", "update_epochs", "eval_episodes"):
            check(value is None or value >= 1, f"{flag} must be at least 1, not {value}")
        if f.name in positive:
            check(value is None or value > 0, f"{flag} must be greater than 0, not {value}")
        if f.name in ("gamma", "final_gamma", "gae_lambda", "value_lambda"):
            check(value is None or 0 <= value <= 1, f"{flag} must lie in [0, 1], not {value}")
        if f.name in ("ent_coef", "bounds_loss_coef", "action_cost", "min_std", "seed"):
            check(value >= 0, f"{flag} must not be negative, not {value}")
        if f.name in ("practice", "swa_share"):
            check(0 <= value < 1, f"{flag} must lie in [0, 1), not {value}")
        if f.name.endswith("hidden_sizes"):
            check(all(size >= 1 for size in value), f"{flag} must all be at least 1, not {value}")
        if f.name.endswith("fall_reward"):
            check(value is None or value < 0, f"{flag} must be less than 0, not {value}")
    check(
        args.final_gamma is None or max(args.gamma, args.final_gamma) < 1,
        "--final-gamma needs --gamma and itself below 1: what changes in equal ratios is what they lack to it",
    )
    check(args.worker_timeout <= threading.TIMEOUT_MAX, "--worker-timeout is too long")
    check(args.final_fall_reward is None or args.fall_reward is not None, "--final-fall-reward needs --fall-reward")
    check(not (args.min_std and args.state_dependent_std), "--min-std and --state-dependent-std exclude each other")
    check(args.min_std <= args.initial_std, "--min-std must not be more than --initial-std")
    check(args.activation in ACTIVATIONS, f"--activation must be one of {', '.join(ACTIVATIONS)}")
    check(
        args.num_workers is None or args.num_workers <= args.num_envs,
        f"--num-workers {args.num_workers} is more than --num-envs {args.num_envs}",
    )
    check(
        args.batch_size % args.num_minibatches == 0,
        f"--num-minibatches {args.num_minibatches} does not divide the rollout of {args.batch_size} = "
        f"--num-envs {args.num_envs} x --num-steps {args.num_steps}",
    )
    check(
        args.minibatch_size > 1,
        f"--num-minibatches {args.num_minibatches} leaves one sample a minibatch: no advantage to normalise",
    )
    check(not (args.resume is not None and args.evaluate is not None), "--resume and --evaluate exclude each other")
    check(not args.stochastic or bool(args.evaluate), "--stochastic belongs to --evaluate")
    name = args.run_name
    plain_name = name is None or (Path(name).name == name and name != "..")
    check(plain_name, f"--run-name {name!r} must be a plain folder name")


def tuned_values(env_id: str) -> dict[str, Any]:
    return TUNED.get(env_id) or TUNED.get(f"{env_id}-v3", {})  # Gymnasium takes an id without a version, too


def tuned_flags(args: Options) -> str:
    """Those of its environment's tuned values that apply, as they would be typed."""
    flags = []
    for name, value in tuned_values(args.env_id).items():
        if getattr(args, name) == value:
            words = () if value is True else value if isinstance(value, tuple) else (value,)
            flags.append(" ".join(("--" + name.replace("_", "-"), *map(str, words))))
    return " ".join(flags)


def parse_args(argv: Sequence[str]) -> tuple[Options, dict[str, Any] | None]:
    """tyro twice: for the env id or the run; then with that environment's or that run's values as defaults.

    Returns the arguments and, for --resume and --evaluate, the checkpoint. Raises UserError.
    """
    argv = [re.sub(r"(?<![^=])\d+(\.\d+)?[eE]\+?\d+$", lambda m: f"{float(m[0]):.0f}", word) for word in argv]  # 1e6
    first = tyro.cli(Options, args=[word for word in argv if word not in ("-h", "--help")])
    if first.resume is None and first.evaluate is None:
        args = tyro.cli(Options, args=argv, default=Options(**{"env_id": first.env_id, **tuned_values(first.env_id)}))
        validate(args)
        return args, None
    validate(first)
    where = first.evaluate if first.resume is None else first.resume
    if not where:
        raise UserError("--resume and --evaluate need a run folder")
    path, tree = read_checkpoint(run_path(where, first.runs_dir), policy=first.resume is None)
    saved = saved_args(tree)
    typed_id = any(word.split("=")[0].replace("_", "-") == "--env-id" for word in argv)
    if typed_id and first.env_id != saved.env_id:
        raise UserError(f"{where} was trained on {saved.env_id}, not on {first.env_id}")
    if ":" in saved.env_id and not typed_id:
        raise UserError(f"{where} would import code; if you trust it, add --env-id {saved.env_id!r}")
    args = tyro.cli(Options, args=argv, default=saved)
    validate(args)
    mode, changeable = ("resumed", CHANGEABLE) if args.resume is not None else ("evaluated", CHOSEN)
    for f in dataclasses.fields(Options):
        if f.name not in changeable and getattr(args, f.name) != getattr(saved, f.name):
            raise UserError(f"--{f.name.replace('_', '-')} cannot change when a run is {mode}")
    if args.resume is not None:
        if path.name not in ("checkpoint.pt", "checkpoint.previous.pt"):
            raise UserError(f"--resume takes a run folder, and continues its checkpoint.pt; {path} is another file")
        folder = path.resolve().parent  # wherever the run folder is now
        args = dataclasses.replace(args, runs_dir=str(folder.parent), run_name=folder.name, resume=None)
    return args, tree


def choose_device(args: Args) -> torch.device:
    usable = torch.cuda.is_available() if args.cuda else False
    if usable:
        try:
            torch.ones(2, 2, device="cuda") @ torch.ones(2, 2, device="cuda")
        except RuntimeError as error:  # a device that this torch has no kernels for, or that is taken
            warn(f"--cuda: {one_line(error)}")
            usable = False
    if args.cuda and not usable:
        warn("--cuda: torch finds no CUDA device that it can use; training on the CPU")
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # these matrices are too small to share; more threads only wait for each other
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # costs time, and nothing here reads such memory
    return torch.device("cuda" if usable else "cpu")


def evaluate_run(args: Options, task: Task, policy: Policy, path: Path) -> None:
    """--evaluate: test episodes of a saved policy on the stock environment, on all cores; prints the result."""
    episodes: list[tuple[float, int, bool]] = []
    seeds = list(range(TEST_SEEDS, TEST_SEEDS + args.eval_episodes))
    workers = args.num_workers or usable_cores()
    args = dataclasses.replace(args, num_envs=5 * TILE * workers, num_workers=workers, num_steps=1, practice=0.0)
    bar = progress_bar(len(seeds), 0, "episode")
    arrays = [policy.mean, policy.scale, policy.std, *itertools.chain.from_iterable(policy.layers)]
    with VecEnv(args, task, new_snapshot(args.num_envs, task.obs_dim, 0), arrays) as envs:
        for start in range(0, len(seeds), args.num_envs):
            part = envs.evaluate(arrays, seeds[start : start + args.num_envs], stock=True, stochastic=args.stochastic)
            episodes += part
            if bar is not None:
                bar.update(len(part))
    if bar is not None:
        bar.close()
    how = "stochastic" if args.stochastic else "deterministic"
    lengths = np.mean([length for _, length, _ in episodes])
    print(f"{args.env_id}, {how}: {describe(summarize(episodes, task.goal))}, mean length {lengths:.0f}")
    if args.capture_video:
        print(f"video: {record_video(task, policy, path.parent / 'videos', TEST_SEEDS)}")


def check_extras(args: Options) -> None:
    """Raises UserError for a flag that cannot work on this machine: hours later would be a bad time to find out."""
    for flag, wanted, module in (
        ("--track", args.track, "wandb"),
        ("--capture-video", args.capture_video, "imageio_ffmpeg"),
    ):
        try:
            if wanted:
                importlib.import_module(module)
        except ImportError as error:
            raise UserError(f"{flag} needs a package: pip install {module.replace('_', '-')}") from error


def check_memory(args: Options, task: Task) -> None:
    """Raises UserError for a rollout that this machine cannot hold."""
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", ()):
        # float32 observations, actions and noise, once shared with the workers and once torch's.
        size = 8 * args.batch_size * (task.obs_dim + 2 * task.action_dim)
        if size > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
            raise UserError(
                f"--num-envs {args.num_envs} x --num-steps {args.num_steps} is a rollout of {size / 2**30:.0f} GiB, "
                "more than this machine's memory"
            )


def check_shapes(args: Options, task: Task, tree: dict[str, Any]) -> None:
    """Raises UserError for a checkpoint of other networks, before they cost any memory."""
    try:
        with torch.device("meta"):
            own = task.agent(args).state_dict()
        same_shapes(tree["agent"], {k: v for k, v in own.items()}, "agent")
        if len(tree["envs"]["episode"]) != args.num_envs:
            raise ValueError("num_envs")
    except Exception as error:
        raise UserError(f"the checkpoint does not fit: {one_line(error)}") from error


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[], int | None]]:
    """Gives a function that tells the signal, SIGINT or SIGTERM, that asked the run to end, if one has come.

    The iteration has GRACE seconds to finish; then, or by a second signal, the process ends at once. What has happened
    since the last checkpoint is done again on --resume.
    """
    received: list[int] = []

    def end(number: int) -> None:
        kill_workers()
        os._exit(128 + number)

    def handle(number: int, _: Any) -> None:
        if received:
            end(number)
        received.append(number)
        timer.args = (number,)
        timer.start()

    timer = threading.Timer(GRACE, end)
    timer.daemon = True
    main_thread = threading.current_thread() is threading.main_thread()
    before = {n: signal.signal(n, handle) for n in (signal.SIGINT, signal.SIGTERM)} if main_thread else {}
    try:
        yield lambda: received[0] if received else None
    finally:
        timer.cancel()
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def run_folder(args: Options, new: bool) -> Iterator[tuple[Options, Path]]:
    """Names and makes the run folder, and keeps other processes out of it. Gives the arguments with its name.

    Raises UserError if it cannot be written, if another process trains in it, or if a `new` run finds files there.
    """
    from filelock import FileLock, Timeout  # torch depends on it

    name = args.run_name or f"{file_name(args.env_id)}__ppo_vec__{args.seed}__{int(time.time())}"
    folder = Path(args.runs_dir) / name
    lock = FileLock(folder / ".lock")

    def check_new() -> None:
        if new and any(file.name != ".lock" for file in folder.iterdir()):
            raise UserError(f"{folder} already holds a run; --resume {folder} continues it")

    try:
        folder.mkdir(parents=True, exist_ok=True)
        check_new()
        lock.acquire(timeout=5)  # a trainer that has just been stopped may still be ending
        check_new()  # another one may have come first
    except Timeout as error:
        raise UserError(f"another process is training in {folder}") from error
    except OSError as error:
        raise UserError(f"cannot write the run folder {folder}: {error.strerror}") from error
    try:
        yield dataclasses.replace(args, run_name=name), folder
    finally:
        lock.release()


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code: 0, 1 training failed, 2 bad input, 130 or 143 stopped by a signal."""
    try:
        args, saved = parse_args(sys.argv[1:] if argv is None else argv)
        check_extras(args)
        task = make_task(args)
        if saved is not None:
            policy = policy_of(saved)
            if (task.obs_dim, task.action_dim) != (len(policy.mean), len(policy.low)):
                raise UserError(f"the checkpoint does not fit {args.env_id}: other observations or actions")
            if args.evaluate is not None:
                signal.signal(signal.SIGINT, lambda *_: (kill_workers(), os._exit(130)))  # there is nothing to save
                evaluate_run(
                    args, task, policy, read_checkpoint(run_path(args.evaluate, args.runs_dir), policy=True)[0]
                )
                return 0
            check_shapes(args, task, saved)
            if saved.get("finished") is True and saved["global_step"] >= args.total_timesteps:
                say(f"{Path(args.runs_dir) / args.run_name} is finished; a longer --total-timesteps would extend it")
                return 0
        check_memory(args, task)
        with run_folder(args, new=saved is None) as (args, folder):
            number = train(args, task, folder, saved)
        if number is not None:
            say(f"stopped by {signal.Signals(number).name}; continue with: --resume {folder}")
            return 128 + number
        return 0
    except (UserError, TrainingError) as error:
        print(f"ppo_vec.py: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except KeyboardInterrupt:  # before the run has taken the signal over
        return 130


if __name__ == "__main__":
    # As a module: a spawned worker looks its classes up there, and would get copies of those in __main__.
    sys.exit(importlib.import_module(Path(__file__).stem).main())
