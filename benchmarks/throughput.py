"""How fast the trainer is, beside its peers and beside the limit of the machine. Run it on a quiet machine.

    python benchmarks/throughput.py --seconds 2 --repeats 5  # ten minutes; writes benchmarks/results/throughput.*
    python benchmarks/throughput.py --command                # also times the README's first command: minutes more
    python benchmarks/throughput.py --quick                  # under a minute; rough, prints only

Peers: pip install -e ".[bench]". One that is missing says so in its row, and the rest runs. If a row fails, it is
named, nothing is written, and the exit code is 1.

Every row is set up once. Then all take turns, A B C A B C ..., the first turn a warm-up that does not count. So what
slows the machine down meets all rows alike. Ratios are taken turn by turn.

All trainings have the hyperparameters SAME, which every peer can express; only the row "as shipped" has our tuned ones.
A trained policy acts, with its noise: walkers that fall at once are cheaper to step. Rows that only step exclude the
policy's time. A peer's extra step for a reset is not counted as a step, but its time counts (skrl's trainer counts
both). Ours steps a whole rollout at one message, as its training does; the others take one step at a time. Peers have
torch's own number of threads; ours what the trainer sets, and a Python thread for the critic.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.metadata
import itertools
import json
import multiprocessing
import operator
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
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
import Box2D
import fingerprint
import gymnasium as gym
import numpy as np
import peers
import torch
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv

ENV_ID, FEW, MANY = "BipedalWalker-v3", 16, 64  # MANY: the larger number of environments
REFERENCE = ROOT / "runs" / "reference" / ENV_ID  # the policy that acts
COMMAND = "python ppo_vec.py --num-envs 16 --cuda"  # the README's first
INSTALL = 'pip install -e ".[bench]"'
STILL = 1e-8  # the learning rate: all compute as ever, but the policy goes on walking as it does
# The hyperparameters of all trainings, beside the networks, which are the policy's. What is not here has the plain
# defaults of `Options`, not the tuned ones: nothing beyond textbook PPO, and no entropy bonus.
SAME: dict[str, Any] = {
    "num_envs": FEW, "num_steps": 128, "update_epochs": 10, "num_minibatches": 8, "learning_rate": STILL,
    "critic_learning_rate": None, "gamma": 0.98, "gae_lambda": 0.85, "clip_coef": 0.2, "max_grad_norm": 0.5,
}  # fmt: skip
PARTS = "physics (b2World.Step)", "lidars", "rest of a walker's step", "resets", "policy", "copies and loop"
TIMED = "set_up_torch", "State.__init__", "VecEnv", "collect", "update"  # with all that these use
now = time.perf_counter


@dataclass
class Row:
    """One thing measured. `turns` yields a figure at each turn, and sets itself up before the first."""

    group: str
    name: str
    turns: Iterator[float]
    unit: str = "steps/s"
    peer: str = ""  # the module of the trainer or environments that are not ours
    threads: int = 1  # of torch
    samples: list[float] = field(default_factory=list)
    note: str = ""  # why there are no samples

    def turn(self, warm_up: bool = False) -> None:
        if self.note:
            return
        torch.use_deterministic_algorithms(not self.peer)  # ours is; a peer need not pay for it
        torch.set_num_threads(self.threads)
        try:
            value = float(next(self.turns))
        except Exception as error:
            if isinstance(error, ModuleNotFoundError) and error.name == self.peer:
                self.note = f"not installed: {INSTALL}"
            else:
                hint = f" (is it the version of {INSTALL}?)" * bool(self.peer)
                self.note = f"failed: {type(error).__name__}: {pv.one_line(error)}{hint}"
        else:
            self.samples += [] if warm_up else [value]


Rows = dict[Any, Row]


def spread(samples: list[float]) -> dict[str, float]:
    return {"median": statistics.median(samples), "min": min(samples), "max": max(samples)} if samples else {}


class Bench:
    """What all rows share: the policy, the arguments and how long one turn lasts."""

    def __init__(self, seconds: float, quick: bool) -> None:
        self.seconds, self.tree = seconds, pv.read_checkpoint(REFERENCE, policy=True)[1]
        self.policy, saved = pv.policy_of(self.tree), pv.saved_args(self.tree, policy=True)
        networks = {k: getattr(saved, k) for k in ("actor_hidden_sizes", "critic_hidden_sizes", "activation")}
        own: dict[str, Any] = {"env_id": ENV_ID, **networks, **({"num_steps": 16} if quick else {})}
        self.same = {**SAME, **own}
        self.plain = pv.Options(**self.same)
        self.shipped = pv.Options(**{**pv.TUNED[ENV_ID], **own, "learning_rate": STILL})
        self.task = pv.make_task(self.plain)

    def args(self, num_envs: int, workers: int = 1) -> pv.Options:
        return replace(self.plain, num_envs=num_envs, num_workers=min(workers, num_envs))

    def start(self, args: pv.Options, task: pv.Task | None = None) -> tuple[pv.State, pv.VecEnv]:
        """A training whose policy walks. Its environments are not started yet, and have to be closed."""
        state = pv.State(args, task or self.task, torch.device("cpu"))
        for name, own in state.agent.state_dict().items():
            if not name.startswith("critic."):
                own.copy_(self.tree["agent"][name])
        return state, pv.VecEnv(args, state.task, state.snapshot)

    def worker(self, args: pv.Options, first: int, last: int) -> pv.Worker:
        """Environments [first, last) as a worker has them, but in this process."""
        state, envs = self.start(args)
        policy = pv.Policy(state.agent.state_dict(), args.activation, state.task.low, state.task.high)
        worker = pv.Worker(0, first, last, args, envs.task, envs.shared, envs.snapshot)
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


def stock_step(env: gym.Env, action: np.ndarray) -> np.ndarray:
    obs, _, terminated, truncated, _ = env.step(action)
    return env.reset()[0] if terminated or truncated else obs


def one_stock(bench: Bench) -> Iterator[float]:
    env = gym.make(ENV_ID, disable_env_checker=True)
    yield from stepping(bench, env.reset()[0][None], lambda actions: (stock_step(env, actions[0])[None], 1))


def vector_env(bench: Bench, make: Callable[[pv.Options], Any], num_envs: int) -> Iterator[float]:
    """Gymnasium's or EnvPool's: the step after an episode's end is a reset."""
    with contextlib.closing(make(bench.args(num_envs))) as envs:
        obs = envs.reset()[0]
        done = np.zeros(len(obs), bool)

        def step(actions: np.ndarray) -> tuple[np.ndarray, int]:
            nonlocal done
            resets = np.count_nonzero(done)
            obs, _, terminated, truncated, _ = envs.step(actions)
            done = terminated | truncated
            return obs, len(obs) - resets

        yield from stepping(bench, obs, step)


