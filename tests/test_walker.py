"""The trainer's walker gives the published BipedalWalker's bits: observations, rewards, ends; and costs no memory.

The reference is Gymnasium's own environment, made anew for every episode: it keeps its world, and with it the order of
its contacts, over resets.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import Box2D
import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.box2d import bipedal_walker as stock

import ppo_vec
from ppo_vec import WALKERS, Options, Walker, make_env, step_walkers

NORMAL, HARDCORE = WALKERS
STANDING = np.array([-1.0, -1.0, 1.0, 1.0])  # both legs against their stops: stands until the time limit


# ----------------------------------------------------------------------------------------------------------------------
# Against the published environment
# ----------------------------------------------------------------------------------------------------------------------


class Walk:
    """Episodes of the published environment and their actions: most walk with some noise, some fall, one stands."""

    def __init__(self, env_id: str, seed: int, dtype: type, standing: bool) -> None:
        self.env_id, self.seed, self.dtype, self.standing_seed = env_id, seed, dtype, seed + 1 if standing else None

    def begin(self) -> np.ndarray:
        self.seed += 1
        self.rng, self.controller = np.random.default_rng(self.seed), stock.BipedalWalkerHeuristics()
        self.noise = float(self.rng.choice((0.0, 0.01, 0.03, 0.1, 1.0)))
        self.env = gym.make(self.env_id, disable_env_checker=True)
        self.obs = self.env.reset(seed=self.seed)[0]
        return self.obs

    def action(self) -> np.ndarray:
        if self.seed == self.standing_seed:
            return STANDING.astype(self.dtype)
        # The published controller walks to the end at 1.2 times its actions; they also go beyond the bounds.
        noise = self.noise * self.rng.standard_normal(4)
        return (1.2 * self.controller.step_heuristic(self.obs) + noise).astype(self.dtype)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool]:
        self.obs, *rest, _ = self.env.step(action)
        return self.obs, *rest


def compare(walks: list[Walk], walkers: list[gym.Env], step: Callable, steps: int) -> Counter:
    """Takes at least `steps` steps of both, every bit compared; an ended episode is followed by the next."""
    counts, running = Counter(), [False] * len(walks)
    while counts["steps"] < steps:
        # Those that have just ended only reset, as in a block of the trainer: the others are stepped without them.
        for i in (i for i, runs in enumerate(running) if not runs):
            expected, (obs, _) = walks[i].begin(), walkers[i].reset(seed=walks[i].seed)
            assert same(obs, expected), f"reset {walks[i].seed}"
        indices = [i for i, runs in enumerate(running) if runs]
        running = [True] * len(walks)
        if not indices:
            continue
        actions = np.array([walks[i].action() for i in indices])
        columns = step([walkers[i] for i in indices], actions)
        for i, action, *got in zip(indices, actions, *columns):
            expected = walks[i].step(action)
            where = f"{walks[i].env_id}, episode {walks[i].seed}, {counts['steps']} steps in"
            assert all(same(*pair) for pair in zip(got, expected)), f"{where}: {got} is not {expected}"
            reward, terminated, truncated = expected[1:]
            running[i] = not (terminated or truncated)
            counts["steps"] += 1
            counts["falls"] += terminated and reward == -100
            counts["finishes"] += terminated and reward != -100
            counts["limits"] += truncated
            counts["walking"] += bool(walks[i].obs[2] > 0.1)
            counts["hits"] += int((walks[i].obs[14:] < 1).sum())
    for walk in walks:
        walk.env.close()
    return counts


def same(a: np.ndarray | float, b: np.ndarray | float) -> bool:
    """Equal to the bit (0.0 is not -0.0). A fall's reward is published as an integer: types are not compared."""
    a, b = np.asarray(a), np.asarray(b)
    return a.shape == b.shape and np.array_equal(a, b) and np.array_equal(np.signbit(a), np.signbit(b))


def step_singly(walkers: list[gym.Env], actions: np.ndarray) -> zip:
    return zip(*(walker.step(action)[:4] for walker, action in zip(walkers, actions)))


FLOAT32, FLOAT64 = np.float32, np.float64


