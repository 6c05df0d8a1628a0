"""PPO in one file: masters BipedalWalker on an ordinary machine in minutes.

    python ppo_vec.py --num-envs 16 --cuda             # train; warns once and uses the CPU without CUDA
    tensorboard --logdir runs                          # watch
    python ppo_vec.py --resume runs/NAME               # continue an interrupted run, to the bit
    python ppo_vec.py --evaluate runs/NAME             # 100 test episodes of the delivered policy

Using what a run delivers takes two lines:

    from ppo_vec import load_policy
    act = load_policy("runs/NAME"); action = act(obs)

The algorithm comes first: arguments, agent, GAE, update, rollout, and train, which puts them together. The engine room
follows: vector environment, fast walker, checkpoint, evaluation, files, command line.

PPO: Schulman et al. 2017, arXiv:1707.06347. GAE: Schulman et al. 2015, arXiv:1506.02438. Details of implementation:
Huang et al. 2022, "The 37 Implementation Details of PPO". Names follow CleanRL's ppo_continuous_action.py.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import ctypes
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
import shlex
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, Literal

# The policy's matrices are far too small to share among threads, and a number of threads that follows the machine
# would change the bits of a result. Must be set before NumPy is imported; what the user has set is respected.
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
    """Train, resume or evaluate a PPO agent. Tuned defaults depend on --env-id; what you type overrides them."""

    exp_name: str = "ppo_vec"
    """the name of this experiment"""
    env_id: str = "BipedalWalker-v3"
    """a Gymnasium environment with Box observations and bounded Box actions"""
    seed: int = 1
    """seed of everything random: environments, policy noise, shuffling and initialisation, without overlap"""
    cuda: bool = False
    """keep the network and the rollout tensors on the GPU (the environments always run on the CPU)"""
    torch_deterministic: bool = True
    """use only deterministic torch algorithms"""
    runs_dir: str = "runs"
    """the folder that holds the run folders"""
    run_name: str | None = None
    """the run folder's name; default {env_id}__{exp_name}__{seed}__{time}"""
    track: bool = False
    """also log to Weights and Biases (pip install wandb)"""

    num_envs: int = 16
    """the number of environments stepped in parallel"""
    num_workers: int | None = None
    """processes that share the environments; default one per CPU core this process may use. Changes no result"""
    worker_timeout: float = 60.0
    """seconds without a step after which a worker counts as hung, and all of them are replaced"""
    fast_walker: bool = True
    """step the two BipedalWalkers with less Python, the same to the bit (checked against the stock one at start)"""
    practice: float = 0.0
    """the share of a walker's training steps that goes back to places shortly before its falls"""

    total_timesteps: int = 1_000_000
    """environment steps to train for; training ends with the first rollout that reaches it"""
    num_steps: int = 256
    """steps each environment takes per rollout"""
    learning_rate: float = 5e-4
    """the learning rate of the optimizer (with --critic-learning-rate: of the actor)"""
    critic_learning_rate: float | None = None
    """the critic's own learning rate; default --learning-rate"""
    anneal_lr: bool = True
    """let the learning rates and --ent-coef fall linearly to zero over --total-timesteps"""
    gamma: float = 0.99
    """the discount factor"""
    final_gamma: float | None = None
    """let 1 - gamma change in equal ratios to this by the end of training; default: constant"""
    gae_lambda: float = 0.95
    """the lambda of generalized advantage estimation"""
    value_lambda: float | None = None
    """the lambda of the value target; default --gae-lambda; 1 regresses on Monte Carlo returns within the rollout"""
    num_minibatches: int = 8
    """minibatches per epoch"""
    update_epochs: int = 10
    """epochs over each rollout"""
    norm_adv: bool = True
    """normalise the advantages of each minibatch"""
    clip_coef: float = 0.2
    """the clip range of the probability ratio"""
    clip_vloss: bool = False
    """also clip the change of the value, by --clip-coef"""
    ent_coef: float = 0.0
    """the weight of the entropy bonus"""
    bounds_loss_coef: float = 0.0
    """the weight of the penalty on means beyond the action bounds, where the gradient of the reward ends (rl_games)"""
    vf_coef: float = 0.5
    """the weight of the value loss; the critic is a network of its own, so this only moves where its clipping begins"""
    max_grad_norm: float = 0.5
    """the largest gradient norm, of actor and critic each"""
    swa_share: float = 0.0
    """the last share of training over which weights are averaged: their mean joins the choice of what is delivered"""
    target_kl: float | None = None
    """end the actor's update before the minibatch whose approximate KL divergence passes this"""
    fall_reward: float | None = None
    """the normalised reward of a fall (-100) at the start of training; default: what normalising makes of it"""
    final_fall_reward: float | None = None
    """let it change in equal ratios to this by the end of training; default: constant"""
    action_cost: float = 0.0
    """reward that training takes for each unit of |action|, beside the environment; rises from 0 over its first half"""
    compile: bool = False
    """torch.compile the loss (needs a C++ compiler; pays on long runs)"""

    initial_std: float = 1.0
    """the standard deviation of the first actions, in units of the action bounds"""
    min_std: float = 0.0
    """the deviation does not fall below this: what little noise does to an episode is hardly to be told from chance"""
    actor_hidden_sizes: tuple[int, ...] = (64, 64)
    """the widths of the actor's hidden layers"""
    critic_hidden_sizes: tuple[int, ...] = (64, 64)
    """the widths of the critic's hidden layers"""
    activation: Literal["tanh", "relu", "leaky_relu", "elu"] = "tanh"
    """the activation of the hidden layers"""
    critic_progress: bool = False
    """show the critic the running episode's length and return, too: the policy never sees them"""
    state_dependent_std: bool = False
    """let the actor's head give the log standard deviation too, clamped to [-20, 2]"""

    resume: str | None = None
    """continue this run (its folder or a checkpoint in it)"""
    evaluate: str | None = None
    """evaluate this run (its folder or a checkpoint) instead of training"""
    eval_episodes: int = 100
    """the number of test episodes, with --evaluate and at the end of training (there twice as many for the choice)"""
    stochastic: bool = False
    """with --evaluate: sample actions instead of taking the mean"""
    capture_video: bool = False
    """write an mp4 of a whole episode of the deterministic policy into the run's videos/"""

    @property
    def batch_size(self) -> int:
        return self.num_envs * self.num_steps

    @property
    def minibatch_size(self) -> int:
        return self.batch_size // self.num_minibatches

    def validate(self) -> None:
        """Raises UserError, naming the flag, where a value or a combination cannot work."""

        def check(ok: bool, message: str) -> None:
            if not ok:
                raise UserError(message)

        for f in dataclasses.fields(self):
            value, flag = getattr(self, f.name), "--" + f.name.replace("_", "-")
            if isinstance(value, float):
                check(math.isfinite(value), f"{flag} must be a finite number, not {value}")
            if f.name.startswith("num_") or f.name in ("total_timesteps", "update_epochs", "eval_episodes"):
                check(value is None or value >= 1, f"{flag} must be at least 1, not {value}")
            if f.name in POSITIVE:
                check(value is None or value > 0, f"{flag} must be greater than 0, not {value}")
            if f.name in ("gamma", "final_gamma", "gae_lambda", "value_lambda"):
                check(value is None or 0 <= value <= 1, f"{flag} must lie in [0, 1], not {value}")
            if f.name in ("ent_coef", "bounds_loss_coef", "vf_coef", "action_cost", "min_std", "seed"):
                check(value >= 0, f"{flag} must not be negative, not {value}")
            if f.name in ("practice", "swa_share"):
                check(0 <= value < 1, f"{flag} must lie in [0, 1), not {value}")
            if f.name.endswith("hidden_sizes"):
                check(all(size >= 1 for size in value), f"{flag} must all be at least 1, not {value}")
        check(
            self.final_gamma is None or max(self.gamma, self.final_gamma) < 1,
            "--final-gamma needs --gamma and itself below 1: what changes in equal ratios is what they lack to it",
        )
        check(self.worker_timeout <= threading.TIMEOUT_MAX, "--worker-timeout is too long")
        for flag, value in (("--fall-reward", self.fall_reward), ("--final-fall-reward", self.final_fall_reward)):
            check(value is None or value < 0, f"{flag} must be less than 0, not {value}")
        check(self.final_fall_reward is None or self.fall_reward is not None, "--final-fall-reward needs --fall-reward")
        check(not (self.min_std and self.state_dependent_std), "--min-std and --state-dependent-std exclude each other")
        check(self.min_std <= self.initial_std, "--min-std must not be more than --initial-std")
        check(self.activation in ACTIVATIONS, f"--activation must be one of {', '.join(ACTIVATIONS)}")
        check(
            self.num_workers is None or self.num_workers <= self.num_envs,
            f"--num-workers {self.num_workers} is more than --num-envs {self.num_envs}",
        )
        check(
            self.batch_size % self.num_minibatches == 0,
            f"--num-minibatches {self.num_minibatches} does not divide the rollout of {self.batch_size} = "
            f"--num-envs {self.num_envs} x --num-steps {self.num_steps}",
        )
        check(
            self.minibatch_size > 1 or not self.norm_adv,
            f"--num-minibatches {self.num_minibatches} leaves one sample a minibatch: no advantage to normalise",
        )
        check(not (self.resume and self.evaluate), "--resume and --evaluate exclude each other")
        check(not self.stochastic or bool(self.evaluate), "--stochastic belongs to --evaluate")
        for flag, name in (("--run-name", self.run_name), ("--exp-name", self.exp_name)):
            plain = name is None or (Path(name).name == name and name != "..")
            check(plain, f"{flag} {name!r} must be a plain folder name")


POSITIVE = (
    "learning_rate", "critic_learning_rate", "clip_coef", "max_grad_norm", "target_kl", "worker_timeout", "initial_std",
)  # fmt: skip

# What beats the defaults above, by environment. Found by experiment; benchmarks/results/ has the runs.
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


def tuned_values(env_id: str) -> dict[str, Any]:
    return TUNED.get(env_id) or TUNED.get(f"{env_id}-v3", {})  # Gymnasium takes an id without a version, too


def tuned_flags(args: Args) -> str:
    """Those of its environment's tuned values that apply, as they would be typed."""
    flags = []
    for name, value in tuned_values(args.env_id).items():
        if getattr(args, name) == value:
            words = () if value is True else value if isinstance(value, tuple) else (value,)
            flags.append(" ".join(("--" + name.replace("_", "-"), *map(str, words))))
    return " ".join(flags)


class UserError(Exception):
    """Bad input: one line on stderr and exit code 2."""


class TrainingError(Exception):
    """A run that cannot go on: a line on stderr (with a worker's traceback) and exit code 1; checkpoints are kept."""


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


ACTIVATIONS: dict[str, tuple[type[nn.Module], Callable[[np.ndarray], np.ndarray]]] = {
    "tanh": (Tanh, np.tanh),
    "relu": (nn.ReLU, lambda x: np.maximum(x, 0)),
    "leaky_relu": (nn.LeakyReLU, lambda x: np.maximum(x, np.float32(0.01) * x)),
    "elu": (nn.ELU, lambda x: np.where(x > 0, x, np.expm1(np.minimum(x, 0)))),
}
LOG_2PI = math.log(2 * math.pi)
LOGSTD_MIN, LOGSTD_MAX = -20.0, 2.0  # of a state-dependent deviation
OBS_CLIP = 10.0