# ---- Ours: rollouts, training; and the limit -------------------------------------------------------------------------


def rollouts(bench: Bench, args: pv.Options) -> Iterator[tuple[float, float]]:
    """VecEnv.rollout alone. And stepping only: the same walking to the bit, its actions given as noise on zeros."""
    state, envs = bench.start(args)
    bare = pv.State(replace(args, actor_hidden_sizes=()), bench.task, torch.device("cpu"))
    policy, nothing = state.agent.state_dict(), {k: torch.zeros_like(v) for k, v in bare.agent.state_dict().items()}
    rng, again = np.random.default_rng(0), pv.VecEnv(args, bench.task, bare.snapshot)
    with contextlib.closing(envs), contextlib.closing(again):
        while True:
            steps, with_policy, stepping_only = 0, 0.0, 0.0
            while with_policy < bench.seconds:
                noise = rng.standard_normal((args.num_steps, args.num_envs, 4), np.float32)
                began = now()
                first = envs.rollout(policy, noise, 0)
                with_policy += now() - began
                began = now()
                second = again.rollout(nothing, first.actions.numpy(), 0)
                stepping_only += now() - began
                if not torch.equal(first.obs, second.obs):
                    raise RuntimeError("the same actions led elsewhere")
                steps += args.batch_size
            yield steps / with_policy, steps / stepping_only


def training(bench: Bench, args: pv.Options, learn: bool = True) -> Iterator[float]:
    """The rollouts of a training, with values, log probabilities and bookkeeping; with `learn` also its updates."""
    state, envs = bench.start(args, pv.make_task(args))

    def iteration() -> int:
        rollout = pv.collect(envs, state, args)
        if learn:
            pv.update(state, rollout, args)
        return args.batch_size

    with contextlib.closing(envs):
        yield from bench.repeat(iteration)


def peer_training(bench: Bench, args: pv.Options, make: Callable, kind: Any) -> Iterator[float]:
    envs, learn = make(bench.start(args)[0].agent, args, kind)

    def iteration() -> int:
        learn()
        return args.batch_size

    with contextlib.closing(envs):
        yield from bench.repeat(iteration)


