"""PPO in one file: masters BipedalWalker on an ordinary machine in minutes.

    python ppo_vec.py --num-envs 16 --cuda             # train; without CUDA it says so once and uses the CPU
    python ppo_vec.py --env-id my_module:MyEnv-v0      # train on your own environment, or another of Gymnasium's
    torchrun --nproc-per-node 2 ppo_vec.py             # train in several processes, on one machine or more
    tensorboard --logdir runs                          # watch
    python ppo_vec.py --resume runs/NAME               # continue an interrupted run, bit for bit
    python ppo_vec.py --evaluate runs/NAME             # 100 test episodes of the run's final policy
    action = ppo_vec.load_policy("runs/NAME")(obs)     # in Python: from raw observations to actions

Order of this file. First the algorithm: Args, Agent, Rollout, collect, gae, policy_loss, value_loss, update, train.
Then the engineering: options and schedules, the optimizer, discrete actions, environments, the acting policy, workers,
walkers, several processes, fast updates, checkpoints (State), evaluation, logs, command line.

PPO: Schulman et al. 2017, arXiv:1707.06347. GAE: Schulman et al. 2015, arXiv:1506.02438. "37 details": Huang et al.
2022, "The 37 Implementation Details of Proximal Policy Optimization". Names follow CleanRL's ppo_continuous_action.py.
"""

from __future__ import annotations

import copy
import ctypes
import dataclasses
import datetime
import errno
import functools
import glob
import hashlib
import importlib
import io
import itertools
import json
import logging
import math
import multiprocessing
import os
import pickletools
import platform
import random
import re
import shlex
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing import connection, resource_tracker
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, get_type_hints

