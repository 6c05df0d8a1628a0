"""How fast the trainer is, beside its peers and beside the limit of the machine. Run it on a quiet machine.

    python benchmarks/throughput.py                   # about 15 minutes; writes benchmarks/results/throughput.*
    python benchmarks/throughput.py --quick           # under two minutes, prints only
    python benchmarks/throughput.py --policy runs/X   # the walking policy; default runs/reference/BipedalWalker-v3

Peers: pip install -e ".[bench]". One that is missing says so in its row, and the rest runs.

Every row is set up once, then all take turns: A B C A B C ..., the first turn a warm-up that does not count. So
whatever slows the machine down meets all rows alike. Ratios are taken turn by turn. If a row fails, the exit code is 1.

All rows have the same hyperparameters, those of the environment but for what only ours can do (practice, what the
critic sees, prices); the last row of the whole training has that, too. A trained policy walks, with its own noise:
walkers that fall at once are cheaper to step. Rows that only step exclude the policy's time. Where an environment needs
a step of its own to reset, that is not counted as one, but its time counts (skrl's trainer counts it). Ours steps a
whole rollout at one message, as its training does; the others take one step at a time. Peers have torch's own number of
threads, one for each core; ours one, and a Python thread for the critic.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import itertools
import json
import logging
import math
import multiprocessing
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # last: a changed copy of ppo_vec on PYTHONPATH can be measured

import ppo_vec as pv  # before NumPy: it decides on its threads

# isort: split
import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv

ENV_ID = "BipedalWalker-v3"
PEERS = "envpool", "stable-baselines3", "skrl"
FOR_ALL = {  # without what only ours can do
    "practice": 0.0, "critic_progress": False, "action_cost": 0.0, "bounds_loss_coef": 0.0, "fall_reward": None,
    "final_fall_reward": None,
}  # fmt: skip
VALUE_WEIGHT = 0.25  # of the critic's mean squared error, in all trainings
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
            missing = (error.name or "").replace("_", "-") in PEERS
            self.note = 'not installed: pip install -e ".[bench]"' if missing else f"failed: {pv.one_line(error)}"
        except Exception as error:
            self.note = f"failed: {type(error).__name__}: {pv.one_line(error)}"
        else:
            self.samples += [] if warm_up else [value]


def spread(samples: list[float]) -> dict[str, float]:
    return {"median": statistics.median(samples), "min": min(samples), "max": max(samples)} if samples else {}


class Bench:
    """What all rows share: the policy, the arguments and how long one turn lasts."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.seconds, self.task = options.seconds, pv.make_task(pv.Options())
        self.tree = pv.read_checkpoint(options.policy, policy=True)[1]
        self.policy, saved = pv.policy_of(self.tree), pv.saved_args(self.tree, policy=True)
        if saved.env_id not in pv.WALKERS or saved.state_dependent_std:
            raise pv.UserError("--policy must be a walker's, with one standard deviation for all states")
        names = "actor_hidden_sizes", "critic_hidden_sizes", "activation"
        self.tuned = pv.Options(**{**pv.TUNED[ENV_ID], **{name: getattr(saved, name) for name in names}})
        steps = options.num_steps or (64 if options.quick else self.tuned.num_steps)
        self.tuned = replace(self.tuned, num_steps=steps, learning_rate=STILL, critic_learning_rate=STILL)

    def args_for(self, num_envs: int, workers: int = 1) -> pv.Options:
        return replace(self.tuned, **FOR_ALL, num_envs=num_envs, num_workers=workers)

    def start(self, args: pv.Options) -> tuple[pv.State, pv.VecEnv]:
        """A training whose policy walks. Its environments are not started yet, and have to be closed."""
        task = replace(self.task, extra_dim=2 * args.critic_progress)
        state = pv.State(args, task, torch.device("cpu"))
        saved = {name.replace("actor.logstd", "distribution.logstd"): w for name, w in self.tree["agent"].items()}
        for name, own in state.agent.state_dict().items():
            if not name.startswith("critic."):  # an observation's first 24 columns
                flat = saved[name].view(-1)[: own.numel()]
                own.view(-1)[: len(flat)] = flat
        return state, pv.VecEnv(args, task, state.envs)

    def worker(self, num_envs: int, first: int, last: int) -> pv.Worker:
        """Environments [first, last) of num_envs as a worker has them, but in this process."""
        state, envs = self.start(self.args_for(num_envs))
        policy = pv.Policy(state.agent.state_dict(), state.args.activation, state.task.low, state.task.high)
        worker = pv.Worker(0, first, last, envs.args, envs.task, envs.shared, envs.snapshot)
        if problem := worker.run("restore", policy):
            raise RuntimeError(problem)
        return worker

    def repeat(self, action: Callable[[], int]) -> Iterator[float]:
        """Turns of at least `seconds` of `action`, which returns the steps it took; yields their rate."""
        while True:
            steps, began = 0, now()
            while (spent := now() - began) < self.seconds or not steps:
                steps += action()
            yield steps / spent


