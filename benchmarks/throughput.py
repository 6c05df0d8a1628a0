"""How fast the trainer is, beside its peers and beside the limit of the machine. Run it on a quiet machine.

    python benchmarks/throughput.py                   # about 15 minutes; writes benchmarks/results/throughput.*
    python benchmarks/throughput.py --quick           # under two minutes, prints only
    python benchmarks/throughput.py --policy runs/X   # the walking policy; default runs/reference/BipedalWalker-v3

Peers: pip install -e ".[bench]". One that is missing says so in its row, and the rest runs.

Every row is set up once, then all take turns: A B C A B C ..., the first turn a warm-up that does not count. So
whatever slows the machine down meets all rows alike. Ratios are taken turn by turn.

In all rows a trained policy walks, with its own noise: walkers that fall at once are cheaper to step. Rows that only
step exclude the policy's time. A row in which an environment only resets is not a step, but its time counts (skrl's
trainer counts it as one). Ours steps a rollout's actions in one message, as its training does; the others take one step
at a time. Peers have torch's own number of threads, one for each core; ours one, and a Python thread for the critic.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import itertools
import json
import logging
import multiprocessing
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # last: a changed copy of ppo_vec on PYTHONPATH can be measured

import ppo_vec as pv  # before NumPy: it decides on its threads

# isort: split
import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
from gymnasium.envs.box2d.bipedal_walker import BipedalWalkerHeuristics
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv

ENV_ID = "BipedalWalker-v3"
PEERS = "envpool", "stable-baselines3", "skrl"
START_METHOD = "fork" if sys.platform == "linux" else "spawn"
STILL = 1e-8  # the learning rate of all trainings: they compute as ever, but the policy goes on walking as it does
now = time.perf_counter


@dataclass
class Row:
    """One thing measured. `turns` yields a figure at each turn, and sets itself up before the first."""

    group: str
    name: str
    turns: Iterator[float]
    unit: str = "steps/s"
    ours: bool = False
    samples: list[float] = field(default_factory=list)
    note: str = ""  # why there are no samples

    def turn(self, warm_up: bool) -> None:
        if self.note:
            return
        torch.use_deterministic_algorithms(self.ours)  # ours is; a peer need not pay for it
        torch.set_num_threads(1 if self.ours else pv.usable_cores())  # ours has a Python thread for each network
        try:
            value = float(next(self.turns))
        except ImportError as error:
            missing = (error.name or "").split(".")[0].replace("_", "-") in PEERS
            self.note = 'not installed: pip install -e ".[bench]"' if missing else f"failed: {error}"
        except Exception as error:
            self.note = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:120]}"
        else:
            self.samples += [] if warm_up else [value]


def spread(samples: list[float]) -> dict[str, float]:
    return {"median": statistics.median(samples), "min": min(samples), "max": max(samples)} if samples else {}


class Bench:
    """What all rows share: the policy, the arguments and how long one turn lasts."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.seconds = options.seconds
        tuned = pv.Args(**{"env_id": ENV_ID, **pv.tuned_values(ENV_ID)})
        steps = options.num_steps or (64 if options.quick else tuned.num_steps)
        self.args = replace(tuned, num_steps=steps, learning_rate=STILL, critic_learning_rate=None)
        reference = ROOT / "runs" / "reference" / ENV_ID
        where = options.policy or (reference if reference.exists() else None)
        self.tree = pv.read_checkpoint(str(where), policy=True)[1] if where else None
        self.about_policy = f"actions: {where}, with its noise"
        if self.tree:
            saved = pv.saved_args(self.tree)
            names = "actor_hidden_sizes", "critic_hidden_sizes", "activation", "state_dependent_std"
            self.args = replace(self.args, **{name: getattr(saved, name) for name in names})
        else:
            self.about_policy = (
                "NO TRAINED POLICY (see --policy): rows that only step follow Gymnasium's heuristic walker, the others "
                "an untrained policy whose walkers fall, so that their ratios mean little"
            )
        self.task = pv.Task.of(self.args)

    def args_for(self, num_envs: int, workers: int = 1) -> pv.Args:
        return replace(self.args, num_envs=num_envs, num_workers=workers)

    def state(self, args: pv.Args) -> pv.State:
        state = pv.State(args, self.task, torch.device("cpu"))
        if self.tree:
            state.agent.load_state_dict(self.tree["agent"])
        return state

    def actor(self, num_envs: int) -> Callable[[np.ndarray], np.ndarray]:
        """A function from observations (n, 24) to env-ready walking actions with noise."""
        rng = np.random.default_rng(0)
        if self.tree:
            policy = pv.restore_policy(self.tree)
            return lambda obs: policy.env_action(policy.sample(obs, rng.standard_normal((len(obs), 4), np.float32)))
        walkers = [BipedalWalkerHeuristics() for _ in range(num_envs)]

        def act(obs: np.ndarray) -> np.ndarray:
            actions = np.array([1.2 * w.step_heuristic(o) for w, o in zip(walkers, obs)], np.float32)
            return np.clip(actions + 0.02 * rng.standard_normal(actions.shape, np.float32), -1, 1)

        return act

    def block(self, num_envs: int, start: int, stop: int, trainer: int) -> pv.Block:
        """Environments [start, stop) of num_envs as a worker has them, but in this process."""
        args = self.args_for(num_envs)
        state = self.state(args)
        envs = pv.VecEnv(args, self.task, state.envs)  # not started: only its shared arrays are used
        envs.load_policy(state.agent.policy_arrays())
        block = pv.Block(0, start, stop, self.task, envs.agent, envs.data, state.envs, trainer)
        block.restore()
        return block

    def rollout(self, args: pv.Args) -> pv.Rollout:
        return pv.Rollout.allocate(args, self.task.obs_dim, self.task.action_dim, torch.device("cpu"))

    def repeat(self, action: Callable[[], int]) -> Iterator[float]:
        """Turns of at least `seconds` of `action`, which returns the steps it took; yields their rate."""
        while True:
            steps, began = 0, now()
            while (spent := now() - began) < self.seconds or not steps:
                steps += action()
            yield steps / spent