def independent(bench: Bench, args: pv.Options) -> Iterator[float]:
    """The machine's real limit: processes with a worker's environments each, and the policy, that wait for no other."""
    context, processes, pipes = multiprocessing.get_context(pv.Options.start_method), [], []
    bounds = np.linspace(0, args.num_envs, args.num_workers + 1).astype(int).tolist()
    try:
        for pair in itertools.pairwise(bounds):
            pipe, end = context.Pipe()
            processes.append(context.Process(target=step_on, args=(end, bench, args, *pair), daemon=True))
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


def step_on(pipe: Any, bench: Bench, args: pv.Options, first: int, last: int) -> None:
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
    worker, rng = bench.worker(args, first, last), np.random.default_rng(first)
    while True:
        seconds, steps, began = pipe.recv(), 0, now()
        while now() - began < seconds:
            for noise in rng.standard_normal((32, last - first, 4), np.float32):
                _, terminated, truncated = worker.step(slice(None), worker.policy.sample(worker.obs, noise, first))
                for i in np.flatnonzero(terminated | truncated):
                    worker.begin(i, worker.episode[i] + 1)
                steps += len(worker.obs)
        pipe.send(steps / (now() - began))


# ---- The update and its floor; where a step's time goes; the README's first command ----------------------------------


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
    agent, n, calls = bench.start(args)[0].agent, peers.minibatch_size(args), []
    for net in (agent.actor, agent.critic):
        for m in net[::2]:  # the linear ones
            x, weight, y = torch.randn(n, m.in_features), m.weight.detach(), torch.randn(n, m.out_features)
            calls += [(x, weight.T, torch.empty_like(y)), (y.T, x, torch.empty_like(weight))]
            calls += [] if m is net[0] else [(y, weight, torch.empty_like(x))]

    def products() -> int:
        for _ in range(args.update_epochs * args.num_minibatches):
            for a, b, out in calls:
                torch.mm(a, b, out=out)
        return 1

    yield from (1000 / rate for rate in bench.repeat(products))