# ---- Stepping only ---------------------------------------------------------------------------------------------------


def stepping(bench: Bench, obs: np.ndarray, step: Callable) -> Iterator[float]:
    """Closed loop, only `step` timed: actions (n, 4) -> observations (n, 24) and the number of steps taken."""
    policy, rng = bench.policy, np.random.default_rng(0)
    while True:
        steps, spent = 0, 0.0
        while spent < bench.seconds:
            actions = policy.env_action(policy.sample(obs, rng.standard_normal((len(obs), 4), np.float32)))
            began = now()
            obs, count = step(actions)
            spent += now() - began
            steps += count
        yield steps / spent


def one_stock(bench: Bench) -> Iterator[float]:
    env = gym.make(ENV_ID, disable_env_checker=True)

    def step(actions: np.ndarray) -> tuple[np.ndarray, int]:
        obs, _, terminated, truncated, _ = env.step(actions[0])
        return (env.reset()[0] if terminated or truncated else obs)[None], 1

    yield from stepping(bench, env.reset()[0][None], step)


def one_worker(bench: Bench, num_envs: int) -> Iterator[float]:
    worker = bench.worker(num_envs, 0, num_envs)
    yield from stepping(bench, worker.obs, lambda actions: step_worker(worker, actions))


def step_worker(worker: pv.Worker, actions: np.ndarray) -> tuple[np.ndarray, int]:
    obs, _, terminated, truncated = worker.step(slice(None), actions)
    for i in np.flatnonzero(terminated | truncated):
        obs[i] = worker.begin(i, worker.episode[i] + 1)
    return obs, len(obs)


def vector_env(bench: Bench, make: Callable[[], Any]) -> Iterator[float]:
    """Gymnasium's or EnvPool's: the step after an episode's end is a reset."""
    with contextlib.closing(make()) as envs:
        obs = envs.reset()[0]
        done = np.zeros(len(obs), bool)

        def step(actions: np.ndarray) -> tuple[np.ndarray, int]:
            nonlocal done
            resets = np.count_nonzero(done)
            obs, _, terminated, truncated, _ = envs.step(actions)
            done = terminated | truncated
            return obs, len(obs) - resets

        yield from stepping(bench, obs, step)


def stock(kind: type, num_envs: int) -> Any:
    return kind([lambda: gym.make(ENV_ID, disable_env_checker=True)] * num_envs)


def envpool(num_envs: int) -> Any:
    import envpool

    threads = min(num_envs, pv.usable_cores())
    return envpool.make(ENV_ID, env_type="gymnasium", num_envs=num_envs, num_threads=threads, seed=0)


# ---- Ours: rollouts, the same rollouts again without the policy, training; and the limit -----------------------------

Record = list[tuple[np.ndarray, np.ndarray]]  # actions and observations of rollouts