# ----------------------------------------------------------------------------------------------------------------------
# Stepping only
# ----------------------------------------------------------------------------------------------------------------------


def stepping(bench: Bench, obs: np.ndarray, step: Callable) -> Iterator[float]:
    """Closed loop, only `step` timed: actions (n, 4) -> observations (n, 24), rewards, terminated, truncated."""
    act, done = bench.actor(len(obs)), np.zeros(len(obs), bool)
    while True:
        steps, spent = 0, 0.0
        while spent < bench.seconds:
            actions = act(obs)
            began = now()
            obs, _, terminated, truncated = step(actions)[:4]
            spent += now() - began
            steps += len(obs) - np.count_nonzero(done)
            done = terminated | truncated
        yield steps / spent


def one_stock(bench: Bench) -> Iterator[float]:
    env, done = gym.make(ENV_ID, disable_env_checker=True), True

    def step(actions: np.ndarray) -> tuple[np.ndarray, ...]:
        nonlocal done
        obs, reward, *ended = (env.reset()[0], 0.0, False, False) if done else env.step(actions[0])[:4]
        done = any(ended)
        return obs[None], reward, *np.array(ended)[:, None]

    yield from stepping(bench, step(np.zeros((1, 4)))[0], step)


def one_block(bench: Bench, num_envs: int) -> Iterator[float]:
    block = bench.block(num_envs, 0, num_envs, trainer=os.getpid())
    yield from stepping(bench, block.obs, block.step)


def vector_env(bench: Bench, make: Callable[[], Any]) -> Iterator[float]:
    with contextlib.closing(make()) as envs:
        yield from stepping(bench, envs.reset()[0], envs.step)


def stock(kind: type, num_envs: int) -> Any:
    return kind([lambda: gym.make(ENV_ID, disable_env_checker=True)] * num_envs)


def envpool(num_envs: int) -> Any:
    import envpool

    threads = min(num_envs, pv.usable_cores())
    return envpool.make(ENV_ID, env_type="gymnasium", num_envs=num_envs, num_threads=threads, seed=0)


# ----------------------------------------------------------------------------------------------------------------------
# Ours: rollouts, the same rollouts again without the policy, training; and the limit
# ----------------------------------------------------------------------------------------------------------------------

