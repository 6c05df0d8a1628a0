"""Stable-Baselines3 PPO with the hyperparameters of rl-baselines3-zoo, evaluated and timed as ppo_vec is.

    python benchmarks/learning.py --setting sb3-zoo --seeds 0 --jobs 1    # which calls this file
    python benchmarks/sb3_zoo.py --run-dir runs/learning/sb3-zoo-0 --seed 0

Leaves summary.json and evaluations.json in the run's folder, with ppo_vec's fields. A run that was interrupted goes on
from its last evaluation (SB3 cannot do so to the bit). Needs pip install -e ".[bench]".
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent))

import ppo_vec as pv

# isort: split
import gymnasium as gym
import numpy as np
import torch
import tyro

# hyperparams/ppo.yml of rl-baselines3-zoo, BipedalWalker-v3; observations and rewards are normalised.
ENV_ID, NUM_ENVS, TIMESTEPS = "BipedalWalker-v3", 32, 5_000_000
ZOO = {
    "n_steps": 2048, "batch_size": 64, "gae_lambda": 0.95, "gamma": 0.999, "n_epochs": 10, "ent_coef": 0.0,
    "learning_rate": 3e-4, "clip_range": 0.18,
}  # fmt: skip
EPISODES, CONFIRMATION = 10, 100  # of an evaluation, and of the one that confirms a solve


@dataclass
class Options:
    run_dir: Path
    """the folder of the run; one that is there already goes on"""
    seed: int = 0
    total_timesteps: int = TIMESTEPS
    minutes: float = 90.0
    """give up after so much time"""


class Player(pv.Worker):
    """Plays evaluation episodes as a worker of ppo_vec does, but with SB3's policy."""

    index, first, last = 0, 0, NUM_ENVS

    def __init__(self, model: Any, venv: Any) -> None:
        self.args, self.playing = pv.Options(env_id=ENV_ID), []
        self.task, self.model, self.venv, self.policy = pv.make_task(self.args), model, venv, self

    def beat(self) -> None:
        pass

    def sample(self, obs: np.ndarray, offset: int) -> np.ndarray:
        return self.model.predict(self.venv.normalize_obs(obs), deterministic=True)[0]  # clips them

    def env_action(self, actions: np.ndarray) -> np.ndarray:
        return actions

    def episodes(self, first: int, count: int, published: bool = False) -> dict[str, Any]:
        """The figures of one episode for each of `count` seeds."""
        rows = sorted(self.play(list(range(first, first + count)), range(count), 1, published))
        return pv.summarize([row[1:] for row in rows], self.task.goal)


def main(options: Options) -> None:
    from stable_baselines3 import PPO
    from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

    pv.set_up_torch()
    torch.use_deterministic_algorithms(False)
    folder = options.run_dir
    folder.mkdir(parents=True, exist_ok=True)
    saved = folder / "progress.json"
    progress = {"evaluations": [], "selection_episodes": 0, "solved_at_step": None, "solved_at_s": None, "wall_s": 0.0}
    make = [lambda: gym.make(ENV_ID, disable_env_checker=True)] * NUM_ENVS
    if saved.exists():
        progress = json.loads(saved.read_text())
        venv = VecNormalize.load(str(folder / "venv.pkl"), DummyVecEnv(make))
        model = PPO.load(folder / "model.zip", venv, device="cpu")
    else:
        venv = VecNormalize(DummyVecEnv(make), gamma=ZOO["gamma"])
        model = PPO("MlpPolicy", venv, device="cpu", seed=options.seed, **ZOO)
    began, before = time.perf_counter(), progress["wall_s"]
    player = Player(model, venv)
    goal = player.task.goal

    def wall() -> float:
        return before + time.perf_counter() - began

    def evaluate(count: int) -> dict[str, Any]:
        progress["selection_episodes"] += count
        return player.episodes(pv.SELECTION_SEEDS + progress["selection_episodes"] - count, count)

    while model.num_timesteps < options.total_timesteps and wall() < 60 * options.minutes:
        steps = NUM_ENVS * ZOO["n_steps"]
        model.learn(2 * steps, reset_num_timesteps=False)
        row = evaluate(EPISODES)
        unsolved = progress["solved_at_step"] is None and row["mean"] >= goal
        if unsolved and evaluate(CONFIRMATION)["mean"] >= goal:
            progress |= {"solved_at_step": model.num_timesteps, "solved_at_s": wall()}
        row = {"global_step": model.num_timesteps, "time_s": wall(), **row}
        progress["evaluations"].append(row)
        print(f"step {row['global_step']}, {row['time_s']:.0f} s: {pv.summary_text(row)}", flush=True)
        model.save(folder / "model.zip"), venv.save(str(folder / "venv.pkl"))
        progress["wall_s"] = wall()
        pv.write_file(saved, json.dumps(progress).encode())

    train_s = wall()
    test = player.episodes(pv.TEST_SEEDS, 100, published=True)
    summary = {
        "env_id": ENV_ID, "seed": options.seed, "global_step": model.num_timesteps, "wall_time_s": wall(),
        "train_time_s": train_s, "sps": model.num_timesteps / train_s, **{f"eval_{k}": v for k, v in test.items()},
        **{f"last_eval_{k}": test[k] for k in ("mean", "std", "min")}, "solved_at_step": progress["solved_at_step"],
        "solved_at_s": progress["solved_at_s"], "finished": True,
    }  # fmt: skip
    pv.write_file(folder / "evaluations.json", json.dumps(progress["evaluations"]).encode())
    pv.write_file(folder / "summary.json", json.dumps(summary, indent=2).encode())
    print(pv.summary_text(test))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