@pytest.mark.parametrize("env_id", WALKERS)
@pytest.mark.parametrize(
    ("step", "dtypes", "steps"),
    [
        pytest.param(step_walkers, [FLOAT32] * 6, 20_000, id="together, float32"),
        pytest.param(step_walkers, [FLOAT64] * 6, 14_000, id="together, float64"),
        pytest.param(step_singly, [FLOAT32, FLOAT64, FLOAT32], 6000, id="one by one"),
    ],
)
def test_walkers_equal_the_published_environments(env_id: str, step: Callable, dtypes: list[type], steps: int) -> None:
    walks = [Walk(env_id, 1000 * i, dtype, standing=i == 0) for i, dtype in enumerate(dtypes)]
    walkers = [make_env(Options(env_id=env_id)) for _ in walks]
    for walker in walkers:
        walker.reset(seed=77)  # a walker that has been used is as good as a new one
    counts = compare(walks, walkers, step, steps)
    assert counts["falls"] >= steps / 2000
    assert counts["limits"] >= 1
    assert counts["walking"] >= 0.3 * counts["steps"]
    assert counts["hits"] >= 4 * counts["steps"]


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64])
def test_the_finish_line(dtype: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terrain of 40 points instead of 200, whose end the rays can see."""
    monkeypatch.setattr(stock, "TERRAIN_LENGTH", 40)
    monkeypatch.setattr(ppo_vec, "FINISH", (40 - stock.TERRAIN_GRASS) * stock.TERRAIN_STEP)
    walks = [Walk(NORMAL, 1000 * i, dtype, standing=False) for i in range(3)]
    counts = compare(walks, [Walker() for _ in walks], step_walkers, 2000)
    assert counts["finishes"] >= 1


@pytest.mark.parametrize("action", [[1, 0, -1, 1], [0, 0, 0, 0], [-0.0, 0.0, -0.0, 0.0], [2, -3, 0.5, -0.5]])
def test_unusual_actions(action: list[float]) -> None:
    fast = Walker()
    for given in (action, np.array(action), np.array(action, FLOAT32)):
        published = make_env(Options(env_id=NORMAL), published=True).unwrapped
        published.reset(seed=1), fast.reset(seed=1)
        for _ in range(20):
            expected, got = published.step(given), fast.step(given)
            assert all(same(*pair) for pair in zip(got[:4], expected[:4]))


class Ray(Box2D.b2RayCastCallback):
    """The nearest terrain that a ray hits, as BipedalWalker's LidarCallback finds it."""

    def ReportFixture(self, fixture: object, point: object, normal: object, fraction: float) -> float:
        if not fixture.filterData.categoryBits & 1:
            return -1
        self.fraction = fraction
        return fraction


@pytest.mark.parametrize("env_id", WALKERS)
def test_the_lidar_equals_box2d_anywhere_on_the_terrain(env_id: str) -> None:
    """Also where no policy of ours goes: before the start, past the finish, in pits, inside stumps and below ground."""
    rng, ray, hits = np.random.default_rng(0), Ray(), 0
    walkers = [make_env(Options(env_id=env_id)) for _ in range(8)]
    for seed, walker in enumerate(walkers):
        walker.reset(seed=seed)
    for _ in range(60):
        x = rng.uniform(-1, stock.TERRAIN_LENGTH * stock.TERRAIN_STEP, len(walkers))
        ground = [walker.terrain_y[min(max(int(at / stock.TERRAIN_STEP), 0), 199)] for walker, at in zip(walkers, x)]
        y = np.array(ground) + rng.uniform(-0.5, 4, len(walkers))
        # Box2D keeps positions in float32.
        x, y = x.astype(np.float32).astype(np.float64), y.astype(np.float32).astype(np.float64)
        got = ppo_vec.cast_rays(walkers, x, y)
        for walker, px, py, fractions in zip(walkers, x.tolist(), y.tolist(), got):
            for i, fraction in enumerate(fractions):
                ray.fraction = 1.0
                end = (
                    px + math.sin(1.5 * i / 10.0) * stock.LIDAR_RANGE, py - math.cos(1.5 * i / 10.0) * stock.LIDAR_RANGE
                )  # fmt: skip
                walker.world.RayCast(ray, (px, py), end)
                assert same(fraction, np.float32(ray.fraction)), (px, py, i)
                hits += ray.fraction < 1
    assert hits > 1000


# ----------------------------------------------------------------------------------------------------------------------
# Memory
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_memory_stays_flat_over_1000_resets(tmp_path: Path) -> None:
    """A Hardcore world is 0.2 MB of C++ memory that Python's garbage collector does not see."""
    resets = """
import resource
import numpy as np
from pathlib import Path
from ppo_vec import Walker

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20

walker = Walker(hardcore=True)
for episode in range(1, 1151):
    walker.reset(seed=episode)
    for _ in range(3):
        walker.step(np.ones(4, np.float32))
    if episode == 150:
        before = resident()
print(resident() - before)
"""
    where = {**os.environ, "PYTHONPATH": str(Path(ppo_vec.__file__).parent)}
    command = [sys.executable, "-c", resets]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path, env=where)
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) < 8, "MB more after 1,000 resets"