Record = list[tuple[np.ndarray, np.ndarray, np.ndarray]]  # actions, observations, valid rows of rollouts


def rollouts(bench: Bench, args: pv.Args, record: Record) -> Iterator[float]:
    """VecEnv.rollout alone. What it did in one turn is left in `record`."""
    state = bench.state(args)
    with pv.VecEnv(args, bench.task, state.envs) as envs:
        while True:
            record.clear()
            steps, spent = 0, 0.0
            while spent < bench.seconds:
                noise = state.noise_rng.standard_normal((args.num_steps, args.num_envs, 4), np.float32)
                began = now()
                data = envs.rollout(state.agent.policy_arrays(), noise)
                spent += now() - began
                record.append((data.actions.copy(), data.obs.copy(), state.envs.advance(data, 0)[0]))
                steps += record[-1][2].sum()
            yield steps / spent


def rollouts_again(bench: Bench, args: pv.Args, record: Record) -> Iterator[float]:
    """The recorded rollouts, given their actions: the same walking to the bit, stepping only."""
    with pv.VecEnv(args, bench.task, bench.state(args).envs) as envs:
        while True:
            steps, spent = 0, 0.0
            for actions, obs, valid in record:
                envs.data.actions[...] = actions
                began = now()
                envs.run("rollout", True)
                spent += now() - began
                steps += valid.sum()
                assert np.array_equal(envs.data.obs, obs), "the same actions led elsewhere"
            yield steps / spent


def training(bench: Bench, args: pv.Args, learn: bool) -> Iterator[float]:
    """The rollouts of a training, with values, log probabilities and bookkeeping; with `learn` also its updates."""
    state, rollout = bench.state(args), bench.rollout(args)
    with pv.VecEnv(args, bench.task, state.envs) as envs:

        def iteration() -> int:
            before = state.global_step
            pv.collect(envs, state, rollout, args)
            if learn:
                pv.update(state.agent, state.optimizers, rollout, args, state.shuffle_rng)
                state.agent.update_normalizers(rollout)
            return state.global_step - before

        yield from bench.repeat(iteration)


def independent(bench: Bench, args: pv.Args) -> Iterator[float]:
    """The machine's real limit: processes that step a block each, with the policy, and never wait for another."""
    context, processes, pipes = multiprocessing.get_context(START_METHOD), [], []
    bounds = np.linspace(0, args.num_envs, args.num_workers + 1).astype(int).tolist()
    try:
        for start, stop in itertools.pairwise(bounds):
            pipe, end = context.Pipe()
            target_args = end, bench, args.num_envs, start, stop, os.getpid()
            processes.append(context.Process(target=step_on, args=target_args, daemon=True))
            processes[-1].start()
            end.close()  # so that recv() ends if the process does
            pipes.append(pipe)
        while True:
            for pipe in pipes:
                pipe.send(bench.seconds)
            yield sum(pipe.recv() for pipe in pipes)
    finally:
        for process in processes:
            process.kill()


def step_on(pipe: Any, bench: Bench, num_envs: int, start: int, stop: int, parent: int) -> None:
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
    block, rng = bench.block(num_envs, start, stop, trainer=parent), np.random.default_rng(start)
    obs, done = block.obs, block.done
    while True:
        seconds, steps, began = pipe.recv(), 0, now()
        while now() - began < seconds:
            for noise in rng.standard_normal((32, stop - start, 4), np.float32):
                steps += len(obs) - np.count_nonzero(done)
                obs, _, terminated, truncated = block.step(block.policy.sample(obs, noise, start))
                done = terminated | truncated
        pipe.send(steps / (now() - began))


# ----------------------------------------------------------------------------------------------------------------------
# The peers' training
# ----------------------------------------------------------------------------------------------------------------------

ACTIVATIONS = {"tanh": nn.Tanh, "relu": nn.ReLU, "leaky_relu": nn.LeakyReLU, "elu": nn.ELU}


def linear_layers(*modules: nn.Module) -> list[nn.Linear]:
    return [m for module in modules for m in module.modules() if isinstance(m, nn.Linear)]