def rollouts(bench: Bench, args: pv.Options, record: Record) -> Iterator[float]:
    """VecEnv.rollout alone. What it did in one turn is left in `record`."""
    state, envs = bench.start(args)
    policy, rng = state.agent.state_dict(), np.random.default_rng(0)
    with contextlib.closing(envs):
        while True:
            record.clear()
            spent = 0.0
            while spent < bench.seconds:
                noise = rng.standard_normal((args.num_steps, args.num_envs, 4), np.float32)
                began = now()
                rollout = envs.rollout(policy, noise, 0)
                spent += now() - began
                record.append((rollout.actions.numpy().copy(), rollout.obs.numpy().copy()))
            yield len(record) * args.batch_size / spent


def rollouts_again(bench: Bench, args: pv.Options, record: Record) -> Iterator[float]:
    """The recorded rollouts, given their actions as noise on zeros: the same walking to the bit, stepping only."""
    shapes = {"normalizer.mean": (24,), "normalizer.var": (24,), "distribution.logstd": (4,)}
    shapes |= {"actor.0.weight": (4, 24), "actor.0.bias": (4,)}
    nothing = {name: torch.zeros(shape) for name, shape in shapes.items()}
    envs = pv.VecEnv(args, bench.task, bench.start(args)[0].envs)
    with contextlib.closing(envs):
        while True:
            spent = 0.0
            for actions, obs in record:
                began = now()
                rollout = envs.rollout(nothing, actions, 0)
                spent += now() - began
                if not np.array_equal(rollout.obs, obs):
                    raise RuntimeError("the same actions led elsewhere")
            yield len(record) * args.batch_size / spent


def training(bench: Bench, args: pv.Options, learn: bool) -> Iterator[float]:
    """The rollouts of a training, with values, log probabilities and bookkeeping; with `learn` also its updates."""
    state, envs = bench.start(args)

    def iteration() -> int:
        rollout = pv.collect(envs, state, args)
        if learn:
            pv.update(state, rollout, args)
        return args.batch_size

    with contextlib.closing(envs):
        yield from bench.repeat(iteration)


def independent(bench: Bench, args: pv.Options) -> Iterator[float]:
    """The machine's real limit: processes with a worker's environments each, and the policy, that wait for no other."""
    context, processes, pipes = multiprocessing.get_context(START_METHOD), [], []
    bounds = np.linspace(0, args.num_envs, args.num_workers + 1).astype(int).tolist()
    try:
        for pair in itertools.pairwise(bounds):
            pipe, end = context.Pipe()
            processes.append(context.Process(target=step_on, args=(end, bench, args.num_envs, *pair), daemon=True))
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


def step_on(pipe: Any, bench: Bench, num_envs: int, first: int, last: int) -> None:
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
    worker, rng = bench.worker(num_envs, first, last), np.random.default_rng(first)
    obs = worker.obs
    while True:
        seconds, steps, began = pipe.recv(), 0, now()
        while now() - began < seconds:
            for noise in rng.standard_normal((32, last - first, 4), np.float32):
                actions = worker.policy.env_action(worker.policy.sample(obs, noise, first))
                obs, count = step_worker(worker, actions)
                steps += count
        pipe.send(steps / (now() - began))


# ---- The peers' training ---------------------------------------------------------------------------------------------


def linear_layers(*modules: nn.Module) -> list[nn.Linear]:
    return [m for module in modules for m in module.modules() if isinstance(m, nn.Linear)]


def copy_layers(source: nn.Module, *targets: nn.Module) -> None:
    """The weights of our network for a peer's: both walk alike."""
    for ours, theirs in zip(linear_layers(source), linear_layers(*targets), strict=True):
        theirs.load_state_dict(ours.state_dict())


