"""Steps a second against workers, environments and processes: measured here, put into a short model, and carried on.

    python benchmarks/scaling.py             # about four minutes; writes benchmarks/results/scaling.*
    python benchmarks/scaling.py --quick     # small and rough, prints only

The model of an iteration of N environments x T steps a process, with W workers and R processes of one machine each:

    rollout = T * (step + physics * N / W) + message * W + serial
    update  = minibatches * (minibatch + row * rows)                                        of one process
            = minibatches * (alone + alone_row * 2 * rows + (R > 2) * (latency + byte * gradient)) + exchange

With R > 1 half of the processes train the actor, the others the critic: each has one network, and twice its own rows.
Before and after an update they exchange the rollouts and the weights.

The measured constants are those of this machine. The forecast for 16 cores with a GPU takes the GPU's time of a
minibatch from benchmarks/results/gpu.json, and stands beside what was measured there. Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # last: a changed copy of ppo_vec on PYTHONPATH can be measured

import ppo_vec as pv

# isort: split
import numpy as np
import torch

ENV_ID = "BipedalWalker-v3"
REFERENCE = ROOT / "runs" / "reference" / ENV_ID
EPOCHS, MINIBATCHES = 10, 8


def timed(action: Callable[[], Any], repeats: int) -> float:
    """The median seconds of a call, after one that does not count."""
    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        action()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def line(points: dict[float, float]) -> tuple[float, float]:
    """Least squares of the relative error: y = a + b * x, neither negative."""
    x, y = np.array(list(points.items())).T
    b, a = np.polyfit(x, y, 1, w=1 / y)
    return max(a, 0.0), max(b, 0.0)


def make_args(envs: int, steps: int = 128, **changed: Any) -> pv.Options:
    tuned = {**pv.TUNED[ENV_ID], "learning_rate": 1e-8, "num_envs": envs, "num_steps": steps}
    return pv.Options(**{**tuned, **changed})


def start(args: pv.Options) -> tuple[pv.State, pv.VecEnv]:
    """A training whose policy walks and goes on doing so."""
    state = pv.State(args, TASK, torch.device("cpu"))
    for name, own in state.agent.state_dict().items():
        if not name.startswith("critic."):
            own.copy_(TREE["agent"][name])
    return state, pv.VecEnv(args, TASK, state.snapshot)


# ---- What is measured ------------------------------------------------------------------------------------------------


def step_seconds(envs: int, repeats: int) -> float:
    """One step of a worker with so many environments, in this process."""
    args = make_args(envs)
    state, vec = start(args)
    policy = pv.Policy(state.agent.state_dict(), args.activation, TASK.low, TASK.high)
    worker = pv.Worker(0, 0, envs, args, vec.task, vec.shared, state.snapshot)
    vec.data.noise[...] = state.agent.distribution.noise(state.noise_rng, *vec.data.noise.shape).numpy()

    def rollout() -> None:
        if isinstance(problem := worker.run("rollout", policy), str):
            raise RuntimeError(problem)

    return timed(rollout, repeats) / args.num_steps


class TimedWorld:
    """A Box2D world that notes how long its steps take."""

    def __init__(self, world: Any) -> None:
        self.world, self.times = world, []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.world, name)

    def Step(self, *given: Any) -> None:
        began = time.perf_counter()
        self.world.Step(*given)
        self.times.append(time.perf_counter() - began)


def physics_seconds(repeats: int) -> float:
    """One b2World.Step of a walker that walks."""
    env, act = pv.make_env(make_args(1)), pv.policy_of(TREE)
    obs = pv.reset_env(env, 1)
    env.world = TimedWorld(env.world)
    for _ in range(100 * repeats):
        obs, *_ = env.step(act(obs))
    return statistics.median(env.world.times)


def message_seconds(workers: int, repeats: int) -> float:
    """A call of all workers that does nothing."""
    state, vec = start(make_args(workers, num_workers=workers))
    weights = state.agent.state_dict()
    with contextlib.closing(vec):
        return timed(lambda: vec.call("close", weights), repeats)


def minibatch_seconds(rows: int, repeats: int, networks: int = 2) -> float:
    """One step on so many rows: of both networks, in two threads as in training, or of the actor alone."""
    state, _ = start(make_args(1, steps=rows))
    batch = {"obs": torch.randn(rows, 24), "actions": 0.5 * torch.randn(rows, 4), "logprobs": torch.full((rows,), -3.0)}
    batch |= {name: torch.randn(rows) for name in ("advantages", "returns", "values")}
    some = torch.stack([torch.randperm(rows) for _ in range(20)])
    for optimizer in state.optimizers:
        optimizer.learning_rate = 1e-8
    args, some_networks = make_args(1, steps=rows), state.optimizers[:networks]
    pv.descend_all(some_networks, batch, some, args)  # the next one records
    return timed(lambda: pv.descend_all(some_networks, batch, some, args), repeats) / len(some)


def iteration(args: pv.Options, repeats: int) -> dict[str, float]:
    """Median seconds of a training's rollouts and updates, and of what neither workers nor networks do."""
    state, vec = start(args)
    times: dict[str, list[float]] = {"rollout": [], "update": [], "serial": []}
    with contextlib.closing(vec):
        inner = vec.rollout

        def rollout(*given: Any) -> pv.Rollout:
            began = time.perf_counter()
            result = inner(*given)
            times["serial"].append(-(time.perf_counter() - began))
            return result

        vec.rollout = rollout
        for _ in range(repeats + 1):
            now = dataclasses.replace(args, critic_learning_rate=1e-8)
            began = time.perf_counter()
            result = pv.collect(vec, state, now)
            middle = time.perf_counter()
            pv.update(state, result, now)
            times["rollout"].append(middle - began)
            times["update"].append(time.perf_counter() - middle)
            times["serial"][-1] += middle - began
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def in_ranks(ranks: int, job: str) -> Any:
    """What this program prints as `job` in each of so many processes, of rank 0."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = []
    for rank in range(ranks):
        own = {**os.environ, **{k: str(v) for k, v in env.items()}, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        own |= {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, "--job", job]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=own))
    texts = [process.communicate(timeout=300)[0] for process in processes]
    if any(process.returncode for process in processes):
        raise RuntimeError(f"a process of the job {job} failed")
    return json.loads(texts[0].strip().splitlines()[-1])


def run_job(job: str) -> None:
    """In a process of in_ranks."""
    name, *numbers = job.split(",")
    envs, repeats = map(int, numbers)
    torch.set_num_threads(1)
    pv.join_ranks([])
    if name == "iteration":
        found: Any = iteration(make_args(envs), repeats)
    else:
        sizes = (1, 1_000, 10_000, 100_000, 1_000_000)
        world = torch.distributed.group.WORLD
        found = {4 * n: timed(lambda: pv.mean_of_group(torch.ones(n), world), 20 * repeats) for n in sizes}  # noqa: B023
    print(json.dumps(found))
    if pv.world_size() > 1:
        torch.distributed.destroy_process_group()


# ---- The model -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Model:
    """Seconds."""

    step: float  # a worker's step, whatever the number of its environments
    physics: float  # and for each of them
    message: float  # a rollout, for each worker
    serial: float  # a rollout, what the trainer does alone, for each row
    minibatch: float  # both networks
    row: float  # and for each row
    alone: float  # a minibatch of the actor, which takes longer than the critic
    alone_row: float  # and for each row
    latency: float  # an all-reduce
    byte: float  # and for each byte

    def rollout(self, envs: int, steps: int, workers: int) -> float:
        largest = -(-envs // workers)
        return steps * (self.step + self.physics * largest) + self.message * workers + self.serial * envs * steps

    def update(self, rows: int, ranks: int = 1, network_bytes: int = 82_000) -> float:
        if ranks == 1:
            return EPOCHS * MINIBATCHES * (self.minibatch + self.row * rows / MINIBATCHES)
        descent = EPOCHS * MINIBATCHES * (self.alone + self.alone_row * 2 * rows / MINIBATCHES)
        return descent + self.messages(rows, ranks, network_bytes)

    def messages(self, rows: int, ranks: int, network_bytes: int) -> float:
        """The mean gradients; and once an update 128 bytes of each row, and both networks with Adam's moments."""
        reduce = EPOCHS * MINIBATCHES * (ranks > 2) * (self.latency + self.byte * network_bytes)
        return reduce + 15 * self.latency + self.byte * (128 * rows * ranks + 6 * network_bytes)

    def rate(self, envs: int, steps: int, workers: int, ranks: int = 1) -> float:
        spent = self.rollout(envs, steps, workers) + self.update(envs * steps, ranks)
        return ranks * envs * steps / spent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small and rough; print only")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="where the results go")
    options = parser.parse_args()
    if options.job:
        run_job(options.job)
        return 0
    torch.set_num_threads(1)
    quick, cores = options.quick, pv.usable_cores()
    repeats = 1 if quick else 5

    blocks = {n: step_seconds(n, repeats) for n in ((1, 4) if quick else (1, 2, 4, 8, 16, 32))}
    step, physics = line(blocks)
    messages = {n: message_seconds(n, 4 * repeats) for n in range(1, cores + 1)}
    message = messages[cores] / cores
    rows = {n: minibatch_seconds(n, repeats) for n in ((64, 256) if quick else (64, 128, 256, 512, 1024))}
    minibatch, row = line(rows)
    alone, alone_row = line({n: minibatch_seconds(n, repeats, networks=1) for n in rows})
    reduces = {int(size): seconds for size, seconds in in_ranks(2, f"reduce,0,{repeats}").items()}
    latency, byte = line(reduces)
    counts = [(8, 1), (16, cores), (32, cores), (64, cores)] if not quick else [(4, 1)]
    found = {(n, w): iteration(make_args(n, num_workers=w), repeats) for n, w in counts}
    serial = statistics.median(times["serial"] / (n * 128) for (n, _), times in found.items())
    model = Model(step, physics, message, serial, minibatch, row, alone, alone_row, latency, byte)

    about = pv.describe_run(make_args(1))
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    out = [
        "# How it scales", "",
        f"`{about['command']}`, commit {about['git_commit']}, {time.strftime('%Y-%m-%d')}, {about['cpu']}, "
        f"{cores} cores, {versions}. Medians.", "", "## What the model is made of, measured here", "",
        "| part | time |", "|---|--:|",
        f"| a worker's step, whatever the number of its environments | {step * 1e6:.0f} us |",
        f"| and for each environment | {physics * 1e6:.0f} us |",
        f"| of which b2World.Step | {physics_seconds(repeats) * 1e6:.0f} us |",
        f"| a rollout's messages, for each worker | {message * 1e6:.0f} us |",
        f"| a rollout's serial part in the trainer, for each row | {serial * 1e6:.2f} us |",
        f"| a minibatch of both networks (128-128, two threads) | {minibatch * 1e3:.2f} ms |",
        f"| and for each row | {row * 1e6:.1f} us |",
        f"| a minibatch of the actor alone | {alone * 1e3:.2f} ms |",
        f"| and for each row | {alone_row * 1e6:.1f} us |",
        f"| an all-reduce between two processes here (gloo) | {latency * 1e6:.0f} us + {byte * 1e9:.2f} ns a byte |",
        "", "## The model beside what was measured, here, steps a second", "",
        "| environments | workers | processes | measured | model |", "|--:|--:|--:|--:|--:|",
    ]  # fmt: skip
    for (n, workers), times in found.items():
        rate = n * 128 / (times["rollout"] + times["update"])
        out.append(f"| {n} | {workers} | 1 | {rate:,.0f} | {model.rate(n, 128, workers):,.0f} |")
    ratio = None
    if cores > 1 and not quick:
        turns: dict[int, list[float]] = {1: [], 2: []}
        for _ in range(3):  # in turns: one process with all environments, two with half of them
            for ranks in (1, 2):
                times = in_ranks(ranks, f"iteration,{16 // ranks},{repeats * 2}")
                turns[ranks].append(16 * 128 / (times["rollout"] + times["update"]))
        ratio = statistics.median(turns[2]) / statistics.median(turns[1])
        out += [f"| 8 each | 1 each | 2 | {statistics.median(turns[2]):,.0f} | {model.rate(8, 128, 1, 2):,.0f} |", ""]
        spread = {n: f"{statistics.median(v):,.0f} ({min(v):,.0f} to {max(v):,.0f})" for n, v in turns.items()}
        out += [
            f"In turns, 16 environments on {cores} cores: one process {spread[1]}, two {spread[2]}: {ratio:.2f}.",
            "Of two processes one trains the actor and the other the critic; they share no interpreter lock.",
            "",
        ]

    gpu_file = ROOT / "benchmarks" / "results" / "gpu.json"
    if gpu_file.exists():
        gpu = json.loads(gpu_file.read_text())
        points = {
            r["minibatch"]: statistics.median(r["graph"]) for r in gpu["update"] if r["hidden"] == 256 and "graph" in r
        }
        both = dict(zip(("minibatch", "row"), line(points)))  # one network alone takes no longer
        on_gpu = dataclasses.replace(model, **both, alone=both["minibatch"], alone_row=both["row"])
        out += ["## 16 cores with a GPU: forecast, and what was measured there", "",
                "The constants of this machine's cores; the GPU's minibatch (256-256, CUDA graph) from gpu.json.",
                "There a core takes 95 us for an environment's step alone, half as long again when all are busy.", "",
                "| environments | rollout, ms: forecast | measured | update, ms: forecast | measured "
                "| steps a second: forecast | measured |", "|--:|--:|--:|--:|--:|--:|--:|"]  # fmt: skip
        for r in gpu["iteration"]:
            if "cuda" not in r:
                continue
            n, there = r["envs"], {name: statistics.median(values) for name, values in r["cuda"].items()}
            forecast = on_gpu.rollout(n, 128, 16), on_gpu.update(n * 128)
            cells = [f"{forecast[0] * 1e3:.0f}", f"{there['rollout'] * 1e3:.0f}", f"{forecast[1] * 1e3:.0f}"]
            cells += [f"{there['update'] * 1e3:.0f}", f"{n * 128 / sum(forecast):,.0f}"]
            out.append(f"| {n} | {' | '.join(cells)} | {n * 128 / sum(there.values()):,.0f} |")
        out += ["", "## Eight such machines, one process each", "",
                "A message over a network: 50 us and 0.8 ns a byte are assumed (10 Gbit/s), not measured.",
                "And that a GPU takes as long for one network with all rows as for both with half of them.", "",
                "| environments each | steps a second, one | eight | of the ideal | largest part |",
                "|--:|--:|--:|--:|---|"]  # fmt: skip
        network = dataclasses.replace(on_gpu, latency=50e-6, byte=0.8e-9)
        for n in (16, 64, 256, 1024):
            one, eight = network.rate(n, 128, 16), network.rate(n, 128, 16, 8)
            messages = network.messages(n * 128, 8, 290_000)
            parts = {
                "physics": 128 * model.physics * -(-n // 16), "a worker's step": 128 * model.step,
                "trainer's serial part": model.serial * n * 128,
                "update": network.update(n * 128, 8, 290_000) - messages, "messages": messages,
            }  # fmt: skip
            name = max(parts, key=parts.get)
            share = parts[name] / sum(parts.values())
            out.append(f"| {n} | {one:,.0f} | {eight:,.0f} | {eight / one / 8:.2f} | {name} ({share:.0%}) |")
    page = "\n".join(out)
    print(page)
    if not quick:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "scaling.md").write_text(page + "\n")
        record = {
            "about": about,
            "model": dataclasses.asdict(model),
            "blocks": blocks,
            "messages": messages,
            "rows": rows,
        }
        record |= {"reduces": reduces, "two_ranks_over_one": ratio}
        record["iterations"] = [{"envs": n, "workers": w, **times} for (n, w), times in found.items()]
        (options.out / "scaling.json").write_text(json.dumps(record, indent=1))
    return 0


TASK = pv.make_task(pv.Options())
TREE = pv.read_checkpoint(REFERENCE, policy=True)[1]

if __name__ == "__main__":
    sys.exit(main())