def copy_layers(source: nn.Module, *targets: nn.Module) -> None:
    """The weights of our network for a peer's: both walk alike."""
    for ours, theirs in zip(linear_layers(source), linear_layers(*targets), strict=True):
        theirs.load_state_dict(ours.state_dict())


def sb3(bench: Bench, args: pv.Args, parallel: bool) -> Iterator[float]:
    from stable_baselines3 import PPO
    from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize

    agent, make = bench.state(args).agent, [lambda: gym.make(ENV_ID, disable_env_checker=True)] * args.num_envs
    venv = SubprocVecEnv(make, start_method=START_METHOD) if parallel else DummyVecEnv(make)
    venv = VecNormalize(venv, gamma=args.gamma)
    model = PPO(
        "MlpPolicy", venv, learning_rate=STILL, n_steps=args.num_steps, batch_size=args.minibatch_size,
        n_epochs=args.update_epochs, gamma=args.gamma, gae_lambda=args.gae_lambda, clip_range=args.clip_coef,
        normalize_advantage=args.norm_adv, ent_coef=args.ent_coef, vf_coef=args.vf_coef, device="cpu", seed=0,
        max_grad_norm=args.max_grad_norm, policy_kwargs={
            "net_arch": {"pi": list(args.actor_hidden_sizes), "vf": list(args.critic_hidden_sizes)},
            "activation_fn": ACTIVATIONS[args.activation],
        },
    )  # fmt: skip
    policy, moments = model.policy, agent.normalizer
    copy_layers(agent.actor, policy.mlp_extractor.policy_net, policy.action_net)
    copy_layers(agent.critic, policy.mlp_extractor.value_net, policy.value_net)
    policy.log_std.data.copy_(agent.actor.logstd.data)
    venv.obs_rms.mean, venv.obs_rms.var, venv.obs_rms.count = moments.mean.numpy(), moments.var.numpy(), 1e6

    def learn() -> int:
        model.learn(args.batch_size, reset_num_timesteps=False)
        return args.batch_size

    with contextlib.closing(venv):
        yield from bench.repeat(learn)


def skrl(bench: Bench, args: pv.Args, kind: type) -> Iterator[float]:
    from skrl.agents.torch.ppo import PPO, PPO_CFG
    from skrl.envs.wrappers.torch import wrap_env
    from skrl.memories.torch import RandomMemory
    from skrl.models.torch import DeterministicMixin, GaussianMixin, Model
    from skrl.resources.preprocessors.torch import RunningStandardScaler
    from skrl.trainers.torch import SequentialTrainer

    logging.getLogger("skrl").setLevel(logging.ERROR)
    agent, env = bench.state(args).agent, wrap_env(stock(kind, args.num_envs), wrapper="gymnasium", verbose=False)
    spaces = {"observation_space": env.observation_space, "action_space": env.action_space, "device": "cpu"}

    class Net:
        def __init__(self, source: nn.Sequential, hidden: tuple[int, ...]) -> None:
            Model.__init__(self, **spaces)
            super().__init__()  # of the mixin
            layers = [(nn.Linear(*size), ACTIVATIONS[args.activation]()) for size in itertools.pairwise((24, *hidden))]
            self.net = nn.Sequential(*itertools.chain(*layers), nn.Linear(hidden[-1], source[-1].out_features))
            copy_layers(source, self.net)
            self.logstd = nn.Parameter(agent.actor.logstd.data.clone()) if source is agent.actor else None

        def compute(self, inputs: dict, role: str) -> tuple[torch.Tensor, dict]:
            return self.net(inputs["observations"]), {"log_std": self.logstd}

    actor = type("Actor", (Net, GaussianMixin, Model), {})(agent.actor, args.actor_hidden_sizes)
    critic = type("Critic", (Net, DeterministicMixin, Model), {})(agent.critic, args.critic_hidden_sizes)
    cfg = PPO_CFG(
        rollouts=args.num_steps, learning_epochs=args.update_epochs, mini_batches=args.num_minibatches,
        discount_factor=args.gamma, gae_lambda=args.gae_lambda, learning_rate=STILL, ratio_clip=args.clip_coef,
        grad_norm_clip=args.max_grad_norm, value_clip=0.0, value_loss_scale=args.vf_coef,
        observation_preprocessor=RunningStandardScaler, value_preprocessor=RunningStandardScaler,
        observation_preprocessor_kwargs={"size": env.observation_space}, value_preprocessor_kwargs={"size": 1},
    )  # fmt: skip
    cfg.experiment.write_interval = cfg.experiment.checkpoint_interval = 0
    memory = RandomMemory(memory_size=args.num_steps, num_envs=args.num_envs, device="cpu")
    ppo = PPO(models={"policy": actor, "value": critic}, memory=memory, cfg=cfg, **spaces)
    scaler, moments = ppo._observation_preprocessor, agent.normalizer
    scaler.running_mean, scaler.running_variance = moments.mean.clone(), moments.var.clone()
    silent = {"headless": True, "disable_progressbar": True, "close_environment_at_exit": False}
    trainer = SequentialTrainer(env=env, agents=ppo, cfg={"timesteps": args.num_steps, **silent})

    def train() -> int:
        trainer.train()
        return args.batch_size

    with contextlib.closing(env):
        yield from bench.repeat(train)