def sb3(bench: Bench, args: pv.Options, parallel: bool) -> Iterator[float]:
    from stable_baselines3 import PPO
    from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize

    agent, make = bench.start(args)[0].agent, [lambda: gym.make(ENV_ID, disable_env_checker=True)] * args.num_envs
    venv = SubprocVecEnv(make, start_method=START_METHOD) if parallel else DummyVecEnv(make)
    venv = VecNormalize(venv, gamma=args.gamma)
    model = PPO(
        "MlpPolicy", venv, learning_rate=STILL, n_steps=args.num_steps, batch_size=args.minibatch_size,
        n_epochs=args.update_epochs, gamma=args.gamma, gae_lambda=args.gae_lambda, clip_range=args.clip_coef,
        normalize_advantage=True, ent_coef=args.ent_coef, vf_coef=VALUE_WEIGHT, device="cpu", seed=0,
        max_grad_norm=args.max_grad_norm, policy_kwargs={
            "net_arch": {"pi": list(args.actor_hidden_sizes), "vf": list(args.critic_hidden_sizes)},
            "activation_fn": pv.ACTIVATIONS[args.activation][0],
        },
    )  # fmt: skip
    policy, moments = model.policy, agent.normalizer
    copy_layers(agent.actor, policy.mlp_extractor.policy_net, policy.action_net)
    copy_layers(agent.critic, policy.mlp_extractor.value_net, policy.value_net)
    policy.log_std.data.copy_(agent.distribution.logstd.data)
    venv.obs_rms.mean, venv.obs_rms.var, venv.obs_rms.count = moments.mean.numpy(), moments.var.numpy(), 1e6

    def learn() -> int:
        model.learn(args.batch_size, reset_num_timesteps=False)
        return args.batch_size

    with contextlib.closing(venv):
        yield from bench.repeat(learn)


