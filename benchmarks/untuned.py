"""Environments that nobody tuned: ppo_vec's defaults beside those of Stable-Baselines3.

    pip install -e ".[bench]" "gymnasium[mujoco]==1.4.0"
    python benchmarks/untuned.py                                       # writes benchmarks/results/untuned.md and .json
    python benchmarks/untuned.py --envs Hopper-v5 --steps 1000000 --seeds 0    # prints only

SB3 is PPO("MlpPolicy") with VecNormalize around one environment, as its documentation has it for PyBullet. Both take
the same number of steps, and are tested with their last weights, deterministically, on the same 100 episode seeds. A
run that is finished is not repeated; an unfinished one of ours goes on.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))

import ppo_vec as pv

# isort: split
import numpy as np
import tyro
from cores import Cores, pin

RUNS = ROOT / "runs" / "untuned"
ENVS = "Pendulum-v1", "Hopper-v5", "Walker2d-v5", "HalfCheetah-v5", "Ant-v5"
EPISODES = 100


@dataclass
class Options:
    envs: tuple[str, ...] = ENVS
    """which environments"""
    seeds: tuple[int, ...] = (0, 1, 2)
    """training seeds"""
    steps: int = 300_000
    """environment steps of a training; of Pendulum a third"""
    jobs: int = pv.usable_cores()
    """runs at a time, each on cores of its own"""
    sb3: Path | None = None
    """train Stable-Baselines3 once, with the first environment and seed, and write its result to this file"""


def steps_of(env: str, options: Options) -> int:
    return options.steps // 3 if env == "Pendulum-v1" else options.steps


def train_sb3(env_id: str, steps: int, seed: int, path: Path) -> None:
    import gymnasium as gym
    import torch
    from stable_baselines3 import PPO
    from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

    torch.set_num_threads(1)
    venv = VecNormalize(DummyVecEnv([lambda: gym.make(env_id)]))
    model, began = PPO("MlpPolicy", venv, seed=seed, device="cpu"), time.perf_counter()
    model.learn(steps)
    train_s, env, returns = time.perf_counter() - began, gym.make(env_id), []
    for episode in range(EPISODES):
        (obs, _), total, done = env.reset(seed=pv.TEST_SEEDS + episode), 0.0, False
        while not done:
            action, _ = model.predict(venv.normalize_obs(obs), deterministic=True)
            obs, reward, terminated, truncated, _ = env.step(action)
            total, done = total + float(reward), terminated or truncated
        returns.append(total)
    row = {"mean": float(np.mean(returns)), "min": min(returns), "train_s": train_s}
    pv.write_file(path, json.dumps(row).encode())


def train_ours(env_id: str, steps: int, seed: int, name: str) -> list[str]:
    """The command of a run, new or resumed."""
    command = [sys.executable, str(ROOT / "ppo_vec.py")]
    if (RUNS / name / "checkpoint.pt").exists():
        return [*command, "--resume", str(RUNS / name)]
    flags = {"env-id": env_id, "total-timesteps": steps, "seed": seed, "runs-dir": RUNS, "run-name": name}
    return command + [str(word) for flag, value in flags.items() for word in (f"--{flag}", value)]


def result(who: str, env_id: str, seed: int, options: Options) -> dict[str, Any]:
    """A finished run's figures; {} if there are none."""
    name = f"{env_id}-{steps_of(env_id, options)}-{seed}"
    if who == "SB3":
        return pv.read_json(RUNS / f"sb3-{name}.json")
    summary = pv.read_json(RUNS / name / "summary.json")
    if not summary.get("finished"):
        return {}
    return {"mean": summary["last_eval_mean"], "min": summary["last_eval_min"], "train_s": summary["train_time_s"]}


def main(options: Options) -> int:
    if options.sb3 is not None:
        train_sb3(options.envs[0], steps_of(options.envs[0], options), options.seeds[0], options.sb3)
        return 0
    RUNS.mkdir(parents=True, exist_ok=True)
    cores = Cores(options.jobs)

    def run(job: tuple[str, str, int]) -> dict[str, Any]:
        who, env_id, seed = job
        steps = steps_of(env_id, options)
        name = f"{env_id}-{steps}-{seed}"
        if not result(*job, options):
            command = train_ours(env_id, steps, seed, name)
            if who == "SB3":
                command = [sys.executable, __file__, "--sb3", str(RUNS / f"sb3-{name}.json"), "--envs", env_id]
                command += ["--steps", str(options.steps), "--seeds", str(seed)]
            with cores.share() as mine, open(RUNS / f"{who}-{name}.log", "a") as log:
                how: dict[str, Any] = {"stdout": log, "stderr": log, "cwd": ROOT}
                how |= {"env": {**os.environ, "OMP_NUM_THREADS": "1"}, "preexec_fn": functools.partial(pin, 0, mine)}
                subprocess.run(command, **how)
        row = {"who": who, "env_id": env_id, "seed": seed, **result(*job, options)}
        print(json.dumps(row), flush=True)
        return row

    jobs = [(who, env, seed) for env in options.envs for seed in options.seeds for who in ("ppo_vec", "SB3")]
    with ThreadPoolExecutor(options.jobs) as pool:
        rows = list(pool.map(run, jobs))
    info = pv.describe_run(pv.Options())
    lines = [
        f"`{info['command']}`, commit {info['git_commit']}, {time.strftime('%Y-%m-%d')}, {info['cpu']}, "
        f"{info['cores']} cores, {options.jobs} at a time, torch {info['versions']['torch']}, gymnasium "
        f"{info['versions']['gymnasium']}. Last weights, deterministic, mean of {EPISODES} test episodes; "
        "seconds of training.",
        "",
        f"| environment | steps | ppo_vec, seeds {' '.join(map(str, options.seeds))} | mean | s | SB3 | mean | s |",
        "|---|--:|---|--:|--:|---|--:|--:|",
    ]
    for env in options.envs:
        cells = []
        for who in ("ppo_vec", "SB3"):
            mine = [row for row in rows if (row["who"], row["env_id"]) == (who, env)]
            all_there = all("mean" in row for row in mine)  # figures of fewer would leave the failed out
            cells.append(" ".join(f"{row['mean']:.0f}" if "mean" in row else "failed" for row in mine))
            cells.append(f"**{np.mean([row['mean'] for row in mine]):.0f}**" if all_there else "")
            cells.append(f"{np.mean([row['train_s'] for row in mine]):.0f}" if all_there else "")
        lines.append(f"| {env} | {steps_of(env, options):,} | {' | '.join(cells)} |")
    text = "\n".join(lines) + "\n"
    print(text)
    whole = all("mean" in row for row in rows)
    if whole and options == Options(jobs=options.jobs):  # of all environments, seeds and steps
        results = ROOT / "benchmarks" / "results"
        (results / "untuned.md").write_text(f"# Environments that nobody tuned\n\n{text}")
        (results / "untuned.json").write_text(json.dumps({"info": info, "runs": rows}, indent=1) + "\n")
    return 0 if whole else 1


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, description=__doc__)))