# ----------------------------------------------------------------------------------------------------------------------
# The update and its floor; where a rollout's time goes
# ----------------------------------------------------------------------------------------------------------------------


def updating(bench: Bench, args: pv.Args) -> Iterator[float]:
    state, rollout = bench.state(args), bench.rollout(args)
    with pv.VecEnv(args, bench.task, state.envs) as envs:
        pv.collect(envs, state, rollout, args)

    def update() -> int:
        pv.update(state.agent, state.optimizers, rollout, args, state.shuffle_rng)
        return 1

    yield from (1000 / rate for rate in bench.repeat(update))


def products_alone(bench: Bench, args: pv.Args) -> Iterator[float]:
    """The update's matrix products alone: every layer's output, gradient of its weight and, but for a first layer, of
    its input."""
    agent, n, calls = bench.state(args).agent, args.minibatch_size, []
    for net in (agent.actor, agent.critic):
        for m in linear_layers(net):
            x, weight, y = torch.randn(n, m.in_features), m.weight.detach(), torch.randn(n, m.out_features)
            calls += [(x, weight.T, torch.empty_like(y)), (y.T, x, torch.empty_like(weight))]
            calls += [] if m is net[0] else [(y, weight, torch.empty_like(x))]

    def products() -> int:
        for _ in range(args.update_epochs * args.num_minibatches):
            for a, b, out in calls:
                torch.mm(a, b, out=out)
        return 1

    yield from (1000 / rate for rate in bench.repeat(products))


def update_flops(bench: Bench, args: pv.Args) -> int:
    agent = bench.state(args).agent
    sizes = [(m.weight.numel(), m is net[0]) for net in (agent.actor, agent.critic) for m in linear_layers(net)]
    return sum(2 * size * (2 if first else 3) for size, first in sizes) * args.batch_size * args.update_epochs