if os.environ.get("CUBLAS_WORKSPACE_CONFIG") not in (":16:8", ":4096:8"):  # else deterministic torch fails on CUDA
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
# Before NumPy is imported; a value that you have set stays. One thread: the acting policy's matrices are small. And one
# kernel for all processors that have AVX2: OpenBLAS has one for each kind, and they differ in the last bits.
os.environ.setdefault("OPENBLAS_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))
CPU = os.environ.get("PROCESSOR_IDENTIFIER", "")  # Windows has that
with suppress(OSError):
    CPU = Path("/proc/cpuinfo").read_text()
    if " avx2 " in CPU:
        os.environ.setdefault("OPENBLAS_CORETYPE", "Haswell")

import Box2D
import gymnasium as gym
import numpy as np
import torch
import torch.distributed as dist
import tyro
from gymnasium.envs.box2d import bipedal_walker as stock
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, async_vector_env
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from tqdm import tqdm

# ---- Arguments -------------------------------------------------------------------------------------------------------


@dataclass
class Args:
    """PPO's hyperparameters. TUNED, further down, has other defaults for a few tasks; Options adds all other flags."""

    seed: int = 1  # seed of everything random: environments, action noise, shuffling and initialisation
    cuda: bool = False  # train on the GPU (the environments, and the actor's copy that acts in them, stay on the CPU)

    total_timesteps: int = 1_000_000  # environment steps to train for; training ends with the rollout that reaches it
    num_envs: int = 16  # the number of environments stepped in parallel (with torchrun: in each process)
    num_steps: int = 128  # steps of each environment per rollout
    learning_rate: float = 3e-4  # the learning rate of the actor's optimizer
    critic_learning_rate: float | None = 1e-3  # the learning rate of the critic's optimizer; None: --learning-rate
    anneal_lr: bool = True  # anneal the learning rates and --ent-coef linearly to zero
    anneal_share: float = 0.2  # anneal over this last share of the training; 1: over all of it, as in CleanRL
    gamma: float = 0.99  # the discount factor
    gae_lambda: float = 0.95  # the lambda of generalized advantage estimation
    value_lambda: float | None = None  # the lambda of the critic's target; None: --gae-lambda; 1: Monte Carlo returns
    num_minibatches: int = 8  # minibatches per epoch
    update_epochs: int = 10  # epochs over each rollout
    norm_adv: Literal["minibatch", "rollout"] = "minibatch"  # what advantages are normalised over
    clip_coef: float = 0.2  # the clip range of the probability ratio
    clip_vloss: bool = False  # also clip the value loss, with --clip-coef
    ent_coef: float = 0.0  # the weight of the entropy bonus
    bounds_loss_coef: float = 0.0  # the weight of the penalty on means beyond the action bounds (as in rl_games)
    max_grad_norm: float = 0.5  # the maximum gradient norm, of actor and critic each
    target_kl: float | None = None  # end the actor's update before the minibatch whose approximate KL exceeds this

    initial_std: float = 0.5  # the initial standard deviation of actions, where -1 and 1 are their bounds
    min_std: float = 0.0  # after each update, standard deviations below this are raised to it
    state_dependent_std: bool = False  # let the actor also output the log standard deviation, clamped to [-20, 2]
    actor_hidden_sizes: tuple[int, ...] = (64, 64)  # the widths of the actor's hidden layers
    critic_hidden_sizes: tuple[int, ...] = (64, 64)  # the widths of the critic's hidden layers
    activation: Literal["tanh", "relu", "leaky_relu", "elu"] = "tanh"  # the activation of the hidden layers
    critic_progress: bool = False  # give the critic two more inputs: the episode's length and return so far

    @property
    def batch_size(self) -> int:  # of each process
        return self.num_envs * self.num_steps

    @property
    def extra_dim(self) -> int:  # the number of inputs that only the critic has; they come after the observation
        return 2 if self.critic_progress else 0


# ---- Agent -----------------------------------------------------------------------------------------------------------

# With torchrun several processes ("ranks") train together: all_ranks(x) is the list of every rank's x; else it is [x].

LOGSTD_MIN, LOGSTD_MAX = -20.0, 2.0  # of a state-dependent standard deviation
OBS_CLIP, REWARD_CLIP = 10.0, 10.0  # of normalised observations and scaled rewards
Tensors = dict[str, Tensor]  # by name


class Normalizer(nn.Module):
    """Running mean and variance, as buffers: so they are saved with the networks (to forget them: CleanRL #425).

    Only `Normalizer.update` changes them: for observations at the end of a PPO update, for returns in `scale_rewards`.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.mean: Tensor = nn.Buffer(torch.zeros(size, dtype=torch.float64))
        self.var: Tensor = nn.Buffer(torch.ones(size, dtype=torch.float64))
        self.count: Tensor = nn.Buffer(torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        """(..., size) raw -> (..., size) float32 of about zero mean and unit variance, clipped to +-10."""
        return ((x - self.mean) * (self.var + 1e-8).rsqrt()).clamp(-OBS_CLIP, OBS_CLIP).float()

    def update(self, rows: Tensor) -> None:
        """Merges the mean and variance of `rows` (n, size) into the running ones (Chan et al. 1979)."""
        rows, n = rows.double(), len(rows)
        for moments in all_ranks(torch.stack((rows.mean(0), rows.var(0, unbiased=False)))):
            mean, var = moments.to(rows.device)
            total, delta = self.count + n, mean - self.mean
            self.mean += delta * n / total
            self.var.copy_((self.var * self.count + var * n + delta**2 * self.count * n / total) / total)
            self.count.copy_(total)


def mlp(sizes: Sequence[int], activation: str, last_gain: float) -> nn.Sequential:
    """Linear layers with activations between them; initial weights are orthogonal, biases 0 (37 details, no. 2)."""
    layers: list[nn.Module] = []
    for i in range(1, len(sizes)):
        linear = nn.Linear(sizes[i - 1], sizes[i])
        nn.init.orthogonal_(linear.weight, gain=math.sqrt(2) if i < len(sizes) - 1 else last_gain)
        nn.init.zeros_(linear.bias)
        layers += [linear, ACTIVATIONS[activation][0]()]
    return nn.Sequential(*layers[:-1])


class Gaussian(nn.Module):
    """A diagonal Gaussian over actions, where -1 and 1 are the action bounds. Samples may lie beyond them."""

    def __init__(self, action_dim: int, args: Args) -> None:
        super().__init__()
        self.outputs = action_dim * (2 if args.state_dependent_std else 1)  # the number of the actor's outputs
        self.first_logstd, self.min_std = math.log(args.initial_std), args.min_std
        logstd = torch.full((action_dim,), self.first_logstd)
        self.logstd = None if args.state_dependent_std else nn.Parameter(logstd)

    def initialize(self, last: nn.Linear) -> None:
        """Sets the bias of the outputs for the log standard deviation, if the actor has them, to log(--initial-std)."""
        if self.logstd is None:
            last.bias.data[len(last.bias) // 2 :] = self.first_logstd

    def mean_logstd(self, out: Tensor) -> tuple[Tensor, Tensor]:
        """The actor's output (..., outputs) -> mean (..., action_dim) and log std: the same shape, or (action_dim,)."""
        if self.logstd is not None:
            return out, self.logstd
        mean, logstd = out.chunk(2, dim=-1)
        return mean, logstd.clamp(LOGSTD_MIN, LOGSTD_MAX)

    def log_prob_entropy(self, out: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """The log density of `actions` (..., action_dim) and the entropy, (...) each, in nats (as torch's Normal)."""
        mean, logstd = self.mean_logstd(out)
        z = (actions - mean) * (-logstd).exp()
        log_norm = logstd.sum(-1) + 0.5 * math.log(2 * math.pi) * actions.shape[-1]
        log_prob = -0.5 * z.square().sum(-1) - log_norm
        return log_prob, (log_norm + 0.5 * actions.shape[-1]).expand_as(log_prob)

    def bounds_loss(self, out: Tensor) -> Tensor:
        """The squared excess of the mean beyond the action bounds, (...).

        All actions beyond a bound have the same effect, so the reward has no gradient that brings a mean back.
        """
        return (self.mean_logstd(out)[0].abs() - 1).clamp(min=0).square().sum(-1)

    @torch.no_grad()
    def keep_min_std(self) -> None:
        """Raises standard deviations below --min-std to it; never with --state-dependent-std."""
        if self.min_std:
            self.logstd.clamp_(min=math.log(self.min_std))  # type: ignore[union-attr]

    @staticmethod
    def noise(generator: torch.Generator, *shape: int) -> Tensor:
        """Standard normal noise, from which `act` makes a sample; drawn here: so workers change no result."""
        return torch.randn(*shape, generator=generator)

    @staticmethod
    def act(out: np.ndarray, std: np.ndarray, noise: np.ndarray | None) -> np.ndarray:
        """In NumPy: output (n, outputs), noise or None for the mean -> actions (n, action_dim).

        std is (action_dim,), or empty with --state-dependent-std: then `out` has mean and log standard deviation.
        """
        if not len(std):
            out, logstd = np.split(out, 2, axis=-1)
            std = np.exp(np.clip(logstd, LOGSTD_MIN, LOGSTD_MAX))
        return out if noise is None else out + std * noise


# The distribution of Box actions; that of Discrete ones is Categorical, further down. For another, such as a Beta, name
# here a class with `outputs` and all methods of Gaussian except mean_logstd. Its noise has a number per action
# dimension, drawn before the mean is known: for a Beta it is uniform, and `act` applies the inverse of the CDF.
Distribution = Gaussian


class Agent(nn.Module):
    """Actor and critic, two networks that share nothing, and the normaliser of what they see."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args, discrete: bool = False) -> None:
        super().__init__()
        self.obs_dim, critic_dim = obs_dim, obs_dim + args.extra_dim
        self.normalizer = Normalizer(critic_dim)
        self.distribution = (Categorical if discrete else Distribution)(action_dim, args)
        sizes = obs_dim, *args.actor_hidden_sizes, self.distribution.outputs
        self.actor = mlp(sizes, args.activation, last_gain=0.01)
        self.critic = mlp((critic_dim, *args.critic_hidden_sizes, 1), args.activation, last_gain=1.0)
        self.distribution.initialize(self.actor[-1])  # type: ignore[arg-type]

    def policy(self, x: Tensor) -> Tensor:
        """Normalised rows (..., obs_dim + extra_dim) -> the actor's output, the parameters of `distribution`."""
        return self.actor(x[..., : self.obs_dim])

    def value(self, x: Tensor) -> Tensor:
        """Normalised rows (..., obs_dim + extra_dim) -> values (...)."""
        return self.critic(x).squeeze(-1)


# ---- Rollout ---------------------------------------------------------------------------------------------------------

# A State, further down, holds what a checkpoint saves: agent, optimizers (the actor's, the critic's), global_step,
# noise_rng, shuffle_rng, return_statistics (a Normalizer), discounted_return (N,), ...; and the networks' device.


@dataclass
class Rollout:
    """What N = num_envs environments did in T = num_steps steps, and what `collect` adds to it.

    D = obs_dim + extra_dim: an observation, then (only with --critic-progress) the episode's length and return so far.
    Of this rank's environments. On the CPU, except obs, normalized_obs, actions, logprobs after `collect`.
    """

    obs: Tensor  # (T + 1, N, D) raw, float64; the last row is the observation after the rollout
    final_obs: Tensor  # (T, N, D) raw, float64; an episode's last, in rows that are only truncated; elsewhere undefined
    actions: Tensor  # (T, N, action_dim) in units of the bounds, not clipped
    rewards: Tensor  # (T, N) raw, float64; after `collect` shaped and scaled, float32
    terminated: Tensor  # (T, N) bool
    truncated: Tensor  # (T, N) bool
    restarted: Tensor  # (N,) bool; row 0 begins a new episode: after a resume or fault the old one could not go on
    episodes: list[dict[str, Any]]  # those that ended, of all ranks: global_step, env, return, length, fell
    # What `collect` adds:
    normalized_obs: Tensor = field(init=False)  # (T + 1, N, D), for the networks
    logprobs: Tensor = field(init=False)  # (T, N) of the policy that acted
    values: Tensor = field(init=False)  # (T, N)
    next_values: Tensor = field(init=False)  # (T, N), see gae


def scale_rewards(state: State, rewards: Tensor, rollout: Rollout, gamma: float) -> Tensor:
    """Divides `rewards` (T, N) by the standard deviation of discounted returns; clips them to +-10; float32.

    37 details, continuous control nos. 8 and 9. Unlike in CleanRL, the statistics take in the whole rollout's returns
    first; then one number divides all its rewards. Updates state.return_statistics and state.discounted_return (N,).
    """
    not_done = (~(rollout.terminated | rollout.truncated)).numpy()
    running = state.discounted_return.numpy() * ~rollout.restarted.numpy()
    returns = rewards.to(torch.float64, copy=True).numpy()  # summed below, six times as fast as in torch
    for t in range(len(returns)):
        returns[t] += gamma * running
        running = returns[t] * not_done[t]
    state.discounted_return = torch.from_numpy(running)
    state.return_statistics.update(torch.from_numpy(returns).view(-1, 1))
    variance = state.return_statistics.var
    std = torch.where(variance > 0, variance, 1.0).sqrt()  # 0: all returns are equal
    return (rewards / std).clamp(-REWARD_CLIP, REWARD_CLIP).float()


@torch.no_grad()
def collect(envs: VecEnv, state: State, args: Options) -> Rollout:
    """Lets every environment take num_steps steps with the current policy.

    The workers act with a NumPy copy of the actor and with noise drawn here: one message to each for a rollout. The
    agent itself then computes values and log probabilities of all steps at once, so that the update's first ratios are
    1. Actions are stored unclipped. Raises TrainingError where a rollout fails.
    """
    agent = state.agent
    shape = args.num_steps, args.num_envs * world_size(), envs.task.action_dim  # for all ranks; each uses its part
    noise = agent.distribution.noise(state.noise_rng, *shape)
    # In the workers, T times: actions[t] = mean(obs[t]) + std * noise[t]; obs[t + 1], ... = env.step(clip(actions[t]))
    rollout = envs.rollout(agent.state_dict(), noise.numpy(), state.global_step)
    state.global_step += args.batch_size * world_size()
    rollout.rewards = training_rewards(state, rollout, args)  # --action-cost and --fall-reward, around scale_rewards
    rollout.obs, rollout.actions = rollout.obs.to(state.device), rollout.actions.to(state.device)
    rollout.normalized_obs = x = agent.normalizer(rollout.obs)
    rollout.logprobs, _ = agent.distribution.log_prob_entropy(agent.policy(x[:-1]), rollout.actions)
    values = agent.value(x).cpu()  # gae has many tiny operations, each slow to start on a GPU
    rollout.values, rollout.next_values = values[:-1], values[1:].clone()  # a copy: the last line changes it
    final_obs = rollout.final_obs[rollout.truncated].to(state.device)
    rollout.next_values[rollout.truncated] = agent.value(agent.normalizer(final_obs)).cpu()
    return rollout


# ---- Generalized advantage estimation --------------------------------------------------------------------------------


def gae(
    rewards: Tensor, values: Tensor, next_values: Tensor, terminated: Tensor, truncated: Tensor,
    gamma: float, gae_lambda: float,
) -> Tensor:  # fmt: skip
    """Generalized advantage estimation (arXiv:1506.02438, equation 16).

    next_values[t] is the value of the observation after step t: values[t + 1]. Where step t ended the episode, the
    environment has been reset by then: a truncated row has the value of the true last observation instead. A
    terminated row is not bootstrapped (termination wins if both are set). Both kinds of end cut the sum of TD errors.

    Args: all (T, N); rewards, values and next_values float32, terminated and truncated bool.
    Returns: advantages (T, N).
    """
    advantages = rewards + gamma * next_values * ~terminated - values  # TD errors (deltas)
    decay = gamma * gae_lambda * ~(terminated | truncated)
    for t in reversed(range(len(rewards) - 1)):
        advantages[t] += decay[t] * advantages[t + 1]
    return advantages


# ---- Update ----------------------------------------------------------------------------------------------------------


def normalized(advantages: Tensor) -> Tensor:
    """Zero mean and unit variance (37 details, no. 7)."""
    return (advantages - advantages.mean()) / (advantages.std() + 1e-8)


def policy_loss(agent: Agent, mb: Tensors, args: Args) -> tuple[Tensor, Tensors]:
    """The clipped surrogate objective (arXiv:1707.06347, equation 7), negated; minus entropy bonus, plus bounds loss.

    Args: mb with normalised obs (B, ...) and actions (B, action_dim); logprobs and advantages (B,).
    Returns: the loss, and metrics without gradient.
    """
    out = agent.policy(mb["obs"])
    logprob, entropy = agent.distribution.log_prob_entropy(out, mb["actions"])
    logratio = logprob - mb["logprobs"]
    ratio = logratio.exp()
    clipped = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
    advantages = normalized(mb["advantages"]) if args.norm_adv == "minibatch" else mb["advantages"]
    pg_loss = -torch.minimum(advantages * ratio, advantages * clipped).mean()
    entropy_loss = entropy.mean()
    loss = pg_loss - args.ent_coef * entropy_loss
    if args.bounds_loss_coef:
        loss = loss + args.bounds_loss_coef * agent.distribution.bounds_loss(out).mean()
    with torch.no_grad():  # two estimates of the KL divergence: http://joschu.net/blog/kl-approx.html
        return loss, {
            "policy_loss": pg_loss.detach(),
            "entropy": entropy_loss.detach(),
            "old_approx_kl": (-logratio).mean(),
            "approx_kl": (ratio - 1 - logratio).mean(),
            "clipfrac": (ratio != clipped).float().mean(),
        }


def value_loss(agent: Agent, mb: Tensors, args: Args) -> tuple[Tensor, Tensors]:
    """0.25 x mean squared error, as CleanRL's 0.5 x MSE x vf_coef .5. With Adam it only affects gradient clipping.

    Args: mb with normalised obs (B, ...); returns and values (B,).
    Returns: the loss, and 0.5 x MSE as a metric without gradient.
    """
    value = agent.value(mb["obs"])
    error = (value - mb["returns"]).square()
    if args.clip_vloss:
        clipped = mb["values"] + (value - mb["values"]).clamp(-args.clip_coef, args.clip_coef)
        error = torch.maximum(error, (clipped - mb["returns"]).square())
    half_mse = 0.5 * error.mean()
    return 0.5 * half_mse, {"value_loss": half_mse.detach()}


def update(state: State, rollout: Rollout, args: Args) -> dict[str, float]:
    """One PPO update: epochs of shuffled minibatches over the rollout. Returns the metrics.

    Advantages are normalised in each minibatch, or with --norm-adv rollout once: then a minibatch in which nothing
    happens does not weigh as much as one with a rare, large reward. The observation normaliser changes only at the
    end: it merges the rollout's observations. Raises TrainingError for a loss or gradient that is not finite.
    """
    agent, (actor_optimizer, critic_optimizer) = state.agent, state.optimizers  # of policy_loss, value_loss
    inputs = rollout.rewards, rollout.values, rollout.next_values, rollout.terminated, rollout.truncated
    advantages = gae(*inputs, args.gamma, args.gae_lambda)
    critic_advantages = advantages if args.value_lambda is None else gae(*inputs, args.gamma, args.value_lambda)
    batch = {  # (T, N, ...) each
        "obs": rollout.normalized_obs[:-1], "actions": rollout.actions, "logprobs": rollout.logprobs,
        "advantages": advantages, "returns": critic_advantages + rollout.values, "values": rollout.values,
    }  # fmt: skip
    parts = all_ranks(batch)  # the environments of all ranks are joined, and (T, N) flattened to rows:
    batch = {name: torch.cat([part[name] for part in parts], dim=1).flatten(0, 1).to(state.device) for name in batch}
    returns = batch["returns"]
    if args.norm_adv == "rollout":
        batch["advantages"] = normalized(batch["advantages"])
    b_inds = [torch.randperm(len(returns), generator=state.shuffle_rng) for _ in range(args.update_epochs)]
    minibatches = torch.stack(b_inds).view(args.update_epochs * args.num_minibatches, -1).to(state.device)

    actor_optimizer.begin_update(args.learning_rate)
    critic_optimizer.begin_update(args.critic_learning_rate or args.learning_rate)
    # Runs `descend`, the loop over minibatches below, for both optimizers at the same time: in threads, or in ranks.
    actor_sums, critic_sums = descend_in_ranks(state, batch, minibatches, args)
    agent.distribution.keep_min_std()
    agent.normalizer.update(rollout.obs[:-1].flatten(0, 1))
    explained = float(1 - (returns - batch["values"]).var() / returns.var()) if returns.var() > 0 else 0.0
    return {**means(actor_sums), **means(critic_sums), "explained_variance": explained}


@torch.no_grad()
def descend(optimizer: FlatAdam, batch: Tensors, minibatches: Tensor, args: Args) -> Tensors:
    """One step of Adam for each row of `minibatches`, (number of minibatches, their size) indices into `batch`.

    None beyond --target-kl. Returns "steps", how many were taken, and the sum of each metric over them.
    """
    gradient_of = optimizer.recording or flat_gradient  # its recorded operations have the same bits, sooner: `record`
    rows = []  # for each minibatch 1 or 0 (was a step taken?), then the metrics
    for mb_inds in minibatches:
        gradient, metrics = gradient_of(optimizer, batch, mb_inds, args)
        if args.target_kl is not None and "approx_kl" in metrics:  # the actor's; before the step, not after
            optimizer.halt_beyond(args.target_kl, metrics["approx_kl"])
        metrics[f"{optimizer.loss_of.__name__}_grad_norm"] = optimizer.take_step(gradient, args.max_grad_norm)
        rows.append(torch.stack([1 - optimizer.halted, *metrics.values()]))
        if args.target_kl is not None and optimizer.flat.is_cpu and optimizer.halted:  # to ask a GPU is to wait for it
            break
    table = torch.stack(rows)  # where no step was taken, for target_kl, a row may hold NaN
    sums = torch.where(table[:, :1] > 0, table, 0.0).sum(0)
    return dict(zip(("steps", *metrics), sums))


def flat_gradient(optimizer: FlatAdam, batch: Tensors, mb_inds: Tensor, args: Args) -> tuple[Tensor, Tensors]:
    """The gradient of optimizer.loss_of, policy_loss or value_loss, as one flat tensor, and the loss's metrics."""
    with torch.enable_grad():
        loss, metrics = optimizer.loss_of(optimizer.agent, {name: rows[mb_inds] for name, rows in batch.items()}, args)
        gradients = torch.autograd.grad(loss, optimizer.parameters)
    return torch.cat([g.flatten() for g in gradients]), metrics


# ---- Train -----------------------------------------------------------------------------------------------------------


def train(args: Options, task: Task, folder: Path, saved: dict[str, Any] | None = None, new: bool = True) -> int | None:
    """Trains a new run, from the networks of checkpoint `saved` if given; or, if not `new`, continues the run `saved`.

    Returns the signal that stopped it, or None if it finished.
    """
    folder = folder.absolute()  # an environment may change the working directory
    set_up_torch()
    state = State(args, task, torch.device("cpu"))
    if saved and new:
        state.agent.load_state_dict(saved["agent"])
    elif saved:
        state.load_gathered(saved)
    envs = VecEnv(args, task, state.snapshot)  # which each rollout changes in place
    with stop_signals(folder, state) as stopped, closing(envs.start()), closing(Log(folder, state)) as log:
        state.move_to(choose_device(args))  # workers are forked by now: CUDA must not be touched before
        save(state, log)  # at once, so that --resume finds a checkpoint whenever the run is stopped
        while state.global_step < args.total_timesteps and not stopped():
            log.lap("files")  # evaluations and files are no part of the training time
            now = scheduled(args, state.global_step, state.shown)  # with the learning rates of now, among others
            rollout = collect(envs, state, now)
            log.lap("rollout")
            metrics = update(state, rollout, now)
            log.lap("update")
            average_weights(state, args)
            note_returns(state, rollout)  # sets state.shown, the share of the goal that was reached
            log.iteration(state, rollout, metrics, now)
            if should_evaluate(state, args):
                evaluate(envs, state, log)
            if should_save(state):
                save(state, log)
        save(state, log)  # the trained networks, in case the tests below fail
        if not stopped():
            deliver(envs, state, log)  # chooses the final policy, and tests it
        plot_learning_curve(state, log)
        save(state, log)  # with the results of the tests
    return None if state.finished else stopped()  # a signal that came after the end changed nothing


# ======================================================================================================================
# You have read PPO, but for three details: `scheduled` anneals learning rates, FlatAdam clips gradients and has Adam's
# epsilon, Policy.env_action clips actions. The rest is engineering. First comes what some environments need besides
# plain PPO: `Options`, TUNED, `scheduled` and `training_rewards`.
# ======================================================================================================================

# ---- Options, schedules, and the rewards that training uses ----------------------------------------------------------


@dataclass
class Options(Args):
    """Train, resume or evaluate a PPO agent: every flag of the command line."""

    env_id: str = "BipedalWalker-v3"  # an environment with Box observations and Discrete or bounded Box actions
    env_kwargs: str = "{}"  # keyword arguments of the environment as JSON, such as '{"gravity": -5}'
    wrappers: tuple[str, ...] = ()  # functions that wrap the environment, as module:function (found on PYTHONPATH)
    runs_dir: str = "runs"  # the folder of the run folders
    run_name: str | None = None  # the run folder's name; None: {env_id}__ppo_vec__{seed}__{time}
    resume: str | None = None  # continue this run (its folder, or "latest")
    init_from: str | None = None  # begin a new run with this one's networks and normaliser (named as for --evaluate)
    evaluate: str | None = None  # evaluate this run (its folder, "latest", or a checkpoint) instead of training
    eval_episodes: int = 100  # test episodes, of --evaluate and after training; the choice plays as many, or 20
    eval_max_steps: int = 10_000  # ends an evaluation episode of an environment without a time limit
    capture_video: bool = False  # write an mp4 of an episode of the deterministic policy into the run's videos/
    track: bool = False  # also log to Weights and Biases (pip install wandb)
    num_workers: int | None = None  # processes that share the environments; None: one per core; changes no result
    # Forking takes 0.1 s, spawning seconds: each worker imports torch. macOS cannot fork safely.
    start_method: Literal["fork", "spawn"] = "fork" if sys.platform == "linux" else "spawn"  # how they start
    worker_timeout: float = 60.0  # seconds without a step after which a worker counts as hung and is replaced

    swa_share: float = 0.0  # deliver the mean of the weights over this last share of training
    fall_reward: float | None = None  # the scaled reward of a fall (raw: -100) at the start; None: unchanged
    final_fall_reward: float | None = None  # the same once the goal is near, see scheduled(); None: constant
    action_cost: float = 0.0  # what training takes off the reward per unit of |action| once the goal is half reached


LANDER = {
    "num_steps": 320, "anneal_share": 1.0, "num_minibatches": 40, "norm_adv": "rollout", "activation": "relu",
}  # fmt: skip
# What beats the defaults, by environment. Found by experiment; benchmarks/results/ has the runs.
TUNED: dict[str, dict[str, Any]] = {
    "BipedalWalker-v3": {
        "learning_rate": 2.5e-4, "critic_learning_rate": None, "gamma": 0.98, "gae_lambda": 0.85, "ent_coef": 0.0025,
        "bounds_loss_coef": 0.01, "fall_reward": -1.0, "final_fall_reward": -20.0, "action_cost": 0.2,
        "swa_share": 0.4, "norm_adv": "rollout", "actor_hidden_sizes": (128, 128), "critic_hidden_sizes": (128, 128),
    },
    "LunarLanderContinuous-v3": {**LANDER, "ent_coef": 0.001, "state_dependent_std": True},
    "LunarLander-v3": {**LANDER, "ent_coef": 0.01},
    "BipedalWalkerHardcore-v3": {
        "total_timesteps": 10_000_000, "num_envs": 64, "learning_rate": 2e-4, "critic_learning_rate": None,
        "anneal_share": 1.0, "gae_lambda": 0.9, "update_epochs": 8, "ent_coef": 0.01, "bounds_loss_coef": 0.01,
        "fall_reward": -1.0, "final_fall_reward": -20.0, "action_cost": 0.1, "swa_share": 0.2, "norm_adv": "rollout",
        "min_std": 0.25, "critic_progress": True, "actor_hidden_sizes": (256, 256), "critic_hidden_sizes": (256, 256),
    },
}  # fmt: skip


class UserError(Exception):
    """Bad input: one line on stderr and exit code 2."""


class TrainingError(Exception):
    """A run that cannot go on: one line on stderr (or a worker's traceback) and exit code 1; checkpoints are kept."""


def scheduled(args: Options, global_step: int, shown: float | None = None) -> Options:
    """The arguments of the iteration that starts at `global_step`; the README says why they change.

    Learning rates and entropy bonus follow global_step. The others follow what the policy has `shown`, from 0 to 1
    (note_returns), or global_step where no goal above 0 is known: the price of a fall grows geometrically, the action
    cost with the square of `shown`, until that is 0.5. What else changes here and is used in a loss belongs in SCALARS.
    """
    progress = min(global_step / args.total_timesteps, 1)
    skill = progress if shown is None else shown
    annealed = min(1.0, (1 - progress) / args.anneal_share) if args.anneal_lr else 1.0
    fall_reward = args.fall_reward
    if fall_reward is not None and args.final_fall_reward is not None:
        fall_reward = -((-fall_reward) ** (1 - skill) * (-args.final_fall_reward) ** skill)
    return dataclasses.replace(
        args,
        learning_rate=annealed * args.learning_rate,
        critic_learning_rate=annealed * (args.critic_learning_rate or args.learning_rate),
        ent_coef=annealed * args.ent_coef,
        fall_reward=fall_reward,
        action_cost=min(1, 2 * skill) ** 2 * args.action_cost,
    )


def note_returns(state: State, rollout: Rollout) -> None:
    """Keeps state.shown: the best smoothed training return so far / (0.95 x goal), from 0 to 1.

    What a fall or strength costs follows it: at a high price a policy that cannot walk yet learns to stand still, which
    pays about nothing.
    """
    for episode in rollout.episodes:
        before = episode["return"] if state.smoothed_return is None else state.smoothed_return
        state.smoothed_return = 0.98 * before + 0.02 * episode["return"]
    if state.shown is not None and state.smoothed_return is not None and (goal := state.task.goal or 0) > 0:
        state.shown = min(1.0, max(state.shown, state.smoothed_return / (0.95 * goal)))


def training_rewards(state: State, rollout: Rollout, args: Options) -> Tensor:
    """The (T, N) rewards that training uses: the raw ones less the action cost, scaled; a fall has its own price."""
    effort = rollout.actions.abs().clamp(max=1).sum(-1)
    rewards = scale_rewards(state, rollout.rewards.float() - args.action_cost * effort, rollout, args.gamma)
    if args.fall_reward is not None:
        rewards[rollout.terminated & (rollout.rewards <= FALL)] = args.fall_reward
    return rewards


def average_weights(state: State, args: Options) -> None:
    """Keeps the mean of the weights and of the normaliser since the last --swa-share began (arXiv:1803.05407).

    Late in training a minibatch's gradient is nearly all noise, and the weights wander about what they have learned.
    """
    if args.swa_share and state.global_step > (1 - args.swa_share) * args.total_timesteps:
        state.average.update_parameters(state.agent)
    else:
        state.average.n_averaged.zero_()  # the next one begins anew, also after --resume with more steps


# ---- The optimizer ---------------------------------------------------------------------------------------------------


class FlatAdam:
    """Adam on one flat tensor that the parameters are views of, instead of many little ones (-15 % update time).

    Move the agent to its device before: a parameter whose .data is replaced later is not trained any more.
    """

    def __init__(self, parameters: list[nn.Parameter], agent: Agent, loss_of: Callable[..., Any], ranks: range) -> None:
        self.agent, self.loss_of = agent, loss_of
        self.flat, self.parameters = nn.utils.parameters_to_vector(parameters).detach(), parameters
        nn.utils.vector_to_parameters(self.flat, parameters)  # sets each p.data to its view
        zero, zeros = torch.zeros((), device=self.flat.device), torch.zeros_like(self.flat)
        self.state = {"step": zero, "exp_avg": zeros, "exp_avg_sq": zeros.clone()}
        self.halted = zero.clone()  # 1 beyond target_kl: Adam takes no more steps (torch's found_inf)
        self.learning_rate: Any = 0.0
        self.group = dist.new_group(list(ranks)) if len(ranks) > 1 else None  # of the processes that train it together
        self.recording: Callable[..., tuple[Tensor, Tensors]] | None = None  # these two are set by `record`
        self.recorded: Any = None

    def tensors(self) -> list[Tensor]:
        """What training changes."""
        return [self.flat, *self.state.values()]

    def begin_update(self, learning_rate: float) -> None:
        """Sets the learning rate; steps are taken again after --target-kl has halted the last update."""
        self.learning_rate = learning_rate
        self.halted.zero_()

    def take_step(self, gradient: Tensor, max_grad_norm: float) -> Tensor:
        """A step down the mean of the group's gradients, clipped. Returns its norm before it was clipped."""
        gradient = mean_of_group(gradient, self.group)
        norm = gradient.norm()
        step, exp_avg, exp_avg_sq = self.state.values()
        step += 1 - self.halted
        torch._fused_adam_(  # what torch.optim.Adam calls, after three times as much Python
            [self.flat], [gradient], [exp_avg], [exp_avg_sq], [], [step], lr=self.learning_rate,
            beta1=0.9, beta2=0.999, eps=1e-5, weight_decay=0.0,  # eps: 37 details, no. 3
            amsgrad=False, maximize=False, found_inf=self.halted,
            grad_scale=((norm + 1e-6) / max_grad_norm).clamp(min=1.0),  # clip_grad_norm_: divides the gradient in place
        )  # fmt: skip
        return norm

    def halt_beyond(self, target_kl: Any, kl: Tensor) -> None:
        """No more steps in this update where `kl`, the mean of the group, exceeds the target."""
        self.halted.masked_fill_(mean_of_group(kl, self.group) > target_kl, 1.0)


def make_optimizers(agent: Agent) -> tuple[FlatAdam, FlatAdam]:
    """One for the actor, that is all parameters but the critic's, and one for the critic."""
    critic = list(agent.critic.parameters())
    rest = [p for p in agent.parameters() if all(p is not other for other in critic)]
    return FlatAdam(rest, agent, policy_loss, trainers(0)), FlatAdam(critic, agent, value_loss, trainers(1))


# ---- Discrete actions ------------------------------------------------------------------------------------------------


class Categorical(nn.Module):
    """A choice among action_dim discrete actions. In all arrays an action is a one-hot row."""

    def __init__(self, action_dim: int, args: Args) -> None:
        super().__init__()
        self.outputs = action_dim

    def initialize(self, last: nn.Linear) -> None: ...

    def log_prob_entropy(self, out: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """The log probability of one-hot `actions` (..., action_dim) and the entropy, (...) each, in nats."""
        log_probs = out.log_softmax(-1)
        return (log_probs * actions).sum(-1), -(log_probs * log_probs.exp()).sum(-1)

    def bounds_loss(self, out: Tensor) -> Tensor:
        return torch.zeros_like(out[..., 0])

    def keep_min_std(self) -> None: ...

    @staticmethod
    def noise(generator: torch.Generator, *shape: int) -> Tensor:
        """Gumbel noise: the largest of logits plus noise is a sample (Gumbel 1954)."""
        return -torch.empty(*shape).exponential_(generator=generator).log()

    @staticmethod
    def act(out: np.ndarray, std: np.ndarray, noise: np.ndarray | None) -> np.ndarray:
        """In NumPy: logits (n, action_dim), noise or None for the likeliest -> one-hot actions (n, action_dim)."""
        best = (out if noise is None else out + noise).argmax(-1)
        return (best[:, None] == np.arange(out.shape[-1])).astype(np.float32)


# ---- Environments ----------------------------------------------------------------------------------------------------

WALKERS = "BipedalWalker-v3", "BipedalWalkerHardcore-v3"
FALL = -100.0  # the reward of a fall or crash in Gymnasium's Box2D environments

# Three ranges of episode seeds that never meet, below 2^31: some simulators take a C int.
TEST_SEEDS, SELECTION_SEEDS, TRAINING_SEEDS = 0, 2**29, 2**30


def episode_seed(seed: int, env: int, episode: int) -> int:
    """The reset seed of a training episode. With its actions it is all that it takes to have the episode again."""
    sequence = np.random.SeedSequence(seed, spawn_key=(0, env, episode))
    return TRAINING_SEEDS | (int(sequence.generate_state(1)[0]) >> 2)


@dataclass(frozen=True)
class Task:
    """What a worker has to know of the environment; found out once, by `make_task`."""

    obs_dim: int
    low: np.ndarray  # (action_dim,) float32 action bounds; of discrete actions the actions themselves, int64
    high: np.ndarray
    max_episode_steps: int | None
    goal: float | None  # the return at which the environment counts as solved

    @property
    def action_dim(self) -> int:
        return len(self.low)

    @property
    def discrete(self) -> bool:
        return self.low.dtype.kind == "i"


def make_env(args: Options, published: bool = False, render: bool = False) -> Any:
    """The one place where an environment is made: for training, evaluation, video and benchmarks.

    Walkers are fast ones with a fresh world at each reset, unless `published`.
    """
    kwargs = {**json.loads(args.env_kwargs), **({"render_mode": "rgb_array"} if render else {})}  # not all take it
    fast = args.env_id in WALKERS and not published
    entry: Any = Walker
    made: Any = dataclasses.replace(gym.spec(args.env_id), entry_point=entry) if fast else args.env_id
    env: Any = gym.make(made, disable_env_checker=True, **kwargs)
    if fast:  # without gym.make's wrappers, so that step_walkers can step several at once; it counts its steps itself
        spec, env = env.spec, env.unwrapped
        env.spec, env.max_episode_steps = spec, spec.max_episode_steps or math.inf
    for wrapper in args.wrappers:
        module, _, name = wrapper.partition(":")
        env = getattr(importlib.import_module(module), name)(env)
        if not isinstance(env, gym.Env):
            raise TypeError(f"{wrapper} returned {type(env).__name__}, not a gymnasium.Env")
    return env


def make_task(args: Options) -> Task:
    """Tries the environment in a worker of its own. Raises UserError, saying why, if we cannot train on it."""
    one = dataclasses.replace(args, num_envs=1, num_workers=1, num_steps=1)
    unknown = Task(1, np.zeros(1), np.zeros(1), None, None)
    with closing(VecEnv(one, unknown, new_snapshot(1, 1))) as envs, refuse(f"--env-id {args.env_id}"):
        try:
            (result,) = envs.ask("inspect", None)  # without a policy
        except BaseException:  # also Ctrl-C; it may hang
            for process in envs.processes:
                process.kill()
            raise
    if isinstance(result, UserError):
        raise result
    if result.obs_dim > 5_000:
        say(f"warning: an observation is {result.obs_dim} numbers, and there are no convolutions: slow, if it learns")
    return result


def inspect_env(args: Options) -> Task:
    """Makes the environment, looks at its spaces, takes a few steps. Raises UserError."""
    wrappers = f" --wrappers {shlex.join(args.wrappers)}" if args.wrappers else ""
    extra = " --env-kwargs" * (args.env_kwargs != "{}") + wrappers
    what = f"--env-id {args.env_id}{extra}{' --capture-video' * args.capture_video}"
    quiet = warnings.catch_warnings(action="ignore")  # such as "v2 is out of date": the error says it, too
    with refuse(what), quiet, one_env(args, render=args.capture_video) as env:
        obs, actions, spec = env.observation_space, env.action_space, env.spec
        discrete, box = isinstance(actions, gym.spaces.Discrete), isinstance(actions, gym.spaces.Box)
        if not isinstance(obs, gym.spaces.Box) or not (discrete or (box and actions.is_bounded())):
            kinds = f"{space_name(obs)} observations and {space_name(actions)} actions"
            ours = "supported are Box, and Discrete actions or Box ones with finite bounds"
            flatten = not isinstance(obs, gym.spaces.Box) and getattr(obs, "is_np_flattenable", False)
            way = "; --wrappers gymnasium.wrappers:FlattenObservation makes Box observations" * flatten
            if box and not actions.is_bounded():
                way += "; its bounds are infinite (ClipAction? leave it out: actions are clipped here)"
            raise ValueError(f"it has {kinds}; {ours}{way}")
        if 0 in (*obs.shape, *actions.shape):
            raise ValueError("its observations or actions have no numbers")
        if discrete and (args.min_std or args.state_dependent_std or args.action_cost):
            raise ValueError("--min-std, --state-dependent-std and --action-cost are for Box actions; its are discrete")
        if args.capture_video and "rgb_array" not in env.metadata.get("render_modes", ()):
            raise ValueError("it has no render mode rgb_array")
        take_steps(env)
        if args.capture_video:
            display = "" if os.environ.get("DISPLAY") else " (there is no display; MUJOCO_GL=egl may help)"
            with refuse(f"it cannot be rendered{display}", ValueError):
                render_frame(env)
        limit, goal = (spec.max_episode_steps, spec.reward_threshold) if spec else (None, None)
        goal = None if goal is None else float(goal)  # a checkpoint takes no NumPy number
        if goal is not None and math.isnan(goal):
            raise ValueError("its reward_threshold is nan")
        low, high = (np.arange(int(actions.n)) + int(actions.start),) * 2 if discrete else float32_bounds(actions)
        return Task(int(np.prod(obs.shape)), low, high, limit, goal)


def take_steps(env: Any) -> None:
    """A reset and three steps. Raises ValueError for what breaks Gymnasium's rules in a way that does harm here.

    Warns where the same reset gives another observation later.
    """

    def check(what: str, value: Any, shape: tuple[int, ...]) -> None:
        with refuse(f"{what} cannot be numbers", ValueError):
            array = np.asarray(value, np.float64)
        if array.size != np.prod(shape):  # (1,) for a number, or a flat image, do no harm
            raise ValueError(f"{what} has the shape {array.shape}, not {shape}")
        if not np.isfinite(array).all():
            raise ValueError(f"{what} is not finite: {one_line(array)}")

    words = {"reset()": "(observation, info)", "step()": "(observation, reward, terminated, truncated, info)"}
    seed_everything(env, 0)
    for call in ("reset()", "step()", "step()", "step()"):
        with refuse(call, ValueError):
            returned = env.reset(seed=0) if call == "reset()" else env.step(env.action_space.sample())
        right = isinstance(returned, tuple) and len(returned) == len(words[call].split())
        if not right or not isinstance(returned[-1], dict):
            size = f" of {len(returned)}" if isinstance(returned, tuple) else ""
            raise ValueError(f"{call} returned {type(returned).__name__}{size}, not {words[call]}")
        obs, *numbers, _ = returned
        check(f"the observation of {call}", obs, env.observation_space.shape)
        for name, value in zip(("reward", "terminated", "truncated"), numbers):
            check(f"the {name} of {call}", value, ())
        if not numbers:
            first = flat(obs, env.observation_space)
        if any(np.any(ended) for ended in numbers[1:]):
            break
    with refuse("reset()", ValueError):
        again = reset_env(env, 0)
    if not np.array_equal(again, first):
        why = "a generator of its own? NormalizeObservation? observations are normalised here anyway"
        say(f"warning: a second reset(seed=0) gives another observation; tests and --resume will differ ({why})")


def render_frame(env: gym.Env) -> np.ndarray:
    """The picture of now as (height, width, 3) uint8, whatever kind the environment gives. Raises ValueError."""
    returned: Any = env.render()
    image = np.asarray(returned[-1] if isinstance(returned, list) and returned else returned)
    if image.ndim == 2:
        image = image[:, :, None]
    if image.ndim != 3 or image.shape[2] not in (1, 3, 4) or image.dtype.kind not in "uifb":
        what = f"{image.dtype} of the shape {image.shape}" if image.ndim else repr(returned)
        raise ValueError(f"render() gives no picture, but {what}")
    if image.dtype.kind in "fb":
        image = image * 255.0
    image = np.clip(image, 0, 255).astype(np.uint8)[:, :, :3]
    return image.repeat(3, 2) if image.shape[2] == 1 else image


def space_name(space: Any) -> str:
    ours = isinstance(space, gym.spaces.Space)
    return type(space).__name__ if ours else f"{type(space).__module__}.{type(space).__name__} (not gymnasium's)"


def float32_bounds(space: gym.spaces.Box) -> tuple[np.ndarray, np.ndarray]:
    """An action space's bounds as float32 (action_dim,) that lie in it, whatever its own precision."""
    low, high = space.low.astype(np.float32), space.high.astype(np.float32)
    low = np.where(low < space.low, np.nextafter(low, np.float32(np.inf)), low)
    high = np.where(high > space.high, np.nextafter(high, np.float32(-np.inf)), high)
    return low.ravel(), high.ravel()


def one_line(error: Any) -> str:
    """The text of an error, or of anything else, in one short line."""
    text = " ".join(re.sub(r"^\[Errno -?\d+\] ", "", str(error)).split())[:200] or type(error).__name__
    return f"{text.rstrip('.')}; is its folder in PYTHONPATH?" if isinstance(error, ModuleNotFoundError) else text


@contextmanager
def refuse(what: str, error_class: type[Exception] = UserError) -> Iterator[None]:
    """Raises whatever is raised inside as an error_class of one line that begins with `what`."""
    try:
        yield
    except Exception as error:
        raise error_class(f"{what}: {one_line(error)}") from error


def seed_everything(env: gym.Env, seed: int) -> None:
    """Seeds every generator that an environment may draw from, as far as we can reach it."""
    random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
    env.action_space.seed(seed), env.observation_space.seed(seed)
    with suppress(Exception):  # its own, in case reset() forgets super().reset(seed=seed); some cannot be set
        if isinstance(env.unwrapped.np_random, np.random.Generator):
            env.unwrapped.np_random = gym.utils.seeding.np_random(seed)[0]


def reset_env(env: gym.Env, seed: int) -> np.ndarray:
    if not isinstance(env, Walker):  # which has its own generator only
        seed_everything(env, seed)
    return flat(env.reset(seed=seed)[0], env.observation_space)


def flat(obs: Any, space: Any) -> np.ndarray:
    """A copy of an observation as (obs_dim,) float64. Raises ValueError where it has another size than its space."""
    row = np.array(obs, np.float64)
    if row.size != math.prod(space.shape):  # a single number would fill the row
        raise ValueError(f"an observation has shape {row.shape}; its space has {space.shape}")
    return row.ravel()


@contextmanager
def one_env(args: Options, render: bool) -> Iterator[Any]:
    """A published environment, which is closed at the end, whatever its close() raises."""
    env = make_env(args, published=True, render=render)
    try:
        yield env
    finally:
        close_all([env])


def close_all(envs: Any) -> None:
    """Closes and removes them, the last first; whatever a close() raises."""
    while envs:
        with suppress(Exception):
            envs.pop().close()


Steps = tuple[np.ndarray, ...]  # four: obs (n, obs_dim), rewards, terminated, truncated (n,)
Episodes = list[tuple[float, int, bool, float]]  # (return, length, fell, effort: mean |action|) of each


def step_envs(envs: Sequence[Any], actions: np.ndarray, beat: Callable[[], None] = lambda: None) -> Steps:
    """Steps each environment with its row of env-ready actions (n, action_dim); `beat` is a sign of life."""
    if isinstance(envs[0], Walker):
        beat()
        return step_walkers(envs, actions)
    space, obs_space, rows, numbers = envs[0].action_space, envs[0].observation_space, [], []
    if space.dtype.kind in "iub":
        actions = np.rint(actions)  # a cast alone would round to zero
    for env, row in zip(envs, actions):
        action = row.reshape(space.shape).astype(space.dtype)[()]  # [()]: a scalar for Discrete
        obs, reward, terminated, truncated, _ = env.step(action)
        rows.append(flat(obs, obs_space))  # copied, as the numbers are: the next environment may return the same array
        kinds = (reward, np.float64), (terminated, bool), (truncated, bool)
        numbers.append([np.asarray(value, dtype).item() for value, dtype in kinds])
        beat()
    return np.stack(rows), *map(np.array, zip(*numbers))


# ---- The acting policy -----------------------------------------------------------------------------------------------

TILE = 4  # rows of a matrix product, see Policy
AMD = "AuthenticAMD" in CPU


class Tanh(nn.Module):
    """nn.Tanh. Torch has Intel MKL's, which takes four times as long as this on AMD processors.

    Elsewhere torch's own is not slower. Both are the same to within 5e-7.
    """

    def forward(self, x: Tensor) -> Tensor:
        return 2 * torch.sigmoid(2 * x) - 1 if AMD and x.is_cpu else x.tanh()


ACTIVATIONS: dict[str, tuple[Callable, Callable]] = {  # in torch, and in NumPy for the workers
    "tanh": (Tanh, np.tanh),
    "relu": (nn.ReLU, lambda x: np.maximum(x, 0)),
    "leaky_relu": (nn.LeakyReLU, lambda x: np.maximum(x, np.float32(0.01) * x)),
    "elu": (nn.ELU, lambda x: np.where(x > 0, x, np.expm1(np.minimum(x, 0)))),
}


def clip(x: np.ndarray, low: Any, high: Any) -> np.ndarray:
    return np.minimum(np.maximum(x, low), high)  # np.clip takes 1.8 times as long for a few rows


class Policy:
    """The actor's copy in NumPy, made of an agent's state dict: raw observation in, action out.

    One row of a float32 matrix product can have other bits in a batch of another size. So rows are computed in tiles
    of fixed shape, and `offset` puts a row into the same place of its tile whatever worker it is in.
    """

    def __init__(self, weights: Tensors, activation: str, low: np.ndarray, high: np.ndarray) -> None:
        obs_dim = weights["actor.0.weight"].shape[1]
        logstd = weights.get("distribution.logstd", weights.get("actor.logstd"))  # the second: in older files
        # [:obs_dim]: with --critic-progress, and in older files, two more columns follow, which only the critic sees.
        self.obs_mean = weights["normalizer.mean"][:obs_dim].cpu().numpy()
        self.obs_scale = (weights["normalizer.var"][:obs_dim] + 1e-8).rsqrt().cpu().numpy()
        arrays: list[Any] = [torch.empty(0) if logstd is None else logstd.exp()]
        arrays += [w.t() for name, w in weights.items() if re.fullmatch(r"actor\.\d+\.(weight|bias)", name)]
        self.std, *layers = (array.detach().cpu().numpy().astype(np.float32, order="C") for array in arrays)
        self.layers = list(zip(layers[0::2], layers[1::2]))
        self.activation, self.low, self.high = activation, low, high
        self.distribution = Categorical if low.dtype.kind == "i" else Distribution  # see Task
        self.middle = ((high.astype(np.float64) + low) / 2).astype(np.float32)
        self.half = ((high.astype(np.float64) - low) / 2).astype(np.float32)

    def forward(self, obs: np.ndarray, offset: int = 0) -> np.ndarray:
        """Raw observations (n, obs_dim) -> the actor's output (n, outputs)."""
        activation, start, n = ACTIVATIONS[self.activation][1], offset % TILE, len(obs)
        tiles = math.ceil((start + n) / TILE)
        x = np.zeros((tiles, TILE, len(self.obs_mean)), np.float32)  # NumPy multiplies tile by tile
        rows = x.reshape(tiles * TILE, len(self.obs_mean))[start : start + n]
        rows[...] = clip((obs - self.obs_mean) * self.obs_scale, -OBS_CLIP, OBS_CLIP)
        for weight, bias in self.layers[:-1]:
            x = activation(x @ weight + bias)
        weight, bias = self.layers[-1]
        return (x @ weight + bias).reshape(tiles * TILE, len(bias))[start : start + n]

    def sample(self, obs: np.ndarray, noise: np.ndarray | None = None, offset: int = 0) -> np.ndarray:
        """Raw observations (n, obs_dim) and noise (n, action_dim) -> actions; without noise, the mean or likeliest."""
        return self.distribution.act(self.forward(obs, offset), self.std, noise)

    def env_action(self, action: np.ndarray) -> np.ndarray:
        """Clips to [-1, 1] and maps to the environment's bounds; of one-hot rows the chosen actions (n,) int64."""
        if self.distribution is Categorical:
            return self.low[action.argmax(-1)]
        action = self.middle + self.half * clip(action, -1, 1)
        return clip(action, self.low, self.high)  # rounding may have gone past the bounds

    def __call__(self, obs: np.ndarray) -> np.ndarray:
        """Raw observation (obs_dim,) or batch (n, obs_dim) -> deterministic actions ready for step(), one or (n, ...).

        An observation may also have the environment's own shape, as (4, 3) for four stacked frames; (1, n) is a batch.
        """
        obs, size = np.asarray(obs, np.float64), len(self.obs_mean)
        actions = self.env_action(self.sample(obs.reshape(-1, size)))
        return actions[0] if obs.size == size and obs.shape != (1, size) else actions


@torch.no_grad()
def check_copy(agent: Agent, task: Task, args: Args) -> None:
    """Raises TrainingError where Policy does not act as the agent says, as after a change of one of them only.

    Its outputs must be those of Agent.policy, and the mean -log_prob of its samples the entropy (exact, no estimate).
    """
    with torch.random.fork_rng(devices=[]):  # on random weights and statistics: at first many are 0 or 1
        torch.manual_seed(0)
        probe = copy.deepcopy(agent).cpu()
        for tensor in (*probe.parameters(), probe.normalizer.mean):
            tensor += 0.3 * torch.randn(tensor.shape)
        probe.normalizer.var *= 1 + torch.rand(probe.normalizer.var.shape)
        obs = 9 * torch.randn(2 * TILE, task.obs_dim + args.extra_dim)
    out, same = probe.policy(probe.normalizer(obs)), False
    with suppress(ValueError, IndexError, KeyError):  # a layer that Policy does not know
        policy = Policy(probe.state_dict(), args.activation, task.low, task.high)
        same = np.allclose(policy.forward(obs[:, : task.obs_dim].numpy()), out.numpy(), rtol=1e-3, atol=1e-3)
    if not same:
        raise TrainingError("Policy, the workers' copy, does not act as Agent.policy: a change of one needs the other")
    distribution, generator = probe.distribution, torch.Generator().manual_seed(0)
    repeats = max(10, min(500, 50_000 // distribution.outputs))  # there may be thousands of discrete actions
    out = torch.randn(2 * TILE, distribution.outputs, generator=generator).repeat(repeats, 1)
    noise = distribution.noise(generator, len(out), task.action_dim).numpy()
    actions = policy.distribution.act(out.numpy(), policy.std, noise)
    log_prob, entropy = distribution.log_prob_entropy(out, torch.from_numpy(actions))
    surprise = -log_prob - entropy  # 0 in the mean
    if not surprise.mean().abs() < 6 * surprise.std() / math.sqrt(len(out)) + 1e-3:  # or NaN
        name = type(distribution).__name__
        raise TrainingError(f"{name}.act draws other actions than {name}.log_prob_entropy and {name}.noise expect")


# ---- Workers ---------------------------------------------------------------------------------------------------------


def open_shared(shared: dict[str, Any]) -> SimpleNamespace:
    """NumPy views of arrays in shared memory: {name: (memory, shape, dtype)} -> attributes."""
    return SimpleNamespace(**{k: np.ndarray(shape, dtype, raw) for k, (raw, shape, dtype) in shared.items()})


def new_snapshot(num_envs: int, obs_dim: int) -> dict[str, Any]:
    """Where N environments are between two rollouts: all that it takes to continue them in another process.

    A Box2D world cannot be pickled, but an episode is a function of its reset seed and its actions, and is replayed.
    """
    return {
        "episode": torch.full((num_envs,), -1),  # the number of the running episode; -1: none has begun
        "actions": [[] for _ in range(num_envs)],  # its actions, in chunks (n, action_dim)
        "obs": torch.zeros(num_envs, obs_dim, dtype=torch.float64),  # the next observation
        "returns": torch.zeros(num_envs, dtype=torch.float64),  # of the running episode
    }


class Worker(gym.Env):
    """Some of the environments, in a process of their own, and the policy beside them.

    To AsyncVectorEnv a worker is one environment, of which only `run` and `close` are ever called.
    """

    observation_space = action_space = gym.spaces.Discrete(1)
    # The environments of training, and of an evaluation. AsyncVectorEnv also makes a Worker without __init__, for its
    # spaces, and closes it: hence these defaults.
    envs: Any = ()
    playing: Any = ()

    def __init__(
        self, index: int, first: int, last: int, args: Options, task: Task, shared: Any, snapshot: Any
    ) -> None:
        self.index, self.first, self.last, self.args, self.task = index, first, last, args, task
        self.data, self.snapshot, self.envs, self.playing = open_shared(shared), snapshot, [], []
        self.first_number = rank() * args.num_envs + first  # of the first environment, counted over all ranks

    def run(self, name: str, policy: Policy, *args: Any) -> Any:
        """A method's result, its UserError, or its traceback: AsyncVectorEnv hangs if an error cannot be pickled."""
        try:
            self.policy = policy
            return getattr(self, name)(*args)
        except UserError as error:  # of `inspect`
            return error
        except (Exception, KeyboardInterrupt) as error:
            return f"{type(error).__name__}: {one_line(error)}\n{traceback.format_exc()}"

    def inspect(self) -> Task:
        """All that the worker of make_task does."""
        return inspect_env(self.args)

    def close(self) -> None:
        close_all(self.envs)
        close_all(self.playing)

    def beat(self) -> None:
        """Shows that this worker does not hang: after everything that it does for one environment or one row."""
        self.data.beats[self.index] += 1

    def rollout(self) -> list[dict[str, Any]]:
        """Steps the environments num_steps times, acting on the shared noise. Returns the episodes that ended."""
        if not self.envs:
            self.restore()
        data, mine, episodes = self.data, slice(self.first, self.last), []
        for t in range(self.args.num_steps):
            data.obs[t, mine] = self.critic_obs()
            data.actions[t, mine] = actions = self.policy.sample(self.obs, data.noise[t, mine], self.first_number)
            rewards, terminated, truncated = self.step(slice(None), actions)
            data.rewards[t, mine], data.terminated[t, mine], data.truncated[t, mine] = rewards, terminated, truncated
            for i in np.flatnonzero(terminated | truncated).tolist():
                if not terminated[i]:  # else its last observation is of no use, and need not be finite
                    data.final_obs[t, self.first + i] = self.critic_obs()[i]
                episodes.append({
                    "t": t, "env": self.first_number + i, "return": float(self.returns[i]),
                    "length": int(self.lengths[i]), "fell": bool(terminated[i] and rewards[i] <= FALL),
                })  # fmt: skip
                self.begin(i, self.episode[i] + 1)
        data.obs[-1, mine] = self.critic_obs()
        data.episode[mine], data.returns[mine] = self.episode, self.returns
        return episodes

    def critic_obs(self) -> np.ndarray:
        """What the critic sees, (k, obs_dim + extra_dim): observations, and with --critic-progress two columns more."""
        return np.column_stack((self.obs, self.lengths, self.returns)) if self.args.critic_progress else self.obs

    def step(self, some: slice, actions: np.ndarray) -> tuple[np.ndarray, ...]:
        """One step of environments `some` with a row of actions each. Returns rewards, terminated and truncated."""
        self.obs[some], rewards, *ends = step_envs(self.envs[some], self.policy.env_action(actions), self.beat)
        self.lengths[some] += 1
        self.returns[some] += rewards
        return rewards, *ends

    def begin(self, i: int, episode: int) -> None:
        """Begins the episode of this number in environment i."""
        self.episode[i], self.lengths[i], self.returns[i] = episode, 0, 0.0
        self.obs[i] = reset_env(self.envs[i], episode_seed(self.args.seed, self.first_number + i, int(episode)))
        self.beat()

    def restore(self) -> None:
        """Brings every environment to where the last complete rollout left it."""
        saved = {k: v[self.first : self.last] for k, v in self.snapshot.items()}
        self.episode, self.obs, self.returns = (saved[name].numpy().copy() for name in ("episode", "obs", "returns"))
        self.lengths = np.zeros(len(self.obs), int)
        for i, past in enumerate(saved["actions"]):
            self.envs.append(make_env(self.args))
            self.beat()
            obs, returns, begun = self.obs[i].copy(), self.returns[i], self.episode[i] >= 0
            ended = not begun
            if begun:
                self.begin(i, self.episode[i])
                steps = (self.step(slice(i, i + 1), action.numpy()[None]) for action in itertools.chain(*past))
                ended = any(terminated[0] or truncated[0] for _, terminated, truncated in steps)
            lost = ended or not (np.array_equal(self.obs[i], obs) and self.returns[i] == returns)
            self.data.restarted[self.first + i] = begun and lost  # the replay ended elsewhere, as on another machine
            if lost:
                self.begin(i, self.episode[i] + 1)

    def play(self, seeds: Sequence[int], share: range, workers: int, published: bool, more: bool = False) -> Episodes:
        """This worker's part of the evaluation episodes in `share`, a range of indices into `seeds`.

        Walkers play side by side, so that their lidars are computed together. Of others one is held at a time: it may
        be large. Environments are reused, and kept for the next call if there is `more` to play; but published
        walkers, whose world remembers earlier episodes, are made anew.
        """
        begin, end = (share.start + len(share) * i // workers for i in (self.index, self.index + 1))
        size = max(8, self.last - self.first) if self.args.env_id in WALKERS else 1
        envs = self.playing
        episodes: Episodes = []
        for start in range(begin, end, size):
            some = range(start, min(start + size, end))
            if published and self.args.env_id in WALKERS:
                close_all(envs)
            while len(envs) < len(some):
                envs.append(make_env(self.args, published))
                self.beat()
            episodes += self.play_batch(envs[: len(some)], [seeds[i] for i in some], start)
        if not more:
            close_all(envs)
        return episodes

    def play_batch(self, envs: list[gym.Env], seeds: list[int], offset: int) -> Episodes:
        """One whole episode per environment, all at once, with the deterministic policy (`offset`: as in Policy)."""
        obs = np.zeros((len(envs), self.task.obs_dim))
        for i, (env, seed) in enumerate(zip(envs, seeds)):
            obs[i] = reset_env(env, seed)
            self.beat()
        (returns, efforts), lengths = np.zeros((2, len(envs))), np.zeros(len(envs), int)
        fell = np.zeros(len(envs), bool)
        running, limit = np.arange(len(envs)), self.task.max_episode_steps or self.args.eval_max_steps
        while len(running):
            if not np.isfinite(obs[running]).all():
                raise ValueError("an observation in an evaluation is not finite")
            means = self.policy.sample(obs, offset=offset)
            if not self.task.discrete:
                efforts[running] += np.abs(clip(means[running], -1, 1)).mean(-1)  # in units of the bounds
            actions = self.policy.env_action(means)
            some = [envs[i] for i in running]
            obs[running], rewards, terminated, truncated = step_envs(some, actions[running], self.beat)
            returns[running] += rewards
            lengths[running] += 1
            fell[running] = terminated & (rewards <= FALL)
            running = running[~(terminated | truncated) & (lengths[running] < limit)]
        return list(zip(returns.tolist(), lengths.tolist(), fell.tolist(), (efforts / lengths).tolist()))


def worker_main(workers: Sequence[Callable[[], Worker]], index: int, _: Any, *args: Any) -> None:
    """The process of a worker. Signals do not end it: the end of its trainer does, whatever the cause."""
    worker, parent = workers[index](), multiprocessing.parent_process()
    for number in STOP_SIGNALS:
        signal.signal(number, lambda *_: None)  # not SIG_IGN: what an environment starts would inherit that
    if hasattr(os, "register_at_fork"):  # what it forks inherits handlers, too; terminate() has to end it
        os.register_at_fork(after_in_child=lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    block_signals(False)  # VecEnv.start blocks them

    def watch() -> None:  # (the pipe does not tell: a forked sibling may hold its other end open)
        while parent is not None and os.getppid() == parent.pid and parent.is_alive():
            time.sleep(0.5)
        threading.Timer(CLOSE_TIMEOUT, os._exit, (1,)).start()
        worker.close()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    with suppress(EOFError, OSError):  # the trainer has gone: no traceback about a broken pipe
        async_vector_env._async_worker(index, lambda: worker, *args)


def block_signals(block: bool) -> None:
    if hasattr(signal, "pthread_sigmask"):
        how = signal.SIG_BLOCK if block else signal.SIG_UNBLOCK
        signal.pthread_sigmask(how, STOP_SIGNALS)


STOP_SIGNALS = [signal.SIGINT, signal.SIGTERM]
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # ignored: nohup
    STOP_SIGNALS.append(signal.SIGHUP)  # the terminal has been closed
START_TIMEOUT = 120.0  # seconds that the start of a worker may take, whatever --worker-timeout
CLOSE_TIMEOUT = 5.0  # seconds that workers have to close their environments
MAX_FAULTS = 3  # attempts at one rollout or evaluation; two where both end with the same traceback


class VecEnv(AsyncVectorEnv):
    """num_envs environments in num_workers processes, as (num_envs, ...) arrays; replaces failed workers.

    A whole rollout is one message: waking a process for each step costs more than the stepping itself. What the
    workers return is the same to the bit for any number of them. No wait is endless.
    """

    def __init__(self, args: Options, task: Task, snapshot: dict[str, Any]) -> None:
        self.args, self.task, self.snapshot = args, task, snapshot
        self.num_workers = min(args.num_workers or usable_cores(), args.num_envs)
        T, N, A, D = args.num_steps, args.num_envs, task.action_dim, task.obs_dim + args.extra_dim
        specs = {
            "obs": ((T + 1, N, D), np.float64), "final_obs": ((T, N, D), np.float64),  # float32 would lose digits
            "actions": ((T, N, A), np.float32), "noise": ((T, N, A), np.float32), "rewards": ((T, N), np.float64),
            "terminated": ((T, N), np.bool_), "truncated": ((T, N), np.bool_), "restarted": ((N,), np.bool_),
            "episode": ((N,), np.int64), "returns": ((N,), np.float64),  # for the next snapshot
            "beats": ((self.num_workers,), np.int64),
        }  # fmt: skip
        # Unnamed memory, which no crash can leave behind.
        array = multiprocessing.get_context(args.start_method).RawArray
        with refuse("no memory for a rollout; fewer --num-envs x --num-steps need less", TrainingError):
            self.shared = {name: (array("b", max(1, np.empty(*spec).nbytes)), *spec) for name, spec in specs.items()}
        self.data = open_shared(self.shared)
        self.processes, self.parent_pipes, self.closed, self.replacements = [], [], True, 0

    def start(self) -> VecEnv:
        """Starts the workers, and waits for none of them. Raises TrainingError."""
        bounds = np.linspace(0, self.args.num_envs, self.num_workers + 1).astype(int).tolist()
        common: tuple[Any, ...] = self.args, self.task, self.shared, self.snapshot
        workers = [functools.partial(Worker, i, *pair, *common) for i, pair in enumerate(itertools.pairwise(bounds))]
        self.data.beats[...], self.closed = 0, False
        if self.args.start_method == "spawn":  # it starts this tracker, which would unblock the signals
            resource_tracker.ensure_running()
        # Large weights do not fit into a pipe: without a limit, to send them to a stopped worker would take for ever.
        limit = struct.pack("ll", math.ceil(min(max(self.args.worker_timeout, START_TIMEOUT), 1e6)), 0)
        block_signals(True)  # until a worker has its own handlers
        try:
            with refuse("cannot start the workers; fewer --num-workers, or a higher ulimit, may help", TrainingError):
                super().__init__(
                    [functools.partial(gym.Env.__new__, Worker)] * len(workers),  # one is made here, for its spaces
                    shared_memory=False, context=self.args.start_method, worker=functools.partial(worker_main, workers),
                    autoreset_mode=AutoresetMode.DISABLED, daemon=False,  # a daemon may start no processes
                )  # fmt: skip
                for pipe in self.parent_pipes if os.name == "posix" else ():
                    with socket.socket(fileno=os.dup(pipe.fileno())) as end:
                        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        except TrainingError:
            self.close()
            raise
        finally:
            block_signals(False)
        return self

    def _check_spaces(self) -> None:
        """AsyncVectorEnv would wait here, without a limit, to learn what we know."""

    def close(self, terminate: bool = False) -> None:  # AsyncVectorEnv's parameter
        """Lets the workers close their environments; ends those that do not in time."""
        end = time.monotonic() + CLOSE_TIMEOUT
        pipes = list(filter(None, self.parent_pipes))  # AsyncVectorEnv forgets that of a worker that has failed
        for pipe in pipes:
            with suppress(OSError):
                if os.name == "posix":
                    os.set_blocking(pipe.fileno(), False)  # that of a stopped worker may be full
                pipe.send(("close", None))
        started = [process for process in self.processes if process.pid is not None]
        try:
            for process in started:
                process.join(max(0.0, end - time.monotonic()))
        finally:  # also after Ctrl-C
            for process in started:
                process.kill()  # not terminate(): a stopped process would never get to it
                process.join()
        for pipe in pipes:
            pipe.close()
        self.processes, self.parent_pipes, self.closed = [], [], True

    def call(self, name: str, weights: Tensors, *args: Any) -> list[Any]:
        """`ask` with a Policy of these weights; after a fault again with new workers. Raises TrainingError at last."""
        acting = Policy(weights, self.args.activation, self.task.low, self.task.high)
        faults: list[str] = []
        while True:
            try:
                return self.ask(name, acting, *args)
            except TrainingError as error:
                fault = str(error)
            self.close()
            self.replacements += 1
            again, faults = fault in faults and "\n" in fault, [*faults, fault]  # the same traceback
            if again or len(faults) == MAX_FAULTS:
                first_line = fault.partition("\n")[0]  # without the traceback
                raise TrainingError(f"gave up after {len(faults)} attempts without progress: {first_line}")
            say(f"warning: {fault}; starting new workers where the last rollout ended", any_rank=True)

    def ask(self, name: str, *args: Any) -> list[Any]:
        """All workers' results. Raises TrainingError if one fails, ends, or takes no step for --worker-timeout."""
        beats, timeout = self.data.beats, self.args.worker_timeout
        try:
            if not self.processes:
                self.start()
            self.call_async("run", name, *args)
            waiting: dict[Any, int] = {pipe: i for i, pipe in enumerate(self.parent_pipes)}
            seen, since = beats.copy(), np.full(len(beats), time.monotonic())
            while waiting:
                for pipe in connection.wait(list(waiting), timeout=min(0.5, timeout / 4)):
                    del waiting[pipe]
                since[beats != seen] = time.monotonic()
                seen = beats.copy()
                for i in waiting.values():
                    if self.processes[i].exitcode is not None:  # where what it has forked holds its pipe open
                        raise EOFError
                    limit = timeout if seen[i] else max(timeout, START_TIMEOUT)
                    if time.monotonic() - since[i] > limit:
                        raise TrainingError(f"worker {i} took no step for {limit:g} s (--worker-timeout)")
            results = list(self.call_wait())
        except (EOFError, OSError) as error:
            codes = enumerate(process.join(0.2) or process.exitcode for process in self.processes)  # join: None
            ended = (f"worker {i} ended with exit code {code}" for i, code in codes if code is not None)
            raise TrainingError(next(ended, "a worker takes no messages")) from error
        for i, result in enumerate(results):
            if isinstance(result, str):
                raise TrainingError(f"worker {i} failed: {result}")
        return results

    def rollout(self, weights: Tensors, noise: np.ndarray, global_step: int) -> Rollout:
        """A rollout with an agent's weights and `noise` (T, num_envs * world_size(), action_dim), of all ranks.

        The tensors are views of memory that the next one fills again. Raises TrainingError for what is not finite.
        """
        data = self.data
        data.noise[...] = noise[:, rank() * self.args.num_envs :][:, : self.args.num_envs]
        data.restarted[...] = False
        shares = self.call("rollout", weights)
        if count := data.restarted.sum():
            say(f"warning: {count} environments cannot be replayed; their episodes start anew", any_rank=True)
        bad = []
        for name in ("obs", "actions", "final_obs"):
            bad += [(name, *place) for place in np.argwhere(~np.isfinite(getattr(data, name)))[:1].tolist()]
        # As float32 they would be infinite, and the statistics of returns no numbers for good. (False for NaN, too.)
        too_large = ~(np.abs(data.rewards) <= np.finfo(np.float32).max)
        bad += [("rewards", *place) for place in np.argwhere(too_large)[:1].tolist()]
        if bad:  # the first: what follows from it is not finite either
            name, t, env, *column = min(bad, key=lambda each: each[1])
            value, env = getattr(data, name)[t, env, *column], env + rank() * self.args.num_envs
            raise TrainingError(f"{name}{column or ''} of environment {env} at step {t} of the rollout is {value}")
        episodes = list(itertools.chain.from_iterable(itertools.chain(*all_ranks(shares))))
        episodes.sort(key=lambda e: (e["t"], e["env"]))
        for episode in episodes:
            episode["global_step"] = global_step + (episode.pop("t") + 1) * self.args.num_envs * world_size()
        done = data.terminated | data.truncated
        # The row in which each running episode begins: after the last that ended one.
        starts = np.where(done.any(0), len(done) - done[::-1].argmax(0), 0)
        for i, chunks in enumerate(self.snapshot["actions"]):
            if starts[i] or data.restarted[i]:
                chunks.clear()
            chunks.append(torch.tensor(data.actions[starts[i] :, i]))
        self.snapshot["obs"][...] = torch.from_numpy(data.obs[-1, :, : self.task.obs_dim])
        for name in ("episode", "returns"):
            self.snapshot[name][...] = torch.from_numpy(getattr(data, name))
        names = "obs", "final_obs", "actions", "rewards", "terminated", "truncated", "restarted"
        return Rollout(**{name: torch.from_numpy(getattr(data, name)) for name in names}, episodes=episodes)

    def play(self, weights: dict, seeds: Sequence[int], published: bool = False, show: bool = False) -> Episodes:
        """One episode per seed with the deterministic policy: short episodes are not favoured (SB3 #402).

        To `show` a progress bar, it plays in portions. These change no bit: a row keeps its place in its tile. Raises
        TrainingError.
        """
        size = self.args.num_envs * world_size() if show else max(1, len(seeds))
        episodes: Episodes = []
        with progress_bar(len(seeds), 0, "episode", show and sys.stderr.isatty()) as bar:
            for start in range(0, len(seeds), size):
                some = range(len(seeds))[start : start + size]
                share = some[len(some) * rank() // world_size() : len(some) * (rank() + 1) // world_size()]
                how = self.num_workers, published, some.stop < len(seeds)
                parts = all_ranks(self.call("play", weights, seeds, share, *how))
                episodes += itertools.chain.from_iterable(itertools.chain(*parts))
                bar.update(len(some))
        for seed, (ret, *_) in zip(seeds, episodes):
            if not math.isfinite(ret):
                raise TrainingError(f"the return of the evaluation episode with seed {seed} is {ret}")
        limit = self.args.eval_max_steps
        cut = self.task.max_episode_steps is None and sum(length >= limit for _, length, *_ in episodes)
        if cut:
            say(f"warning: {cut} of {len(seeds)} episodes were cut off after {limit} steps (--eval-max-steps)")
        return episodes


def usable_cores() -> int:
    """The cores that this process may use: with torchrun its share of the machine's."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, ValueError):  # a container's share of the machine; no number: all of it
        quota, period = map(int, Path("/sys/fs/cgroup/cpu.max").read_text().split())
        cores = min(cores, math.ceil(quota / period))
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if world_size() > 1 else cores)


# ---- Walkers ---------------------------------------------------------------------------------------------------------

RAYS = np.array([(math.sin(1.5 * i / 10.0), -math.cos(1.5 * i / 10.0)) for i in range(10)]).T * stock.LIDAR_RANGE
NEAR_EDGES = 14  # edges that the ten rays can reach, the one behind the hull included
NEAR_POLYGONS = 8  # obstacles that they can reach (6 at most, counted over Hardcore terrains), padded
MOTOR_SPEEDS = np.array([stock.SPEED_HIP, stock.SPEED_KNEE] * 2, np.float32)
TORQUE_COST = 0.00035 * stock.MOTORS_TORQUE
FINISH = (stock.TERRAIN_LENGTH - stock.TERRAIN_GRASS) * stock.TERRAIN_STEP


class Walker(stock.BipedalWalker):
    """BipedalWalker with a new Box2D world at each reset, as LunarLander has it, and less Python in a step.

    The published one reuses its world, and with it the order of its contacts: the last bits of a trajectory depend on
    the episodes before. In a fresh world an episode is a function of its seed and actions alone.

    The walkers of a worker are stepped together (step_walkers), their lidars in one NumPy ray cast instead of ten
    Python callbacks each: the published bits (tests/test_walker.py) in less than half the time.
    """

    max_episode_steps: float = math.inf  # make_env sets it

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        self.world.contactListener = None  # breaks the cycle world, listener, environment: it holds C++ memory
        self.world, self.terrain, self.elapsed = Box2D.b2World(), [], -1  # the published reset takes a step
        return super().reset(seed=seed, options=options)

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
        reach: Any = (left < cells + stock.TERRAIN_STEP + stock.LIDAR_RANGE) & (right > cells)
        assert reach.sum(1).max(initial=0) <= NEAR_POLYGONS
        reach = np.pad(reach, ((0, 0), (0, NEAR_POLYGONS)))
        near = np.sort(np.where(reach, np.arange(reach.shape[1]), len(bodies)), axis=1)[:, :NEAR_POLYGONS]
        self.polygons, self.near, self.any_near = polygons, near, reach.any(1)


def edge_vectors(start: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Edges, outward unit normals and squared lengths, (2, n), (2, n), (1, n), in Box2D's order of operations."""
    edge = end - start
    square = edge[0] * edge[0] + edge[1] * edge[1]
    inverse = np.float32(1) / np.sqrt(square)
    return edge, np.stack((edge[1] * inverse, -edge[0] * inverse)), square[None]


def step_walkers(walkers: Sequence[Walker], actions: np.ndarray) -> Steps:
    """One step of each walker with its row of actions (n, 4); what BipedalWalker.step does, in the same arithmetic.

    Rewards have the actions' precision, as the published ones do under NumPy 2.
    """
    n = len(walkers)
    if actions.dtype.kind != "f":
        actions = actions.astype(np.float64)
    effort = np.minimum(np.abs(actions), 1)
    speeds, torques = (MOTOR_SPEEDS * np.sign(actions)).tolist(), (stock.MOTORS_TORQUE * effort).tolist()
    obs = np.zeros((n, 24), np.float32)
    progress, x, y = np.empty(n), [0.0] * n, [0.0] * n
    terminated, truncated, fell = np.zeros((3, n), bool)
    hull: Any  # None, says gymnasium's hint, before the first reset
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
            angle, 2.0 * hull.angularVelocity / stock.FPS,
            0.3 * velocity.x * (stock.VIEWPORT_W / stock.SCALE) / stock.FPS,
            0.3 * velocity.y * (stock.VIEWPORT_H / stock.SCALE) / stock.FPS,
            hip0.angle, hip0.speed / stock.SPEED_HIP, knee0.angle + 1.0, knee0.speed / stock.SPEED_KNEE,
            legs[1].ground_contact,
            hip1.angle, hip1.speed / stock.SPEED_HIP, knee1.angle + 1.0, knee1.speed / stock.SPEED_KNEE,
            legs[3].ground_contact,
        )  # fmt: skip
        shaping = 130 * px / stock.SCALE - 5.0 * abs(angle)
        progress[i] = 0.0 if walker.prev_shaping is None else shaping - walker.prev_shaping
        walker.prev_shaping = shaping
        walker.elapsed += 1
        fell[i] = walker.game_over or px < 0
        terminated[i] = fell[i] or px > FINISH
        truncated[i] = walker.elapsed >= walker.max_episode_steps
    obs[:, 14:] = cast_rays(walkers, np.array(x), np.array(y))
    rewards = progress.astype(actions.dtype)
    cost = actions.dtype.type(TORQUE_COST) * effort
    for j in range(4):  # one after another, as the published one does: a sum has other bits
        rewards -= cost[:, j]
    rewards[fell] = FALL
    return obs, rewards, terminated, truncated


@np.errstate(divide="ignore", invalid="ignore")  # a ray parallel to an edge divides by zero, and is a miss
def cast_rays(walkers: Sequence[Walker], x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The lidar fractions (n, 10) float32 of walkers whose hulls are at x, y (n,) float64.

    b2EdgeShape::RayCast and b2PolygonShape::RayCast in float32 and in their order of operations, for the terrain
    within reach at once: shapes are (walkers, rays, edges or polygons). Misses are 1.
    """
    near, edges = walkers[0].near, walkers[0].edges
    cells = clip((x / stock.TERRAIN_STEP).astype(int), 0, len(near) - 1)
    first = clip(cells - 1, 0, edges.shape[1] - NEAR_EDGES).tolist()
    hulls = np.array((x, y))
    hull = hulls.astype(np.float32)[:, :, None, None]  # (x and y, walkers, 1, 1)
    ray = (hulls[:, :, None] + RAYS[:, None]).astype(np.float32)[..., None] - hull

    edges = np.concatenate([w.edges[:, i : i + NEAR_EDGES] for w, i in zip(walkers, first)])
    edges = edges.reshape(len(walkers), 7, 1, NEAR_EDGES).swapaxes(0, 1)
    vertex, edge, normal, square = edges[:2], edges[2:4], edges[4:6], edges[6]
    ts = np.empty((2, len(walkers), RAYS.shape[1], NEAR_EDGES), np.float32)  # where on the ray, and where on the edge
    np.divide(np.add(*normal * (vertex - hull)), np.add(*normal * ray), out=ts[0])
    np.divide(np.add(*(hull + ts[0] * ray - vertex) * edge), square, out=ts[1])
    inside = (ts >= 0) & (ts <= 1)  # false for the NaN of a ray along an edge
    fractions = np.where(inside[0] & inside[1], ts[0], np.float32(1)).min(2)

    some = [i for i, (w, cell) in enumerate(zip(walkers, cells.tolist())) if w.any_near[cell]]
    if some:
        polygons = np.stack([walkers[i].polygons[walkers[i].near[cells[i]]] for i in some])[:, None]
        nx, ny, vx, vy = np.moveaxis(polygons, (-1, -2), (0, 1))  # (4 sides, walkers, 1, polygons) each
        (px, py), (dx, dy) = hull[:, some], ray[:, some]
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


# ---- Several processes -----------------------------------------------------------------------------------------------

# torchrun starts them ("ranks"). Each has its own environments, and all have the same weights, statistics, generators
# and counters: rollouts are gathered before anything changes these. They differ only inside descend_in_ranks.

RANK_ENDED = "another process of this training has ended; --resume goes on where it last saved"


def rank() -> int:
    """The number of this process; 0 without torchrun."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """How many processes train together. (Without RANK, WORLD_SIZE is not torchrun's.)"""
    return int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1


def all_ranks(value: Any) -> list[Any]:
    """The value of each process, in the order of the ranks; with several processes its tensors are on the CPU."""
    if world_size() == 1:
        return [value]
    values = list[Any]([None] * world_size())
    with refuse(RANK_ENDED, TrainingError):  # over the CPU: two processes may use one GPU, or one of them none
        dist.all_gather_object(values, tree_map_only(Tensor, lambda tensor: tensor.cpu().numpy(), value))
    return tree_map_only(np.ndarray, torch.from_numpy, values)  # (to pickle tensors takes longer)


def mean_of_group(vector: Tensor, group: Any) -> Tensor:
    """Replaces `vector` by its mean over the ranks of `group`, in place. No group (None): this rank is alone."""
    if group is not None:
        with refuse(RANK_ENDED, TrainingError):
            dist.all_reduce(vector, group=group)
        vector /= dist.get_world_size(group)
    return vector


def trainers(network: int) -> range:
    """With torchrun: the ranks that train the actor (network 0), the even ones, or the critic (1), the odd ones."""
    return range(network, world_size(), 2)


def descend_in_ranks(state: State, batch: Tensors, minibatches: Tensor, args: Args) -> list[Tensors]:
    """What state.descend_all returns for both networks, computed by all processes.

    With two, one trains the actor, the other the critic, and they send nothing between two minibatches. With more,
    those of one network divide the rows of each minibatch (each normalises the advantages of its own, unless
    --norm-adv rollout), and take a step down the mean of their gradients.
    """
    if world_size() == 1:
        return state.descend_all(state.optimizers, batch, minibatches, args)
    group, optimizer = trainers(rank() % 2), state.optimizers[rank() % 2]
    size = minibatches.shape[1] // len(group)  # an odd number of processes may leave out a few rows
    rows = minibatches[:, group.index(rank()) * size :][:, :size]
    (sums,) = state.descend_all([optimizer], batch, rows, args)
    parts = all_ranks((sums, optimizer.tensors() if rank() < 2 else []))  # rank 0 has the actor, rank 1 the critic
    for each, (_, tensors) in zip(state.optimizers, parts):
        for own, new in zip(each.tensors(), tensors):
            own.copy_(new)
    by_network = [[sums for sums, _ in parts[network::2]] for network in (0, 1)]  # as in `trainers`
    return [{name: sum(part[name] for part in some) / len(some) for name in some[0]} for some in by_network]


def join_ranks(argv: Sequence[str]) -> None:
    """Connects torchrun's processes. Raises UserError where their arguments, program or versions differ."""
    if "RANK" not in os.environ:
        return
    if any(name not in os.environ for name in ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")):
        raise UserError("RANK is set, but not by torchrun: unset it, or start torchrun --nproc-per-node N ppo_vec.py")
    if world_size() == 1:
        return
    backend = "cpu:gloo,cuda:nccl" if dist.is_nccl_available() else "gloo"
    with refuse("torchrun's processes do not find each other"):
        dist.init_process_group(backend, timeout=datetime.timedelta(minutes=10))
    versions = {"ppo_vec.py": hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8], "torch": torch.__version__}
    same_in_all_ranks({"arguments": shlex.join(argv), **versions, "numpy": np.__version__})


def same_in_all_ranks(facts: dict[str, str]) -> None:
    """Raises UserError, in rank 0, and ends the others where a process has other facts."""
    first, *others = all_ranks(facts)
    for number, other in enumerate(others, start=1):
        for name, value in other.items():
            if value != first[name]:
                message = f"rank {number} has {name} {value!r}, rank 0 has {first[name]!r}"
                raise UserError(message) if rank() == 0 else SystemExit(2)


def from_rank_0(action: Callable[[], Any]) -> Any:
    """Runs `action` in rank 0, which alone has the files; returns its result in every rank. If it raises, all end."""
    try:
        box = [action() if rank() == 0 else None]
    except (UserError, SystemExit) as error:
        box = [error]
    if world_size() > 1:
        dist.broadcast_object_list(box)
    if isinstance(box[0], BaseException):
        raise box[0] if rank() == 0 or isinstance(box[0], SystemExit) else SystemExit(2)
    return box[0]


# ---- Fast updates: recordings and CUDA graphs ------------------------------------------------------------------------


# Arguments that `scheduled`, or your edit of it, may change in each update: a loss gets them as tensors.
SCALARS = "ent_coef", "clip_coef", "learning_rate", "critic_learning_rate", "gamma"


def fixed_args(args: Args) -> dict[str, Any]:
    """The arguments whose values are fixed in a recording or a CUDA graph; it is made anew where one changes."""
    return {f.name: getattr(args, f.name) for f in dataclasses.fields(Args) if f.name not in SCALARS}


@torch.no_grad()  # or TorchScript prepares for a backward pass
def record(optimizer: FlatAdam, batch: Tensors, minibatches: Tensor, args: Args) -> None:
    """On the CPU: makes optimizer.recording of the operations of flat_gradient, which TorchScript plays.

    They give the same bits in 0.57 of the time (networks of 128-128; 0.87 with 256-256): without autograd, and without
    Python, whose lock the two threads share. Whatever is no tensor is a constant of the recording. Where a
    field of Args changes, it is made anew, in the second update with the new value: often there is no second one.
    """
    what = minibatches.shape[1:], fixed_args(args)
    if what != optimizer.recorded:
        optimizer.recorded, optimizer.recording = what, None
        return
    if optimizer.recording or not optimizer.flat.is_cpu:
        return
    from torch.fx.experimental.proxy_tensor import make_fx  # takes 0.4 s

    names: list[str] = []

    def traced(mb_inds: Tensor, *tensors: Any) -> list[Tensor]:
        now = dataclasses.replace(args, **dict(zip(SCALARS, tensors)))
        gradient, metrics = flat_gradient(optimizer, dict(zip(batch, tensors[len(SCALARS) :])), mb_inds, now)
        names[:] = metrics
        return [gradient, *metrics.values()]

    def play(optimizer: FlatAdam, batch: Tensors, mb_inds: Tensor, args: Args) -> tuple[Tensor, Tensors]:
        with torch.jit.optimized_execution(False):  # else addmm becomes mm and add, with other bits
            gradient, *values = recording(mb_inds, *(getattr(args, name) for name in SCALARS), *batch.values())
        return gradient, dict(zip(names, values))

    inputs = minibatches[0], *(getattr(args, name) for name in SCALARS), *batch.values()
    try:
        recording: Any = make_fx(traced)(*inputs)
        recording.graph.eliminate_dead_code()
        recording.recompile()
        # (torch.compile, which is TorchScript's successor, needs a C++ compiler.)
        with warnings.catch_warnings(action="ignore"), suppress(RuntimeError):
            recording = torch.jit.trace(recording, inputs, check_trace=False)  # it knows no LayerNorm, for example
        changed = dataclasses.replace(args, **{name: 1.1 * getattr(args, name) + 0.01 for name in SCALARS})
        played, direct = (f(optimizer, batch, minibatches[-1], changed) for f in (play, flat_gradient))
        for ours, value in zip((played[0], *played[1].values()), (direct[0], *direct[1].values()), strict=True):
            if not torch.allclose(ours, value, rtol=0, atol=0, equal_nan=True):
                raise ValueError("with another minibatch it does not have the loss's values")
        optimizer.recording = play
    except Exception as error:  # an edited loss that asks for a tensor's value, uses NumPy, or draws numbers
        name = optimizer.loss_of.__name__
        where = "".join(f", line {f.lineno}," for f in traceback.extract_tb(error.__traceback__) if f.name == name)
        text = f"warning: updates take twice as long, for {name}{where} cannot be recorded: {one_line(error)}"
        say(text, any_rank=rank() == 1)  # which trains the critic
        optimizer.recording = flat_gradient  # which is not tried again


def descend_all(optimizers: Sequence[FlatAdam], batch: Tensors, minibatches: Tensor, args: Args) -> list[Tensors]:
    """On the CPU: `descend` for actor and critic at the same time, or for one of them. With --cuda see CudaGraph."""
    scalars: dict[str, Any] = {name: torch.tensor(getattr(args, name) or 0.0) for name in SCALARS}
    args = dataclasses.replace(args, **scalars)  # as tensors, so that a recording sees them change
    for optimizer in optimizers:
        record(optimizer, batch, minibatches, args)  # sets optimizer.recording, a faster flat_gradient
    first, *others = optimizers
    # In a new thread MKL takes all cores, until torch has looked how many it may have (-9 % update time, 64-64 nets).
    with ThreadPoolExecutor(1, initializer=torch.get_num_threads) as pool:
        sums = [pool.submit(descend, other, batch, minibatches, args) for other in others]
        return [descend(first, batch, minibatches, args), *(each.result() for each in sums)]


def means(sums: Tensors) -> dict[str, float]:
    """The mean of each metric, from what `descend` returns. Raises TrainingError if one is not finite."""
    steps, *values = torch.stack(list(sums.values())).tolist()
    metrics = {name: value / max(steps, 1) for name, value in zip(list(sums)[1:], values)}
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise TrainingError(f"losses/{name} is {value}")
    return metrics


class CudaGraph:
    """`descend_all` on CUDA: the kernels of a minibatch are recorded once, and replayed for every other.

    Python takes about twenty times as long to start its many small kernels as the GPU to run them: see
    benchmarks/results/gpu.md. The first update runs without a graph, so that CUDA's libraries are ready when it is
    recorded. What is recorded are kernels and addresses. So whatever they read is copied to the same place; and where
    an argument changes that cannot be copied, the graph is recorded anew.
    """

    def __init__(self) -> None:
        self.graph: torch.cuda.CUDAGraph | None = None
        self.batch: Tensors = {}
        # With more than two processes a minibatch has an exchange; that was never tried in a graph (it takes two GPUs).
        self.side, self.works = torch.cuda.Stream(), world_size() <= 2
        self.fixed: dict[str, Any] | None = None

    def __call__(
        self, optimizers: Sequence[FlatAdam], batch: Tensors, minibatches: Tensor, args: Args
    ) -> list[Tensors]:
        if not self.batch:
            self.batch = {name: tensor.clone() for name, tensor in batch.items()}
            self.minibatch = minibatches[:1].clone()
            self.scalars = torch.zeros(len(optimizers) + len(SCALARS), device=minibatches.device)
        if (fixed := fixed_args(args)) != self.fixed:
            self.graph, self.fixed = None, fixed
        for name, tensor in batch.items():
            self.batch[name].copy_(tensor)
        rates = [optimizer.learning_rate for optimizer in optimizers]
        self.scalars.copy_(torch.tensor([*rates, *(getattr(args, name) or 0.0 for name in SCALARS)]))
        for optimizer, rate in zip(optimizers, self.scalars):
            optimizer.learning_rate = rate  # a view of self.scalars: a replay reads what is copied there
        args = dataclasses.replace(args, **dict(zip(SCALARS, self.scalars[len(optimizers) :])))
        self.run_minibatch = functools.partial(self.one_minibatch, optimizers, args)
        totals: list[Any] = [0] * len(optimizers)
        for minibatch in minibatches:
            self.minibatch.copy_(minibatch)
            if self.graph is None:
                self.run_minibatch()
            else:
                self.graph.replay()
            totals = [total + sums for total, sums in zip(totals, self.sums)]
        if self.graph is None and self.works:
            self.capture()
        return [dict(zip(names, total)) for names, total in zip(self.names, totals)]

    def one_minibatch(self, optimizers: Sequence[FlatAdam], args: Args) -> None:
        """Both networks side by side, each on a CUDA stream; or one of them, see descend_in_ranks."""
        (first, *others), main = optimizers, torch.cuda.current_stream()
        self.side.wait_stream(main)
        with torch.cuda.stream(self.side):
            other_sums = [descend(other, self.batch, self.minibatch, args) for other in others]
        all_sums = [descend(first, self.batch, self.minibatch, args), *other_sums]
        main.wait_stream(self.side)
        self.names = [list(sums) for sums in all_sums]
        self.sums = [torch.stack(list(sums.values())) for sums in all_sums]

    def capture(self) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self.run_minibatch()
            self.graph = graph
        except RuntimeError as error:  # an edited loss that waits for the GPU, for example
            self.works = False
            text = f"warning: --cuda: no CUDA graph, updates are slow without one ({one_line(error)})"
            say(text, any_rank=rank() == 1)  # which trains the critic

    def cpu_seconds(self, agent: Agent, args: Args) -> float:
        """The seconds that an update would take this process on the CPU: a copy takes a few steps there."""
        agent = copy.deepcopy(agent).cpu()
        optimizers, batch = make_optimizers(agent), {name: tensor.cpu() for name, tensor in self.batch.items()}
        some = optimizers if world_size() == 1 else [optimizers[rank() % 2]]
        few = self.minibatch[:, :1024].cpu().expand(4, -1)
        for _ in range(3):  # the first warms up, the second is recorded
            began = time.perf_counter()
            descend_all(some, batch, few, args)
            seconds = time.perf_counter() - began
        minibatches = args.update_epochs * args.num_minibatches * self.minibatch.shape[1] / few.shape[1]
        return seconds / 4 * minibatches


# ---- State and checkpoints -------------------------------------------------------------------------------------------

FORMAT = f"ppo_vec 5 {Distribution.__name__}"
OLDER = "ppo_vec 4 Gaussian", "ppo_vec 3 Gaussian", "ppo_vec 2", "ppo_vec 1"  # of these only the policy is read
READABLE = FORMAT, *OLDER * (Distribution is Gaussian)
MAGIC = b"ppo_vec1"  # before the digest that follows the checkpoint's bytes
MAX_BYTES = 2**31  # of a file that is read
PLAIN = r"torch \w+Storage|torch\._utils _rebuild_tensor_v2|collections OrderedDict"  # what a checkpoint's pickle calls


class State:
    """Everything that must survive: a checkpoint holds every attribute that is not in UNSAVED."""

    UNSAVED = "args", "task", "device", "descend_all", "started", "next_save"  # (policy_dict saves args and bounds)

    def __init__(self, args: Options, task: Task, device: torch.device) -> None:
        # One seed, four streams that never overlap; `seed + i` would make neighbouring runs share environments
        # (Gymnasium seeds each with its own). Stream 0 belongs to the environments: episode_seed().
        _, noise, shuffle, init = np.random.SeedSequence(args.seed).spawn(4)
        torch.manual_seed(int(init.generate_state(1)[0]))
        self.args, self.task, self.device = args, task, device
        self.agent = Agent(task.obs_dim, task.action_dim, args, task.discrete).to(device)
        self.average = torch.optim.swa_utils.AveragedModel(self.agent, use_buffers=True)  # average_weights
        self.optimizers = make_optimizers(self.agent)
        self.descend_all = CudaGraph() if device.type == "cuda" else descend_all
        check_copy(self.agent, task, args)
        self.return_statistics = Normalizer(1)  # scale_rewards
        self.discounted_return = torch.zeros(args.num_envs, dtype=torch.float64)
        self.noise_rng = torch.Generator().manual_seed(int(noise.generate_state(1)[0]))
        self.shuffle_rng = torch.Generator().manual_seed(int(shuffle.generate_state(1)[0]))
        self.snapshot = new_snapshot(args.num_envs, task.obs_dim)
        self.global_step = 0
        self.smoothed_return: float | None = None  # these two: note_returns
        self.shown = 0.0 if (task.goal or 0) > 0 else None
        self.train_time_s = 0.0  # rollouts and updates
        self.wall_time_s = 0.0  # with evaluations and files, until `started`; see wall_time()
        self.evaluations: list[dict[str, Any]] = []
        none = {"global_step": 0, "time_s": 0.0, **summarize([(0.0, 0, False, 0.0)], task.goal), "mean": -math.inf}
        self.best = {"agent": copy.deepcopy(self.agent.state_dict()), "evaluation": none}  # by `score`
        self.selection_episodes = 0  # evaluation episodes so far, each on a seed of its own
        self.selection_steps = 0  # their steps, without those that confirm a solve
        self.evaluation_steps = 0  # all steps of evaluations
        self.solved_at_step: int | None = None
        self.solved_at_s: float | None = None
        self.finished = False
        self.log_sizes = {"events": 0, "episodes": 0}  # bytes of each log that belong to this state
        self.started, self.next_save = time.perf_counter(), -math.inf

    def move_to(self, device: torch.device) -> None:
        """Moves the networks and optimizers. With torchrun every rank has to: optimizers make groups of ranks."""
        saved = self.state_dict()  # which has the workers' snapshot itself, not a copy
        self.__init__(self.args, self.task, device)  # type: ignore[misc]
        self.load(saved)

    def wall_time(self) -> float:
        return self.wall_time_s + time.perf_counter() - self.started

    def state_dict(self) -> dict[str, Any]:
        """Plain types and tensors."""
        saved = {name: value for name, value in vars(self).items() if name not in self.UNSAVED}
        for name, value in saved.items():
            if isinstance(value, nn.Module):
                saved[name] = value.state_dict()
            elif isinstance(value, torch.Generator):
                saved[name] = value.get_state()
        saved["optimizers"] = [{0: optimizer.state} for optimizer in self.optimizers]  # as torch.optim.Adam's state
        return {**saved, **policy_dict(self.agent, self.args, self.task), "wall_time_s": self.wall_time()}

    def gathered(self) -> dict[str, Any]:
        """state_dict with the environments of all ranks."""
        parts = all_ranks({**self.snapshot, "discounted_return": self.discounted_return})
        rows: dict[str, Any] = {k: torch.cat([part[k] for part in parts]) for k in parts[0] if k != "actions"}
        rows["actions"] = [chunks for part in parts for chunks in part["actions"]]
        return {**self.state_dict(), "discounted_return": rows.pop("discounted_return"), "snapshot": rows}

    def load_gathered(self, saved: dict[str, Any]) -> None:
        """Loads what `gathered` gave: with this rank's environments, and new ones where there were fewer. See load."""
        own, size = {**self.snapshot, "discounted_return": self.discounted_return}, self.args.num_envs
        with refuse("the checkpoint does not fit"):
            there = {**saved["snapshot"], "discounted_return": saved["discounted_return"]}
            for name, new in own.items():
                rows = there[name][rank() * size :][:size]
                own[name] = rows + new[len(rows) :] if name == "actions" else torch.cat((rows, new[len(rows) :]))
            if (before := len(there["episode"])) != size * world_size():
                say(f"the checkpoint has {before} environments, this run has {size * world_size()}")
        self.load({**saved, "discounted_return": own.pop("discounted_return"), "snapshot": own})

    def load(self, saved: dict[str, Any]) -> None:
        """Takes over what state_dict gave. Raises UserError if it does not fit this agent and environment."""
        with refuse("the checkpoint does not fit"):
            expected = kind({**self.state_dict(), "args": saved["args"]})
            row, chunk = kind(self.best["evaluation"]), torch.empty(0, self.task.action_dim)
            grown = [kind(evaluation) == row for evaluation in saved["evaluations"]]
            grown += [kind(actions[:0]) == kind(chunk) for actions in itertools.chain(*saved["snapshot"]["actions"])]
            if kind(saved) != expected or not all(grown):
                raise ValueError("its entries, or their types or shapes, are others")
            for name, own in vars(self).items():
                if isinstance(own, nn.Module):
                    own.load_state_dict(saved[name])
                elif isinstance(own, torch.Generator):
                    own.set_state(saved[name])
                elif name not in self.UNSAVED and name != "optimizers":
                    setattr(self, name, saved[name])
            for optimizer, state in zip(self.optimizers, saved["optimizers"]):
                for name, tensor in optimizer.state.items():
                    tensor.copy_(state[0][name])
        self.finished = False


# A number or None. The last two: an environment may get a goal, or lose it, while a run is interrupted.
MAY_BE_NONE = "solved_at_step", "solved_at_s", "smoothed_return", "shown", "frac_solved"


def kind(tree: Any, name: Any = "") -> Any:
    """What a saved value must have in common with our own: keys, types, shapes and dtypes; lists of results may grow.

    A fused optimizer looks at no shape: it would write past the end of a tensor that is too small.
    """
    if isinstance(tree, dict):
        return {key: kind(value, key) for key, value in tree.items()}
    if isinstance(tree, list) and name in ("optimizers", "actions"):
        return [kind(value) for value in tree]
    if name in MAY_BE_NONE and type(tree) in (int, float):
        return type(None)
    return (tree.shape, tree.dtype) if isinstance(tree, Tensor) else type(tree)


def policy_dict(agent: Agent, args: Options, task: Task) -> dict[str, Any]:
    """A policy as plain types and tensors: all of best.pt but its evaluation, and a part of every checkpoint."""
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(args).items()}
    low, high = torch.from_numpy(task.low), torch.from_numpy(task.high)
    return {"format": FORMAT, "args": plain, "low": low, "high": high, "agent": agent.state_dict()}


def read_file(path: Path) -> bytes:
    """Raises OSError, also for what is no regular file or too large."""
    if is_odd(path):
        raise OSError(0, "is no regular file")
    if path.stat().st_size > MAX_BYTES:
        raise OSError(0, "is too large")
    return path.read_bytes()


def is_odd(path: Path) -> bool:
    """Whether it is a link, a device or the like: a run folder may come from a stranger."""
    return path.is_symlink() or (path.exists() and not path.is_file() and not path.is_dir())


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; an empty one if there is none that can be read."""
    with suppress(OSError, ValueError, RecursionError):
        value = json.loads(read_file(path))
        return value if isinstance(value, dict) else {}
    return {}


def write_file(path: Path, data: bytes, keep: Path | None = None) -> None:
    """Replaces `path` by `data`, whole or not at all. `keep`: where the old file goes. Raises TrainingError."""
    temporary = path.with_name(path.name + ".tmp")
    with refuse(f"cannot write {path}", TrainingError):
        temporary.unlink(missing_ok=True)
        with open(temporary, "xb") as file:  # a new file: through no link
            file.write(data)
            file.flush()
            sync(file.fileno())
        if keep is not None and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
        if hasattr(os, "O_DIRECTORY"):  # the renames themselves have to reach the disk, too
            folder = os.open(path.parent, os.O_DIRECTORY)
            sync(folder)
            os.close(folder)


def sync(file: int) -> None:
    try:
        os.fsync(file)
    except OSError as error:  # some network file systems have no such call, above all for folders
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise


def encode(tree: dict[str, Any]) -> bytes:
    """torch.save's bytes, then their SHA-256. torch.load ignores what follows, but would not notice a flipped bit."""
    buffer = io.BytesIO()
    torch.save(tree, buffer)
    data = buffer.getvalue()
    return data + MAGIC + hashlib.sha256(data).digest()


def decode(data: bytes) -> dict[str, Any]:
    """Raises ValueError, saying why, for bytes that are not an intact checkpoint. Executes nothing.

    The digest tells that a file is intact, not who made it. A stranger's must not cost more than its size: nothing is
    compressed, calls anything but the parts of a plain tensor, or is larger than what is stored of it.
    """
    body, tail = data[: -len(MAGIC) - 32], data[-len(MAGIC) - 32 :]
    if not tail.startswith(MAGIC):
        raise ValueError("is not a ppo_vec checkpoint, or is cut off")
    if hashlib.sha256(body).digest() != tail[len(MAGIC) :]:
        raise ValueError("is damaged: its digest does not match")
    try:
        with zipfile.ZipFile(io.BytesIO(body)) as archive, warnings.catch_warnings(action="ignore"):
            if sum(info.file_size for info in archive.infolist()) > len(body):
                raise ValueError
            (pickled,) = (name for name in archive.namelist() if name.lower().endswith("/data.pkl"))
            for opcode, called, _ in pickletools.genops(archive.read(pickled)):
                if "GLOBAL" in opcode.name and not re.fullmatch(PLAIN, str(called)):
                    raise ValueError
            tree = torch.load(io.BytesIO(body), map_location="cpu", weights_only=True)
        left, parts = len(body), [tree]
        for part in parts:
            inner = list(part.values()) if isinstance(part, dict) else part if isinstance(part, (list, tuple)) else ()
            left -= part.nbytes if isinstance(part, Tensor) else 1 + len(inner)
            if left < 0 or (isinstance(part, Tensor) and (part.requires_grad or not part.is_contiguous())):
                raise ValueError
            parts += inner
    except Exception as error:  # whatever a crafted file makes the restricted unpickler raise
        raise ValueError("cannot be read as plain tensors") from error
    if not isinstance(tree, dict) or tree.get("format") not in READABLE:
        raise ValueError(f"is of the format {tree.get('format') if isinstance(tree, dict) else None!r}, not {FORMAT!r}")
    return tree


def read_checkpoint(where: str | Path, policy: bool = False, runs_dir: str = "runs") -> tuple[Path, dict[str, Any]]:
    """The newest intact checkpoint of a run folder, or of a file and its predecessor; with `policy`, best.pt first.

    "latest" is the run in `runs_dir` whose checkpoint is the newest. Returns also the file used. Raises UserError.
    """
    path = Path(where)
    if str(where) == "latest":
        found = ((os.path.getmtime(file), file) for file in Path(runs_dir).glob("*/checkpoint*.pt") if file.exists())
        path = max(found, default=(0, path / "none"))[1].parent
    paths = [path, path.with_name("checkpoint.previous.pt")] if path.name == "checkpoint.pt" else [path]
    if os.path.isdir(path):  # Path.is_dir raises for a name that is too long
        paths = [path / name for name in ["best.pt"] * policy + ["checkpoint.pt", "checkpoint.previous.pt"]]
    complaints: list[str] = []
    for file in filter(os.path.lexists, paths):
        try:
            tree = decode(read_file(file))
            for complaint in complaints:
                say(f"warning: {complaint}; using {file.name}")
            return file, tree
        except (OSError, ValueError) as error:
            complaints.append(f"{file} {error.strerror if isinstance(error, OSError) else error}")
    hint = "; it holds a policy only: --evaluate it, or begin with it: --init-from" * os.path.isfile(path / "best.pt")
    place = f"in any folder of {runs_dir}" if str(where) == "latest" else f"at {where}"
    raise UserError("; ".join(complaints) or f"there is no checkpoint {place}{hint}")


def saved_args(tree: dict[str, Any], policy: bool = False) -> Options:
    """The arguments in a checkpoint. Raises UserError for flags that are gone, unless only its `policy` is used."""
    import typeguard  # tyro depends on it

    if not policy and tree["format"] != FORMAT:
        raise UserError(f"its format is {tree['format']}, not {FORMAT}: --init-from begins a new run with its networks")
    with refuse("the checkpoint's arguments do not fit"):
        hints = get_type_hints(Options)
        saved = {k: tuple(v) if isinstance(v, list) else v for k, v in tree["args"].items()}
        saved.setdefault("norm_adv", "rollout")  # so it was before there was this flag
        if not policy and (gone := {name for name in saved.keys() - hints.keys() if saved[name]}):  # not just off
            raise ValueError(f"another version of ppo_vec made it, with other flags ({', '.join(sorted(gone))})")
        trusted = (saved.keys() & hints.keys()) - NEVER_FROM_A_FILE - ({"capture_video"} if policy else set())
        args = Options(**{name: typeguard.check_type(saved[name], hints[name]) for name in trusted})
        validate(args)
        return args


def load_policy(where: str | Path) -> Policy:
    """A run folder (its best policy) or a checkpoint -> a function from raw observations to deterministic actions.

    Box actions: (obs_dim,) -> (action_dim,) or (n, obs_dim) -> (n, action_dim), float32. Discrete ones: () or (n,),
    int64. Ready for env.step(), which may want its own shape: training reshapes to it, and rounds to whole numbers.
    Raises UserError if there is no intact checkpoint.
    """
    return policy_of(read_checkpoint(where, policy=True)[1])


def policy_of(tree: dict[str, Any]) -> Policy:
    """The policy in a checkpoint, whatever version of ppo_vec has written it. Raises UserError."""
    with refuse("the checkpoint holds no policy of ours"):
        policy = Policy(tree["agent"], tree["args"]["activation"], tree["low"].numpy(), tree["high"].numpy())
        actions = policy.sample(np.zeros((1, len(policy.obs_mean))))
        if actions.shape != (1, len(policy.low)) or not np.isfinite(policy.env_action(actions)).all():
            raise ValueError("its shapes do not fit, or its weights are not finite")
        return policy


# ---- Evaluation ------------------------------------------------------------------------------------------------------

EVALUATIONS = 20  # periodic evaluations a run, at most
EVALUATION_SHARE = 0.08  # their steps, at most this share of training's steps (each takes a third of the time)
ROUNDS = (5, 15, 100)  # episodes of a periodic evaluation; the second and third only where the task may be solved


def summarize(episodes: Episodes, goal: float | None) -> dict[str, Any]:
    returns = np.array([ret for ret, *_ in episodes])
    return {
        "episodes": len(returns), "mean": float(returns.mean()), "std": float(returns.std()),
        "min": float(returns.min()), "frac_solved": None if goal is None else float((returns >= goal).mean()),
    }  # fmt: skip


def summary_text(result: dict[str, Any]) -> str:
    solved = "" if result["frac_solved"] is None else f", {result['frac_solved']:.0%} solved"
    numbers = f"{result['mean']:.1f} +- {result['std']:.1f} (min {result['min']:.1f}"
    return f"{numbers}{solved}, {result['episodes']} episodes)"


def should_evaluate(state: State, args: Options) -> bool:
    """At most EVALUATIONS a run, and no more than their share. Counted in steps: the same in every run of a seed."""
    last = state.evaluations[-1]["global_step"] if state.evaluations else 0
    spaced = state.global_step - last >= args.total_timesteps / EVALUATIONS
    affordable = state.selection_steps <= EVALUATION_SHARE * state.global_step
    return spaced and affordable and state.global_step < args.total_timesteps  # deliver() has the last weights


def play_seeds(envs: VecEnv, state: State, weights: Tensors, first: int, count: int, **how: Any) -> Episodes:
    """Episodes of the policy with these weights on `count` seeds from `first` on; counts state.evaluation_steps."""
    episodes = envs.play(weights, list(range(first, first + count)), **how)
    state.evaluation_steps += sum(length for _, length, *_ in episodes)
    return episodes


def evaluate(envs: VecEnv, state: State, log: Log) -> None:
    """A periodic evaluation, on fresh selection seeds: keeps the best policy, notes when the task is solved.

    Every rank has to call it. Raises TrainingError.
    """
    goal, weights = state.task.goal, copy.deepcopy(state.agent.state_dict())
    episodes: Episodes = []
    for count in ROUNDS:
        part = play_seeds(envs, state, weights, SELECTION_SEEDS + state.selection_episodes, count)
        state.selection_episodes += count
        episodes = part if count == ROUNDS[-1] else episodes + part  # the last round counts alone: it decided nothing
        if count < ROUNDS[-1]:
            state.selection_steps += sum(length for _, length, *_ in part)
        if goal is None or state.solved_at_step is not None or summarize(episodes, goal)["mean"] < goal:
            break
    else:  # confirmed only by episodes that had no part in the decision to look
        state.solved_at_step, state.solved_at_s = state.global_step, state.wall_time()
    row = {"global_step": state.global_step, "time_s": state.wall_time(), **summarize(episodes, goal)}
    state.evaluations.append(row)
    if score(row, goal) > score(state.best["evaluation"], goal):
        state.best = {"agent": weights, "evaluation": row}
    log.evaluation(state, row)
    write_results(envs, state, log.folder, state.best["evaluation"], row)


def score(evaluation: dict[str, Any], goal: float | None) -> tuple[bool, float]:
    """By what policies are chosen: a hundred episodes at the goal, then the mean return less one standard error.

    Five good episodes may be luck: a policy that falls in one episode of ten has them three times in five.
    """
    mean, episodes = evaluation["mean"], evaluation["episodes"]
    confirmed = goal is not None and mean >= goal and episodes >= ROUNDS[-1]
    return confirmed, mean - evaluation["std"] / math.sqrt(episodes)


def deliver(envs: VecEnv, state: State, log: Log) -> None:
    """The end of a run: chooses the policy that it delivers, and tests it. Every rank has to call it.

    It is the last weights, or with --swa-share their mean. If these do not solve the task on fresh selection seeds, the
    best policy of the periodic evaluations plays the same: it is delivered if it is better by a standard error. The
    test, on other seeds and the published environment, chooses nothing. Raises TrainingError.
    """
    args, goal, step = state.args, state.task.goal, state.global_step
    averaged = bool(args.swa_share and state.average.n_averaged)  # none, if --resume came with fewer --total-timesteps
    source = state.average.module if averaged else state.agent
    last = {"agent": copy.deepcopy(source.state_dict()), "evaluation": {"global_step": step}}
    first = SELECTION_SEEDS + state.selection_episodes

    def solves(candidate: dict[str, Any], count: int, by: str = "mean") -> bool:  # and notes the result in it
        result = summarize(play_seeds(envs, state, candidate["agent"], first, count, show=True), goal)
        candidate["evaluation"] = {**candidate["evaluation"], "time_s": state.wall_time(), **result}
        return goal is not None and result[by] >= goal

    few, earlier = min(sum(ROUNDS[:2]), args.eval_episodes), False
    sure = bool(state.solved_at_step) and solves(last, few, by="min")  # a few are enough if none fails
    if not sure and not solves(last, args.eval_episodes) and state.evaluations:
        solves(state.best, args.eval_episodes)  # to note its result
        earlier = score(state.best["evaluation"], goal) > (False, last["evaluation"]["mean"])
    state.selection_episodes += args.eval_episodes
    row, state.best = last["evaluation"], state.best if earlier else last
    if not state.solved_at_step and score(row, goal)[0]:
        state.solved_at_step, state.solved_at_s = step, state.wall_time()
    state.evaluations.append(row)
    log.evaluation(state, row)

    last_test = test = play_seeds(envs, state, last["agent"], TEST_SEEDS, args.eval_episodes, published=True, show=True)
    if state.best is not last:
        test = play_seeds(envs, state, state.best["agent"], TEST_SEEDS, args.eval_episodes, published=True, show=True)
    last_result, result = summarize(last_test, goal), summarize(test, goal)
    name = "the mean of the last weights" if averaged else "the last weights"
    what = name if state.best is last else f"an earlier policy, of step {state.best['evaluation']['global_step']}"
    say(f"test on unseen episodes of the published environment: {name}: {summary_text(last_result)}")
    say(f"delivered: {what}: {summary_text(result)}")
    falls = float(np.mean([fell for _, _, fell, _ in test]))
    log.scalars(step, {"test/return": result["mean"], "test/fall_rate": falls, "test/last_return": last_result["mean"]})
    write_episodes(log.folder, test)
    write_results(envs, state, log.folder, result, last_result)  # before the video: a renderer may fail
    if args.capture_video:  # with torchrun only on rank 0, which therefore may not wait for others in here
        policy = Policy(state.best["agent"], args.activation, state.task.low, state.task.high)
        path, strip = record_video(args, policy, log.folder)
        log.picture("video", step, strip)
        say(f"video: {path}")
    state.finished = True
    write_results(envs, state, log.folder, result, last_result)


def write_episodes(folder: Path, episodes: Episodes) -> None:
    """evaluation.csv: one row a test episode. Raises TrainingError."""
    rows = [f"{TEST_SEEDS + i},{ret!r},{length},{fell}\n" for i, (ret, length, fell, _) in enumerate(episodes)]
    write_file(folder / "evaluation.csv", "".join(("seed,return,length,fell\n", *rows)).encode())


def record_video(args: Options, policy: Policy, folder: Path) -> tuple[Path, bytes]:
    """Writes the first test episode as an mp4, frame by frame (RecordVideo would keep all). Raises TrainingError.

    Returns also a strip of six of its frames, side by side, as a PNG.
    """
    import imageio

    path = folder / "videos" / f"{re.sub('[/:]', '_', args.env_id)}-seed{TEST_SEEDS}.mp4"
    film = io.BytesIO()
    with refuse(f"cannot write {path}", TrainingError):  # a renderer that has lost its display, ...
        path.parent.mkdir(exist_ok=True)
        # macro_block_size 2: players want even sizes, not the multiples of 16 of the default.
        how: dict[str, Any] = {"format": ".mp4", "macro_block_size": 2}
        with (
            one_env(args, render=True) as env,
            imageio.get_writer(film, fps=env.metadata.get("render_fps", 30), **how) as writer,
        ):
            obs, done, few = reset_env(env, TEST_SEEDS), False, []
            limit = (env.spec.max_episode_steps if env.spec else None) or args.eval_max_steps
            for t in range(limit + 1):
                frame = render_frame(env)
                writer.append_data(frame)
                if t % 25 == 0:
                    few.append(frame[::2, ::2])
                if done:
                    break
                (obs,), _, (terminated,), (truncated,) = step_envs([env], policy(obs)[None])
                done = terminated or truncated
    write_file(path, film.getvalue())
    strip = np.hstack([few[i] for i in np.linspace(0, len(few) - 1, 6).astype(int)])
    return path, imageio.v3.imwrite("<bytes>", strip, extension=".png")


# ---- The run folder: checkpoints, summary, logs, picture -------------------------------------------------------------


def say(message: str, any_rank: bool = False) -> None:
    """One line on stderr, above a progress bar if there is one, and in log.txt; of rank 0 only, unless `any_rank`."""
    if rank():
        if any_rank:
            print(f"rank {rank()}: {message}", file=sys.stderr)
        return
    with suppress(OSError):  # a folder in the place of log.txt
        logging.getLogger("ppo_vec").info(message)
    with suppress(OSError):  # stderr on a full disk, a terminal that has gone
        tqdm.write(message, file=sys.stderr)


def progress_bar(total: int, initial: int, unit: str, show: bool = True) -> Any:
    """Of rank 0 only. One that counts episodes disappears when it is full."""
    tqdm.monitor_interval = 0  # no thread beside the forks
    interval = 0.5 if sys.stderr.isatty() else 30.0  # a log file needs no redrawing
    how: Any = {"dynamic_ncols": True, "leave": unit == "step", "disable": rank() > 0 or not show}
    with suppress(OSError):  # it draws itself at once: as in `say`
        return tqdm(total=total, initial=initial, unit=unit, mininterval=interval, **how)
    return tqdm(disable=True)


def should_save(state: State) -> bool:
    """Whether `save` is due: by the clock, so that saving takes at most a hundredth of the time, whatever the disk."""
    return any(all_ranks(time.perf_counter() > state.next_save))


def save(state: State, log: Log) -> None:
    """Writes checkpoint.pt, keeping the one before. Raises TrainingError where the disk is full."""
    began = time.perf_counter()
    state.log_sizes = log.flush(to_disk=True)
    # The first save moves nothing there: checkpoint.pt may be damaged, and the run resumed from the previous one.
    keep = log.folder / "checkpoint.previous.pt" if state.next_save > -math.inf else None
    tree = state.gathered()
    if rank() == 0:
        write_file(log.folder / "checkpoint.pt", encode(tree), keep=keep)
    now = time.perf_counter()
    state.next_save = now + max(2.0, 100 * (now - began))


def write_results(envs: VecEnv, state: State, folder: Path, best: dict[str, Any], last: dict[str, Any]) -> None:
    """best.pt, and summary.json with its evaluation, `best`, and that of the last weights."""
    write_file(folder / "best.pt", encode({**policy_dict(state.agent, state.args, state.task), **state.best}))
    summary = {
        "env_id": state.args.env_id, "seed": state.args.seed, "global_step": state.global_step,
        "evaluation_steps": state.evaluation_steps, "wall_time_s": round(state.wall_time(), 3),
        "train_time_s": round(state.train_time_s, 3),
        "sps": round(state.global_step / max(state.train_time_s, 1e-9), 1),
        **{f"eval_{k}": best[k] for k in ("episodes", "mean", "std", "min", "frac_solved")},
        **{f"last_eval_{k}": last[k] for k in ("mean", "std", "min")},
        "solved_at_step": state.solved_at_step, "solved_at_s": state.solved_at_s,
        "worker_restarts": sum(all_ranks(envs.replacements)), "finished": state.finished,
    }  # fmt: skip
    write_file(folder / "summary.json", json.dumps(summary, indent=2).encode())


EPISODES_HEADER = b"global_step,time_s,return,length,env\n"


class Log:
    """TensorBoard's event file, episodes.csv, the progress bar and Weights and Biases.

    A resumed run cuts off what was written after its checkpoint: one file, one axis, no step twice (SB3 #433, #975).
    """

    def __init__(self, folder: Path, state: State) -> None:
        self.args, self.folder, self.steps_before = state.args, folder, state.global_step
        self.started = self.clock = time.perf_counter()
        self.seconds: dict[str, float] = {}
        self.wandb = start_wandb(self.args) if self.args.track else None
        before = read_json(folder / "args.json")
        earlier = before.pop("earlier", [])
        earlier = (earlier if isinstance(earlier, list) else []) + [before] * bool(before)
        info = {**describe_run(self.args), "earlier": earlier}
        write_file(folder / "args.json", json.dumps(info, indent=2).encode())
        if (summary := read_json(folder / "summary.json")).get("finished"):  # a finished run that goes on
            write_file(folder / "summary.json", json.dumps({**summary, "finished": False}, indent=2).encode())
        self.paths = {"events": folder / "events.out.tfevents.0", "episodes": folder / "episodes.csv"}
        first = self.event(file_version="brain.Event:2") + self.arguments()
        headers = first, EPISODES_HEADER
        self.files: dict[str, Any] = {}
        for (name, path), header in zip(self.paths.items(), headers):
            with refuse(f"cannot write {path}", TrainingError):
                file = self.files[name] = open(path, "ab")  # noqa: SIM115
                file.truncate(min(state.log_sizes[name], file.tell()))
                if file.seek(0, os.SEEK_END) == 0:  # new, or lost
                    file.write(header)
        better = TUNED.get(self.args.env_id, {}).items()
        tuned = " ".join(typed(name, value) for name, value in better if getattr(self.args, name) == value)
        say(f"{self.args.env_id}, seed {self.args.seed}, in {folder}, tuned: {tuned or 'nothing'}")
        early, late = (fixed_args(scheduled(self.args, int(x * self.args.total_timesteps), x)) for x in (0, 0.9))
        if changing := ", ".join(name for name in early if early[name] != late[name]):
            say(f"warning: updates are slow, for scheduled() changes {changing}, which is not in SCALARS")
        if world_size() > 1:
            say(f"{world_size()} processes of {self.args.num_envs} environments each")
        self.bar = progress_bar(self.args.total_timesteps, self.steps_before, "step")

    def close(self) -> None:
        for closed in (self.bar, *self.files.values()):
            with suppress(OSError):
                closed.close()
        if self.wandb is not None:
            if read_json(self.folder / "summary.json").get("finished"):
                names = "best.pt", "evaluation.csv", "summary.json", "learning_curve.png", "videos/*.mp4"
                for path in itertools.chain.from_iterable(self.folder.glob(name) for name in names):
                    if not is_odd(path):  # escaped: wandb takes both for patterns
                        self.wandb.save(glob.escape(str(path)), base_path=glob.escape(str(self.folder)), policy="now")
            self.wandb.finish()

    def write(self, name: str, data: bytes) -> None:
        with refuse(f"cannot write {self.paths[name]}", TrainingError):
            self.files[name].write(data)

    def flush(self, to_disk: bool = False) -> dict[str, int]:
        """Hands everything to the system, or on to the disk itself. Returns the sizes of the files."""
        for name, file in self.files.items():
            with refuse(f"cannot write {self.paths[name]}", TrainingError):
                file.flush()
                _ = to_disk and sync(file.fileno())
        return {name: file.tell() for name, file in self.files.items()}

    def lap(self, name: str) -> None:
        """The time since the last lap was spent on `name`."""
        now = time.perf_counter()
        self.seconds[name], self.clock = now - self.clock, now

    def event(self, **fields: Any) -> bytes:
        """An entry of TensorBoard's event file."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        buffer = io.BytesIO()
        RecordWriter(buffer).write(Event(wall_time=time.time(), **fields).SerializeToString())
        return buffer.getvalue()

    def arguments(self) -> bytes:
        """All arguments, for TensorBoard's HPARAMS, whose metric is the final test, and as a table for its TEXT."""
        from torch.utils.tensorboard import summary

        values = {k: v if isinstance(v, (bool, int, float, str)) else str(v) for k, v in vars(self.args).items()}
        table = "\n".join(("| argument | value |", "|---|---|", *(f"| {k} | {v} |" for k, v in values.items())))
        parts = *summary.hparams(values, {"test/return": 0.0}), summary.text("arguments", table)
        return b"".join(self.event(summary=part) for part in parts)

    def picture(self, tag: str, step: int, png: bytes) -> None:
        """A picture for TensorBoard's IMAGES."""
        width, height = (int.from_bytes(png[i : i + 4], "big") for i in (16, 20))  # of the PNG's header
        image = {"encoded_image_string": png, "width": width, "height": height, "colorspace": 4}
        self.write("events", self.event(step=step, summary={"value": [{"tag": tag, "image": image}]}))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        entries = [{"tag": tag, "simple_value": value} for tag, value in values.items()]
        self.write("events", self.event(step=step, summary={"value": entries}))
        if self.wandb is not None:
            self.wandb.log(values, step=step)

    def iteration(self, state: State, rollout: Rollout, metrics: dict[str, float], now: Options) -> None:
        """One iteration: TensorBoard, episodes.csv, progress bar. Every tag is explained in the README."""
        rollout_s, update_s, size = self.seconds["rollout"], self.seconds["update"], self.args.batch_size * world_size()
        state.train_time_s += rollout_s + update_s
        for e in rollout.episodes:
            tags = {"charts/episodic_return": e["return"], "charts/episodic_length": float(e["length"])}
            self.scalars(e["global_step"], tags)
            line = f"{e['global_step']},{state.wall_time():.3f},{e['return']!r},{e['length']},{e['env']}\n"
            self.write("episodes", line.encode())
        values = {
            "time/SPS": size / (rollout_s + update_s), "time/SPS_rollout": size / rollout_s,
            "time/SPS_total": (state.global_step - self.steps_before) / (time.perf_counter() - self.started),
            "time/rollout_s": rollout_s, "time/update_s": update_s, "policy/learning_rate": now.learning_rate,
            **{f"losses/{name}": value for name, value in metrics.items()},
        }  # fmt: skip
        if rollout.episodes:
            values["charts/fall_rate"] = float(np.mean([e["fell"] for e in rollout.episodes]))
        self.scalars(state.global_step, values)
        self.flush()
        if isinstance(state.descend_all, CudaGraph) and state.global_step == self.steps_before + 3 * size:
            where = f"on the GPU, {'as a CUDA graph' if state.descend_all.graph else 'without a CUDA graph'}"
            cpu_s = state.descend_all.cpu_seconds(state.agent, now)
            took = f"a rollout takes {rollout_s:.3f} s, an update {update_s:.3f} s"
            say(f"{took} {where}; on the CPU about {cpu_s:.3f} s")
            if cpu_s < update_s:
                say("warning: these networks are so small that training is faster without --cuda")
        with suppress(OSError):  # stderr may be a file on a full disk
            smoothed = math.nan if state.smoothed_return is None else state.smoothed_return
            self.bar.set_postfix_str(f"return={smoothed:.1f}, SPS={values['time/SPS']:.0f}", refresh=False)
            self.bar.update(min(state.global_step, self.args.total_timesteps) - self.bar.n)

    def evaluation(self, state: State, row: dict[str, Any]) -> None:
        self.scalars(state.global_step, {"charts/eval_return": row["mean"]})
        say(f"step {state.global_step}: evaluation {summary_text(row)}")


def start_wandb(args: Options) -> Any:
    import wandb

    with refuse("--track"):  # not logged in, no network, an id that it refuses
        project, name = (os.environ.get(f"WANDB_{k}", v) for k, v in (("PROJECT", "ppo_vec"), ("NAME", args.run_name)))
        return wandb.init(project=project, name=name, id=args.run_name, resume="allow", config=vars(args))


def describe_run(args: Options) -> dict[str, Any]:
    """Every argument and everything else that a result depends on."""
    git = "git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"
    commit, cpu = None, re.findall(r"model name\s*: (.*)", CPU) or [platform.processor() or platform.machine()]
    with suppress(OSError, subprocess.SubprocessError):
        commit = subprocess.run(git, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    starter = ["torchrun", f"--nproc-per-node={world_size()}"] if world_size() > 1 else [Path(sys.executable).name]
    versions = {"torch": torch, "numpy": np, "gymnasium": gym, "box2d": Box2D}
    kernels = {name: os.environ.get(name) for name in ("OPENBLAS_CORETYPE", "ATEN_CPU_CAPABILITY", "MKL_CBWR")}
    return {
        "args": dataclasses.asdict(args),
        "command": shlex.join([*starter, *sys.argv]), "processes": world_size(),
        "versions": {"python": platform.python_version(), **{k: str(v.__version__) for k, v in versions.items()}},
        "git_commit": commit, "cpu": cpu[0], "cores": usable_cores(),
        "kernels": {"torch": torch.backends.cpu.get_cpu_capability(), **kernels},
        "gpu": torch.cuda.get_device_name() if args.cuda and torch.cuda.is_available() else None,
    }  # fmt: skip


def plot_learning_curve(state: State, log: Log) -> None:
    """learning_curve.png, also for TensorBoard: the mean and deviation of recent returns; evaluations."""
    try:
        lines = read_file(log.folder / "episodes.csv").decode().splitlines()[1:]
        from matplotlib.figure import Figure  # no pyplot: no display needed, no global state
    except (ImportError, OSError) as error:  # somebody has moved the file
        say(f"warning: no learning_curve.png: {one_line(error)}")
        return
    if not lines:
        return
    rows = np.array([line.split(",")[:3] for line in lines], float)
    window = max(1, min(100, len(rows) // 10))
    recent = np.lib.stride_tricks.sliding_window_view(rows[:, 2], window)
    steps, mean, std = rows[window - 1 :, 0], recent.mean(1), recent.std(1)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.fill_between(steps, mean - std, mean + std, alpha=0.25, lw=0, label="±1 standard deviation")
    axes.plot(steps, mean, lw=1.5, label=f"training return, mean of {window} episodes")
    if points := [(row["global_step"], row["mean"]) for row in state.evaluations]:
        axes.plot(*zip(*points), "o", ms=5, color="C1", label="evaluation, deterministic")
    if state.solved_at_step is not None:
        axes.axvline(state.solved_at_step, color="C2", lw=1, ls=":", label="solved")
    if state.task.goal is not None:
        axes.axhline(state.task.goal, color="0.4", lw=1, ls="--", label=f"goal {state.task.goal:g}")
    axes.set(xlabel="environment steps", ylabel="return", title=log.folder.name.replace("$", r"\$"))
    axes.legend(loc="lower right", fontsize="small")
    axes.grid(alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=120)
    log.picture("learning_curve", state.global_step, buffer.getvalue())
    write_file(log.folder / "learning_curve.png", buffer.getvalue())


# ---- Command line ----------------------------------------------------------------------------------------------------

# Another change would make it another run. NEVER_FROM_A_FILE: what only the command line sets.
EVALUATE_MAY_CHANGE = {
    "num_workers", "start_method", "worker_timeout", "capture_video", "eval_episodes", "eval_max_steps", "evaluate",
    "runs_dir",
}  # fmt: skip
RESUME_MAY_CHANGE = EVALUATE_MAY_CHANGE | {"total_timesteps", "track", "cuda", "resume"}
NEVER_FROM_A_FILE = {"track", "num_workers", "start_method", "runs_dir", "run_name", "resume", "evaluate"}
GRACE = 5.0  # seconds that an iteration has to finish after a signal
RULES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (  # flags, what their values must be, in words
    ("num_\\w+|total_timesteps|update_epochs|eval_\\w+", lambda v: v >= 1, "be at least 1"),
    ("\\w+_hidden_sizes", lambda v: all(size >= 1 for size in v), "all be at least 1"),
    ("(critic_)?learning_rate|clip_coef|max_grad_norm|target_kl|worker_timeout",
        lambda v: 0 < v < math.inf, "be a finite number greater than 0"),
    ("initial_std", lambda v: 1e-4 <= v <= 1e4, "lie in [1e-4, 1e4]"),
    ("gamma|\\w+_lambda", lambda v: 0 <= v <= 1, "lie in [0, 1]"),
    ("swa_share", lambda v: 0 <= v < 1, "lie in [0, 1)"),
    ("anneal_share", lambda v: 0 < v <= 1, "lie in (0, 1]"),
    ("\\w+_(coef|cost)|min_std|seed", lambda v: 0 <= v < math.inf, "be finite and at least 0"),
    ("(final_)?fall_reward", lambda v: -math.inf < v < 0, "be a finite number less than 0"),
    ("wrappers", lambda v: all(":" in wrapper for wrapper in v), "be module:function"),
    ("run_name", lambda v: Path(v).name == v != ".." and v.isprintable(), "be a plain folder name"),
    ("runs_dir", str.isprintable, "be printable"),
)  # fmt: skip


def validate(args: Options) -> None:
    """Raises UserError, naming the flag, where a value or a combination cannot work."""
    for f in dataclasses.fields(args):
        value = getattr(args, f.name)
        for pattern, holds, words in RULES:
            if re.fullmatch(pattern, f.name) and value is not None and not holds(value):
                raise UserError(f"{flag(f.name)} must {words}, not {value!r}")
    rows = args.batch_size * world_size() // args.num_minibatches // len(trainers(0))  # see descend_in_ranks
    for good, message in (
        (args.final_fall_reward is None or args.fall_reward is not None, "--final-fall-reward needs --fall-reward"),
        (not (args.min_std and args.state_dependent_std), "--min-std and --state-dependent-std exclude each other"),
        (args.min_std <= args.initial_std, "--min-std must not be more than --initial-std"),
        (args.batch_size % args.num_minibatches == 0, "--num-minibatches must divide --num-envs x --num-steps"),
        (args.batch_size > 1, "--num-envs x --num-steps is one step: no advantages to normalise"),
        (
            rows > 1 or args.norm_adv == "rollout",
            "--num-minibatches leaves one step in each: no advantages to normalise; fewer, or --norm-adv rollout",
        ),
        (args.resume is None or args.evaluate is None, "--resume and --evaluate exclude each other"),
        (args.evaluate is None or world_size() == 1, "--evaluate uses all cores without torchrun"),
    ):
        if not good:
            raise UserError(message)


ALIASES = {  # what other trainers call it
    "--lr": "--learning-rate", "--env": "--env-id", "--device": "--cuda", "--gpu": "--cuda", "--wandb": "--track",
    "--batch-size": "--num-envs x --num-steps / --num-minibatches", "--load": "--resume, --evaluate or --init-from",
    "--render": "--capture-video", "--timesteps": "--total-timesteps", "--n-envs": "--num-envs",
    "--exp-name": "--run-name", "--vf-coef": "always 0.5",
    "--torch-deterministic": "always on", "--save-model": "always on (best.pt)",
    "--wandb-project-name": "the variable WANDB_PROJECT",
}  # fmt: skip


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def typed(name: str, value: Any) -> str:
    """A flag with its value, as one types it."""
    if isinstance(value, bool):
        return flag(name if value else f"no_{name}")
    return " ".join((flag(name), *map(str, value if isinstance(value, (tuple, list)) else [value])))


def code_flags(args: Options) -> str:
    """What is to be typed again with --resume and --evaluate: a checkpoint alone imports no code."""
    wrappers = f" --wrappers {shlex.join(args.wrappers)}" if args.wrappers else ""
    return f" --env-id {shlex.quote(args.env_id)}" * (":" in args.env_id) + wrappers


def resume_flags(args: Options, folder: Path) -> str:
    start = f" --start-method {args.start_method}" * (args.start_method != Options.start_method)
    more = start + " --track" * args.track  # which no checkpoint turns on
    return f"--resume {shlex.quote(str(folder))}{code_flags(args)}{more}"


def parse_args(argv: Sequence[str]) -> tuple[Options, Path | None, dict[str, Any] | None]:
    """tyro twice: for the env id or the run; then with its values as defaults.

    Returns also the file of the run to continue or evaluate, if there is one, and what is in it, or in --init-from's.
    """
    argv, whole = list(argv), {flag(f.name) for f in dataclasses.fields(Options) if f.type.startswith("int")}
    for i, word in enumerate(argv):  # whole numbers may be written 1e6
        name, equals, value = word.rpartition("=")  # without a "=" the first two are empty: the flag is the word before
        number = re.fullmatch(r"\d+(\.\d+)?[eE]\+?\d+", value)
        if (name or argv[i - 1]).replace("_", "-") in whole and number and float(value).is_integer():
            argv[i] = f"{name}{equals}{float(value):.0f}"
    if sum(word.partition("=")[0] == "--wrappers" for word in argv) > 1:  # tyro would take the last only
        raise UserError("--wrappers takes several at once: --wrappers a:b c:d")
    for word in argv:
        if instead := ALIASES.get(word.partition("=")[0].replace("_", "-")):
            raise UserError(f"there is no {word.partition('=')[0]}; here it is {instead}")
    examples = re.sub(" +# ", "\n        # ", "\n".join(re.findall("(?m)^    .*", __doc__ or "")))  # for 80 columns
    words = f"{examples}\n\nTuned defaults depend on --env-id; what you type overrides them."
    cli = functools.partial(tyro.cli, Options, description=words)
    first = cli(args=[word for word in argv if word not in ("-h", "--help")])
    where = first.resume if first.evaluate is None else first.evaluate
    if where is None:
        env_id = next((name for name in TUNED if first.env_id == name.rsplit("-v", 1)[0]), first.env_id)  # no "-v3"
        tuned = Options(env_id=env_id, **TUNED.get(env_id, {}))
        args = dataclasses.replace(cli(args=argv, default=tuned), env_id=env_id)
        validate(args)
        if args.init_from is not None and args.initial_std != tuned.initial_std:
            raise UserError("--initial-std has no effect with --init-from: that policy has its own standard deviation")
        begin = None if args.init_from is None else read_checkpoint(args.init_from, True, args.runs_dir)[1]
        return args, None, begin
    path, tree = read_checkpoint(where, policy=first.evaluate is not None, runs_dir=first.runs_dir)
    saved = saved_args(tree, policy=first.evaluate is not None)
    if (":" in saved.env_id and first.env_id != saved.env_id) or (saved.wrappers and first.wrappers != saved.wrappers):
        raise UserError(f"{where} would import code; if you trust it, add{code_flags(saved)}")
    args = cli(args=argv, default=saved)
    validate(args)
    mode, changeable = ("evaluated", EVALUATE_MAY_CHANGE) if args.resume is None else ("resumed", RESUME_MAY_CHANGE)
    for f in dataclasses.fields(Options):
        if f.name not in changeable and getattr(args, f.name) != getattr(saved, f.name):
            raise UserError(f"{flag(f.name)} cannot change when a run is {mode}; it has {getattr(saved, f.name)}")
    if args.resume is not None:
        if path.name not in ("checkpoint.pt", "checkpoint.previous.pt"):
            raise UserError(f"--resume takes a run folder and continues its checkpoint.pt; {path} is another file")
        folder = path.resolve().parent  # wherever the run folder is now
        args = dataclasses.replace(args, runs_dir=str(folder.parent), run_name=folder.name, resume=None)
    return args, path, tree


def set_up_torch() -> None:
    """Before networks are made: their first weights have other bits with more threads."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # these matrices are too small to share; more threads only wait for each other
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # costs time, and nothing here reads such memory
    # Else glibc gives large arrays back at once, and gets their memory anew page by page (8,192 values: 14 ms, now 5).
    with suppress(OSError, AttributeError):  # no glibc
        for option in (-1, -3):  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD
            ctypes.CDLL(None).mallopt(option, 2**28)
    # In a forked process, torch makes autograd's engine anew at its first use. Two threads at once would crash in it.
    torch.ones((), requires_grad=True).square()


def choose_device(args: Args) -> torch.device:
    if args.cuda:
        try:
            if "LOCAL_RANK" in os.environ and torch.cuda.device_count():
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
            torch.ones(2, 2, device="cuda") @ torch.ones(2, 2, device="cuda")
            return torch.device("cuda")
        except (RuntimeError, AssertionError) as error:  # none, one without kernels in this torch, one that is taken
            say(f"warning: --cuda: no CUDA device that torch can use ({one_line(error)[:80]}); training on the CPU")
    return torch.device("cpu")


def evaluate_run(args: Options, task: Task, tree: dict[str, Any], folder: Path) -> None:
    """--evaluate: test episodes of a saved policy on the published environment, on all cores; prints and writes it."""
    # A folder of its own: the run's has the run's own test, and may be another's.
    target = Path(args.runs_dir).absolute() / f"{folder.resolve().name}__evaluation__{time.time_ns() // 10**6}"
    with refuse(f"cannot make the folder {target}; --runs-dir names another place"):
        target.mkdir(parents=True)
    portion = (16 if args.env_id in WALKERS else 4) * (args.num_workers or usable_cores())  # for each move of the bar
    args = dataclasses.replace(args, num_envs=portion, num_steps=1)
    seeds = range(TEST_SEEDS, TEST_SEEDS + args.eval_episodes)  # no list: a stranger's number may be large
    with closing(VecEnv(args, task, new_snapshot(args.num_envs, task.obs_dim))) as envs:
        episodes = envs.play(tree["agent"], seeds, published=True, show=True)
    write_episodes(target, episodes)
    returns, lengths, fell, efforts = np.array(episodes).T
    text = f"{summary_text(summarize(episodes, task.goal))}, mean length {lengths.mean():.0f}"
    effort = "" if task.discrete else f", effort {efforts.mean():.2f}"
    print(f"{args.env_id}, deterministic: {text}{effort}")
    print(f"highest {returns.max():.1f}, {int(fell.sum())} falls; episodes by return:")
    with suppress(ValueError):  # equal returns that are too large for ten bins
        for count, edge in zip(*np.histogram(returns, bins=10)):
            print(f"{edge:10.1f} .. {'#' * math.ceil(50 * count / len(returns))} {count}")
    if args.capture_video:
        print(f"video: {record_video(args, policy_of(tree), target)[0]}")
    print(f"episodes: {target / 'evaluation.csv'}")


def check_machine(args: Options, task: Task, tree: dict[str, Any] | None, new: bool) -> None:
    """Raises UserError for what this machine lacks, or a checkpoint of other sizes, before either costs anything."""
    for name, module in (("track", "wandb"), ("capture_video", "imageio"), ("capture_video", "imageio_ffmpeg")):
        with refuse(f"{flag(name)} needs a package: pip install {module}"):
            _ = getattr(args, name) and importlib.import_module(module)
    if args.evaluate is not None:
        return
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", ()):
        # Bytes of a row: raw observations twice, and three times on their way to the networks; actions, noise and their
        # copies; outputs of two hidden layers; and with torchrun twice the rows of all processes, which the update has.
        widest = max((*args.actor_hidden_sizes, *args.critic_hidden_sizes, 1))
        row = 40 * (task.obs_dim + args.extra_dim) + 16 * task.action_dim + 8 * widest
        row += 8 * world_size() * (task.obs_dim + task.action_dim + 4) * (world_size() > 1)
        size = args.batch_size * row
        if size > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
            what = f"--num-envs {args.num_envs} x --num-steps {args.num_steps} is a rollout of {size / 2**30:.0f} GiB"
            raise UserError(f"{what}, more than this machine's memory")
    if tree is not None:
        with refuse("the checkpoint does not fit"), torch.device("meta"):  # networks without memory
            own = Agent(task.obs_dim, task.action_dim, args, task.discrete)
            theirs, ours = kind(tree["agent"]), kind(own.state_dict())
            if others := [name for name in {**ours, **theirs} if theirs.get(name) != ours.get(name)]:
                names = "env_id", "actor_hidden_sizes", "critic_hidden_sizes", "critic_progress", "state_dependent_std"
                words = " ".join(typed(name, tree["args"].get(name, getattr(Options, name))) for name in names)
                raise ValueError(f"its networks have other sizes or actions ({others[0]} differs); it has {words}")
            if (activation := tree["args"]["activation"]) != args.activation:
                raise ValueError(f"its networks need --activation {activation}")
            if not new and len(tree["snapshot"]["episode"]) % args.num_envs:
                raise ValueError("another number of environments")


@contextmanager
def stop_signals(folder: Path, state: State) -> Iterator[Callable[[], int | None]]:
    """Gives a function that tells the signal, one of STOP_SIGNALS, that has asked the run to end, if any rank got one.
    With torchrun all ranks have to call that together; the end of torchrun itself counts as SIGTERM.

    The iteration has GRACE seconds to finish. Then, or by a second signal, the process ends at once: what has happened
    since the last checkpoint is done again on --resume.
    """
    received: list[int] = []

    def end(number: int) -> None:
        if rank() == 0:
            how = f"continue with: {resume_flags(state.args, folder)}"
            with suppress(OSError):  # the terminal has gone
                os.write(2, f"\nstopped by {signal.Signals(number).name}; {how}\n".encode())
        os._exit(128 + number)  # the workers notice, and close their environments

    def handle(number: int, _: Any) -> None:
        if not received:
            received.append(number)
            timer.start()
        elif signal.Signals(number).name != "SIGHUP":  # a closed terminal may send that twice
            end(number)

    def lost_torchrun() -> int:  # which somebody has killed
        return signal.SIGTERM if "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != parent else 0

    parent = os.getppid()
    timer = threading.Timer(GRACE, lambda: state.finished or end(received[0]))
    main_thread = threading.current_thread() is threading.main_thread()
    before = {n: signal.signal(n, handle) for n in STOP_SIGNALS} if main_thread else {}
    try:
        yield lambda: max(all_ranks(received[0] if received else lost_torchrun())) or None
    finally:
        timer.cancel()
        if received:
            timer.join()
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def run_folder(args: Options, new: bool) -> Iterator[tuple[Options, Path]]:
    """Names and makes the run folder, and keeps other processes out of it. Gives the arguments with its name."""
    from filelock import FileLock  # torch depends on it

    if rank():  # rank 0 alone writes what stays
        with tempfile.TemporaryDirectory() as folder:
            yield dataclasses.replace(args, track=False, capture_video=False), Path(folder)
        return
    # Weights and Biases and Windows refuse the colon of "module:Env-v0" in a name.
    name = args.run_name or f"{re.sub('[/:]', '_', args.env_id)}__ppo_vec__{args.seed}__{time.time_ns() // 10**6}"
    folder = Path(args.runs_dir) / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if odd := next(filter(is_odd, folder.iterdir()), None):
            raise UserError(f"{odd} is no regular file; remove it")
        lock = FileLock(folder / ".lock").acquire(timeout=CLOSE_TIMEOUT + 2)  # workers of one just killed hold it, too
    except OSError as error:  # the lock's Timeout is one, too
        why = error.strerror or "another process is training in it"
        raise UserError(f"cannot write the run folder {folder}: {why}") from error
    with lock:
        results = "summary.json", "evaluation.csv", "learning_curve.png"
        episodes, checkpoints = folder / "episodes.csv", list(folder.glob("*.pt"))
        rows = episodes.exists() and episodes.stat().st_size > len(EPISODES_HEADER)
        if new and (rows or checkpoints or any((folder / name).exists() for name in results)):
            how = f"{resume_flags(args, folder)} continues it, " * bool(checkpoints)
            raise UserError(f"{folder} already holds a run; {how}another --run-name begins a new one")
        logger = logging.getLogger("ppo_vec")
        handler: Any = logging.FileHandler(folder / "log.txt", encoding="utf-8", delay=True)  # a refused run has none
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        handler.handleError = lambda record: None  # a full disk: stderr has the line, too
        logger.setLevel(logging.INFO), logger.addHandler(handler)
        try:
            yield dataclasses.replace(args, run_name=name), folder
        except TrainingError as error:
            if isinstance(error.__cause__, OSError) and any(folder.glob("checkpoint*.pt")):  # a full disk, say
                error = TrainingError(f"{error}; mend that, and {resume_flags(args, folder)} loses nothing")
            with suppress(OSError):  # as in `say`
                logger.error(f"error: {error}")
            raise error
        finally:
            with suppress(OSError):
                logger.removeHandler(handler), handler.close()


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code: 0, 1 training failed, 2 bad input, 128 + signal if one stopped it."""
    if sys.stderr is None:  # closed, or a program without a console
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    try:
        argv = sys.argv[1:] if argv is None else argv
        join_ranks(argv)
        args, path, tree = from_rank_0(lambda: parse_args(argv))
        task = make_task(args)
        same_in_all_ranks(
            {f"the environment's {name}": str(np.asarray(value).tolist()) for name, value in vars(task).items()}
        )
        check_machine(args, task, tree, new=path is None)
        if tree is not None:
            policy = policy_of(tree)
            if (task.obs_dim, len(task.low)) != (len(policy.obs_mean), len(policy.low)):
                raise UserError(f"the checkpoint does not fit {args.env_id}: other observations or actions")
            if args.evaluate is not None:
                evaluate_run(args, task, tree, path.parent)
                return 0
            step = tree.get("global_step")
            if path is not None and tree.get("finished") is True and type(step) is int and step >= args.total_timesteps:
                say(f"{path.parent} is finished; a longer --total-timesteps would extend it")
                return 0
        with run_folder(args, new=path is None) as (args, folder):
            number = train(args, task, folder, tree, new=path is None)
            if number is not None:
                say(f"stopped by {signal.Signals(number).name}; continue with: {resume_flags(args, folder)}")
        return 128 + number if number is not None else 0
    except (UserError, TrainingError, MemoryError, RuntimeError) as error:
        text, on_gpu = str(error), isinstance(error, torch.OutOfMemoryError)
        no_memory = on_gpu or isinstance(error, MemoryError) or "DefaultCPUAllocator" in text
        if isinstance(error, RuntimeError) and not no_memory:
            raise
        if no_memory:
            hint = "smaller networks, fewer --num-envs x --num-steps, or more --num-minibatches, need less"
            text = f"no memory left{' on the GPU' * on_gpu}; {hint} ({one_line(error)})"
        print(f"ppo_vec.py: error: {f'rank {rank()}: ' * (world_size() > 1)}{text}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except KeyboardInterrupt:  # in an evaluation, or before a run has taken the signal over
        return 130
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


# So that `uv run ppo_vec.py` needs nothing but this file (PEP 723; as in pyproject.toml):
# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = [
#     "torch==2.13.0", "gymnasium[box2d]==1.4.0", "numpy==2.4.6", "filelock>=3.20.3", "tensorboard>=2.19",
#     "tyro>=0.9.20,<2", "tqdm>=4.66", "typeguard>=4.4", "matplotlib>=3.9", "imageio[ffmpeg]>=2.37",
# ]
# ///

if __name__ == "__main__":
    # As a module: a spawned worker looks its classes up there, and would get copies of those in __main__.
    sys.path.insert(0, str(Path(__file__).resolve().parent))  # python -I and -P leave it out
    sys.exit(importlib.import_module(Path(__file__).resolve().stem).main())