class Normalizer(nn.Module):
    """Running mean and variance, as buffers of the agent: a checkpoint cannot lose them (CleanRL #425).

    An agent's are frozen through a rollout and its update; `update` merges the rollout's statistics once an iteration.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(size, dtype=torch.float64))
        self.register_buffer("var", torch.ones(size, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    def forward(self, obs: Tensor) -> Tensor:
        """(..., size) raw -> (..., size) float32 of about zero mean and unit variance, clipped to +-10."""
        mean, scale = self.mean_and_scale()
        return ((obs - mean) * scale).clamp(-OBS_CLIP, OBS_CLIP)

    def mean_and_scale(self) -> tuple[Tensor, Tensor]:
        return self.mean.float(), (self.var + 1e-8).rsqrt().float()

    def update(self, obs: Tensor, valid: Tensor) -> None:
        """Merges the rows of `obs` (n, size) where `valid` (n,) is true (Chan et al. 1979)."""
        rows = obs[valid].double()
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


class Agent(nn.Module):
    """Separate actor and critic, a diagonal Gaussian over unclipped actions, and the normalisers of what they see.

    `value` and `log_prob_entropy` take what `critic_input` and `normalizer` return: these are frozen through an update,
    so that their results are computed once and not again for each of its minibatches.

    With --critic-progress the critic sees the episode's length and return so far. An observation of BipedalWalker does
    not tell how much of the course is left. To a critic that cannot know it either, haste pays: it sees the reward of
    a fast step, and not that there will be less to earn later. One that can sees only what haste costs.
    """

    def __init__(self, obs_dim: int, action_dim: int, args: Args) -> None:
        super().__init__()
        self.state_dependent_std = args.state_dependent_std
        self.activation = args.activation
        heads = action_dim * (2 if args.state_dependent_std else 1)
        self.normalizer = Normalizer(obs_dim)
        self.progress_normalizer = Normalizer(2) if args.critic_progress else None
        self.actor = mlp((obs_dim, *args.actor_hidden_sizes, heads), args.activation, last_gain=0.01)
        self.critic = mlp(
            (obs_dim + 2 * args.critic_progress, *args.critic_hidden_sizes, 1), args.activation, last_gain=1.0
        )
        logstd = torch.full((action_dim,), math.log(args.initial_std))
        if args.state_dependent_std:
            self.actor[-1].bias.data[action_dim:] = logstd
        else:
            self.actor.register_parameter("logstd", nn.Parameter(logstd))

    def mean_logstd(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised observations (..., obs_dim) -> the Gaussian's mean (..., action_dim) and log deviation."""
        out = self.actor(x)
        if self.state_dependent_std:
            mean, logstd = out.chunk(2, dim=-1)
            return mean, logstd.clamp(LOGSTD_MIN, LOGSTD_MAX)
        return out, self.actor.logstd

    def critic_input(self, x: Tensor, progress: Tensor) -> Tensor:
        """Normalised observations (..., obs_dim) and raw progress (..., 2) -> what `value` takes."""
        return x if self.progress_normalizer is None else torch.cat((x, self.progress_normalizer(progress)), -1)

    def value(self, x: Tensor) -> Tensor:
        """critic_input (..., obs_dim or obs_dim + 2) -> values (...)."""
        return self.critic(x).squeeze(-1)

    def log_prob_entropy(self, x: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised observations (..., obs_dim), actions (..., action_dim) -> log densities and entropies (...)."""
        return log_prob_entropy(*self.mean_logstd(x), actions)

    def update_normalizers(self, rollout: Rollout) -> None:
        """Merges the statistics of a rollout's steps."""
        valid = rollout.valid.flatten()
        self.normalizer.update(rollout.obs[:-1].flatten(0, 1), valid)
        if self.progress_normalizer is not None:
            self.progress_normalizer.update(rollout.progress[:-1].flatten(0, 1), valid)

    def policy_arrays(self) -> list[np.ndarray]:
        """What Policy needs, as float32 NumPy arrays: mean, scale, deviation, then each layer's weight.T and bias."""
        std = torch.empty(0) if self.state_dependent_std else self.actor.logstd.exp()
        arrays = [*self.normalizer.mean_and_scale(), std]
        for layer in self.actor:
            if isinstance(layer, nn.Linear):
                arrays += [layer.weight.T, layer.bias]
        return [a.detach().cpu().numpy().astype(np.float32, order="C") for a in arrays]


def log_prob_entropy(mean: Tensor, logstd: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
    """Log density of unclipped `actions` (..., action_dim) and the Gaussian's entropy, (...) each, in nats."""
    z = (actions - mean) * (-logstd).exp()
    volume = logstd.sum(-1) + 0.5 * LOG_2PI * actions.shape[-1]
    log_prob = -0.5 * z.square().sum(-1) - volume
    return log_prob, (volume + 0.5 * actions.shape[-1]).expand_as(log_prob)


TILE = 4


class Policy:
    """The acting half of an Agent in NumPy, for where the environments are: raw observation in, action out.

    One row of a float32 matrix product can have other bits in a batch of another size. So rows are computed in tiles
    of fixed shape, and `offset` puts a row into the same place of its tile whatever block of environments it is in.
    """

    def __init__(self, arrays: list[np.ndarray], agent: Agent, low: np.ndarray, high: np.ndarray) -> None:
        self.mean, self.scale, self.std, *layers = arrays
        self.layers = list(zip(layers[0::2], layers[1::2]))
        self.activation = ACTIVATIONS[agent.activation][1]
        self.action_dim, self.low, self.high = len(low), low, high
        self.middle = ((high.astype(np.float64) + low) / 2).astype(np.float32)
        self.half = ((high.astype(np.float64) - low) / 2).astype(np.float32)

    def sample(self, obs: np.ndarray, noise: np.ndarray | None = None, offset: int = 0) -> np.ndarray:
        """Raw observations (n, obs_dim) float32 and standard normal `noise` (n, action_dim) -> unclipped actions.

        Without noise: the mean. Actions are in units of the bounds; `env_action` makes them ready for step().
        """
        n = len(obs)
        padded = -(-(offset % TILE + n) // TILE) * TILE
        rows = slice(offset % TILE, offset % TILE + n)
        x = np.zeros((padded, len(self.mean)), np.float32)
        np.clip((obs - self.mean) * self.scale, -OBS_CLIP, OBS_CLIP, out=x[rows])
        x = x.reshape(padded // TILE, TILE, len(self.mean))  # a leading dimension: NumPy multiplies tile by tile
        for weight, bias in self.layers[:-1]:
            x = self.activation(x @ weight + bias)
        weight, bias = self.layers[-1]
        out = (x @ weight + bias).reshape(padded, len(bias))[rows]
        mean = out[:, : self.action_dim]
        if noise is None:
            return mean
        std = self.std if len(self.std) else np.exp(np.clip(out[:, self.action_dim :], LOGSTD_MIN, LOGSTD_MAX))
        return mean + std * noise

    def env_action(self, action: np.ndarray) -> np.ndarray:
        """Clips to [-1, 1] and maps to the environment's bounds."""
        action = self.middle + self.half * np.clip(action, -1, 1)
        return np.clip(action, self.low, self.high)  # rounding may have left them

    def __call__(self, obs: np.ndarray) -> np.ndarray:
        """Raw observation (obs_dim,) or batch (n, obs_dim) -> deterministic actions ready for step()."""
        obs = np.asarray(obs, np.float32)
        return self.env_action(self.sample(obs.reshape(-1, len(self.mean)))).reshape(*obs.shape[:-1], self.action_dim)


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


@dataclass
class Rollout:
    """Fixed-length rollout tensors on the training device. T = num_steps, N = num_envs."""

    obs: Tensor  # (T + 1, N, obs_dim) raw; the last row is the observation after the rollout
    progress: Tensor  # (T + 1, N, 2) the running episode's steps and raw return before the row's step
    actions: Tensor  # (T, N, action_dim) unclipped, in units of the action bounds
    logprobs: Tensor  # (T, N) of the behaviour policy
    rewards: Tensor  # (T, N) scaled
    terminated: Tensor  # (T, N) bool
    truncated: Tensor  # (T, N) bool
    valid: Tensor  # (T, N) bool; False in the row after a done one, where the environment only resets
    values: Tensor  # (T + 1, N)

    @classmethod
    def allocate(cls, args: Args, obs_dim: int, action_dim: int, device: torch.device) -> Rollout:
        T, N = args.num_steps, args.num_envs

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        flag = functools.partial(zeros, T, N, dtype=torch.bool)
        return cls(
            obs=zeros(T + 1, N, obs_dim),
            progress=zeros(T + 1, N, 2),
            actions=zeros(T, N, action_dim),
            logprobs=zeros(T, N),
            rewards=zeros(T, N),
            terminated=flag(),
            truncated=flag(),
            valid=flag(),
            values=zeros(T + 1, N),
        )


POLICY_METRICS = "policy_loss", "entropy", "old_approx_kl", "approx_kl", "clipfrac"
KL = POLICY_METRICS.index("approx_kl")


def policy_loss(
    agent: Agent, x: Tensor, actions: Tensor, old_logprob: Tensor, advantage: Tensor, weight: Tensor,
    norm_adv: bool, clip_coef: float, ent_coef: float, bounds_loss_coef: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The clipped loss of one minibatch (arXiv:1707.06347, equation 7), less the entropy bonus.

    Beyond the action bounds an environment cannot tell two actions apart: a mean that has drifted out there meets no
    gradient of the reward that would bring it back. With bounds_loss_coef its squared excess is part of the loss.

    Args: x (B, obs_dim) normalised observations, actions (B, action_dim); old_logprob, advantage and weight (B,). The
    weights of a minibatch sum to 1 and are 0 for rows that are masked out, so that `rows @ weight` is a mean (all are
    0 where there is no other row).
    Returns: the loss, and POLICY_METRICS without gradient.
    """
    mean, logstd = agent.mean_logstd(x)
    logprob, entropy = log_prob_entropy(mean, logstd, actions)
    logratio = (logprob - old_logprob) * (weight > 0)  # a masked row's ratio might not be finite
    ratio = logratio.exp()
    if norm_adv:
        advantage = advantage - advantage @ weight
        advantage = advantage / ((advantage.square() @ weight).sqrt() + 1e-8)
    clipped = ratio.clamp(1 - clip_coef, 1 + clip_coef)
    loss = -torch.minimum(advantage * ratio, advantage * clipped) @ weight
    entropy = entropy @ weight
    with torch.no_grad():  # http://joschu.net/blog/kl-approx.html
        metrics = torch.stack((-logratio, ratio - 1 - logratio, (ratio != clipped).float())) @ weight
    total = loss - ent_coef * entropy
    if bounds_loss_coef:
        total = total + bounds_loss_coef * ((mean.abs() - 1).clamp(min=0).square().sum(-1) @ weight)
    return total, torch.cat((torch.stack((loss, entropy)).detach(), metrics))


def value_loss(
    agent: Agent, x: Tensor, returns: Tensor, old_value: Tensor, weight: Tensor,
    clip_coef: float, clip_vloss: bool, vf_coef: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Half the mean squared error of one minibatch's values, times vf_coef.

    Args: x (B, ...) critic_input; returns, old_value and weight (B,), as in policy_loss.
    Returns: the loss, and half the error (1,) without gradient.
    """
    value = agent.value(x)
    error = (value - returns).square()
    if clip_vloss:
        clipped = old_value + (value - old_value).clamp(-clip_coef, clip_coef)
        error = torch.maximum(error, (clipped - returns).square())
    loss = 0.5 * (error @ weight)
    return vf_coef * loss, loss.detach().view(1)


def descend(
    net: nn.Module, optimizer: torch.optim.Optimizer, loss: Callable[..., tuple[Tensor, Tensor]],
    minibatches: Iterable[Sequence[Tensor]], max_grad_norm: float, target_kl: float | None = None,
) -> Tensor:  # fmt: skip
    """Steps `net` down the `loss` of each minibatch.

    Returns: a row for each step, the loss's metrics and the gradient's norm before clipping.
    """
    parameters, (flat,) = list(net.parameters()), optimizer.param_groups[0]["params"]
    rows = []
    for minibatch in minibatches:
        value, metrics = loss(*minibatch)
        # Before the step, so that no step is taken on a policy that has gone too far already (SB3).
        if target_kl is not None and metrics[KL] > target_kl:
            break
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(value, parameters)])
        norm = gradient.norm()
        flat.grad = gradient.mul_((max_grad_norm / (norm + 1e-6)).clamp(max=1.0))
        optimizer.step()
        rows.append(torch.cat((metrics, norm.view(1))))
    return torch.stack(rows).cpu() if rows else torch.zeros(1, len(metrics) + 1)


def update(
    agent: Agent, optimizers: Sequence[torch.optim.Optimizer], rollout: Rollout, args: Args, rng: torch.Generator,
    losses: Sequence[Callable[..., tuple[Tensor, Tensor]]] = (policy_loss, value_loss),
) -> dict[str, float]:  # fmt: skip
    """One PPO update: epochs of shuffled minibatches over the rollout. Returns means over its minibatches.

    Advantages are computed once. Minibatches are equal slices of a shuffle over all rows, reset rows included, so that
    shapes never change; the mask keeps those rows out of every mean, and zeros in them keep it finite. Actor and
    critic share nothing but the minibatches: each is clipped and stepped on its own, the two side by side.
    Raises TrainingError for a loss or gradient that is not finite.
    """
    rewards = torch.where(rollout.valid, rollout.rewards, 0.0)
    flags = rollout.terminated, rollout.truncated
    advantages = gae(rewards, rollout.values, *flags, args.gamma, args.gae_lambda)
    targets = advantages
    if args.value_lambda is not None:
        targets = gae(rewards, rollout.values, *flags, args.gamma, args.value_lambda)
    returns = targets + rollout.values[:-1]

    b_obs = agent.normalizer(rollout.obs[:-1]).flatten(0, 1)
    b_critic_input = agent.critic_input(b_obs, rollout.progress[:-1].flatten(0, 1))
    b_actions = torch.where(rollout.valid[..., None], rollout.actions, 0.0).flatten(0, 1)
    b_logprobs, b_advantages, b_returns, b_values = (
        torch.where(rollout.valid, t, 0.0).flatten()
        for t in (rollout.logprobs, advantages, returns, rollout.values[:-1])
    )
    b_mask = rollout.valid.float().flatten()
    shuffles = [torch.randperm(args.batch_size, generator=rng).to(b_obs.device) for _ in range(args.update_epochs)]

    def minibatches(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """The minibatches of every epoch; their last tensor is the weight that each row has in a mean."""
        for shuffle in shuffles:
            rows = shuffle.view(args.num_minibatches, args.minibatch_size)
            mask = b_mask[rows]
            weights = mask / mask.sum(1, keepdim=True).clamp(min=1)
            yield from zip(*(tensor[rows] for tensor in tensors), weights)  # an epoch is gathered at once

    actor_loss = functools.partial(
        losses[0], agent, norm_adv=args.norm_adv, clip_coef=args.clip_coef, ent_coef=args.ent_coef,
        bounds_loss_coef=args.bounds_loss_coef,
    )  # fmt: skip
    critic_loss = functools.partial(
        losses[1], agent, clip_coef=args.clip_coef, clip_vloss=args.clip_vloss, vf_coef=args.vf_coef
    )
    actor_data = minibatches(b_obs, b_actions, b_logprobs, b_advantages)
    critic_data = minibatches(b_critic_input, b_returns, b_values)
    for optimizer, rate in zip(optimizers, (args.learning_rate, args.critic_learning_rate or args.learning_rate)):
        optimizer.param_groups[0]["lr"] = rate
    tables = side_by_side(
        lambda: descend(agent.actor, optimizers[0], actor_loss, actor_data, args.max_grad_norm, args.target_kl),
        lambda: descend(agent.critic, optimizers[1], critic_loss, critic_data, args.max_grad_norm),
    )
    if args.min_std:
        agent.actor.logstd.data.clamp_(min=math.log(args.min_std))
    metrics: dict[str, float] = {}
    for table, names in zip(tables, ((*POLICY_METRICS, "policy_grad_norm"), ("value_loss", "value_grad_norm"))):
        bad = (~table.isfinite()).nonzero().tolist()
        if bad:
            row, column = bad[0]
            raise TrainingError(f"losses/{names[column]} is {table[row, column]} in minibatch {row}")
        metrics.update(zip(names, table.mean(0).tolist()))

    y, pred = returns[rollout.valid], rollout.values[:-1][rollout.valid]
    explained = float(1 - (y - pred).var() / y.var()) if y.numel() > 1 and y.var() > 0 else 0.0
    norm = math.hypot(metrics.pop("policy_grad_norm"), metrics.pop("value_grad_norm"))
    return {**metrics, "grad_norm": norm, "explained_variance": explained}


def side_by_side(first: Callable[[], Any], second: Callable[[], Any]) -> tuple[Any, Any]:
    """Both results; `second` is computed in a thread: torch lets go of the interpreter while it works."""
    if usable_cores() == 1:
        return first(), second()
    with ThreadPoolExecutor(1) as pool:  # waits for `second`, whatever `first` raises
        other = pool.submit(second)
        return first(), other.result()


def make_optimizers(agent: Agent, args: Args) -> tuple[torch.optim.Adam, torch.optim.Adam]:
    """One Adam for the actor and one for the critic. Call it after the agent has moved to its device.

    Each network's parameters become views of one flat tensor, which is what Adam steps: on networks this small most
    of an optimizer's time is the handling of many little tensors.
    """

    def adam(net: nn.Module) -> torch.optim.Adam:
        flat = nn.Parameter(nn.utils.parameters_to_vector(net.parameters()).detach())
        nn.utils.vector_to_parameters(flat.data, net.parameters())  # sets each p.data to its view
        return torch.optim.Adam([flat], lr=args.learning_rate, eps=1e-5, fused=True)  # eps: 37 details, no. 3

    return adam(agent.actor), adam(agent.critic)


def average_weights(average: AveragedModel, agent: Agent, args: Args, global_step: int) -> None:
    """Keeps the mean of the weights since the last --swa-share of training began; before that, there is none.

    Late in training a minibatch's gradient is nearly all noise, and the weights wander about what they have learned:
    their mean is nearer to it (Izmailov et al. 2018, arXiv:1803.05407).
    """
    if args.swa_share and global_step > (1 - args.swa_share) * args.total_timesteps:
        average.update_parameters(agent)
    else:
        average.n_averaged.zero_()


def scheduled(args: Args, global_step: int) -> Args:
    """The arguments of the iteration that starts at `global_step`.

    Learning rates and entropy bonus fall linearly; discount and the price of a fall change in equal ratios; the action
    cost grows with the square of the steps over the first half.

    The discount of BipedalWalker rises: a short horizon finds a gait soon, and a fast one; but undiscounted returns pay
    nothing for speed, and only a longer horizon weighs a fall by all that it costs. The price of a fall rises, too: at
    its full price from the start some seeds learn to stand still for good; at a low one to the end, to fall. It ends
    above what normalising makes of -100 (about -7), since any discount hides most of the course that a fall forfeits.
    With --action-cost strength costs more than its own price, once there is a gait to make cheaper: all that a finished
    course lacks to the ceiling is the price of its torque, but at that price alone a gait hardly changes any more.
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


# ----------------------------------------------------------------------------------------------------------------------
# Rollout
# ----------------------------------------------------------------------------------------------------------------------


REWARD_CLIP = 10.0
FALL = -100.0  # the reward of a fall or crash in the Box2D environments
CHUNK = 1024  # rows of a forward pass: more of them at once would leave the processor's cache


def is_fall(terminated: np.ndarray, rewards: np.ndarray) -> np.ndarray:
    """Whether steps ended their episode by a fall; of arrays or of single steps. `rewards` are raw."""
    return terminated & (rewards <= FALL)


def running_sums(start: np.ndarray, gains: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """(T + 1, ...) float64: `start`, and then keep[t] times the row before plus gains[t]."""
    sums = np.empty((len(gains) + 1, *start.shape))
    sums[0] = start
    for t in range(len(gains)):
        np.multiply(sums[t], keep[t], out=sums[t + 1])
        sums[t + 1] += gains[t]
    return sums


class RewardScaler:
    """Divides rewards by the running deviation of the discounted return (37 details, continuous control no. 8).

    A rollout's rewards are divided by a deviation that has them merged already.
    """

    def __init__(self, num_envs: int) -> None:
        self.returns = np.zeros(num_envs)  # the discounted return so far, per environment
        self.moments = Normalizer(1)

    def update(self, rewards: np.ndarray, valid: np.ndarray, gamma: float) -> None:
        """Merges a rollout's discounted returns. rewards, valid: (T, N); rows that are not valid start an episode."""
        returns = running_sums(self.returns, np.where(valid, rewards, 0.0), gamma * valid)[1:]
        self.returns = returns[-1].copy()
        self.moments.update(torch.from_numpy(returns).view(-1, 1), torch.from_numpy(valid).view(-1))

    def scale(self, rewards: np.ndarray, fell: np.ndarray, fall_reward: float | None) -> np.ndarray:
        """Raw rewards -> scaled float32 ones, clipped to +-10; where it `fell`, `fall_reward`, if that is given."""
        deviation = math.sqrt(float(self.moments.var) + 1e-8)
        scaled = np.clip(rewards / deviation, -REWARD_CLIP, REWARD_CLIP).astype(np.float32)
        return scaled if fall_reward is None else np.where(fell, np.float32(fall_reward), scaled)


def collect(envs: VecEnv, state: State, rollout: Rollout, args: Args) -> list[Episode]:
    """Lets every environment take num_steps steps with the current policy; fills `rollout`.

    The workers act with a NumPy copy of the policy on noise drawn here, one message per rollout. Values and log
    probabilities are then computed in one pass by the network that the update differentiates, from the same raw
    observations and unclipped actions. Returns the episodes that ended. A rollout that fails raises, and leaves the
    environments' state as it was.
    """
    noise = state.noise_rng.standard_normal((args.num_steps, args.num_envs, envs.action_dim), dtype=np.float32)
    data = envs.rollout(state.agent.policy_arrays(), noise)
    state.reward_scaler.returns[data.restarted] = 0.0  # could not be replayed: a new episode
    valid, progress, episodes = state.envs.advance(data, state.global_step)
    state.global_step += int(valid.sum())
    state.episode_count += sum(not episode.practice for episode in episodes)
    effort = np.abs(data.actions).clip(max=1).sum(-1)
    rewards = data.rewards - np.float32(args.action_cost) * effort
    state.reward_scaler.update(rewards, valid, args.gamma)

    def store(tensor: Tensor, array: np.ndarray) -> None:
        tensor.copy_(torch.from_numpy(array))

    store(rollout.obs, data.obs)
    store(rollout.progress, progress)
    store(rollout.actions, data.actions)
    fell = is_fall(data.terminated, data.rewards)
    store(rollout.rewards, state.reward_scaler.scale(rewards, fell, args.fall_reward))
    store(rollout.terminated, data.terminated)
    store(rollout.truncated, data.truncated)
    store(rollout.valid, valid)
    agent = state.agent
    x = agent.normalizer(rollout.obs)

    @torch.no_grad()
    def values() -> None:
        inputs = agent.critic_input(x, rollout.progress).flatten(0, 1).split(CHUNK)
        rollout.values.view(-1).copy_(torch.cat([agent.value(rows) for rows in inputs]))

    @torch.no_grad()
    def logprobs() -> None:
        pairs = zip(x[:-1].flatten(0, 1).split(CHUNK), rollout.actions.flatten(0, 1).split(CHUNK))
        rollout.logprobs.view(-1).copy_(torch.cat([agent.log_prob_entropy(*pair)[0] for pair in pairs]))

    side_by_side(values, logprobs)
    return episodes


# ----------------------------------------------------------------------------------------------------------------------
# Train
# ----------------------------------------------------------------------------------------------------------------------


def train(args: Args, task: Task, checkpoint: dict[str, Any] | None = None) -> Run:
    """Trains, or continues from a checkpoint; evaluates, plots and saves."""
    device = choose_device(args)
    state = State(args, task, device)
    if checkpoint:
        state.load(checkpoint)
        state.finished = False
    rollout = Rollout.allocate(args, task.obs_dim, task.action_dim, device)
    losses = [torch.compile(loss) if args.compile else loss for loss in (policy_loss, value_loss)]

    with Run(args, task, state, checkpoint) as run, VecEnv(args, task, state.envs) as envs:
        run.save()
        while state.global_step < args.total_timesteps and not run.stopped:
            started = time.perf_counter()
            now = scheduled(args, state.global_step)
            episodes = collect(envs, state, rollout, now)
            collected = time.perf_counter()
            metrics = update(state.agent, state.optimizers, rollout, now, state.shuffle_rng, losses)
            state.agent.update_normalizers(rollout)
            average_weights(state.average, state.agent, args, state.global_step)
            updated = time.perf_counter()

            state.iteration += 1
            state.train_time_s += updated - started
            run.log(rollout, episodes, metrics, now, collected - started, updated - collected)
            if evaluation_due(state, args):
                evaluate_progress(envs, state, run)
            run.save_now_and_then()
        run.save()
        if not run.stopped:
            deliver(envs, state, run, args)
    if missing := run.missing():
        raise TrainingError(f"the disk is still full: {', '.join(missing)} could not be written")
    return run


# ======================================================================================================================
# The engine room: vector environment, fast walker, checkpoint, evaluation, files, command line
# ======================================================================================================================

# ----------------------------------------------------------------------------------------------------------------------
# Vector environment
# ----------------------------------------------------------------------------------------------------------------------

WALKERS = {"BipedalWalker-v3": False, "BipedalWalkerHardcore-v3": True}  # env id: hardcore
STARTING = 120.0  # seconds that the start of workers may take, whatever --worker-timeout
MAX_FAULTS = 3  # attempts at one rollout or evaluation before a run gives up
ENDLESS = 10_000  # steps after which an evaluation ends an episode of an environment without a time limit

# Three ranges of episode seeds that never meet. Training seeds are spread over the upper half of 32 bits.
TEST_SEEDS, SELECTION_SEEDS, TRAINING_SEEDS = 0, 2**30, 2**31


def episode_seed(seed: int, env: int, episode: int) -> int:
    """The reset seed of a training episode: with its actions, all that it takes to have the episode again."""
    sequence = np.random.SeedSequence(seed, spawn_key=(0, env, episode))
    return TRAINING_SEEDS | int(sequence.generate_state(1)[0])


@dataclass(frozen=True)
class Task:
    """What a worker has to know of the environment; checked once, before any process is started."""

    env_id: str
    seed: int
    fast_walker: bool
    practice: float
    obs_dim: int
    low: np.ndarray  # (action_dim,) float32 action bounds
    high: np.ndarray
    max_episode_steps: int | None
    goal: float | None  # the return at which the environment counts as solved

    @property
    def action_dim(self) -> int:
        return len(self.low)

    @classmethod
    def of(cls, args: Args) -> Task:
        """Raises UserError for an environment that does not exist or that PPO with a Gaussian cannot act in."""
        try:
            with warnings.catch_warnings():  # of an outdated version: the error says it, too
                warnings.simplefilter("ignore")
                env = gym.make(args.env_id, disable_env_checker=True)
        except Exception as error:  # a registry error, a missing dependency, or whatever the environment raises
            raise UserError(f"--env-id {args.env_id}: {' '.join(str(error).split())}") from error
        obs_space, action_space = env.observation_space, env.action_space
        box = gym.spaces.Box
        if not isinstance(obs_space, box) or not isinstance(action_space, box):
            raise UserError(
                f"--env-id {args.env_id} has {type(obs_space).__name__} observations and {type(action_space).__name__} "
                "actions; supported are environments with Box observations and Box actions"
            )
        if not (np.isfinite(action_space.low).all() and np.isfinite(action_space.high).all()):
            raise UserError(f"--env-id {args.env_id} has unbounded actions; supported are finite bounds")
        if args.capture_video:
            check_rendering(args.env_id, env)
        spec = env.spec
        env.close()
        env_id = spec.id if spec.id in WALKERS else args.env_id  # "BipedalWalker" is the newest version of it
        if args.practice and env_id not in WALKERS:
            raise UserError(f"--practice belongs to {' and '.join(WALKERS)}: {env_id} cannot be put back to a place")
        fast = args.fast_walker and env_id in WALKERS and not args.evaluate  # which takes the published one
        if fast and not fast_walker_agrees(env_id):
            warn("the fast walker differs from Gymnasium's on this machine; using Gymnasium's")
            fast = False
        return cls(
            env_id=env_id,
            seed=args.seed,
            fast_walker=fast,
            practice=args.practice,
            obs_dim=int(np.prod(obs_space.shape)),
            low=rounded(action_space.low, np.inf),
            high=rounded(action_space.high, -np.inf),
            max_episode_steps=spec.max_episode_steps,
            goal=spec.reward_threshold,
        )

    def make_env(self, as_published: bool = False) -> gym.Env:
        """One environment; the walkers with a fresh world at each reset unless it shall be the published one."""
        hardcore = WALKERS.get(self.env_id)
        if as_published or hardcore is None:
            return gym.make(self.env_id, disable_env_checker=True)
        if self.fast_walker:
            return FastWalker(hardcore, self.max_episode_steps)
        return TimeLimit(FreshWalker(hardcore=hardcore), self.max_episode_steps)

    def agent(self, args: Args) -> Agent:
        return Agent(self.obs_dim, self.action_dim, args)

    def policy(self, agent: Agent, arrays: list[np.ndarray] | None = None) -> Policy:
        return Policy(agent.policy_arrays() if arrays is None else arrays, agent, self.low, self.high)


def check_rendering(env_id: str, env: gym.Env) -> None:
    """Raises UserError for an environment of which no video can be made on this machine."""
    if "rgb_array" not in env.metadata.get("render_modes", ()):
        raise UserError(f"--capture-video: {env_id} cannot be rendered to an rgb_array")
    try:
        rendered = gym.make(env_id, render_mode="rgb_array", disable_env_checker=True)
        rendered.reset(seed=0)
        rendered.render()
        rendered.close()
    except Exception as error:  # no display, no OpenGL, no pygame, ...
        raise UserError(f"--capture-video: {env_id} cannot be rendered here: {' '.join(str(error).split())}") from error


def rounded(bounds: np.ndarray, inwards: float) -> np.ndarray:
    """An action space's bounds as float32 (action_dim,) that lie in it, whatever its own precision."""
    nearest = bounds.astype(np.float32)
    outside = nearest < bounds if inwards > 0 else nearest > bounds
    return np.where(outside, np.nextafter(nearest, np.float32(inwards)), nearest).ravel()


def reset_env(env: gym.Env, seed: int) -> np.ndarray:
    return np.asarray(env.reset(seed=seed)[0], np.float32).ravel()


def step_envs(envs: Sequence[gym.Env], actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Steps each environment with its row of env-ready actions (n, action_dim).

    Returns: observations (n, obs_dim) float32, rewards (n,) float32, terminated (n,), truncated (n,).
    """
    if isinstance(envs[0], FastWalker):
        return step_walkers(envs, actions)
    space = envs[0].action_space
    steps = [env.step(row.reshape(space.shape).astype(space.dtype)) for env, row in zip(envs, actions)]
    obs, rewards, terminated, truncated, _ = zip(*steps)
    obs = np.stack([np.asarray(o, np.float32).ravel() for o in obs])
    return obs, np.array(rewards, np.float32), np.array(terminated, bool), np.array(truncated, bool)


PRACTICE_FALLS = 4  # of each environment: the last ones
PRACTICE_BEFORE = (40, 140)  # steps before a fall: where practice begins
PRACTICE_BEYOND = 60  # steps after it: where practice ends
PRACTICE_EVERY = 5  # steps from one place that is kept to the next

# A place that a walker can be put back to.
PLACE = np.dtype(
    [
        ("seed", np.int64),  # of the course; 0 where there is no place
        ("length", np.int64),  # of the episode so far
        ("ret", np.float64),
        ("last", np.int64),  # the length at which practice is cut off
        ("walker", np.float64, 33),  # walker_state
        ("obs", np.float32, 24),
    ]
)


class Practice:
    """Sends one walker back to where it fell, for a share of its steps (--practice).

    A walker that falls on one course in ten learns nothing about it in most of its steps. So it practises: an episode
    begins shortly before one of its last falls, on that course, in the same place and at the same speed, and is cut off
    shortly after the place of the fall. To PPO it is a truncated episode like others. It has the length and the return
    that the one that fell had there, for --critic-progress. Starting from states on the way is an idea of Salimans &
    Chen 2018 (arXiv 1812.03381), for demonstrations.

    Every environment has one, and its episodes begin here; with a share of 0, and so in all that are no walkers, they
    are whole.
    """

    def __init__(self, share: float, env: gym.Env, places: np.ndarray, steps: np.ndarray) -> None:
        self.share, self.env = share, env
        self.places = places  # (1 + PRACTICE_FALLS,): where the running episode began; shortly before the last falls
        self.steps = steps  # (2,): of whole courses and of practice, in episodes that have ended
        # The last places of a whole course, as long before a fall as it may be.
        self.recent: deque[tuple] = deque(maxlen=PRACTICE_BEFORE[1] // PRACTICE_EVERY)

    def choose(self, episode: int) -> np.void | None:
        """The place to begin the episode of this number at, or None for the start of a new course."""
        falls = self.places[1:][self.places["seed"][1:] > 0]
        if len(falls) and self.steps[1] < self.share * self.steps.sum():
            return falls[episode % len(falls)]
        return None

    def begin(self, seed: int, place: np.void | None) -> np.ndarray:
        """Resets to the course of this seed, or puts the walker back to `place`. Returns the first observation."""
        self.recent.clear()
        self.places[0] = np.zeros((), PLACE) if place is None else place
        self.seed, self.practising = seed, place is not None
        self.length, self.ret, self.last = (self.places[0][name].item() for name in ("length", "ret", "last"))
        self.begun = self.length, self.ret, self.practising  # what EnvState.advance has to know of an episode's start
        if place is None:
            return reset_env(self.env, seed)
        reset_env(self.env, int(place["seed"]))
        put_back(self.env, place["walker"])
        return place["obs"]

    def after_step(self, obs: np.ndarray, reward: float, terminated: bool, truncated: bool) -> bool:
        """Takes note of what a step returned. Returns `truncated`, or true where practice ends."""
        self.length += 1
        self.ret += reward
        if self.practising:
            truncated |= self.length >= self.last
        elif is_fall(terminated, reward):
            before = [place for place in self.recent if self.length - place[1] >= PRACTICE_BEFORE[0]]
            if before:
                self.places[1:-1] = self.places[2:].copy()
                self.places[-1] = before[self.length % len(before)]  # as good as at random
                self.places[-1]["last"] = self.length + PRACTICE_BEYOND
        elif self.length % PRACTICE_EVERY == 0:
            self.recent.append((self.seed, self.length, self.ret, 0, walker_state(self.env), obs.copy()))
        if terminated or truncated:
            self.steps[int(self.practising)] += self.length - self.begun[0]
        return truncated


@dataclass
class Episode:
    """An episode that has ended; if it is no practice, one row of episodes.csv."""

    global_step: int
    env: int
    ret: float
    length: int
    fell: bool  # ended by a termination with the reward of a fall
    practice: bool = False  # began shortly before an earlier fall


class EnvState:
    """Where the environments are between two rollouts: all that it takes to continue them in another process.

    A Box2D world cannot be pickled, but an episode is a function of its reset seed and its actions, so those are what
    is kept (a fresh world at each reset makes this true of the walkers too), and the place where practice began.
    """

    def __init__(self, num_envs: int, obs_dim: int) -> None:
        self.episode = np.zeros(num_envs, np.int64)  # the number of the running episode
        self.actions: list[list[np.ndarray]] = [[] for _ in range(num_envs)]  # its actions, in chunks (n, action_dim)
        self.obs = np.zeros((num_envs, obs_dim), np.float32)  # the next observation
        self.done = np.zeros(num_envs, bool)  # that observation is an episode's last; the next step resets
        self.returns = np.zeros(num_envs)  # of the running episode
        self.lengths = np.zeros(num_envs, np.int64)
        self.places = np.zeros((num_envs, 1 + PRACTICE_FALLS), PLACE)  # as Practice has them
        self.practice_steps = np.zeros((num_envs, 2), np.int64)
        self.started = False

    def advance(self, data: RolloutData, global_step: int) -> tuple[np.ndarray, np.ndarray, list[Episode]]:
        """Moves on over a complete rollout.

        Returns: the (T, N) mask of rows that are steps; (T + 1, N, 2) the running episode's length and return before
        each of them, the last row after the rollout; and the episodes that ended.
        """
        done = data.terminated | data.truncated
        valid = ~np.vstack((self.done[None], done[:-1]))
        self.episode[data.restarted] += 1  # could not be replayed: a new episode began at row 0
        self.lengths[data.restarted] = self.returns[data.restarted] = self.places["seed"][data.restarted, 0] = 0
        # Length, return and whether it is practice: a step adds to them, a row that resets sets them anew.
        gains = np.stack((valid, data.rewards, np.zeros_like(valid)), -1)
        gains = np.where(valid[..., None], gains, data.begun)
        running = np.stack((self.lengths, self.returns, self.places["seed"][:, 0] > 0), -1)
        progress = running_sums(running, gains, valid[..., None])
        steps = global_step + valid.sum(1).cumsum()
        episodes = []
        for t, i in np.argwhere(done):
            length, ret, practice = progress[t + 1, i].tolist()
            fell = bool(is_fall(data.terminated[t, i], data.rewards[t, i]))
            episodes.append(Episode(int(steps[t]), int(i), ret, int(length), fell, bool(practice)))
        for i in range(valid.shape[1]):
            resets = np.flatnonzero(~valid[:, i])
            self.episode[i] += len(resets)
            if len(resets) or data.restarted[i]:
                self.actions[i] = []
            self.actions[i].append(data.actions[resets[-1] + 1 if len(resets) else 0 :, i].copy())
        self.obs, self.done = data.obs[-1].copy(), done[-1].copy()
        self.lengths[:], self.returns[:] = np.where(self.done, 0, progress[-1, :, :2].T)
        self.places[...], self.practice_steps[...] = data.places, data.practice_steps
        self.started = True
        return valid, progress[..., :2], episodes

    def state_dict(self) -> dict[str, Any]:
        arrays = {k: torch.from_numpy(as_bytes(v).copy()) for k, v in vars(self).items() if isinstance(v, np.ndarray)}
        actions = [torch.from_numpy(np.concatenate(c)) if c else None for c in self.actions]
        return {**arrays, "actions": actions, "started": self.started}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        for name, value in vars(self).items():
            if isinstance(value, np.ndarray):
                as_bytes(value)[...] = saved[name].numpy()
        self.actions = [[] if a is None else [a.numpy()] for a in saved["actions"]]
        self.started = saved["started"]
        places = self.places[self.places["seed"] != 0]
        sane = all((np.abs(places[field]) < 1e4).all() for field in ("length", "last", "ret", "walker", "obs"))
        if not sane or ((places["seed"] < 0) | (places["seed"] >= 2**32)).any():
            raise ValueError("a place to practise at is on no course")  # Box2D would not come back from far away


def as_bytes(array: np.ndarray) -> np.ndarray:
    """A view of records as their bytes, which torch can hold; of any other array itself."""
    return array.view(np.uint8) if array.dtype.names else array


class RolloutData:
    """A rollout's arrays: the workers write their columns, the trainer reads all of them.

    They lie in unnamed shared memory, which no crash can leave behind.
    """

    def __init__(self, context: Any, args: Args, task: Task, num_workers: int, policy: list[np.ndarray]) -> None:
        def allocate(*shape: int, dtype: Any = np.float32) -> tuple[Any, tuple[int, ...], Any]:
            return context.RawArray("b", max(1, math.prod(shape) * np.dtype(dtype).itemsize)), shape, dtype

        T, N, A = args.num_steps, args.num_envs, task.action_dim
        arrays = {
            "obs": allocate(T + 1, N, task.obs_dim),
            "actions": allocate(T, N, A),
            "noise": allocate(T, N, A),  # drawn by the trainer
            "rewards": allocate(T, N),
            "terminated": allocate(T, N, dtype=np.bool_),
            "truncated": allocate(T, N, dtype=np.bool_),
            "restarted": allocate(N, dtype=np.bool_),  # a new episode began before row 0
            "begun": allocate(T, N, 3, dtype=np.float64),  # in rows that reset: the new episode's Practice.begun
            "places": allocate(N, 1 + PRACTICE_FALLS, dtype=PLACE),
            "practice_steps": allocate(N, 2, dtype=np.int64),
            "beats": allocate(num_workers, dtype=np.int64),  # counts each worker's steps
        }
        self.open(arrays, [allocate(*a.shape) for a in policy])

    def open(self, *memory: Any) -> None:
        def view(raw: Any, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
            return np.frombuffer(raw, dtype, count=math.prod(shape)).reshape(shape)

        self.memory, (arrays, policy) = memory, memory
        vars(self).update({name: view(*spec) for name, spec in arrays.items()})
        self.policy = [view(*spec) for spec in policy]  # the acting policy's weights

    def __getstate__(self) -> bytes:
        """For spawned workers: AsyncVectorEnv pickles with cloudpickle, which knows nothing of shared memory."""
        return bytes(ForkingPickler.dumps(self.memory))

    def __setstate__(self, state: bytes) -> None:
        self.open(*pickle.loads(state))


class Block(gym.Env):
    """The environments [start, stop) of one worker, and the policy beside them.

    To AsyncVectorEnv a block is one environment that is only ever `call`ed. Its methods return a traceback's text
    instead of raising: an exception that cannot be pickled would hang the error queue of AsyncVectorEnv.
    """

    def __init__(
        self, index: int, start: int, stop: int, task: Task, agent: Agent, data: RolloutData, state: EnvState,
        trainer: int,
    ) -> None:  # fmt: skip
        self.index, self.start, self.stop, self.task, self.agent = index, start, stop, task, agent
        self.data, self.state = data, state
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (task.obs_dim,), np.float32)
        self.action_space = gym.spaces.Box(task.low, task.high)
        self.envs: list[gym.Env] = []  # made by the first rollout: AsyncVectorEnv makes a block for its spaces, too
        if os.getpid() != trainer:
            # The trainer decides when workers end: a Ctrl-C or `kill` of the whole group reaches them as well.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            with contextlib.suppress(Exception):  # Linux: the kernel ends this worker with its trainer
                ctypes.CDLL(None).prctl(1, int(signal.SIGKILL))  # 1: PR_SET_PDEATHSIG
            threading.Thread(target=end_with, args=(trainer,), daemon=True).start()  # elsewhere: within a second

    def rollout(self, given_actions: bool = False) -> str | None:
        """Steps the block num_steps times, acting on the shared noise.

        With `given_actions` on the shared actions: benchmarks/throughput.py times the stepping without a policy.
        """
        try:
            self.restore()
            data, columns, obs = self.data, slice(self.start, self.stop), self.obs
            data.obs[0, columns] = obs
            for t in range(len(data.actions)):
                if not given_actions:
                    data.actions[t, columns] = self.policy.sample(obs, data.noise[t, columns], self.start)
                resets = np.flatnonzero(self.done)
                obs, rewards, terminated, truncated = self.step(data.actions[t, columns])
                for i in resets:
                    data.begun[t, self.start + i] = self.practices[i].begun
                data.obs[t + 1, columns] = obs
                data.rewards[t, columns] = rewards
                data.terminated[t, columns] = terminated
                data.truncated[t, columns] = truncated
                self.beat()
            self.obs = obs
            data.places[columns], data.practice_steps[columns] = self.places, self.practice_steps
        except Exception:
            return traceback.format_exc()

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """One row of unclipped actions (k, action_dim). After an episode's end the row only resets (NEXT_STEP)."""
        actions = self.policy.env_action(actions)
        if not self.done.any():
            result = self.step_some(range(len(self.envs)), actions)
        else:
            k = len(self.envs)
            result = np.empty((k, self.task.obs_dim), np.float32), np.zeros(k, np.float32), *np.zeros((2, k), bool)
            for i in np.flatnonzero(self.done):
                episode = self.episode[i] + 1
                result[0][i] = self.begin_episode(i, episode, self.practices[i].choose(episode))
            running = np.flatnonzero(~self.done)
            if len(running):
                for into, row in zip(result, self.step_some(running, actions[running])):
                    into[running] = row
        self.done = result[2] | result[3]
        return result

    def step_some(
        self, some: Sequence[int], actions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """One step of the running episodes of environments `some`, with their rows of env-ready actions."""
        result = step_envs([self.envs[i] for i in some], actions)
        if self.task.practice:
            for row, (i, obs, *step) in enumerate(zip(some, result[0], *(column.tolist() for column in result[1:]))):
                result[3][row] = self.practices[i].after_step(obs, *step)
        return result

    def begin_episode(self, i: int, episode: int, place: np.void | None) -> np.ndarray:
        """Begins the episode of this number in environment i, on a course of its own or at a place to practise."""
        self.episode[i] = episode
        seed = episode_seed(self.task.seed, self.start + i, int(episode))
        obs = self.practices[i].begin(seed, place)
        self.beat()
        return obs

    def beat(self) -> None:
        """Shows that this worker does not hang: after everything that it does for one environment or one row."""
        self.data.beats[self.index] += 1

    def restore(self) -> None:
        """On the first call: brings every environment to where the last complete rollout left it."""
        if self.envs:
            return
        self.policy = self.task.policy(self.agent, self.data.policy)
        columns, state = slice(self.start, self.stop), self.state
        self.obs, self.done = state.obs[columns].copy(), state.done[columns].copy()
        self.episode = state.episode[columns].copy()
        self.data.restarted[columns] = False
        for _ in range(self.start, self.stop):
            self.envs.append(self.task.make_env())
            self.beat()
        self.places, self.practice_steps = state.places[columns].copy(), state.practice_steps[columns].copy()
        rows = zip(self.envs, self.places, self.practice_steps)
        self.practices = [Practice(self.task.practice, *row) for row in rows]
        for i in np.flatnonzero(~self.done):
            obs, running = self.replay(i)
            if state.started and not (running and np.array_equal(obs, self.obs[i])):
                # Not the same here, as on another machine: a new episode begins, and what the replay noted is undone.
                self.data.restarted[self.start + i] = True
                self.places[i], self.practice_steps[i] = state.places[columns][i], state.practice_steps[columns][i]
                obs = self.begin_episode(i, self.episode[i] + 1, None)
            self.obs[i] = obs

    def replay(self, i: int) -> tuple[np.ndarray, bool]:
        """Takes the running episode of environment i to where it was. Its observation, and whether it still runs."""
        place = self.places[i, 0].copy()
        obs, running = self.begin_episode(i, self.episode[i], place if place["seed"] else None), True
        for action in itertools.chain.from_iterable(self.state.actions[self.start + i]):
            if not running:
                break
            rows, _, terminated, truncated = self.step_some([i], self.policy.env_action(action[None]))
            obs, running = rows[0], not (terminated[0] or truncated[0])
            self.beat()
        return obs, running

    def evaluate(self, seeds: list[int], workers: int, as_published: bool) -> list[tuple[int, float, int]] | str:
        """This worker's share of evaluation episodes: (index into seeds, return, length) of each."""
        try:
            policy = self.task.policy(self.agent, self.data.policy)
            mine = [i for i in range(len(seeds)) if i // TILE % workers == self.index]  # whole tiles
            episodes = []
            for start in range(0, len(mine), 32 * TILE):  # so many environments at a time
                some = [seeds[i] for i in mine[start : start + 32 * TILE]]
                episodes += run_episodes(self.task, policy, some, as_published, beat=self.beat)
            return [(i, *episode) for i, episode in zip(mine, episodes)]
        except Exception:
            return traceback.format_exc()


def end_with(trainer: int) -> None:
    """Ends this worker soon after the trainer has: a sibling may keep the pipe open that would have told it."""
    while os.getppid() == trainer and multiprocessing.parent_process().is_alive():  # forked, spawned on Windows
        time.sleep(1)
    os._exit(1)


def serve(*args: Any) -> None:
    """AsyncVectorEnv's own worker; but one whose trainer has gone ends without a traceback about its broken pipe."""
    try:
        _async_worker(*args)
    except (EOFError, OSError):
        os._exit(1)


class WorkerFault(Exception):
    """A worker died, hung or raised."""


class Workers(AsyncVectorEnv):
    """AsyncVectorEnv in which no wait is endless and a hung or dead worker ends in a WorkerFault."""

    def __init__(self, blocks: list[Callable[[], Block]], context: str, timeout: float) -> None:
        self.timeout = timeout
        # Construction waits for the workers without a limit; a spawned one imports torch first.
        watchdog = threading.Timer(max(timeout, STARTING), self.kill)
        watchdog.daemon = True
        watchdog.start()
        try:
            super().__init__(
                blocks, shared_memory=False, context=context, worker=serve, autoreset_mode=AutoresetMode.DISABLED
            )
        except (EOFError, OSError) as error:
            raise WorkerFault(self.describe_end()) from error
        finally:
            watchdog.cancel()

    def run(self, beats: np.ndarray, name: str, *args: Any) -> list[Any]:
        """Calls a method of every block; raises WorkerFault if one dies, returns a traceback or stops beating."""
        try:
            self.call_async(name, *args)
            waiting = {pipe: i for i, pipe in enumerate(self.parent_pipes)}
            seen, since = beats.copy(), np.full(len(beats), time.monotonic())
            while waiting:
                for pipe in multiprocessing.connection.wait(list(waiting), timeout=min(0.5, self.timeout / 4)):
                    del waiting[pipe]
                since[beats != seen] = time.monotonic()
                seen = beats.copy()
                hung = [i for i in waiting.values() if time.monotonic() - since[i] > self.timeout]
                if hung:
                    raise WorkerFault(f"worker {hung[0]} took no step for {self.timeout:g} s")
            results = self.call_wait()
        except (EOFError, OSError) as error:
            raise WorkerFault(self.describe_end()) from error
        for i, result in enumerate(results):
            if isinstance(result, str):
                raise WorkerFault(f"worker {i} failed:\n{result}")
        return list(results)

    def describe_end(self) -> str:
        for i, process in enumerate(getattr(self, "processes", [])):
            process.join(0.2)
            if process.exitcode is not None:
                code = process.exitcode
                return f"worker {i} " + (f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}")
        return "a worker closed its pipe"

    def kill(self) -> None:
        for process in getattr(self, "processes", []):
            if process.pid:
                process.kill()  # not terminate(): a stopped process would never get to it

    def close_extras(self, timeout: float | None = None, terminate: bool = False) -> None:
        """Ends the workers at once: they hold nothing that could be lost, and some may no longer answer."""
        self.kill()
        for process in getattr(self, "processes", []):
            if process.pid:
                process.join()
        for pipe in getattr(self, "parent_pipes", []):
            if pipe is not None:
                pipe.close()


class VecEnv:
    """num_envs environments in num_workers processes, as flat (num_envs, ...) arrays; replaces failed workers.

    The environments are AsyncVectorEnv's, in blocks. A whole rollout is one message: waking a process for each step
    costs more than the stepping itself. What the workers return is the same to the bit for any number of them.
    """

    def __init__(self, args: Args, task: Task, state: EnvState) -> None:
        self.args, self.task, self.state = args, task, state
        self.action_dim = task.action_dim
        self.num_workers = min(args.num_workers or usable_cores(), args.num_envs)
        # Forking takes a tenth of a second, spawning many (each worker imports torch). macOS cannot fork safely.
        self.context = "fork" if sys.platform == "linux" else "spawn"
        with torch.random.fork_rng(devices=[]):  # the weights come with every rollout
            self.agent = task.agent(args)
        policy = self.agent.policy_arrays()
        context = multiprocessing.get_context(self.context)
        self.data = RolloutData(context, args, task, self.num_workers, policy)
        self.workers: Workers | None = None
        self.restarts = 0

    def __enter__(self) -> VecEnv:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        if self.workers is not None:
            self.workers.close()
            self.workers = None

    def start(self) -> None:
        bounds = np.linspace(0, self.args.num_envs, self.num_workers + 1).astype(int).tolist()
        blocks = [
            functools.partial(
                Block, i, bounds[i], bounds[i + 1], self.task, self.agent, self.data, self.state, os.getpid()
            )
            for i in range(self.num_workers)
        ]
        self.workers = Workers(blocks, self.context, self.args.worker_timeout)

    def run(self, name: str, *args: Any) -> list[Any]:
        """Calls a method of every block. After a fault, new workers continue where the last rollout ended."""
        for attempt in range(1, MAX_FAULTS + 1):
            try:
                if self.workers is None:
                    self.start()
                return self.workers.run(self.data.beats, name, *args)
            except WorkerFault as error:
                fault = str(error)
                self.close()
                self.restarts += 1
                if attempt < MAX_FAULTS:
                    warn(f"{fault}; starting new workers where the last rollout ended")
        raise TrainingError(f"gave up after {MAX_FAULTS} attempts without progress: {fault}")

    def load_policy(self, arrays: list[np.ndarray]) -> None:
        for shared, array in zip(self.data.policy, arrays):
            shared[...] = array

    def rollout(self, policy: list[np.ndarray], noise: np.ndarray) -> RolloutData:
        """A rollout of all environments with `policy` (Agent.policy_arrays) and `noise` (T, N, action_dim).

        Raises TrainingError if a worker keeps failing, or an observation, action or reward is not finite.
        """
        self.load_policy(policy)
        self.data.noise[...] = noise
        self.data.restarted[...] = False
        self.run("rollout")
        data = self.data
        if data.restarted.any():
            warn(f"{data.restarted.sum()} environments cannot be replayed; their episodes start anew")
        for name in ("obs", "actions", "rewards"):
            array = getattr(data, name)
            if not np.isfinite(array).all():
                t, env = np.argwhere(~np.isfinite(array))[0][:2]
                raise TrainingError(
                    f"{name} of environment {env} at step {t} of the rollout are not finite: {array[t, env]}"
                )
        return data

    def evaluate(self, policy: list[np.ndarray], seeds: list[int], as_published: bool) -> list[tuple[float, int]]:
        """(return, length) of one deterministic episode per seed, in environments of their own."""
        self.load_policy(policy)
        shares = self.run("evaluate", seeds, self.num_workers, as_published)
        episodes = sorted(row for share in shares for row in share)
        for i, ret, _ in episodes:
            if not math.isfinite(ret):
                raise TrainingError(f"the return of the evaluation episode with seed {seeds[i]} is {ret}")
        return [(ret, length) for _, ret, length in episodes]


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ----------------------------------------------------------------------------------------------------------------------
# Fast walker
# ----------------------------------------------------------------------------------------------------------------------


class FreshWalker(stock.BipedalWalker):
    """BipedalWalker with a new Box2D world at each reset, as LunarLander has it.

    The published one reuses its world: the order of its contacts, and with it the last bits of a trajectory, depend
    on the episodes before. In a fresh world an episode is a function of its seed and actions alone.
    """

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        self.world.contactListener = None  # breaks the cycle world, listener, environment: it holds C++ memory
        self.world, self.terrain = Box2D.b2World(), []
        return super().reset(seed=seed, options=options)


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


RAYS = 10
RAY_X = np.array([math.sin(1.5 * i / 10.0) * stock.LIDAR_RANGE for i in range(RAYS)])
RAY_Y = np.array([math.cos(1.5 * i / 10.0) * stock.LIDAR_RANGE for i in range(RAYS)])
NEAR_EDGES = 14  # edges that the ten rays can reach, the one behind the hull included
NEAR_POLYGONS = 8  # obstacles that they can reach (6 at most, counted over Hardcore terrains), padded
MOTOR_SPEEDS = np.array([stock.SPEED_HIP, stock.SPEED_KNEE] * 2, np.float32)
TORQUE_COST = 0.00035 * stock.MOTORS_TORQUE
FINISH = (stock.TERRAIN_LENGTH - stock.TERRAIN_GRASS) * stock.TERRAIN_STEP


class FastWalker(FreshWalker):
    """BipedalWalker, the same to the bit, in less than half the time: same world, same solver, less Python.

    Walkers of one block are stepped together (step_walkers): Box2D one by one, their lidars in one NumPy ray cast
    over the terrain instead of ten Python callbacks each. tests/test_walker.py compares every bit.
    """

    def __init__(self, hardcore: bool, max_episode_steps: int) -> None:
        super().__init__(hardcore=hardcore)
        self.max_episode_steps = max_episode_steps

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        self.elapsed = 0
        result = super().reset(seed=seed, options=options)
        self.elapsed = 0  # the published reset takes a step
        return result

    def step(self, action: np.ndarray) -> tuple[np.ndarray, np.floating, bool, bool, dict]:
        obs, reward, terminated, truncated = step_walkers([self], np.asarray(action)[None])
        return obs[0], reward[0], bool(terminated[0]), bool(truncated[0]), {}

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
    walkers: Sequence[FastWalker], actions: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """One step of each walker with its row of actions (n, 4); what BipedalWalker.step does, in the same arithmetic.

    Returns: observations (n, 24) float32, rewards (n,), terminated (n,), truncated (n,). Rewards have the actions'
    precision, as the published ones do under NumPy 2.
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
    for j in range(4):  # one after another, as the published environment does: a sum has other bits
        rewards -= cost[:, j]
    rewards[fell] = FALL
    return obs, rewards, terminated, truncated


@np.errstate(divide="ignore", invalid="ignore")  # a ray parallel to an edge divides by zero, and is a miss
def cast_rays(walkers: Sequence[FastWalker], x: np.ndarray, y: np.ndarray) -> np.ndarray:
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
    """Whether the fast walker gives the published one's bits on this machine (a fused multiply-add would not)."""
    rng = np.random.default_rng(0)
    published = gym.make(env_id, disable_env_checker=True)
    fast = FastWalker(WALKERS[env_id], published.spec.max_episode_steps)
    done = True
    for step in range(steps):
        if done:
            published = gym.make(env_id, disable_env_checker=True)  # anew: its world must be fresh, too
            pairs = [(env.reset(seed=step)[0], 0, False) for env in (published, fast)]
        else:
            action = rng.uniform(-1, 1, 4).astype(np.float32)
            pairs = [env.step(action)[:3] for env in (published, fast)]
        (obs, reward, done), (fast_obs, fast_reward, fast_done) = pairs
        if not np.array_equal(obs, fast_obs) or reward != fast_reward or done != fast_done:
            return False
    return True


# ----------------------------------------------------------------------------------------------------------------------
# State and checkpoint
# ----------------------------------------------------------------------------------------------------------------------

FORMAT = "ppo_vec 1"
MAGIC = b"ppo_vec1"  # before the digest that follows the checkpoint's bytes


class State:
    """Everything that must survive, in one object that saves to and loads from one dict of plain types and tensors."""

    def __init__(self, args: Args, task: Task, device: torch.device) -> None:
        # One seed, four streams that never overlap; `seed + i` would make neighbouring runs share environments
        # (Gymnasium seeds each with its own). Stream 0 belongs to the environments: episode_seed().
        _, noise, shuffle, init = np.random.SeedSequence(args.seed).spawn(4)
        torch.manual_seed(int(init.generate_state(1)[0]))
        self.args, self.task = args, task
        self.agent = task.agent(args).to(device)
        self.average = AveragedModel(self.agent, use_buffers=True)  # average_weights
        self.optimizers = make_optimizers(self.agent, args)
        self.reward_scaler = RewardScaler(args.num_envs)
        self.noise_rng = np.random.Generator(np.random.PCG64(noise))
        self.shuffle_rng = torch.Generator().manual_seed(int(shuffle.generate_state(1)[0]))
        self.envs = EnvState(args.num_envs, task.obs_dim)
        self.iteration = 0
        self.global_step = 0  # real steps: the rows in which an environment resets are none
        self.episode_count = 0
        self.recent: deque[tuple[float, int]] = deque(maxlen=100)  # (return, length) of the last episodes
        self.train_time_s = 0.0  # rollouts and updates
        self.wall_time_s = 0.0  # with evaluations and files; of this process and those before it
        self.evaluations: list[dict[str, float]] = []
        self.selection_episodes = 0  # evaluation episodes so far, each on a seed of its own
        self.selection_steps = 0
        self.candidates: list[dict[str, Any]] = []  # the best policies so far, {"agent": weights, "evaluation": row}
        self.solved_at_step: int | None = None
        self.solved_at_s: float | None = None
        self.finished = False
        self.log_sizes: dict[str, int] = {}  # bytes of episodes.csv and the event file that belong to this state

    PLAIN = (
        "iteration", "global_step", "episode_count", "train_time_s", "wall_time_s", "evaluations",
        "selection_episodes", "selection_steps", "candidates", "solved_at_step", "solved_at_s", "finished", "log_sizes",
    )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        scaler = self.reward_scaler
        return {
            **policy_dict(self.agent, self.args, self.task),
            "average": self.average.state_dict(),
            "optimizers": [optimizer.state_dict()["state"] for optimizer in self.optimizers],
            "reward_scaler": {**scaler.moments.state_dict(), "returns": torch.from_numpy(scaler.returns)},
            "noise_rng": self.noise_rng.bit_generator.state,
            "shuffle_rng": self.shuffle_rng.get_state(),
            "envs": self.envs.state_dict(),
            "recent": list(self.recent),
            **{name: getattr(self, name) for name in self.PLAIN},
        }

    def pattern(self) -> dict[str, Any]:
        """What a saved state must fit: one like this, further on."""
        own = self.state_dict()
        row = {"global_step": 0, "time_s": 0.0, **summarize([(0.0, 0)], self.task.goal)}

        def adam(optimizer: torch.optim.Optimizer) -> Callable[[Any], bool]:
            (flat,) = optimizer.param_groups[0]["params"]
            return one_of({}, {0: {"step": torch.zeros(()), "exp_avg": flat.data, "exp_avg_sq": flat.data}})

        def actions_of(episode: Any) -> bool:
            return isinstance(episode, Tensor) and fits(episode, torch.empty(len(episode), self.task.action_dim))

        return {
            **own,
            "args": lambda args: True,  # saved_args has seen them
            "optimizers": [adam(optimizer) for optimizer in self.optimizers],
            "envs": {**own["envs"], "actions": [one_of(None, actions_of)] * self.args.num_envs},
            "recent": list_of((0.0, 0)),
            "evaluations": list_of(row),
            "candidates": list_of({"agent": own["agent"], "evaluation": row}),
            "solved_at_step": one_of(None, 0),
            "solved_at_s": one_of(None, 0.0),
            "log_sizes": {"events": 0, "episodes": 0},
        }

    def load(self, saved: dict[str, Any]) -> None:
        """Raises UserError if `saved` does not fit this agent and environment."""
        try:
            pattern = self.pattern()
            for key in saved.keys() | pattern.keys():
                if not fits(saved[key], pattern[key]):
                    raise ValueError(f"{key} is not what was expected")
            self.agent.load_state_dict(saved["agent"])
            self.average.load_state_dict(saved["average"])
            for optimizer, state in zip(self.optimizers, saved["optimizers"]):
                optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
            moments = dict(saved["reward_scaler"])
            self.reward_scaler.returns[...] = moments.pop("returns").numpy()
            self.reward_scaler.moments.load_state_dict(moments)
            self.noise_rng.bit_generator.state = saved["noise_rng"]
            self.shuffle_rng.set_state(saved["shuffle_rng"])
            self.envs.load_state_dict(saved["envs"])
            self.recent.extend(tuple(row) for row in saved["recent"])
            for name in self.PLAIN:
                setattr(self, name, saved[name])
        except Exception as error:
            raise UserError(f"the checkpoint does not fit: {' '.join(str(error).split())[:200]}") from error


def fits(saved: Any, pattern: Any) -> bool:
    """Whether `saved` has the types, keys and shapes of `pattern`, in which a function decides for itself.

    The digest tells that a file is intact, not who made it; and a fused optimizer does not look at shapes: it writes
    past the end of a tensor that is too small.
    """
    if callable(pattern):
        return pattern(saved)
    if isinstance(pattern, Tensor):
        same = isinstance(saved, Tensor) and (saved.shape, saved.dtype) == (pattern.shape, pattern.dtype)
        return same and saved.layout == pattern.layout and saved.is_contiguous()
    if isinstance(pattern, dict):  # a module's state is an OrderedDict
        same = isinstance(saved, dict) and saved.keys() == pattern.keys()
        return same and all(fits(saved[k], pattern[k]) for k in saved)
    same = type(saved) is type(pattern)
    if isinstance(pattern, (list, tuple)):
        return same and len(saved) == len(pattern) and all(map(fits, saved, pattern))
    return same


def list_of(pattern: Any) -> Callable[[Any], bool]:
    return lambda saved: type(saved) is list and all(fits(row, pattern) for row in saved)


def one_of(*patterns: Any) -> Callable[[Any], bool]:
    return lambda saved: any(fits(saved, pattern) for pattern in patterns)


def policy_dict(agent: Agent, args: Args, task: Task) -> dict[str, Any]:
    """A policy as plain types and tensors: what best.pt holds and a checkpoint begins with."""
    return {
        "format": FORMAT,
        "args": {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(args).items()},
        "obs_dim": task.obs_dim,
        "low": torch.from_numpy(task.low),
        "high": torch.from_numpy(task.high),
        "agent": agent.state_dict(),
    }


def write_file(path: Path, data: bytes, keep: Path | None = None) -> None:
    """Replaces `path` by `data`; a crash leaves the old file or the new one whole. `keep` becomes the old one."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
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


def encode(tree: dict[str, Any]) -> bytes:
    """torch.save's bytes and their SHA-256 behind them: torch.load ignores the tail, but not a flipped bit's effect."""
    buffer = io.BytesIO()
    torch.save(tree, buffer)
    data = buffer.getvalue()
    return data + MAGIC + hashlib.sha256(data).digest()


def decode(data: bytes) -> dict[str, Any]:
    """Raises ValueError, saying why, for bytes that are not an intact checkpoint of ours. Executes nothing."""
    body, tail = data[: -len(MAGIC) - 32], data[-len(MAGIC) - 32 :]
    if not tail.startswith(MAGIC):
        raise ValueError("is not a ppo_vec checkpoint, or is cut off")
    if hashlib.sha256(body).digest() != tail[len(MAGIC) :]:
        raise ValueError("is damaged: its digest does not match")
    try:
        with warnings.catch_warnings():  # torch's about strange pickles
            warnings.simplefilter("ignore")
            tree = torch.load(io.BytesIO(body), map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a crafted file makes the restricted unpickler raise
        raise ValueError("cannot be read as plain tensors") from error
    if not isinstance(tree, dict) or tree.get("format") != FORMAT:
        raise ValueError(f"is not of the format {FORMAT!r}")
    return tree


def read_checkpoint(where: str, policy: bool = False) -> tuple[Path, dict[str, Any]]:
    """The newest intact checkpoint of a run folder, or of a file and its predecessor; with `policy`, best.pt first.

    Returns the file used and its content. Raises UserError if there is none.
    """
    path = Path(where)
    if os.path.isdir(path):  # Path.is_dir raises for a name that is too long
        names = ["best.pt"] * policy + ["checkpoint.pt", "checkpoint.previous.pt"]
        candidates = [path / name for name in names]
    else:
        candidates = [path, path.with_name("checkpoint.previous.pt")] if path.name == "checkpoint.pt" else [path]
    complaints = []
    for candidate in candidates:
        try:
            tree = decode(candidate.read_bytes())
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            complaints.append(f"{candidate} {reason}")
            continue
        for complaint in complaints:
            warn(f"{complaint}; using {candidate.name}")
        return candidate, tree
    raise UserError("; ".join(complaints) or f"there is no checkpoint at {where}")


def saved_args(tree: dict[str, Any]) -> Args:
    """The arguments in a checkpoint. Raises UserError for ones that are not ours."""
    try:
        saved = {k: tuple(v) if isinstance(v, list) else v for k, v in tree["args"].items()}
        args = Args(**saved)
        for f in dataclasses.fields(Args):
            value, plain = getattr(args, f.name), type(getattr(Args(), f.name))
            if plain is type(None):  # optional: int, float or str by the annotation
                plain = type(None) if value is None else {"int": int, "float": float, "str": str}[f.type.split()[0]]
            if type(value) is not plain and not (plain is float and type(value) is int):
                raise TypeError(f"{f.name} is a {type(value).__name__}")
            if isinstance(value, tuple) and not all(type(size) is int for size in value):
                raise TypeError(f"{f.name} is {value}")
    except Exception as error:
        reason = " ".join(str(error).split())
        raise UserError(f"the checkpoint's arguments are not ppo_vec's: {reason}") from error
    args = dataclasses.replace(args, resume=None, evaluate=None)
    args.validate()
    return args


def load_policy(where: str | Path) -> Policy:
    """A run folder (its best policy) or a checkpoint -> a function from raw observations to deterministic actions.

    (obs_dim,) -> (action_dim,), or (n, obs_dim) -> (n, action_dim), float32, ready for env.step().
    Raises UserError if there is no intact checkpoint.
    """
    return restore_policy(read_checkpoint(str(where), policy=True)[1])


def restore_policy(tree: dict[str, Any]) -> Policy:
    try:
        low, high = tree["low"].numpy(), tree["high"].numpy()
        with torch.random.fork_rng(devices=[]):
            agent = Agent(int(tree["obs_dim"]), len(low), saved_args(tree))
        agent.load_state_dict(tree["agent"])
        return Policy(agent.policy_arrays(), agent, low, high)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"the checkpoint holds no policy of ours: {' '.join(str(error).split())[:200]}") from error


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation
# ----------------------------------------------------------------------------------------------------------------------

EVALUATIONS = 20  # periodic evaluations a run, at most
EVALUATION_EPISODES = 10
CANDIDATES = 8  # policies kept for the final choice
HEAT_EPISODES = 40  # in which they compete for its three places beside the last weights
FINALISTS = 3
CONFIRMATION_EPISODES = 100  # to call the task solved
DOUBT_EPISODES = 20  # before those: one fall in ten shows in them
EVALUATION_SHARE = 0.16  # of the steps trained, confirmations apart; without an update a step costs a third


def run_episodes(
    task: Task, policy: Policy, seeds: Sequence[int], as_published: bool, stochastic: bool = False,
    beat: Callable[[], None] = lambda: None,
) -> list[tuple[float, int]]:  # fmt: skip
    """(undiscounted raw return, length) of one episode per seed, all at once, each in an environment of its own.

    One episode each is a quota that favours no short ones (SB3 #402). The result does not depend on how seeds are
    split over calls, as long as they are split at multiples of TILE.
    """
    if not seeds:
        return []
    envs, first = [], []
    for seed in seeds:
        envs.append(task.make_env(as_published))
        first.append(reset_env(envs[-1], seed))
        beat()
    obs = np.stack(first)
    rngs = [np.random.default_rng((seed, 1)) for seed in seeds] if stochastic else []
    returns, lengths, running = np.zeros(len(seeds)), np.zeros(len(seeds), int), np.arange(len(seeds))
    limit = task.max_episode_steps or ENDLESS
    while len(running):
        noise = np.stack([rng.standard_normal(task.action_dim, np.float32) for rng in rngs]) if stochastic else None
        actions = policy.env_action(policy.sample(obs, noise))
        obs[running], rewards, terminated, truncated = step_envs([envs[i] for i in running], actions[running])
        returns[running] += rewards
        lengths[running] += 1
        running = running[~(terminated | truncated) & (lengths[running] < limit)]
        beat()
    for env in envs:
        env.close()
    return list(zip(returns.tolist(), lengths.tolist()))


def summarize(episodes: list[tuple[float, int]], goal: float | None) -> dict[str, float]:
    returns = np.array([ret for ret, _ in episodes])
    solved = float((returns >= goal).mean()) if goal is not None else None
    return {
        "episodes": len(returns), "mean": float(returns.mean()), "std": float(returns.std()),
        "min": float(returns.min()), "frac_solved": solved,
    }  # fmt: skip


def evaluation_due(state: State, args: Args) -> bool:
    """At most EVALUATIONS a run, and no more than their share. Counted in steps: the same in every run of a seed."""
    last = state.evaluations[-1]["global_step"] if state.evaluations else 0
    if state.global_step >= args.total_timesteps:  # deliver() evaluates the last weights
        return False
    spaced = state.global_step - last >= args.total_timesteps / EVALUATIONS
    return spaced and state.selection_steps <= EVALUATION_SHARE * state.global_step


def evaluate_progress(envs: VecEnv, state: State, run: Run) -> None:
    """A periodic evaluation, on fresh selection seeds; keeps the best policy, notes when the task is solved."""
    policy, goal = state.agent.policy_arrays(), state.task.goal

    def more(count: int) -> list[tuple[float, int]]:
        first = SELECTION_SEEDS + state.selection_episodes
        state.selection_episodes += count
        return envs.evaluate(policy, list(range(first, first + count)), as_published=False)

    def mean(episodes: list[tuple[float, int]]) -> float:
        return sum(ret for ret, _ in episodes) / len(episodes)

    episodes = more(EVALUATION_EPISODES)
    if goal is not None and state.solved_at_step is None and mean(episodes) >= goal:
        episodes += more(DOUBT_EPISODES)
    state.selection_steps += sum(length for _, length in episodes)
    if goal is not None and state.solved_at_step is None and mean(episodes) >= goal:
        confirmation = more(CONFIRMATION_EPISODES)
        if mean(confirmation) >= goal:
            state.solved_at_step, state.solved_at_s = state.global_step, run.wall_time()
        episodes += confirmation
    row = {"global_step": state.global_step, "time_s": run.wall_time(), **summarize(episodes, goal)}
    state.evaluations.append(row)
    state.candidates.append({"agent": copy.deepcopy(state.agent.state_dict()), "evaluation": row})
    rank_candidates(state, run)
    run.log_evaluation(row)
    run.write_summary(envs, state.candidates[0]["evaluation"], row)


def standing(candidate: dict[str, Any]) -> float:
    """Its mean return less one standard error: between two equal means, the one without a fall was no luck."""
    evaluation = candidate["evaluation"]
    return evaluation["mean"] - evaluation["std"] / math.sqrt(evaluation["episodes"])


def rank_candidates(state: State, run: Run) -> None:
    """Keeps the few best; best.pt is the first of them."""
    state.candidates.sort(key=standing, reverse=True)
    del state.candidates[CANDIDATES:]
    run.save_best()


def deliver(envs: VecEnv, state: State, run: Run, args: Args) -> None:
    """The end of a run: the choice of what it delivers, and the test of that and of the last weights.

    A few periodic episodes cannot tell a policy that falls once in fifty from one that falls once in ten. So the
    candidates meet on fresh selection seeds, and the best of them, the last policy and, with --swa-share, the mean of
    the last weights on more; the winner is best.pt. The test, on other seeds and the published environment, chooses
    nothing.
    """
    goal = state.task.goal
    last, average = (
        {"agent": copy.deepcopy(net.state_dict()), "evaluation": {"global_step": state.global_step}}
        for net in (state.agent, state.average.module)
    )
    others = [c for c in state.candidates if c["evaluation"]["global_step"] != state.global_step]
    agent = copy.deepcopy(state.agent)

    def name_of(candidate: dict[str, Any]) -> str:
        kind = "mean weights up to" if candidate is average else "weights of"
        return f"{kind} step {candidate['evaluation']['global_step']}"

    def evaluate(candidate: dict[str, Any], first: int, count: int, as_published: bool) -> dict[str, float]:
        agent.load_state_dict(candidate["agent"])
        seeds = list(range(first, first + count))
        return summarize(envs.evaluate(agent.policy_arrays(), seeds, as_published), goal)

    def compete(candidates: list[dict[str, Any]], count: int) -> None:
        first = SELECTION_SEEDS + state.selection_episodes
        state.selection_episodes += count
        for candidate in candidates:
            step = candidate["evaluation"]["global_step"]
            result = evaluate(candidate, first, count, as_published=False)
            candidate["evaluation"] = {"global_step": step, "time_s": run.wall_time(), **result}
            say(f"choosing: {name_of(candidate)}: {describe(result)}")

    if len(others) > FINALISTS:
        compete(others, min(HEAT_EPISODES, args.eval_episodes))
        others.sort(key=standing, reverse=True)
    state.candidates = [last, *[average] * bool(args.swa_share), *others[:FINALISTS]]
    compete(state.candidates, 2 * args.eval_episodes)
    state.evaluations.append(last["evaluation"])
    run.log_evaluation(last["evaluation"])
    enough = last["evaluation"]["episodes"] >= CONFIRMATION_EPISODES
    if enough and goal is not None and last["evaluation"]["mean"] >= goal and state.solved_at_step is None:
        state.solved_at_step, state.solved_at_s = state.global_step, run.wall_time()
    rank_candidates(state, run)

    best = state.candidates[0]
    last_test = evaluate(last, TEST_SEEDS, args.eval_episodes, as_published=True)
    best_test = last_test if best is last else evaluate(best, TEST_SEEDS, args.eval_episodes, as_published=True)
    say(f"test on unseen episodes of the published environment: last weights {describe(last_test)}")
    say(f"delivered policy, {name_of(best)}: {describe(best_test)}")
    state.finished = True
    run.write_summary(envs, best_test, last_test)
    run.save()
    if args.capture_video:
        agent.load_state_dict(best["agent"])
        say(f"video: {record_video(state.task, state.task.policy(agent), run.path / 'videos', TEST_SEEDS)}")


def describe(result: dict[str, float]) -> str:
    solved = "" if result["frac_solved"] is None else f", {result['frac_solved']:.0%} solved"
    numbers = f"{result['mean']:.1f} +- {result['std']:.1f} (min {result['min']:.1f}"
    return f"{numbers}{solved}, {result['episodes']} episodes)"


def record_video(task: Task, policy: Policy, folder: Path, seed: int) -> Path:
    """Writes a whole episode of the deterministic policy as an mp4, frame by frame (RecordVideo would keep all).

    Raises TrainingError where that fails.
    """
    import imageio_ffmpeg

    path = folder / f"{file_name(task.env_id)}-seed{seed}.mp4"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.closing(gym.make(task.env_id, render_mode="rgb_array", disable_env_checker=True)) as env:
            obs, done = reset_env(env, seed), False
            frame = env.render()
            # Two encoder threads; macro_block_size 2: players want even sizes, not the multiples of 16 of the default.
            writer = imageio_ffmpeg.write_frames(
                str(path), (frame.shape[1], frame.shape[0]), fps=env.metadata.get("render_fps", 30), macro_block_size=2,
                output_params=["-threads", "2"],
            )  # fmt: skip
            with contextlib.closing(writer):
                writer.send(None)
                for _ in range(task.max_episode_steps or ENDLESS):
                    writer.send(np.ascontiguousarray(frame))
                    if done:
                        break
                    (obs,), _, terminated, truncated = step_envs([env], policy(obs)[None])
                    done = bool(terminated[0] or truncated[0])
                    frame = env.render()
    except Exception as error:  # a full disk, a renderer that has lost its display, ...
        raise TrainingError(f"cannot write {path}: {' '.join(str(error).split())[:200]}") from error
    return path


# ----------------------------------------------------------------------------------------------------------------------
# Files, logs and signals of a run
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


class AppendLog:
    """A file that only grows, and survives a full disk: what could not be written is kept and tried again.

    `size` are the bytes that belong to the run so far; a resumed run cuts off what was written after its checkpoint.
    """

    def __init__(self, path: Path, header: bytes, size: int | None) -> None:
        self.path, self.pending, self.failing = path, bytearray(), False
        self.size = min(size or 0, path.stat().st_size) if path.exists() else 0
        if self.size == 0:  # new, or lost
            self.pending += header

    def flush(self, sync: bool = False) -> bool:
        """Writes what is pending, to the disk itself with `sync`; returns whether the file now holds everything."""
        try:
            with open(self.path, "r+b" if self.path.exists() else "wb") as file:
                file.seek(self.size)
                file.write(self.pending)
                file.truncate()
                if sync:
                    file.flush()
                    os.fsync(file.fileno())
        except OSError as error:
            if not self.failing:
                warn(f"cannot write {self.path} ({error.strerror}); the run goes on and tries again")
            self.failing = True
            return False
        if self.failing:
            warn(f"{self.path} can be written again; nothing is missing")
        self.failing = False
        self.size += len(self.pending)
        self.pending.clear()
        return True


class Run:
    """A run's folder, its logs, checkpoints and progress bar, and the signals that end it."""

    def __init__(self, args: Args, task: Task, state: State, checkpoint: dict[str, Any] | None) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        self.args, self.task, self.state, self.pid = args, task, state, os.getpid()
        self.path = Path(args.runs_dir) / args.run_name
        self.stopped: int | None = None  # the signal that asked the run to end
        self.started = time.perf_counter()
        self.wall_before, self.steps_before = state.wall_time_s, state.global_step
        self.saved_at, self.save_cost = -math.inf, 0.0
        self.save_failing = False
        self.unwritten: dict[str, bytes] = {}  # files that a full disk refused, and their content
        self.warned_of: set[str] = set()

        def encode_event(**fields: Any) -> bytes:
            buffer = io.BytesIO()
            RecordWriter(buffer).write(Event(wall_time=time.time(), **fields).SerializeToString())
            return buffer.getvalue()

        self.encode_event = encode_event
        # One event file per run, continued on resume: one axis, no step twice (SB3 #433, #975).
        existing = sorted(self.path.glob("events.out.tfevents.*"))
        events = existing[0] if existing else self.path / f"events.out.tfevents.{int(time.time())}.{platform.node()}"
        sizes = state.log_sizes if checkpoint else {}
        self.events = AppendLog(events, encode_event(file_version="brain.Event:2"), sizes.get("events"))
        header = b"global_step,time_s,return,length,env\n"
        self.episodes = AppendLog(self.path / "episodes.csv", header, sizes.get("episodes"))
        self.wandb = None
        if args.track:
            import wandb

            try:
                self.wandb = wandb.init(
                    project="ppo_vec", name=args.run_name, id=args.run_name, resume="allow", config=vars(args)
                )
            except Exception as error:  # not logged in, no network, an id that it refuses
                raise UserError(f"--track: {' '.join(str(error).split())}") from error

    def __enter__(self) -> Run:
        args = self.args
        self.write("args.json", json.dumps(self.describe(), indent=2).encode())
        with contextlib.suppress(OSError, ValueError):  # of a finished run that goes on
            summary = json.loads((self.path / "summary.json").read_text())
            if summary.get("finished") and not self.state.finished:
                self.write("summary.json", json.dumps({**summary, "finished": False}, indent=2).encode())
        say(f"{args.env_id}, seed {args.seed}, in {self.path}; tuned values: {tuned_flags(args) or 'none'}")
        self.bar = progress_bar(args.total_timesteps, self.steps_before, "step")
        self.handlers = {}
        if threading.current_thread() is threading.main_thread():
            self.handlers = {s: signal.signal(s, self.on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
            if hasattr(signal, "SIGALRM"):
                self.handlers[signal.SIGALRM] = signal.signal(signal.SIGALRM, self.on_alarm)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> bool:
        if hasattr(signal, "SIGALRM"):
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if self.bar is not None:
            with contextlib.suppress(OSError):
                self.bar.close()
        self.events.flush(), self.episodes.flush()
        self.write_curve()
        if self.wandb is not None:
            self.wandb.finish()
        if self.stopped and not self.state.finished:
            say(f"stopped by {signal.Signals(self.stopped).name}; continue with: --resume {self.path}")
        return kind is Interrupted

    def on_signal(self, number: int, _: Any) -> None:
        """The first signal lets the iteration finish, for a few seconds at most; the second ends the run at once."""
        if os.getpid() != self.pid:
            return  # a worker that has just been forked and not yet changed its handlers
        if self.stopped:
            for process in multiprocessing.active_children():
                process.kill()
            os._exit(128 + number)
        self.stopped = number
        if hasattr(signal, "SIGALRM"):
            signal.setitimer(signal.ITIMER_REAL, 3.0)

    def on_alarm(self, *_: Any) -> None:
        raise Interrupted  # what has happened since the last checkpoint is done again on --resume

    def describe(self) -> dict[str, Any]:
        """What args.json holds: this session of the run, and under "earlier" those that it continues."""
        earlier = []
        with contextlib.suppress(OSError, ValueError):
            before = json.loads((self.path / "args.json").read_text())
            earlier = [*before.pop("earlier", []), before]
        return {**describe_run(self.args), "earlier": earlier}

    # -- what is written ------------------------------------------------------------------------------------------

    def write(self, name: str, data: bytes) -> None:
        """Replaces a file of the folder. What a full disk refuses is tried again with every checkpoint."""
        self.unwritten[name] = data
        self.write_again()

    def write_again(self) -> None:
        for name, data in list(self.unwritten.items()):
            try:
                write_file(self.path / name, data)
                del self.unwritten[name]
            except OSError as error:
                if name not in self.warned_of:
                    warn(f"cannot write {self.path / name} ({error.strerror}); the run goes on and tries again")
                self.warned_of.add(name)

    def missing(self) -> list[str]:
        """The files that do not hold what they should."""
        logs = [log.path.name for log in (self.events, self.episodes) if log.pending]
        return [*self.unwritten, *logs, *(["checkpoint.pt"] if self.save_failing else [])]

    def save(self) -> None:
        """Writes checkpoint.pt, keeping the one before; a disk that is full does not end the run."""
        state = self.state
        began = time.perf_counter()
        state.wall_time_s = self.wall_time()
        self.write_again()
        try:
            if all([self.events.flush(sync=True), self.episodes.flush(sync=True)]):
                state.log_sizes = {"events": self.events.size, "episodes": self.episodes.size}
                data = encode(state.state_dict())
                # The first one takes the place of what may be damaged, and what the run was resumed from is kept.
                keep = self.path / "checkpoint.previous.pt" if self.saved_at > -math.inf else None
                write_file(self.path / "checkpoint.pt", data, keep=keep)
                if self.save_failing:
                    warn("checkpoints can be written again")
                self.save_failing = False
            else:
                self.save_failing = True
        except OSError as error:
            if not self.save_failing:
                warn(f"cannot write a checkpoint ({error.strerror}); the run goes on and tries again")
            self.save_failing = True
        self.saved_at = time.perf_counter()
        self.save_cost = self.saved_at - began

    def save_now_and_then(self) -> None:
        """A checkpoint at a wall-clock cadence that costs at most a hundredth of the time, whatever the disk."""
        if time.perf_counter() - self.saved_at > max(2.0, 100 * self.save_cost):
            self.save()

    def save_best(self) -> None:
        tree = {**policy_dict(self.state.agent, self.args, self.task), **self.state.candidates[0]}
        self.write("best.pt", encode(tree))

    def write_summary(self, envs: VecEnv, best: dict[str, Any], last: dict[str, Any]) -> None:
        """`best`: the evaluation of best.pt, `last`: of the last weights."""
        state = self.state
        summary = {
            "env_id": self.args.env_id,
            "seed": self.args.seed,
            "global_step": state.global_step,
            "wall_time_s": round(self.wall_time(), 3),
            "train_time_s": round(state.train_time_s, 3),
            "sps": round(state.global_step / max(state.train_time_s, 1e-9), 1),
            **{f"eval_{k}": best[k] for k in ("episodes", "mean", "std", "min", "frac_solved")},
            **{f"last_eval_{k}": last[k] for k in ("mean", "std", "min")},
            "solved_at_step": state.solved_at_step,
            "solved_at_s": state.solved_at_s,
            "worker_restarts": envs.restarts,
            "finished": state.finished,
        }
        self.write("summary.json", json.dumps(summary, indent=2).encode())

    def write_curve(self) -> None:
        try:
            plot_learning_curve(self.path, self.task.goal)
        except ImportError:
            warn("no learning_curve.png without matplotlib")
        except (OSError, ValueError) as error:  # a full disk refuses the picture, or has cut off its data
            warn(f"cannot write learning_curve.png ({error})")

    # -- what is logged -------------------------------------------------------------------------------------------

    def wall_time(self) -> float:
        return self.wall_before + time.perf_counter() - self.started

    def scalars(self, step: int, values: dict[str, float]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])
        self.events.pending += self.encode_event(step=step, summary=summary)
        if self.wandb is not None:
            self.wandb.log(values, step=step)

    def log(
        self, rollout: Rollout, episodes: list[Episode], metrics: dict[str, float], now: Args, rollout_s: float,
        update_s: float,
    ) -> None:  # fmt: skip
        """One iteration: TensorBoard, episodes.csv, progress bar. Every tag is explained in the README."""
        state = self.state
        valid = int(rollout.valid.sum())
        whole = [episode for episode in episodes if not episode.practice]
        for episode in whole:
            self.scalars(
                episode.global_step,
                {"charts/episodic_return": episode.ret, "charts/episodic_length": float(episode.length)},
            )
            line = f"{episode.global_step},{self.wall_time():.3f},{episode.ret!r},{episode.length},{episode.env}\n"
            self.episodes.pending += line.encode()
            state.recent.append((episode.ret, episode.length))
        values = {
            "charts/learning_rate": now.learning_rate,
            "charts/SPS": valid / (rollout_s + update_s),
            "charts/SPS_rollout": valid / rollout_s,
            "charts/SPS_total": (state.global_step - self.steps_before) / (time.perf_counter() - self.started),
            "charts/valid_fraction": valid / self.args.batch_size,
            "charts/action_std": self.action_std(state.agent, rollout),
            "time/rollout_s": rollout_s,
            "time/update_s": update_s,
            **{f"losses/{name}": value for name, value in metrics.items()},
        }
        for tag, some in (("fall_rate", whole), ("practice_fall_rate", [e for e in episodes if e.practice])):
            if some:
                values[f"charts/{tag}"] = sum(e.fell for e in some) / len(some)
        self.scalars(state.global_step, values)
        self.events.flush(), self.episodes.flush()
        if self.bar is not None:
            with contextlib.suppress(OSError):  # stderr may be a file on a full disk
                self.bar.update(min(state.global_step, self.args.total_timesteps) - self.bar.n)
                shown = {"SPS": f"{values['charts/SPS']:.0f}"}
                if state.recent:
                    returns, lengths = zip(*state.recent)
                    shown = {"return": f"{np.mean(returns):.1f}", "length": f"{np.mean(lengths):.0f}", **shown}
                self.bar.set_postfix(shown)

    @staticmethod
    def action_std(agent: Agent, rollout: Rollout) -> float:
        with torch.no_grad():
            if agent.state_dependent_std:
                return float(agent.mean_logstd(agent.normalizer(rollout.obs[:-1]))[1].exp().mean())
            return float(agent.actor.logstd.exp().mean())

    def log_evaluation(self, row: dict[str, float]) -> None:
        self.scalars(self.state.global_step, {"charts/eval_return": row["mean"]})
        say(f"step {self.state.global_step}: evaluation {describe(row)}")


class Interrupted(BaseException):
    """A signal came and the iteration did not finish in time."""


def progress_bar(total: int, initial: int, unit: str) -> Any:
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    interval = 0.5 if sys.stderr.isatty() else 30.0  # a log file needs no redrawing
    return tqdm(total=total, initial=initial, unit=unit, mininterval=interval, dynamic_ncols=True)


def describe_run(args: Args) -> dict[str, Any]:
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


def plot_learning_curve(path: Path, goal: float | None) -> None:
    """learning_curve.png: the mean return of a window of episodes with its deviation, against steps; evaluations."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about a run without a finished episode
        rows = np.loadtxt(path / "episodes.csv", delimiter=",", skiprows=1, ndmin=2)
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
    with contextlib.suppress(OSError, ValueError):
        tree = decode((path / "checkpoint.pt").read_bytes())
        points = [(e["global_step"], e["mean"]) for e in tree["evaluations"]]
        if points:
            axes.plot(*zip(*points), "o", ms=5, color="C1", label="evaluation, deterministic")
        if tree["solved_at_step"] is not None:
            axes.axvline(tree["solved_at_step"], color="C2", lw=1, ls=":", label="solved")
    if goal is not None:
        axes.axhline(goal, color="0.4", lw=1, ls="--", label=f"goal {goal:g}")
    axes.set(xlabel="environment steps", ylabel="return", title=path.name)
    axes.legend(loc="lower right", fontsize="small")
    axes.grid(alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=120)
    write_file(path / "learning_curve.png", buffer.getvalue())


# ----------------------------------------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------------------------------------

CHANGEABLE = {  # on --resume; whatever else changed would make it another run
    "total_timesteps", "num_workers", "worker_timeout", "fast_walker", "track", "capture_video", "eval_episodes",
    "cuda", "resume",
}  # fmt: skip
CHOSEN = {"evaluate", "eval_episodes", "stochastic", "capture_video", "cuda"}  # on --evaluate; no other has an effect


def parse_args(argv: Sequence[str]) -> tuple[Args, dict[str, Any] | None]:
    """Two passes: the env id or the run first, then tyro with that environment's or that run's values as defaults.

    Returns the arguments and, for --resume and --evaluate, the checkpoint.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for flag in ("env-id", "resume", "evaluate"):
        first.add_argument(f"--{flag}", f"--{flag.replace('-', '_')}")
    try:
        known, _ = first.parse_known_args(list(argv))
    except argparse.ArgumentError:
        known = argparse.Namespace(env_id=None, resume=None, evaluate=None)  # tyro will say what is wrong
    where = known.evaluate if known.resume is None else known.resume
    if where is None:
        env_id = known.env_id or Args.env_id
        defaults = Args(**{"env_id": env_id, **tuned_values(env_id)})
        args = tyro.cli(Args, args=list(argv), default=defaults)
        args.validate()
        return args, None

    if not where:
        raise UserError("--resume and --evaluate need a run folder or a checkpoint")
    path, tree = read_checkpoint(where, policy=known.evaluate is not None)
    saved = saved_args(tree)
    if known.env_id not in (None, saved.env_id):
        raise UserError(f"{where} was trained on {saved.env_id}, not on {known.env_id}")
    if ":" in saved.env_id and known.env_id is None:
        raise UserError(f"{where} would import code; if you trust it, add --env-id {saved.env_id!r}")
    if known.evaluate:  # what only a training needs
        saved = dataclasses.replace(saved, track=False, capture_video=False, compile=False)
    args = tyro.cli(Args, args=list(argv), default=saved)
    args.validate()
    mode, changeable = ("resumed", CHANGEABLE) if known.resume else ("evaluated", CHOSEN)
    for f in dataclasses.fields(Args):
        if f.name not in changeable and getattr(args, f.name) != getattr(saved, f.name):
            raise UserError(f"--{f.name.replace('_', '-')} cannot change when a run is {mode}")
    if known.resume:
        if "optimizers" not in tree:
            raise UserError(f"{path} holds a policy only; resume from the run's folder or its checkpoint.pt")
        folder = path.resolve().parent  # wherever the run folder is now
        args = dataclasses.replace(args, runs_dir=str(folder.parent), run_name=folder.name, resume=None)
    return args, tree


def choose_device(args: Args) -> torch.device:
    if args.cuda and not torch.cuda.is_available():
        warn("--cuda: torch finds no CUDA device; training on the CPU")
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # these matrices are too small to share; more threads only wait for each other
    torch.use_deterministic_algorithms(args.torch_deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # costs time, and nothing here reads such memory
    if args.torch_deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    return device


def evaluate_run(args: Args, task: Task, policy: Policy) -> None:
    """--evaluate: test episodes of a saved policy on the published environment; prints the result."""
    seeds = list(range(TEST_SEEDS, TEST_SEEDS + args.eval_episodes))
    episodes: list[tuple[float, int]] = []
    bar = progress_bar(len(seeds), 0, "episode")
    for start in range(0, len(seeds), 5 * TILE):
        batch = seeds[start : start + 5 * TILE]
        episodes += run_episodes(task, policy, batch, as_published=True, stochastic=args.stochastic)
        if bar is not None:
            bar.update(len(batch))
    if bar is not None:
        bar.close()
    how = "stochastic" if args.stochastic else "deterministic"
    lengths = np.mean([length for _, length in episodes])
    print(f"{args.env_id}, {how}: {describe(summarize(episodes, task.goal))}, mean length {lengths:.0f}")
    if args.capture_video:
        where = Path(args.evaluate)
        folder = (where if where.is_dir() else where.parent) / "videos"
        print(f"video: {record_video(task, policy, folder, TEST_SEEDS)}")


def is_finished(checkpoint: dict[str, Any], args: Args) -> bool:
    step = checkpoint.get("global_step")
    return checkpoint.get("finished") is True and isinstance(step, int) and step >= args.total_timesteps


def check_extras(args: Args) -> None:
    """Raises UserError for a flag that cannot work on this machine: hours later would be a bad time to find out."""
    extras = (("--track", args.track, "wandb"), ("--capture-video", args.capture_video, "imageio_ffmpeg"))
    for flag, wanted, module in extras:
        try:
            if wanted:
                importlib.import_module(module)
        except ImportError as error:
            raise UserError(f"{flag} needs a package: pip install {module.replace('_', '-')}") from error
    if args.compile:
        from torch._inductor.cpp_builder import get_cpp_compiler

        try:
            get_cpp_compiler()
        except Exception as error:
            raise UserError("--compile needs a C++ compiler, and torch finds none (CXX can name one)") from error


def check_memory(args: Args, task: Task) -> None:
    """Raises UserError for a rollout that this machine cannot hold."""
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", ()):
        # float32 observations, actions and noise, once shared with the workers and once torch's.
        size = 8 * args.batch_size * (task.obs_dim + 2 * task.action_dim)
        if size > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
            raise UserError(
                f"--num-envs {args.num_envs} x --num-steps {args.num_steps} is a rollout of {size / 2**30:.0f} GiB, "
                "more than this machine's memory"
            )


@contextlib.contextmanager
def run_folder(args: Args, new: bool) -> Iterator[Args]:
    """Names and makes the run folder, and keeps other processes out of it. Gives the arguments with its name.

    Raises UserError if it cannot be written, if another process trains in it, or if a `new` run finds files there.
    """
    from filelock import FileLock, Timeout  # torch depends on it

    name = args.run_name or f"{file_name(args.env_id)}__{args.exp_name}__{args.seed}__{int(time.time())}"
    path = Path(args.runs_dir) / name
    lock = FileLock(path / ".lock")

    def check_new() -> None:
        if new and any(file.name != ".lock" for file in path.iterdir()):
            raise UserError(f"{path} already holds a run; --resume {path} continues it")

    try:
        path.mkdir(parents=True, exist_ok=True)
        check_new()
        lock.acquire(timeout=5)  # a trainer that has just been stopped may still be ending
        check_new()  # another one may have come first
    except Timeout as error:
        raise UserError(f"another process is training in {path}") from error
    except OSError as error:
        raise UserError(f"cannot write the run folder {path}: {error.strerror}") from error
    try:
        yield dataclasses.replace(args, run_name=name)
    finally:
        lock.release()


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code: 0, 1 training failed, 2 bad input, 130 or 143 stopped by a signal."""
    try:
        args, checkpoint = parse_args(sys.argv[1:] if argv is None else argv)
        check_extras(args)
        task = Task.of(args)
        if not args.evaluate:
            check_memory(args, task)
        if checkpoint is not None:
            policy = restore_policy(checkpoint)
            if (task.obs_dim, task.action_dim) != (len(policy.mean), policy.action_dim):
                raise UserError(f"the checkpoint does not fit {args.env_id}: other observations or actions")
            if args.evaluate:
                handler = signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # there is nothing to save
                evaluate_run(args, task, policy)
                signal.signal(signal.SIGINT, handler)
                return 0
            if is_finished(checkpoint, args):
                say(f"{Path(args.runs_dir) / args.run_name} is finished; a longer --total-timesteps would extend it")
                return 0
        with run_folder(args, new=checkpoint is None) as named:
            run = train(named, task, checkpoint)
        return 128 + run.stopped if run.stopped and not run.state.finished else 0
    except (UserError, TrainingError) as error:
        print(f"ppo_vec.py: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except KeyboardInterrupt:  # before the run has taken the signal over
        return 130


if __name__ == "__main__":
    # As a module: a spawned worker looks its classes up there, and would get copies of those in __main__.
    sys.exit(importlib.import_module(Path(__file__).stem).main())