def time_split(bench: Bench, args: pv.Args) -> dict[str, dict[str, float]]:
    """Seconds of a rollout: in a worker's loop (run alone, in this process), and in the main process beside workers."""
    spent: dict[str, float] = {}

    def timed(name: str, function: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            began = now()
            result = function(*args, **kwargs)
            spent[name] = spent.get(name, 0.0) + now() - began
            return result

        return call

    def split(action: Callable[[], Any], rest: str) -> dict[str, float]:
        action()
        spent.clear()
        began, count = now(), 0
        while now() - began < max(1.0, bench.seconds):
            action()
            count += 1
        spent[rest] = now() - began - sum(spent.values())
        return {name: seconds / count for name, seconds in spent.items()}

    block = bench.block(args.num_envs, 0, -(-args.num_envs // args.num_workers), trainer=os.getpid())
    block.data.noise[...] = np.random.default_rng(0).standard_normal(block.data.noise.shape)
    block.policy.sample = timed("policy", block.policy.sample)
    step_envs, reset_env = pv.step_envs, pv.reset_env
    pv.step_envs, pv.reset_env = timed("stepping", step_envs), timed("resetting", reset_env)
    worker = split(block.rollout, "copies and loop")
    pv.step_envs, pv.reset_env = step_envs, reset_env

    state, rollout = bench.state(args), bench.rollout(args)
    with pv.VecEnv(args, bench.task, state.envs) as envs:
        envs.run = timed("waiting for workers", envs.run)
        main = split(lambda: pv.collect(envs, state, rollout, args), "own work, workers idle")
    return {"a worker": worker, "main process": main}


# ----------------------------------------------------------------------------------------------------------------------
# Results
# ----------------------------------------------------------------------------------------------------------------------


def make_rows(bench: Bench, few: int, many: int) -> dict[Any, Row]:
    """All rows, by a key. The first row of a group is what the others are compared with."""
    rows: dict[Any, Row] = {}

    def row(key: Any, group: str, name: str, turns: Iterator[float], ours: bool = False, unit: str = "steps/s") -> None:
        rows.setdefault(key, Row(group, name, turns, unit, ours))

    alone, step, train = "stepping only, one process", "stepping only, all cores", f"whole training, {few} envs"
    cores, base = pv.usable_cores(), bench.args_for(few, min(pv.usable_cores(), few))
    row("stock", alone, "stock environment", one_stock(bench))
    row("sync", alone, f"SyncVectorEnv, {few} envs", vector_env(bench, lambda: stock(SyncVectorEnv, few)))
    for n in (max(1, few // 2), few):
        row(("block", n), alone, f"ours, a block of {n} fast walkers", one_block(bench, n), True)
    for n in (few, many):
        make = lambda n=n: stock(AsyncVectorEnv, n)  # noqa: E731
        row(("async", n), step, f"AsyncVectorEnv, {n} envs and workers", vector_env(bench, make))
    sizes = (few, cores), (many, 1), (many, min(2, cores)), (many, cores)
    for n, workers in dict.fromkeys((n, min(w, n)) for n, w in sizes):
        args, record, title = bench.args_for(n, workers), [], f"{n} envs, {workers} worker{'s' * (workers > 1)}"
        group = f"rollouts with the policy, {title}"
        row(("limit", n, workers), group, "the limit: as many independent processes", independent(bench, args), True)
        row(("rollout", n, workers), group, "ours, workers' part alone", rollouts(bench, args, record), True)
        row(("collect", n, workers), group, "ours, whole", training(bench, args, learn=False), True)
        row(("step", n, workers), step, f"ours, {title}", rollouts_again(bench, args, record), True)
    row("sb3 subproc", train, "SB3 PPO, SubprocVecEnv", sb3(bench, base, True))
    row("sb3 dummy", train, "SB3 PPO, DummyVecEnv", sb3(bench, base, False))
    row("skrl async", train, "skrl PPO, AsyncVectorEnv", skrl(bench, base, AsyncVectorEnv))
    row("skrl sync", train, "skrl PPO, SyncVectorEnv", skrl(bench, base, SyncVectorEnv))
    row("train", train, "ours", training(bench, base, learn=True), True)
    small = replace(base, num_minibatches=max(1, base.batch_size // 64))
    train = f"{train}, minibatches of {small.minibatch_size} (SB3's default)"
    row("sb3 small", train, "SB3 PPO, DummyVecEnv", sb3(bench, small, False))
    row("train small", train, "ours", training(bench, small, learn=True), True)
    row("floor", "update", "its matrix products alone", products_alone(bench, base), True, unit="ms")
    row("update", "update", "one update", updating(bench, base), True, unit="ms")
    for n in (few, many):  # last: its threads are better not there when others fork
        row(("envpool", n), step, f"EnvPool, {n} envs", vector_env(bench, lambda n=n: envpool(n)))
    return rows


def make_goals(rows: dict[Any, Row], few: int, many: int) -> list[dict[str, Any]]:
    def ratio(above: Any, below: Any) -> list[float]:
        """Turn by turn; empty where one of them has no figures."""
        return [a / b for a, b in zip(*(rows[key].samples if key in rows else [] for key in (above, below)))]

    cores = pv.usable_cores()
    at_few, at_many, block = (few, min(cores, few)), (many, min(cores, many)), max(1, few // 2)
    faster = max(("sb3 subproc", "sb3 dummy"), key=lambda key: spread(rows[key].samples).get("median", 0.0))
    growth = [ratio((kind, many, 2), (kind, many, 1)) for kind in ("collect", "limit")]
    goals = [
        (f"rollouts over AsyncVectorEnv stepping alone, {few} envs", ratio(("collect", *at_few), ("async", few)), 4),
        (f"ours over EnvPool, stepping only, {few} envs", ratio(("step", *at_few), ("envpool", few)), 0.8),
        (f"fast walkers, a block of {block}, over the stock one, one process", ratio(("block", block), "stock"), 1.8),
        (f"rollouts over the machine's limit, {few} envs", ratio(("collect", *at_few), ("limit", *at_few)), 0.85),
        (f"rollouts over the machine's limit, {many} envs", ratio(("collect", *at_many), ("limit", *at_many)), 0.93),
        ("the update over its floor", ratio("update", "floor"), -2.5),  # negative: at most
        (f"whole training over {rows[faster].name}", ratio("train", faster), 5),
        ("the same with minibatches of 64, SB3's default", ratio("train small", "sb3 small"), 5),
        (f"growth from 1 to 2 workers over that of processes, {many} envs", [a / b for a, b in zip(*growth)], 0.95),
    ]  # fmt: skip
    report = []
    for name, samples, goal in goals:
        figures = spread(samples)
        met = (figures["median"] <= -goal if goal < 0 else figures["median"] >= goal) if samples else None
        report.append({"measure": name, "goal": f"{'<=' if goal < 0 else '>='} {abs(goal):g}", **figures, "met": met})
    return report


def table(rows: dict[Any, Row]) -> list[dict[str, Any]]:
    """The rows in the order of their groups, each with its ratio to the first of its group, turn by turn."""
    result, groups = [], list(dict.fromkeys(row.group for row in rows.values()))
    for row in sorted(rows.values(), key=lambda row: groups.index(row.group)):
        first = next(r for r in rows.values() if r.group == row.group)
        ratios = [a / b for a, b in zip(row.samples, first.samples)]
        entry = {"group": row.group, "name": row.name, "unit": row.unit, "ours": row.ours, "note": row.note}
        result.append({**entry, **spread(row.samples), "ratio": spread(ratios), "samples": row.samples})
    return result


def markdown(report: dict[str, Any]) -> str:
    about, update = report["about"], report["update"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    lines = [
        f"{about['cpu']}, {about['cores']} cores; {versions}; torch threads {about['torch_threads']}; "
        f"commit {about['git_commit']}; {about['date']}; `{about['command']}`", "",
        f"Medians of {about['repeats']} turns of {about['seconds']:g} s, with least and most; {about['policy']}.", "",
        "| measured | median | min - max | unit | ratio to the group's first |", "|---|--:|--:|---|--:|",
    ]  # fmt: skip
    for group, rows in itertools.groupby(report["rows"], lambda row: row["group"]):
        lines.append(f"| **{group}** | | | | |")
        for row in rows:
            if "median" not in row:
                lines.append(f"| {row['name']} | - | | {row['note']} | |")
                continue
            median, least, most = (f"{row[k]:,.{1 if row['unit'] == 'ms' else 0}f}" for k in ("median", "min", "max"))
            ratio = f"{row['ratio']['median']:.2f}" if row["ratio"] else ""
            lines.append(f"| {row['name']} | {median} | {least} - {most} | {row['unit']} | {ratio} |")
    lines += ["", "| ratio, turn by turn | goal | median | min - max | |", "|---|--:|--:|--:|---|"]
    for goal in report["goals"]:
        verdict = {None: "not measured", True: "met", False: "**missed**"}[goal["met"]]
        figures = f"{goal['median']:.2f} | {goal['min']:.2f} - {goal['max']:.2f}" if "median" in goal else "- |"
        lines.append(f"| {goal['measure']} | {goal['goal']} | {figures} | {verdict} |")
    lines.append("")
    for who, parts in report["time_split"].items():
        shares = (f"{name} {1e3 * s:.1f} ms ({s / sum(parts.values()):.0%})" for name, s in parts.items())
        lines.append(f"- One rollout, {who}: {', '.join(shares)}")
    rates = ", ".join(f"{rate:.1f} GFLOP/s {what}" for what, rate in update["gflops_per_s"].items())
    lines.append(f"- One update: {update['flops'] / 1e9:.2f} GFLOP of matrix products; {rates}")
    return "\n".join(lines) + "\n"


def chart(report: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    rows = [row for row in report["rows"] if "median" in row and row["unit"] == "steps/s"]
    groups = [(group, list(members)) for group, members in itertools.groupby(rows, lambda row: row["group"])]
    figure = Figure(figsize=(9, 0.6 + 0.3 * len(rows) + 0.5 * len(groups)), layout="constrained")
    panels = figure.subplots(len(groups), sharex=True, squeeze=False, height_ratios=[len(m) + 1 for _, m in groups])
    for axes, (group, members) in zip(panels[:, 0], groups):
        spans = [[r["median"] - r["min"] for r in members], [r["max"] - r["median"] for r in members]]
        axes.barh(
            [r["name"] for r in members], [r["median"] for r in members], xerr=spans, ecolor="0.3", capsize=2,
            color=["C0" if r["ours"] else "0.7" for r in members],
        )  # fmt: skip
        for i, row in enumerate(members):
            axes.annotate(f"  {row['median']:,.0f}", (row["max"], i), va="center", fontsize=8)
        axes.invert_yaxis()
        axes.set_title(group, loc="left", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    panels[-1, 0].set_xlabel("environment steps per second")
    figure.savefig(path, dpi=120)


def describe(bench: Bench, options: argparse.Namespace) -> dict[str, Any]:
    about = pv.describe_run(bench.args)
    for peer in PEERS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            about["versions"][peer] = importlib.metadata.version(peer)
    threads = {"torch_threads": torch.get_num_threads(), "omp_num_threads": os.environ.get("OMP_NUM_THREADS")}
    run = {"date": time.strftime("%Y-%m-%d %H:%M"), "seconds": options.seconds, "repeats": options.repeats}
    return {**about, **threads, **run, "policy": bench.about_policy}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="short turns and rollouts; prints only, unless --out")
    parser.add_argument("--policy", help="run folder or checkpoint of a walking policy")
    parser.add_argument("--seconds", type=float, help="time of one measurement; default 4, quick 0.4")
    parser.add_argument("--repeats", type=int, help="turns that count; default 7, quick 2")
    parser.add_argument("--num-steps", type=int, help="length of our rollouts; default as in training, quick 64")
    parser.add_argument("--envs", type=int, nargs=2, default=(16, 64), help="the two numbers of environments")
    parser.add_argument("--out", type=Path, help="folder of the results; default benchmarks/results, quick none")
    options = parser.parse_args()
    options.seconds = options.seconds or (0.4 if options.quick else 4.0)
    options.repeats = options.repeats or (2 if options.quick else 7)
    out = options.out or (None if options.quick else ROOT / "benchmarks" / "results")
    warnings.filterwarnings("ignore")  # the peers' own
    few, many = options.envs
    try:
        pv.choose_device(pv.Args())
        bench = Bench(options)
        bench.args_for(few).validate()
    except pv.UserError as error:
        parser.error(str(error))

    rows = make_rows(bench, few, many)
    try:
        for turn in range(options.repeats + 1):
            for row in rows.values():
                row.turn(warm_up=turn == 0)
            print(f"turn {turn} of {options.repeats}{' (warm-up)' * (turn == 0)}", file=sys.stderr, flush=True)
        split = time_split(bench, bench.args_for(few, min(pv.usable_cores(), few)))
    finally:
        for row in rows.values():
            row.turns.close()

    flops = update_flops(bench, bench.args_for(few))
    rates = {
        row.name: flops / 1e6 / statistics.median(row.samples) for row in (rows["update"], rows["floor"]) if row.samples
    }
    report = {
        "about": describe(bench, options), "rows": table(rows), "goals": make_goals(rows, few, many),
        "time_split": split, "update": {"flops": flops, "gflops_per_s": rates},
    }  # fmt: skip
    text = markdown(report)
    print(text)
    if out:
        out.mkdir(parents=True, exist_ok=True)
        stem = out / ("throughput-quick" if options.quick else "throughput")
        stem.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")
        stem.with_suffix(".md").write_text(text)
        chart(report, stem.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