def skrl(bench: Bench, args: pv.Options, kind: type) -> Iterator[float]:
    from skrl.agents.torch.ppo import PPO, PPO_CFG
    from skrl.envs.wrappers.torch import wrap_env
    from skrl.memories.torch import RandomMemory
    from skrl.models.torch import DeterministicMixin, GaussianMixin, Model
    from skrl.resources.preprocessors.torch import RunningStandardScaler
    from skrl.trainers.torch import SequentialTrainer

    logging.getLogger("skrl").setLevel(logging.ERROR)
    agent, env = bench.start(args)[0].agent, wrap_env(stock(kind, args.num_envs), wrapper="gymnasium", verbose=False)
    spaces = {"observation_space": env.observation_space, "action_space": env.action_space, "device": "cpu"}

    class Net:
        def __init__(self, source: nn.Sequential, hidden: tuple[int, ...]) -> None:
            Model.__init__(self, **spaces)
            super().__init__()  # of the mixin
            activation, sizes = pv.ACTIVATIONS[args.activation][0], itertools.pairwise((24, *hidden))
            layers = [(nn.Linear(*size), activation()) for size in sizes]
            self.net = nn.Sequential(*itertools.chain(*layers), nn.Linear(hidden[-1], source[-1].out_features))
            copy_layers(source, self.net)
            logstd = agent.distribution.logstd.data.clone()
            self.logstd = nn.Parameter(logstd) if source is agent.actor else None

        def compute(self, inputs: dict, role: str) -> tuple[torch.Tensor, dict]:
            return self.net(inputs["observations"]), {"log_std": self.logstd}

    actor = type("Actor", (Net, GaussianMixin, Model), {})(agent.actor, args.actor_hidden_sizes)
    critic = type("Critic", (Net, DeterministicMixin, Model), {})(agent.critic, args.critic_hidden_sizes)
    cfg = PPO_CFG(
        rollouts=args.num_steps, learning_epochs=args.update_epochs, mini_batches=args.num_minibatches,
        discount_factor=args.gamma, gae_lambda=args.gae_lambda, learning_rate=STILL, ratio_clip=args.clip_coef,
        grad_norm_clip=args.max_grad_norm, value_clip=0.0, value_loss_scale=VALUE_WEIGHT,
        entropy_loss_scale=args.ent_coef,
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


# ---- The update and its floor; where a rollout's time goes -----------------------------------------------------------


def updating(bench: Bench, args: pv.Options) -> Iterator[float]:
    state, envs = bench.start(args)
    with contextlib.closing(envs):
        rollout = pv.collect(envs, state, args)

    def update() -> int:
        pv.update(state, rollout, args)
        return 1

    yield from (1000 / rate for rate in bench.repeat(update))


def products_alone(bench: Bench, args: pv.Options) -> Iterator[float]:
    """The update's matrix products alone: every layer's output, gradient of its weight and, but for a first layer, of
    its input."""
    agent, n, calls = bench.start(args)[0].agent, args.minibatch_size, []
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


def time_split(bench: Bench, args: pv.Options) -> dict[str, dict[str, float]]:
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

    worker = bench.worker(args.num_envs, 0, -(-args.num_envs // args.num_workers))
    worker.data.noise[...] = np.random.default_rng(0).standard_normal(worker.data.noise.shape)
    with (
        mock.patch.object(worker.policy, "sample", timed("policy", worker.policy.sample)),
        mock.patch.object(pv, "step_envs", timed("stepping", pv.step_envs)),
        mock.patch.object(pv, "reset_env", timed("resetting", pv.reset_env)),
    ):
        alone = split(worker.rollout, "copies and loop")
    state, envs = bench.start(args)
    with contextlib.closing(envs), mock.patch.object(envs, "call", timed("waiting for workers", envs.call)):
        main = split(lambda: pv.collect(envs, state, args), "own work, workers idle")
    return {"a worker": alone, "main process": main}


# ---- Results ---------------------------------------------------------------------------------------------------------


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
        row(("worker", n), alone, f"ours, a worker of {n} walkers", one_worker(bench, n), True)
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
    tuned = replace(bench.tuned, num_envs=few, num_workers=base.num_workers)
    row("train tuned", train, "ours, with all that only ours can do", training(bench, tuned, learn=True), True)
    small = replace(base, num_minibatches=base.batch_size // math.gcd(base.batch_size, 64))
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
    at_few, at_many, half = (few, min(cores, few)), (many, min(cores, many)), max(1, few // 2)
    faster = max(("sb3 subproc", "sb3 dummy"), key=lambda key: spread(rows[key].samples).get("median", 0.0))
    growth = [ratio((kind, many, 2), (kind, many, 1)) for kind in ("collect", "limit")]
    goals = [
        (f"rollouts over AsyncVectorEnv stepping alone, {few} envs", ratio(("collect", *at_few), ("async", few)), 4),
        (f"ours over EnvPool, stepping only, {few} envs", ratio(("step", *at_few), ("envpool", few)), 0.8),
        (f"a worker of {half} walkers over the stock one, one process", ratio(("worker", half), "stock"), 1.8),
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
    about = report["about"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    lines = [
        f"{about['cpu']}, {about['cores']} cores; {versions}; torch threads {about['torch_threads']}; "
        f"commit {about['git_commit']}; {about['date']}; `{about['command']}`", "",
        f"Medians of {about['repeats']} turns of {about['seconds']:g} s, with least and most; actions: "
        f"{about['policy']}, with its noise.", "",
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="short turns and rollouts; prints only, unless --out")
    reference = str(ROOT / "runs" / "reference" / ENV_ID)
    parser.add_argument("--policy", default=reference, help="run folder or checkpoint of a walking policy")
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
    pv.set_up_torch()
    try:
        bench = Bench(options)
        for num_envs in options.envs:
            pv.validate(bench.args_for(num_envs))
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
            with contextlib.suppress(Exception):  # of one that has failed
                row.turns.close()

    about = pv.describe_run(bench.tuned)
    about |= {"date": time.strftime("%Y-%m-%d %H:%M"), "torch_threads": torch.get_num_threads()}
    about |= {name: getattr(options, name) for name in ("seconds", "repeats", "policy")}
    for peer in PEERS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            about["versions"][peer] = importlib.metadata.version(peer)
    report = {"about": about, "rows": table(rows), "goals": make_goals(rows, few, many), "time_split": split}
    text = markdown(report)
    print(text)
    if out:
        out.mkdir(parents=True, exist_ok=True)
        stem = out / ("throughput-quick" if options.quick else "throughput")
        stem.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")
        stem.with_suffix(".md").write_text(text)
        chart(report, stem.with_suffix(".png"))
    failed = [f"{row.group}: {row.name}" for row in rows.values() if row.note.startswith("failed")]
    for name in failed:
        print(f"throughput.py: error: a row failed: {name}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