def parts_of_a_step(bench: Bench, args: pv.Options) -> Iterator[dict[str, float]]:
    """The µs of each of PARTS in a step of one environment: a worker's rollouts, in this process, with a stopwatch."""
    worker = bench.worker(args, 0, -(-args.num_envs // args.num_workers))
    worker.data.noise[...] = np.random.default_rng(0).standard_normal(worker.data.noise.shape)
    spent, inside = dict.fromkeys(PARTS, 0.0), [0.0]

    def timed(part: str, function: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            inside.append(0.0)
            began = now()
            result = function(*args, **kwargs)
            took = now() - began
            spent[part] += took - inside.pop()
            inside[-1] += took
            return result

        return call

    places = (Box2D.b2World, "Step"), (pv, "cast_rays"), (pv, "step_envs"), (pv, "reset_env"), (worker.policy, "sample")
    while True:
        with contextlib.ExitStack() as stack:
            for part, (owner, name) in zip(PARTS, places):
                stack.enter_context(mock.patch.object(owner, name, timed(part, getattr(owner, name))))
            spent.update(dict.fromkeys(PARTS, 0.0))
            steps, began = 0, now()
            while (total := now() - began) < bench.seconds or not steps:
                worker.rollout()
                steps += args.num_steps * len(worker.envs)
        spent[PARTS[-1]] = total - sum(spent.values())
        yield {part: 1e6 * seconds / steps for part, seconds in spent.items()}


def first_command(bench: Bench) -> Iterator[tuple[float, float]]:
    """One stock environment with random actions, before and after the command. And the command, all in: imports,
    evaluations and files take time, but only the steps of the training count."""
    env, rng = gym.make(ENV_ID, disable_env_checker=True), np.random.default_rng(0)
    env.reset(seed=0)

    def random_steps() -> int:
        for action in rng.uniform(-1, 1, (100, 4)).astype(np.float32):
            stock_step(env, action)
        return 100

    rates = bench.repeat(random_steps)
    while True:
        stock = list(itertools.islice(rates, 5))
        with tempfile.TemporaryDirectory() as folder:
            flags = [*shlex.split(COMMAND)[2:], "--runs-dir", folder, "--run-name", "run"]
            began = now()
            done = subprocess.run([sys.executable, pv.__file__, *flags], capture_output=True, text=True)
            spent = now() - began
            if done.returncode:
                raise RuntimeError(f"exit code {done.returncode}: {done.stderr[-200:]}")
            steps = json.loads((Path(folder) / "run" / "summary.json").read_text())["global_step"]
        yield statistics.median(stock + list(itertools.islice(rates, 5))), steps / spent


# ---- Rows and goals --------------------------------------------------------------------------------------------------


def make_rows(bench: Bench, workers: int, threads: int, peer_threads: int) -> Rows:
    """All rows, by a key. The first row of a group is what the others are compared with."""
    rows: Rows = {}

    def row(key: Any, group: str, name: str, turns: Iterator[float], peer: str = "", unit: str = "steps/s") -> None:
        rows.setdefault(key, Row(group, name, turns, unit, peer, peer_threads if peer else threads))

    def stock(kind: type) -> Callable[[pv.Options], Any]:
        return functools.partial(peers.stock, kind)

    alone, step = "stepping only, one process", "stepping only, all cores"
    row("stock", alone, "stock environment", one_stock(bench))
    row("sync", alone, f"SyncVectorEnv, {FEW} envs", vector_env(bench, stock(SyncVectorEnv), FEW))
    for n in (FEW, MANY):
        row(("async", n), step, f"AsyncVectorEnv, {n} envs and workers", vector_env(bench, stock(AsyncVectorEnv), n))
    sizes = (FEW, workers), (MANY, 1), (MANY, 2), (MANY, workers)
    for n, some in dict.fromkeys((n, min(some, n)) for n, some in sizes):
        args, title = bench.args(n, some), f"{n} envs, {some} worker{'s' * (some > 1)}"
        group = f"rollouts with the policy, {title}"
        row(("limit", n, some), group, "the limit: as many independent processes", independent(bench, args))
        with_policy, stepping_only = itertools.tee(rollouts(bench, args))
        row(("rollout", n, some), group, "ours, workers' part alone", (pair[0] for pair in with_policy))
        row(("collect", n, some), group, "ours, whole", training(bench, args, learn=False))
        row(("step", n, some), step, f"ours, {title}", (pair[1] for pair in stepping_only))
    base = bench.args(FEW, workers)
    small = replace(base, num_minibatches=base.batch_size // 64)
    for args, note in ((base, ""), (small, ", the default of SB3")):
        is_small = args is small
        group = f"whole training, {FEW} envs, minibatches of {peers.minibatch_size(args)}{note}"
        for kind in ("SubprocVecEnv", "DummyVecEnv"):
            turns = peer_training(bench, args, peers.sb3, kind)
            row((kind, is_small), group, f"SB3 PPO, {kind}", turns, "stable_baselines3")
        for kind in () if is_small else (AsyncVectorEnv, SyncVectorEnv):
            turns = peer_training(bench, args, peers.skrl, kind)
            row(("skrl", kind), group, f"skrl PPO, {kind.__name__}", turns, "skrl")
        row(
            ("train", is_small),
            group,
            f"ours, {args.num_workers} worker{'s' * (args.num_workers > 1)}",
            training(bench, args),
        )
    shipped = replace(bench.shipped, num_workers=base.num_workers)
    row("shipped", rows["train", False].group, "ours, as shipped (tuned defaults)", training(bench, shipped))
    group = f"update, {base.batch_size} rows, minibatches of {peers.minibatch_size(base)}"
    row("floor", group, "its bare matrix products, one thread", products_alone(bench, base), unit="ms")
    rows["floor"].threads = 1
    row("update", group, "one update", updating(bench, base), unit="ms")
    group = f"where a worker's time goes, a step of one of {-(-FEW // base.num_workers)} walkers"
    for part, turns in zip(PARTS, itertools.tee(parts_of_a_step(bench, base), len(PARTS))):
        row(part, group, part, map(operator.itemgetter(part), turns), unit="µs")
    for n in (FEW, MANY):  # last: its threads are better not there when others fork
        row(("envpool", n), step, f"EnvPool, {n} envs", vector_env(bench, peers.envpool, n), "envpool")
    return rows


def make_goals(rows: Rows, workers: int) -> list[dict[str, Any]]:
    def ratio(above: Any, below: Any) -> list[float]:
        """Turn by turn; empty where one of them has no figures."""
        return [a / b for a, b in zip(*(rows[key].samples if key in rows else [] for key in (above, below)))]

    def over_sb3(small: bool) -> list[float]:
        keys = ("SubprocVecEnv", small), ("DummyVecEnv", small)
        return ratio(("train", small), max(keys, key=lambda key: spread(rows[key].samples).get("median", 0.0)))

    few, many = (FEW, min(workers, FEW)), (MANY, min(workers, MANY))
    growth = [ratio((kind, MANY, 2), (kind, MANY, 1)) for kind in ("collect", "limit")]
    goals = [
        (f"stepping only, {FEW} envs, over EnvPool", ratio(("step", *few), ("envpool", FEW)), ">=", 1.0),
        (f"rollouts, {FEW} envs, over AsyncVectorEnv's stepping", ratio(("collect", *few), ("async", FEW)), ">=", 7),
        (f"rollouts, {FEW} envs, over the machine's limit", ratio(("collect", *few), ("limit", *few)), ">=", 0.9),
        (f"rollouts, {MANY} envs, over the machine's limit", ratio(("collect", *many), ("limit", *many)), ">=", 0.95),
        ("the update over its bare matrix products on one thread", ratio("update", "floor"), "<=", 1.2),
        ("whole training over SB3 PPO on its best vector env", over_sb3(False), ">=", 5),
        ("the same with minibatches of 64, the default of SB3", over_sb3(True), ">=", 3),
        ("growth from 1 to 2 workers over that of processes", [a / b for a, b in zip(*growth)], ">=", 0.95),
        ("time of the README's first command, all in, over that of one stock environment for as many steps",
            ratio("random", "command"), "<=", 0.75),
    ]  # fmt: skip
    report = []
    for name, samples, sign, goal in goals:
        figures = spread(samples)
        met = {">=": operator.ge, "<=": operator.le}[sign](figures["median"], goal) if figures else None
        report.append({"measure": name, "goal": f"{sign} {goal:g}", **figures, "met": met})
    return report


def table(rows: Rows) -> list[dict[str, Any]]:
    """The rows in the order of their groups, each with its ratio to the first of its group, turn by turn."""
    firsts: dict[str, Row] = {}
    for row in rows.values():
        firsts.setdefault(row.group, row)
    result = []
    for row in sorted(rows.values(), key=lambda row: list(firsts).index(row.group)):
        ratio = spread([a / b for a, b in zip(row.samples, firsts[row.group].samples)])
        entry = {name: value for name, value in vars(row).items() if name != "turns"}
        result.append({**entry, **spread(row.samples), "ratio": ratio})
    return result


# ---- Results ---------------------------------------------------------------------------------------------------------


def work() -> dict[str, str]:
    """What a record is of. Where today's differs, its figures are of the past."""
    parts = fingerprint.parts(Path(pv.__file__).read_text(), TIMED)
    return {**parts, "TUNED": repr(pv.TUNED[ENV_ID]), "SAME": repr(SAME)}


def summary(report: dict[str, Any]) -> str:
    """What the README cites: the goals, and of what machine and commit they are."""
    about = report["about"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    threads = ", ".join(f"{name} {value}" for name, value in about["threads"].items() if value)
    lines = [
        f"{about['cpu']}, cores: {about['cores']}, workers: {about['workers']}, threads: {threads}; {versions}; commit "
        f"{about['git_commit']}; {about['date']}; `{about['command']}`. Medians of {about['repeats']} turns of "
        f"{about['seconds']:g} s, with least and most.", "",
        "| ratio, turn by turn | goal | median | min - max | |", "|---|--:|--:|--:|---|",
    ]  # fmt: skip
    for goal in report["goals"]:
        verdict = {None: "not measured", True: "met", False: "**missed**"}[goal["met"]]
        figures = "{median:.2f} | {min:.2f} - {max:.2f}".format(**goal) if "median" in goal else "- |"
        lines.append(f"| {goal['measure']} | {goal['goal']} | {figures} | {verdict} |")
    return "\n".join(lines) + "\n"


def markdown(report: dict[str, Any]) -> str:
    same = ", ".join(f"{name} {value}" for name, value in report["about"]["args"].items())
    lines = [
        f"All trainings but the one as shipped: {same}.", "",
        "| measured | median | min - max | unit | ratio to the group's first |", "|---|--:|--:|---|--:|",
    ]  # fmt: skip
    for group, rows in itertools.groupby(report["rows"], lambda row: row["group"]):
        lines.append(f"| **{group}** | | | | |")
        for row in rows:
            if "median" not in row:
                lines.append(f"| {row['name']} | - | | {row['note']} | |")
                continue
            median, least, most = (
                f"{row[k]:,.{0 if row['unit'] == 'steps/s' else 1}f}" for k in ("median", "min", "max")
            )
            ratio = f"{row['ratio']['median']:.2f}" if row["ratio"] else ""
            lines.append(f"| {row['name']} | {median} | {least} - {most} | {row['unit']} | {ratio} |")
    return "\n".join([summary(report), *lines, ""])


def picture(rows: Rows, path: Path) -> None:
    """Where a step's time goes, above the physics as its floor; and an update's, above its matrix products."""
    from matplotlib.figure import Figure

    floor, update = (spread(rows[key].samples)["median"] for key in ("floor", "update"))
    products = {"bare matrix products, one thread": floor, "the rest": max(0.0, update - floor)}
    bars = (rows["update"], products), (rows[PARTS[0]], {part: spread(rows[part].samples)["median"] for part in PARTS})
    figure = Figure(figsize=(8, 3), layout="constrained")
    for axes, (row, parts) in zip(figure.subplots(2), reversed(bars)):
        left = 0.0
        for name, width in parts.items():
            axes.barh([""], [width], left=left, label=f"{name} {width:.1f}")
            left += width
        axes.set_title(f"{row.group}: {left:.1f} {row.unit}", loc="left", fontsize=9)
        axes.legend(ncols=3, fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(0, -0.25))
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(labelsize=8, length=0)
        axes.margins(0)
    figure.savefig(path, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="short rollouts, one short turn; prints only, unless --out"
    )
    parser.add_argument("--command", action="store_true", help=f"also time `{COMMAND}`")
    parser.add_argument("--seconds", type=float, help="time of one turn; default 4, quick 0.05")
    parser.add_argument("--repeats", type=int, help="turns that count; default 7, quick 1")
    parser.add_argument("--workers", type=int, default=pv.usable_cores(), help="our workers; default one per core")
    parser.add_argument("--out", type=Path, help="folder of the results; default benchmarks/results, quick none")
    options = parser.parse_args()
    options.seconds = options.seconds or (0.05 if options.quick else 4.0)
    options.repeats = options.repeats or (1 if options.quick else 7)
    out = options.out or (None if options.quick else ROOT / "benchmarks" / "results")
    if (load := getattr(os, "getloadavg", lambda: [0.0])()[0]) > 0.5:
        print(f"throughput.py: warning: the machine is busy (load {load:.1f})", file=sys.stderr)
    warnings.filterwarnings("ignore")  # the peers' own
    peer_threads = torch.get_num_threads()
    pv.set_up_torch()
    threads = torch.get_num_threads()
    bench = Bench(options.seconds, options.quick)
    about = pv.describe_run(bench.plain)
    about |= {name: getattr(options, name) for name in ("seconds", "repeats", "workers")} | {"args": bench.same}
    about |= {"date": time.strftime("%Y-%m-%d %H:%M"), "threads": {"torch": threads, "torch in peers": peer_threads}}
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        about["threads"][name] = os.environ.get(name)
    for peer in peers.NAMES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            about["versions"][peer] = importlib.metadata.version(peer)
    report = {"about": about, "work": work()}

    rows = make_rows(bench, options.workers, threads, peer_threads)
    try:
        for turn in range(options.repeats + 1):
            for row in rows.values():
                row.turn(warm_up=turn == 0)
            print(f"turn {turn} of {options.repeats}{' (warm-up)' * (turn == 0)}", file=sys.stderr, flush=True)
    finally:
        for row in rows.values():
            with contextlib.suppress(Exception):  # of one that has failed
                row.turns.close()
    if options.command:
        group, pairs = "the README's first command", itertools.tee(first_command(bench))
        rows["random"] = Row(group, "one stock environment, random actions", (pair[0] for pair in pairs[0]))
        rows["command"] = Row(group, f"`{COMMAND}`, all in", (pair[1] for pair in pairs[1]))
        rows["random"].turn(), rows["command"].turn()

    report |= {"goals": make_goals(rows, options.workers), "rows": table(rows)}
    print(markdown(report))
    if missing := sorted({row.peer for row in rows.values() if row.note.startswith("not installed")}):
        print(f"throughput.py: warning: not measured: {', '.join(missing)}; {INSTALL}", file=sys.stderr)
    if failed := [row for row in rows.values() if row.note.startswith("failed")]:
        for row in failed:
            print(f"throughput.py: error: {row.group}: {row.name}: {row.note}", file=sys.stderr)
        return 1
    if out:
        out.mkdir(parents=True, exist_ok=True)
        (out / "throughput.json").write_text(json.dumps(report, indent=2) + "\n")
        (out / "throughput.md").write_text(markdown(report))
        picture(rows, out / "throughput.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
