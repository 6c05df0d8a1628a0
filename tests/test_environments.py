"""The data path: rollouts, replays, workers, evaluation, checkpoints, and what a run delivers."""

from __future__ import annotations

import builtins
import contextlib
import copy
import csv
import dataclasses
import functools
import io
import itertools
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from gymnasium.envs.box2d import bipedal_walker as stock
from hypothesis import given
from torch import Tensor

import ppo_vec
from ppo_vec import TILE, Options, Policy, State, Task, VecEnv, Worker, decode, encode

WALKER, PENDULUM, LANDER, TOY = "BipedalWalker-v3", "Pendulum-v1", "LunarLanderContinuous-v3", "Toy-v0"
CPU = torch.device("cpu")
SELECTION_SEEDS, TEST_SEEDS, TRAINING_SEEDS = ppo_vec.SELECTION_SEEDS, ppo_vec.TEST_SEEDS, ppo_vec.TRAINING_SEEDS


# ---- Helpers ---------------------------------------------------------------------------------------------------------


class Toy(gym.Env):
    """An episode of seed % 7 + 1 steps, or an endless one; each reward is the seed's last digit."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,))
    action_space = gym.spaces.Box(-1, 1, (1,))

    def __init__(self, endless: bool = False) -> None:
        self.endless = endless

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        self.seed, self.left = seed, seed % 7 + 1
        return np.array([seed % 10, self.left], np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.left -= 1
        done = self.left <= 0 and not self.endless
        return np.array([self.seed % 10, self.left], np.float32), float(self.seed % 10), done, False, {}


gym.register(TOY, entry_point=Toy)


class Choice(gym.Env):
    """Of the actions 5, 6 and 7 the one that the observation tells pays 1. An episode has 10 steps."""

    observation_space, action_space = gym.spaces.Box(0, 1, (3,)), gym.spaces.Discrete(3, start=5)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.left = 10
        return self.show(), {}

    def show(self) -> np.ndarray:
        self.right = int(self.np_random.integers(3))
        return np.eye(3, dtype=np.float32)[self.right]

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        assert isinstance(action, self.action_space.dtype.type)
        assert self.action_space.contains(action)
        reward, self.left = float(action == 5 + self.right), self.left - 1
        return self.show(), reward, self.left == 0, False, {}


gym.register("Choice-v0", entry_point=Choice)


def make_args(**overrides: Any) -> Options:
    small = {"actor_hidden_sizes": (16, 16), "critic_hidden_sizes": (16, 16), "update_epochs": 2, "num_minibatches": 4}
    args = Options(**{**small, "anneal_lr": False, **overrides})
    ppo_vec.validate(args)
    return args


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int64, np.uint64])
def test_discrete_actions_of_any_type_are_int64_here(dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Choice, "action_space", gym.spaces.Discrete(3, start=5, dtype=dtype))
    task = ppo_vec.inspect_env(make_args(env_id="Choice-v0"))
    assert (task.discrete, task.low.dtype, task.low.tolist()) == (True, np.int64, [5, 6, 7])


@contextlib.contextmanager
def trainer(args: Options, saved: bytes | None = None, task: Task | None = None) -> Iterator[tuple[State, VecEnv]]:
    """What train() puts together, without files."""
    task = task or ppo_vec.make_task(args)
    state = State(args, task, CPU)
    if saved:
        state.load(decode(saved))
    with contextlib.closing(VecEnv(args, task, state.snapshot)) as envs:
        yield state, envs


def iterate(state: State, envs: VecEnv) -> None:
    now = ppo_vec.scheduled(state.args, state.global_step, state.shown)
    rollout = ppo_vec.collect(envs, state, now)
    ppo_vec.update(state, rollout, now)
    ppo_vec.note_returns(state, rollout)


def steps(
    state: State, envs: VecEnv, rollouts: int, before: Callable[[int], Any] = lambda k: None
) -> tuple[dict[str, np.ndarray], list[dict[str, Any]]]:
    """Rollouts of one policy: their rows in a row, (rollouts * T, N, ...), and the episodes that ended."""
    parts, episodes, policy = [], [], state.agent.state_dict()
    for k in range(rollouts):
        before(k)
        shape = state.args.num_steps, state.args.num_envs, state.task.action_dim
        noise = torch.randn(shape, generator=state.noise_rng).numpy()
        rollout = envs.rollout(policy, noise, state.global_step)
        state.global_step += state.args.batch_size
        part = {name: value.numpy().copy() for name, value in vars(rollout).items() if isinstance(value, Tensor)}
        part["final_obs"][part["terminated"] | ~part["truncated"]] = 0  # means nothing in other rows
        parts.append({**part, "restarted": part["restarted"][None], "next_obs": part["obs"][-1:]})
        parts[-1]["obs"] = part["obs"][:-1]
        episodes += rollout.episodes
    for one, following in itertools.pairwise(parts):
        assert np.array_equal(one["next_obs"][0], following["obs"][0]) or following["restarted"].any()
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}, episodes


def assert_same(a: Any, b: Any, where: str = "") -> None:
    """Equality to the bit of nested dicts, sequences, tensors, arrays and numbers."""
    assert type(a) is type(b), where
    if isinstance(a, Tensor):
        a, b = a.numpy(), b.numpy()
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, pair in enumerate(zip(a, b)):
            assert_same(*pair, f"{where}[{i}]")
    elif isinstance(a, np.ndarray):
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes()), where
    else:
        assert a == b, where


TIMES = {"time_s", "train_time_s", "wall_time_s", "solved_at_s", "log_sizes", "args"}


def plain(tree: Any) -> Any:
    """Without what differs between equal runs: times, and arguments that change no result."""
    if isinstance(tree, dict):
        return {k: plain(v) for k, v in tree.items() if k not in TIMES}
    return [plain(v) for v in tree] if isinstance(tree, list) else tree


def run_train(tmp_path: Path, limit: int = 200, **overrides: Any) -> tuple[Path, dict[str, Any]]:
    """train() in a folder of its own, with short evaluations; returns the folder and its checkpoint."""
    name = f"run{len(list(tmp_path.iterdir()))}"
    args = make_args(runs_dir=str(tmp_path), run_name=name, **overrides)
    with ppo_vec.run_folder(args, new=True) as (args, folder):
        task = dataclasses.replace(ppo_vec.make_task(args), max_episode_steps=limit)
        assert ppo_vec.train(args, task, folder) is None
    return folder, ppo_vec.read_checkpoint(folder)[1]


def rows_of(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file, without times."""
    with open(path, newline="") as file:
        return [plain(row) for row in csv.DictReader(file)]


def worker_here(args: Options, snapshot: dict[str, Any] | None = None) -> tuple[Worker, State]:
    """A worker of all environments in this process."""
    state = State(args, ppo_vec.make_task(args), CPU)
    envs = VecEnv(args, state.task, snapshot or state.snapshot)
    return Worker(0, 0, args.num_envs, args, envs.task, envs.shared, envs.snapshot), state


def call(worker: Worker, name: str, *args: Any) -> Any:
    """With the policy of an agent that has learned nothing."""
    agent = State(worker.args, worker.task, CPU).agent
    policy = Policy(agent.state_dict(), worker.args.activation, worker.task.low, worker.task.high)
    result = worker.run(name, policy, *args)
    assert not isinstance(result, str), result  # a traceback
    return result


# ---- Rollouts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("env_id", "num_steps", "rollouts"), [(PENDULUM, 70, 6), (PENDULUM, 100, 5), (WALKER, 60, 5), (LANDER, 60, 5)]
)
def test_rollouts_equal_published_environments_stepped_by_hand(env_id: str, num_steps: int, rollouts: int) -> None:
    """With the episode's length and return behind the observation, and the snapshot at the end."""
    args = make_args(
        env_id=env_id, seed=5, num_envs=3, num_workers=2, num_steps=num_steps, num_minibatches=2, critic_progress=True
    )
    with trainer(args) as (state, envs):
        data, episodes = steps(state, envs, rollouts)
    bound, expected = {PENDULUM: 2}.get(env_id, 1), []

    def begin(i: int, episode: int) -> tuple:
        env = gym.make(env_id)
        return env, env.reset(seed=ppo_vec.episode_seed(5, i, episode))[0], episode, 0, 0.0

    for i in range(3):
        env, obs, episode, length, total = begin(i, 0)
        for row in range(num_steps * rollouts):
            got = {k: data[k][row, i] for k in ("obs", "final_obs", "actions", "rewards", "terminated", "truncated")}
            assert_same(got["obs"], np.array([*obs, length, total], np.float64), f"{i}, {row}")
            obs, reward, terminated, truncated, _ = env.step(bound * np.clip(got["actions"], -1, 1))
            length, total = length + 1, total + float(reward)
            assert (got["rewards"], got["terminated"], got["truncated"]) == (reward, terminated, truncated)
            if terminated or truncated:
                if not terminated:
                    assert_same(got["final_obs"], np.array([*obs, length, total], np.float64), f"{i}, {row}")
                expected.append({
                    "env": i, "return": total, "length": length,
                    "fell": bool(terminated and reward <= -100), "global_step": 3 * (row + 1),
                })  # fmt: skip
                env, obs, episode, length, total = begin(i, episode + 1)
        assert_same(data["next_obs"][-1, i], np.array([*obs, length, total], np.float64))
        assert_same(state.snapshot["obs"][i].numpy(), obs.astype(np.float64))
        assert (state.snapshot["episode"][i], state.snapshot["returns"][i]) == (episode, total)
        kept = np.concatenate([chunk.numpy() for chunk in state.snapshot["actions"][i]])
        assert_same(kept, data["actions"][num_steps * rollouts - length :, i])
    assert episodes == sorted(expected, key=lambda e: (e["global_step"], e["env"]))
    assert len(episodes) >= 3
    assert not data["restarted"].any()
    if env_id == PENDULUM:  # with 100 steps a rollout the second one ends with the episodes
        assert np.flatnonzero(data["truncated"][:, 0]).tolist() == [r for r in (199, 399) if r < num_steps * rollouts]
    else:
        assert data["terminated"].any()
        assert {e["fell"] for e in episodes} == {True}


@pytest.mark.parametrize("env_id", [WALKER, LANDER, PENDULUM])
def test_new_workers_go_on_where_the_last_rollout_ended(env_id: str) -> None:
    """To the bit, however many they are and whenever the old ones end."""

    def run(num_workers: int, *ends: int) -> tuple:
        args = make_args(env_id=env_id, num_envs=5, num_workers=num_workers, num_steps=60)
        with trainer(args) as (state, envs):
            data = steps(state, envs, 5, before=lambda k: k in ends and envs.close(terminate=k % 2 == 0))
            return *data, plain(state.snapshot)

    undisturbed = run(2)
    assert max(map(len, undisturbed[2]["actions"])) > 1  # chunks
    assert len(undisturbed[1]) >= 5
    for num_workers, *ends in ((1, 1, 3), (2, 0, 1, 2, 3, 4), (3,), (5, 4)):
        result = run(num_workers, *ends)
        assert_same(result, undisturbed)
    assert not undisturbed[0]["restarted"].any()


def test_a_second_attempt_forgets_what_the_first_could_not_replay() -> None:
    args = make_args(env_id=PENDULUM, num_envs=2, num_workers=1, num_steps=10)
    with trainer(args) as (state, envs):
        steps(state, envs, 1)
        envs.data.restarted[...] = True
        with contextlib.closing(ppo_vec.Worker(0, 0, 2, args, state.task, envs.shared, state.snapshot)) as worker:
            worker.policy = Policy(state.agent.state_dict(), args.activation, state.task.low, state.task.high)
            worker.restore()
            assert_same(worker.obs, state.snapshot["obs"].numpy())
        assert not envs.data.restarted.any()


def test_ctrl_c_while_workers_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that do not close in time are killed, all of them."""

    def interrupted(timeout: float | None = None) -> None:
        monkeypatch.undo()
        raise KeyboardInterrupt

    with trainer(make_args(env_id=PENDULUM, num_envs=2, num_workers=2)) as (_, envs):
        processes = envs.start().processes
        for process in processes:
            os.kill(process.pid, signal.SIGSTOP)
        monkeypatch.setattr(processes[0], "join", interrupted)
        with pytest.raises(KeyboardInterrupt):
            envs.close()
        assert [process.exitcode for process in processes] == [-signal.SIGKILL] * 2  # by that, not by the next close()


def tampered(envs: dict[str, Any], what: str) -> None:
    """Environment 1 has come to another place than its actions lead to."""
    if what == "observation":
        envs["obs"][1, 0] = envs["obs"][1, 0].nextafter(torch.tensor(9.0))
    elif what == "return":
        envs["returns"][1] = envs["returns"][1].nextafter(torch.tensor(0.0, dtype=torch.float64))
    elif what == "action":
        envs["actions"][1][0][3] *= -1
    else:  # to the end of its episode: the last of 200 actions
        envs["actions"][1].append(torch.zeros(80, 1))
        env = gym.make(PENDULUM)
        env.reset(seed=ppo_vec.episode_seed(1, 1, 0))
        by_hand = [env.step(2 * np.clip(action, -1, 1)) for action in torch.cat(envs["actions"][1]).numpy()]
        assert by_hand[-1][3]
        envs["obs"][1] = torch.from_numpy(by_hand[-1][0])
        envs["returns"][1] = sum(float(step[1]) for step in by_hand)


@pytest.mark.parametrize("what", ["observation", "return", "action", "end"])
def test_an_environment_that_cannot_be_replayed_starts_a_new_episode(
    what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    args = make_args(env_id=PENDULUM, num_envs=3, num_workers=2, num_steps=60, critic_progress=True)

    def run(tamper: bool) -> tuple[dict[str, np.ndarray], State]:
        def before(k: int) -> None:
            if k == 2 and tamper:
                envs.close()
                tampered(state.snapshot, what)
            elif k == 3:
                envs.close()

        with trainer(args) as (state, envs):
            return steps(state, envs, 4, before)[0], state

    (expected, _), (data, state) = run(False), run(True)
    assert data["restarted"].tolist() == [[False] * 3, [False] * 3, [False, True, False], [False] * 3]
    assert "1 environments cannot be replayed; their episodes start anew" in capsys.readouterr().err
    obs = gym.make(PENDULUM).reset(seed=ppo_vec.episode_seed(1, 1, 1))[0]
    assert_same(data["obs"][120, 1], np.array([*obs, 0, 0], np.float64))
    for name in ("obs", "rewards", "truncated"):
        assert_same(data[name][:, [0, 2]], expected[name][:, [0, 2]])
        assert_same(data[name][:120], expected[name][:120])
    assert state.snapshot["episode"].tolist() == [1, 1, 1]  # the others' first one ended in the last rollout
    assert [sum(map(len, chunks)) for chunks in state.snapshot["actions"]] == [40, 120, 40]


# ---- Workers and seeds -----------------------------------------------------------------------------------------------


def test_results_depend_on_the_seed_and_not_on_the_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten walkers in 1, 2 and 3 processes (shares that divide no tile), and another seed; and what is in the logs."""
    collect, collected = ppo_vec.collect, []

    def spy(*args: Any) -> ppo_vec.Rollout:
        rollout = collect(*args)
        collected.extend(rollout.episodes)
        return rollout

    def run(seed: int, num_workers: int) -> tuple:
        collected.clear()
        folder, tree = run_train(
            tmp_path, seed=seed, num_envs=10, num_workers=num_workers, num_steps=48, total_timesteps=1500,
            learning_rate=3e-3, actor_hidden_sizes=(64, 64), eval_episodes=3, swa_share=0.5,
        )  # fmt: skip
        return plain(tree), rows_of(folder / "episodes.csv"), rows_of(folder / "evaluation.csv")

    monkeypatch.setattr(ppo_vec, "collect", spy)
    first = run(1, 1)
    tree, rows, _ = first
    assert len(collected) > 5
    assert [{k: str(e[k]) for k in ("global_step", "return", "length", "env")} for e in collected] == rows
    assert (tree["global_step"], len(tree["evaluations"])) == (4 * 480, 2)
    assert tree["average"]["n_averaged"] == 3  # after 960, 1440 and 1920 steps
    for num_workers in (2, 3):
        assert_same(run(1, num_workers), first)
    other = run(2, 2)
    assert not torch.equal(tree["agent"]["actor.0.weight"], other[0]["agent"]["actor.0.weight"])
    assert rows != other[1]


def test_discrete_actions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They are learned, the same for any number of workers and in two parts; the policy gives the environment's own."""
    flags = f"--runs-dir {tmp_path} --env-id Choice-v0 --num-envs 6 --num-steps 53 --num-minibatches 6 --no-anneal-lr"
    flags += " --eval-episodes 4 --learning-rate 3e-3"

    def run(name: str, workers: int, steps: int) -> dict[str, Any]:
        where = f"{flags} --num-workers {workers} --total-timesteps {steps} --run-name {name}"
        where = f"--resume {tmp_path / name} --total-timesteps {steps}" if (tmp_path / name).exists() else where
        assert ppo_vec.main(where.split()) == 0
        return plain(ppo_vec.read_checkpoint(tmp_path / name / "checkpoint.pt")[1])

    first = run("one", 1, 4000)
    assert first["evaluations"][-1]["mean"] == 10
    assert_same(run("two", 2, 4000), first)
    run("parts", 2, 2000)
    parts = run("parts", 1, 4000)  # from the middle of six episodes, which are replayed
    assert_same(parts["agent"], first["agent"])
    assert_same(parts["snapshot"], first["snapshot"])
    act = ppo_vec.load_policy(tmp_path / "one")
    assert act(np.eye(3)).tolist() == [5, 6, 7]
    action = act(np.eye(3)[1])
    assert (type(action), action) == (np.int64, 6)
    where = f"--evaluate {tmp_path / 'one'} --runs-dir {tmp_path}"
    capsys.readouterr()
    assert ppo_vec.main([*where.split(), "--eval-episodes", "3"]) == 0
    assert "effort" not in capsys.readouterr().out


def test_the_first_minibatch_of_discrete_actions_has_ratio_1(monkeypatch: pytest.MonkeyPatch) -> None:
    args, ratios = make_args(env_id="Choice-v0", num_envs=6, num_steps=40), []
    loss_of = ppo_vec.policy_loss

    def noting(agent: ppo_vec.Agent, mb: dict[str, Tensor], args: Options) -> tuple[Tensor, dict[str, Tensor]]:
        logprobs, _ = agent.distribution.log_prob_entropy(agent.policy(mb["obs"]), mb["actions"])
        ratios.append((logprobs - mb["logprobs"]).exp().detach())
        return loss_of(agent, mb, args)

    noting.__name__ = "policy_loss"
    monkeypatch.setattr(ppo_vec, "policy_loss", noting)
    with trainer(args) as (state, envs):
        iterate(state, envs)
        first = len(ratios)
        iterate(state, envs)
    for i in (0, first):
        torch.testing.assert_close(ratios[i], torch.ones_like(ratios[i]), rtol=0, atol=1e-5)
    assert (ratios[first - 1] - 1).abs().max() > 1e-3


@pytest.mark.skipif(ppo_vec.usable_cores() < 2, reason="needs two cores")
def test_the_number_of_cores_changes_no_result(tmp_path: Path) -> None:
    """Torch would make the first weights with a thread for each, and so with other bits."""
    env = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    env["PYTHONPATH"] = str(Path(ppo_vec.__file__).parent)
    cores, results = sorted(os.sched_getaffinity(0)), []
    for some in (cores[:1], cores):
        run = tmp_path / f"{len(some)}"
        small = "--num-steps 8 --num-minibatches 2 --total-timesteps 128 --eval-episodes 1"
        flags = f"{small} --runs-dir {tmp_path} --run-name {run.name}"
        pin = functools.partial(os.sched_setaffinity, 0, some)
        command = [sys.executable, ppo_vec.__file__, *flags.split()]
        subprocess.run(command, env=env, capture_output=True, timeout=100, check=True, preexec_fn=pin)
        results.append(plain(ppo_vec.read_checkpoint(run / "checkpoint.pt")[1]))
    assert_same(*results)


def short_task(env_id: str, limit: int) -> Task:
    return dataclasses.replace(ppo_vec.make_task(make_args(env_id=env_id)), max_episode_steps=limit)


def test_a_rows_place_in_its_tile_does_not_follow_the_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """On some processors the bits of a row depend on its place in a matrix product. Here they do, on every one."""
    places = np.arange(TILE, dtype=np.float32)[:, None]
    monkeypatch.setitem(ppo_vec.ACTIVATIONS, "tanh", (torch.nn.Tanh, lambda x: np.tanh(x + places / 10)))
    monkeypatch.setattr(ppo_vec, "check_copy", lambda *_: None)
    args, task, results = make_args(num_envs=10, num_steps=16), short_task(WALKER, 40), []
    state = State(args, task, CPU)
    arrays, obs = state.agent.state_dict(), np.random.default_rng(0).normal(size=(10, 24))
    policy, obs = Policy(arrays, "tanh", task.low, task.high), obs.astype(np.float32)
    whole = policy.sample(obs)
    assert not np.array_equal(policy.sample(obs, offset=1), whole)
    for cut in range(1, 10):
        assert_same(np.concatenate((policy.sample(obs[:cut]), policy.sample(obs[cut:], offset=cut))), whole)
    for num_workers in (1, 2, 3, 4):
        with trainer(dataclasses.replace(args, num_workers=num_workers), task=task) as (state, envs):
            results.append((*steps(state, envs, 2), envs.play(arrays, list(range(11)))))
            assert envs.play(arrays, list(range(11)), show=True) == results[-1][-1]  # ten, and one
        assert_same(results[0], results[-1])


def test_episode_seeds_do_not_overlap() -> None:
    runs = [{ppo_vec.episode_seed(seed, env, k) for env in range(16) for k in range(20)} for seed in range(6)]
    assert [len(run) for run in runs] == [320] * 6
    assert len(set().union(*runs)) == 6 * 320
    assert all(TRAINING_SEEDS <= s < 2**31 for run in runs for s in run)  # some simulators take a C int
    assert ppo_vec.episode_seed(1, 2, 3) == ppo_vec.episode_seed(1, 2, 3)
    million = 10**6  # more than any run evaluates
    assert TEST_SEEDS >= 0
    assert TEST_SEEDS + million <= SELECTION_SEEDS
    assert SELECTION_SEEDS + million <= TRAINING_SEEDS


def test_streams_of_random_numbers_do_not_repeat() -> None:
    task, streams = ppo_vec.make_task(make_args(env_id=PENDULUM)), set()
    for seed in range(1, 21):
        first, same = (State(make_args(env_id=PENDULUM, seed=seed), task, CPU) for _ in range(2))
        streams |= {torch.initial_seed(), first.noise_rng.initial_seed(), first.shuffle_rng.initial_seed()}
        assert_same(plain(first.state_dict()), plain(same.state_dict()))
    assert len(streams) == 3 * 20


# ---- Evaluation ------------------------------------------------------------------------------------------------------


def by_hand(task: Task, args: Options, arrays: list[np.ndarray], seeds: list[int]) -> list[tuple]:
    """One episode of the published environment per seed."""
    policy, expected = Policy(arrays, args.activation, task.low, task.high), []
    for i, seed in enumerate(seeds):
        env, total, length, done, effort = gym.make(args.env_id), 0.0, 0, False, 0.0
        obs = env.reset(seed=seed)[0]
        while not done:
            mean = policy.sample(obs[None], None, i)  # i: other places, other bits
            action = policy.env_action(mean)[0]
            effort += 0.0 if task.discrete else float(np.abs(np.clip(mean, -1, 1)).mean())
            obs, reward, terminated, truncated, _ = env.step(action)
            total, length = total + float(reward), length + 1
            done = terminated or truncated or length == task.max_episode_steps
        expected.append((total, length, bool(terminated and reward <= -100), effort / length))
    return expected


@pytest.mark.parametrize("env_id", [PENDULUM, LANDER, WALKER, TOY])
def test_evaluation_equals_published_environments_stepped_by_hand(env_id: str) -> None:
    """One episode per seed, in their order; the number of workers changes no bit, nor does the walker's world."""
    args, seeds = make_args(env_id=env_id, num_envs=5, num_steps=8), [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 3]
    task = short_task(env_id, 120)
    for num_workers in (1, 2, 3):
        with trainer(dataclasses.replace(args, num_workers=num_workers), task=task) as (state, envs):
            arrays = dict(state.agent.state_dict())
            arrays["actor.4.bias"] = arrays["actor.4.bias"] + 0.3
            if num_workers == 1:
                expected = by_hand(task, args, arrays, seeds)
                assert len(set(expected)) >= (6 if env_id == TOY else 7)
            for published in (True, False):
                for show in (True, False):
                    assert envs.play(arrays, seeds, published, show) == expected
            assert envs.play(arrays, []) == []


@pytest.mark.parametrize(("env_id", "published"), [(WALKER, True), (WALKER, False), (LANDER, True)])
def test_an_evaluation_holds_few_environments_of_the_right_kind(
    env_id: str, published: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bits of walkers are the same, so only the class tells them apart."""
    make_env, alive, most, kinds, resets = ppo_vec.make_env, set(), [0], [], []

    def spy(*args: Any) -> gym.Env:
        env = make_env(*args)
        alive.add(env)
        most.append(len(alive))
        kinds.append(type(env.unwrapped))
        close, env.close = env.close, lambda: (alive.discard(env), close())
        return env

    reset_env = ppo_vec.reset_env
    monkeypatch.setattr(ppo_vec, "reset_env", lambda env, seed: resets.append((id(env), seed)) or reset_env(env, seed))
    worker, _ = worker_here(make_args(env_id=env_id, num_envs=6, num_workers=1))
    worker.task = dataclasses.replace(worker.task, max_episode_steps=10)
    monkeypatch.setattr(ppo_vec, "make_env", spy)
    episodes = call(worker, "play", list(range(11)), range(6), 1, published, True)  # there is more to play
    few = 1 if env_id == LANDER else 6  # num_envs
    assert len(alive) == few
    episodes += call(worker, "play", list(range(11)), range(6, 11), 1, published)
    assert len(episodes) == 11
    assert sorted(seed for _, seed in resets) == list(range(11))
    assert max(most) == few
    assert not alive
    if env_id == LANDER:
        assert len(kinds) == 1
    else:
        assert kinds == ([stock.BipedalWalker] * 11 if published else [ppo_vec.Walker] * 6)


def test_an_endless_episode_ends() -> None:
    args = make_args(env_id=TOY, env_kwargs='{"endless": true}', num_envs=2, num_workers=1, eval_max_steps=30)
    worker, _ = worker_here(args)
    rows = call(worker, "play", [3, 4], range(2), 1, True)
    assert [row[:3] for row in rows] == [(90.0, 30, False), (120.0, 30, False)]


# ---- State and checkpoints -------------------------------------------------------------------------------------------


def test_a_state_survives_its_checkpoint_and_goes_on_to_the_bit() -> None:
    args = make_args(num_envs=5, num_workers=2, num_steps=40, learning_rate=3e-3)
    with trainer(args) as (state, envs):
        for _ in range(3):
            iterate(state, envs)
            state.average.update_parameters(state.agent)
        state.train_time_s, state.wall_time_s = 1.5, 2.5
        row = {
            "global_step": 7,
            "time_s": 0.5,
            **ppo_vec.summarize([(-1.5, 70, True, 0.1), (2.5, 90, False, 0.2)], 300.0),
        }
        state.evaluations.append(row)
        state.best = {"agent": copy.deepcopy(state.agent.state_dict()), "evaluation": row}
        state.solved_at_step, state.solved_at_s, state.selection_episodes = 17, 1.25, 10
        state.selection_steps, state.evaluation_steps, state.log_sizes = 111, 222, {"events": 1, "episodes": 2}
        data = encode(state.state_dict())
        copied = State(dataclasses.replace(args, seed=2), state.task, CPU)
        copied.load(decode(data))
        assert_same(plain(copied.state_dict()), plain(state.state_dict()))
        assert copied.state_dict().keys() | set(State.UNSAVED) >= vars(state).keys()
        names = "global_step", "train_time_s", "solved_at_s", "log_sizes", "evaluations", "evaluation_steps"
        assert_same(*({name: getattr(s, name) for name in names} for s in (copied, state)))
        assert 2.5 < copied.wall_time_s < 600
        assert any(map(len, state.snapshot["actions"]))
        for _ in range(2):
            iterate(state, envs)
        with trainer(dataclasses.replace(args, num_workers=3), data) as (resumed, new_envs):
            for _ in range(2):
                iterate(resumed, new_envs)
        assert_same(plain(resumed.state_dict()), plain(state.state_dict()))
        assert not torch.equal(resumed.agent.actor[0].weight, copied.agent.actor[0].weight)


@pytest.fixture(scope="module")
def checkpoint_bytes() -> bytes:
    args = make_args(env_id=PENDULUM)
    task = ppo_vec.make_task(args)
    return encode(ppo_vec.policy_dict(State(args, task, CPU).agent, args, task))


@given(position=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_is_refused(checkpoint_bytes: bytes, position: float, bit: int) -> None:
    damaged = bytearray(checkpoint_bytes)
    damaged[int(position * len(damaged))] ^= 1 << bit
    with pytest.raises(ValueError, match=r"damaged|not a ppo_vec checkpoint"):
        decode(bytes(damaged))


def test_a_cut_or_foreign_file_is_refused(checkpoint_bytes: bytes) -> None:
    assert decode(checkpoint_bytes)["format"] == ppo_vec.FORMAT
    for data in (b"", b"x", checkpoint_bytes[:-1], checkpoint_bytes[:100], checkpoint_bytes + b"x"):
        with pytest.raises(ValueError, match="not a ppo_vec checkpoint"):
            decode(data)
    buffer = io.BytesIO()
    torch.save({"format": ppo_vec.FORMAT}, buffer)
    with pytest.raises(ValueError, match="not a ppo_vec checkpoint"):
        decode(buffer.getvalue())
    with pytest.raises(ValueError, match="format"):
        decode(encode({"format": "something else"}))


class Malicious:
    """Would run code if it were unpickled."""

    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        return exec, ("import builtins; builtins.ppo_vec_was_fooled = True",)


def test_a_checkpoint_executes_nothing() -> None:
    with pytest.raises(ValueError, match="plain tensors"):
        decode(encode({"format": ppo_vec.FORMAT, "agent": Malicious()}))
    assert not hasattr(builtins, "ppo_vec_was_fooled")


# ---- The choice of what a run delivers -------------------------------------------------------------------------------


class Contest:
    """A run's evaluations without environments: a policy is known by a number in it, and `returns` tells its results.

    `returns(policy, seed)` are of selection seeds, `tests(policy, seed)` of the published environment.
    """

    def __init__(self, folder: Path, goal: float | None = 200.0, **args: Any) -> None:
        self.args = make_args(env_id=PENDULUM, num_envs=2, num_workers=1, **args)
        self.state = State(self.args, dataclasses.replace(ppo_vec.make_task(self.args), goal=goal), CPU)
        self.envs = VecEnv(self.args, self.state.task, self.state.snapshot)  # never started
        self.folder, self.calls, self.logged = folder, [], []
        note = lambda state, row: self.logged.append(row)  # noqa: E731
        self.log = SimpleNamespace(folder=folder, evaluation=note, scalars=lambda *_: None)
        self.returns = self.tests = lambda policy, seed: float(policy)
        self.envs.play = self.play

    def play(
        self, arrays: list[np.ndarray], seeds: list[int], published: bool = False, show: bool = False
    ) -> list[tuple]:
        policy = round(float(arrays["actor.4.bias"][0]), 3)
        self.calls.append((policy, seeds, published))
        return [((self.tests if published else self.returns)(policy, seed), 7, False, 0.5) for seed in seeds]

    def become(self, policy: float, net: torch.nn.Module | None = None) -> None:
        (net or self.state.agent).actor[-1].bias.data.fill_(policy)

    def evaluate(self, policy: float, step: int) -> dict[str, Any]:
        self.become(policy)
        self.state.global_step = step
        ppo_vec.evaluate(self.envs, self.state, self.log)
        return self.state.evaluations[-1]

    def finish(self, last: float, average: float = 0.0, step: int = 10**6, averaged: int = 1) -> dict[str, Any]:
        """Returns summary.json."""
        self.become(last)
        self.become(average, self.state.average.module)
        self.state.average.n_averaged.fill_(averaged)
        self.state.global_step = step
        self.calls.clear()
        ppo_vec.deliver(self.envs, self.state, self.log)
        return json.loads((self.folder / "summary.json").read_text())

    def best(self) -> tuple[float, dict[str, Any]]:
        """What best.pt holds."""
        tree = decode((self.folder / "best.pt").read_bytes())
        return round(float(tree["agent"]["actor.4.bias"][0]), 3), tree["evaluation"]


@pytest.mark.parametrize(
    ("means", "goal", "rounds", "solved"),
    [
        ((199, 999, 999), 200.0, [5], False),
        ((900, -33.3, 999), 200.0, [5, 15, 100], True),  # it is the mean of both
        ((900, -33.4, 999), 200.0, [5, 15], False),
        ((900, 900, 199.9), 200.0, [5, 15, 100], False),  # though the mean of all is above
        ((200, 200, 200), 200.0, [5, 15, 100], True),
        ((900, 900, 900), None, [5], False),
    ],
)
def test_a_task_is_solved_only_by_a_hundred_fresh_episodes(
    tmp_path: Path, means: tuple, goal: float | None, rounds: list[int], solved: bool
) -> None:
    contest = Contest(tmp_path, goal)
    starts = SELECTION_SEEDS + np.array([5, 20])  # of the second round and the third
    contest.returns = lambda policy, seed: float(means[np.sum(seed >= starts)])
    row = contest.evaluate(0.1, 5000)
    assert [len(seeds) for _, seeds, _ in contest.calls] == rounds
    state, total = contest.state, sum(rounds)
    assert (state.solved_at_step, state.solved_at_s is not None) == (5000 if solved else None, solved)
    counted = slice(2, 3) if len(rounds) == 3 else slice(0, len(rounds))  # a hundred count alone
    assert (row["episodes"], row["global_step"]) == (sum(rounds[counted]), 5000)
    assert row["mean"] == pytest.approx(np.average(means[counted.start : len(rounds)], weights=rounds[counted]))
    assert state.selection_steps == 7 * sum(rounds[:2])  # confirmation is not among them
    assert state.evaluation_steps == 7 * total
    assert contest.logged == [row]

    contest.evaluate(0.2, 6000)
    seeds = [seed for _, seeds, _ in contest.calls for seed in seeds]
    assert seeds == list(range(SELECTION_SEEDS, SELECTION_SEEDS + len(seeds)))  # each its own
    assert not any(published for _, _, published in contest.calls)
    assert state.selection_episodes == len(seeds)
    assert state.evaluation_steps == 7 * len(seeds)
    if solved:
        assert len(seeds) == total + 5  # no need to look again
        assert state.solved_at_step == 5000


def test_when_a_run_evaluates(tmp_path: Path) -> None:
    contest = Contest(tmp_path, total_timesteps=1000)
    state = contest.state

    def due(step: int, last: int | None, spent: int) -> bool:
        state.global_step, state.selection_steps = step, spent
        state.evaluations = [] if last is None else [{"global_step": 0}, {"global_step": last}]
        return ppo_vec.should_evaluate(state, contest.args)

    assert [due(step, None, 0) for step in (49, 50, 999, 1000, 1200)] == [False, True, True, False, False]
    assert [due(step, 400, 0) for step in (449, 450)] == [False, True]  # a twentieth of the run
    assert [due(500, 400, spent) for spent in (40, 41)] == [True, False]  # 8 % of the steps


def test_the_best_evaluated_policy_is_kept(tmp_path: Path) -> None:
    """Best by mean less one standard error. The first is better than none."""
    contest = Contest(tmp_path, goal=None)
    order, seen = [0.5, 1.1, 0.3, 0.9, 0.7, 1.0, 0.2], []
    contest.returns = lambda policy, seed: policy + (4, -4, 4, -4, 0)[seed % 5] * (policy == 1.1) - 10  # it had luck
    for k, policy in enumerate(order, start=1):
        row = contest.evaluate(policy, 1000 * k)
        seen.append(policy)
        name, evaluation = contest.best()
        assert name == max(seen, key=lambda p: p - math.sqrt(64 / 5 / 5) * (p == 1.1))
        assert evaluation["mean"] == pytest.approx(name - 10, abs=1e-6)
        assert evaluation["global_step"] == 1000 * (order.index(name) + 1)
        assert contest.state.best["evaluation"] == evaluation
        summary = json.loads((tmp_path / "summary.json").read_text())
        assert (summary["eval_mean"], summary["last_eval_mean"]) == (evaluation["mean"], row["mean"])
        assert (summary["finished"], summary["evaluation_steps"]) == (False, 35 * k)


def test_a_policy_that_has_solved_the_task_is_not_replaced_by_one_with_luck(tmp_path: Path) -> None:
    """Five episodes of 300 show less than 100 of 210; and what is delivered, solves the task."""
    contest = Contest(tmp_path)
    contest.returns = lambda policy, seed: {0.1: 190, 0.5: 210, 0.9: 300}[policy]
    assert contest.evaluate(0.5, 1000)["episodes"] == 100  # those that confirmed it
    contest.evaluate(0.9, 2000)
    assert contest.best()[0] == 0.5
    contest.finish(0.1)
    assert contest.best()[0] == 0.5


@pytest.mark.parametrize("swa_share", [0.0, 0.2])
@pytest.mark.parametrize(("earlier", "winner"), [(0.1, "last"), (0.9, "earlier"), (0.4, "last")])
def test_what_a_run_delivers(tmp_path: Path, swa_share: float, earlier: float, winner: str) -> None:
    """The last weights, or with --swa-share their mean, unless the best of the periodic evaluations is better."""
    contest = Contest(tmp_path, total_timesteps=10**6, eval_episodes=7, swa_share=swa_share)
    contest.evaluate(earlier, 1000)
    contest.tests = lambda policy, seed: policy * (seed + 1)
    last, other = (0.4, 0.8) if not swa_share else (0.8, 0.4)
    summary = contest.finish(last, average=other)  # delivered is 0.4, and the other is not even looked at
    delivered, step = (0.4, 10**6) if winner == "last" else (earlier, 1000)
    choice, test = range(SELECTION_SEEDS + 5, SELECTION_SEEDS + 12), range(TEST_SEEDS, TEST_SEEDS + 7)
    expected = [(0.4, list(choice), False), (earlier, list(choice), False), (0.4, list(test), True)]
    expected += [] if winner == "last" else [(earlier, list(test), True)]  # no test is played twice
    assert contest.calls == expected
    state = contest.state
    assert (state.selection_episodes, state.selection_steps) == (12, 35)
    assert state.evaluation_steps == 35 + 7 * 7 * len(expected)
    name, evaluation = contest.best()
    assert (name, evaluation["global_step"], evaluation["episodes"]) == (delivered, step, 7)
    row = state.evaluations[-1]
    assert contest.logged[-1] is row
    assert (row["global_step"], row["mean"]) == (10**6, pytest.approx(0.4))
    assert summary["eval_mean"] == pytest.approx(delivered * 4, rel=1e-5)
    assert summary["last_eval_mean"] == pytest.approx(0.4 * 4, rel=1e-5)
    assert (summary["finished"], summary["solved_at_step"], state.finished) == (True, None, True)
    rows = rows_of(tmp_path / "evaluation.csv")
    assert [int(row["seed"]) for row in rows] == list(test)
    assert [float(row["return"]) for row in rows] == pytest.approx([delivered * k for k in range(1, 8)], rel=1e-5)
    assert {(row["length"], row["fell"]) for row in rows} == {("7", "False")}


@pytest.mark.parametrize(("earlier", "winner"), [(1.5, 1.0), (2.5, 2.5)])
def test_an_earlier_policy_must_be_better_by_a_standard_error(tmp_path: Path, earlier: float, winner: float) -> None:
    """Which is 1.13 here. On Hardcore two policies that were better by less had 27 and 18 points less in the test."""
    contest = Contest(tmp_path, goal=None, eval_episodes=10)
    contest.returns = lambda policy, seed: policy + (4, -4, 4, -4, 0)[seed % 5]
    contest.evaluate(earlier, 1000)
    contest.finish(1.0)
    assert contest.best()[0] == winner


def test_without_an_iteration_in_the_last_share_there_is_no_mean(tmp_path: Path) -> None:
    """As on --resume with fewer --total-timesteps: the mean is still of the first weights, and is not delivered."""
    contest = Contest(tmp_path, eval_episodes=7, swa_share=0.4)
    contest.finish(0.4, average=0.8, averaged=0)
    assert contest.best()[0] == 0.4


@pytest.mark.parametrize(("last", "delivered"), [(200.0, 200.0), (199.0, 900.0)])
def test_last_weights_that_solve_the_task_are_not_weighed_against_others(
    tmp_path: Path, last: float, delivered: float
) -> None:
    contest = Contest(tmp_path, eval_episodes=3)
    contest.evaluate(900.0, 1000)
    contest.finish(last)
    assert contest.best()[0] == delivered
    choice = [policy for policy, _, published in contest.calls if not published]
    assert choice == ([last] if last == delivered else [last, last, 900.0])  # a few episodes first


@pytest.mark.parametrize(("solved", "count"), [(None, 100), (1000, 20)])
def test_a_solved_run_looks_at_its_last_weights_for_twenty_episodes(
    tmp_path: Path, solved: int | None, count: int
) -> None:
    contest = Contest(tmp_path, eval_episodes=100)
    contest.state.solved_at_step = solved
    contest.finish(250.0)
    assert [(len(seeds), published) for _, seeds, published in contest.calls] == [(count, False), (100, True)]


def test_last_weights_that_fail_on_twenty_episodes_are_weighed_by_all(tmp_path: Path) -> None:
    """After a solved run, too: twenty episodes are too few to choose by."""
    contest = Contest(tmp_path, eval_episodes=100)
    contest.evaluate(250.0, 1000)
    assert contest.state.solved_at_step == 1000
    contest.finish(150.0)
    found = [(policy, len(seeds)) for policy, seeds, published in contest.calls if not published]
    assert found == [(150.0, 20), (150.0, 100), (250.0, 100)]
    assert contest.best()[0] == 250.0


@pytest.mark.parametrize(("later", "weighed"), [(240.0, False), (150.0, True)])
def test_one_failure_in_twenty_episodes_asks_for_all(tmp_path: Path, later: float, weighed: bool) -> None:
    """A walker had a mean of 323 in twenty, with two falls, and of 271 in a hundred."""
    contest = Contest(tmp_path, eval_episodes=100)
    contest.evaluate(250.0, 1000)
    first = SELECTION_SEEDS + contest.state.selection_episodes
    returns = [*[240.0] * 19, 150.0, *[later] * 80]
    contest.returns = lambda policy, seed: returns[seed - first] if policy == 240.0 and seed >= first else policy
    contest.finish(240.0)
    found = [(policy, len(seeds)) for policy, seeds, published in contest.calls if not published]
    assert found == [(240.0, 20), (240.0, 100), (250.0, 100)][: 3 if weighed else 2]
    assert contest.best()[0] == (250.0 if weighed else 240.0)


def test_a_run_too_short_for_an_evaluation_delivers_its_last_weights(tmp_path: Path) -> None:
    contest = Contest(tmp_path, eval_episodes=3)
    contest.finish(last=-5.0)
    assert [policy for policy, *_ in contest.calls] == [-5.0, -5.0]
    assert contest.best()[0] == -5.0


def test_the_winner_is_the_best_by_mean_less_one_standard_error(tmp_path: Path) -> None:
    contest = Contest(tmp_path, goal=None, eval_episodes=100)
    contest.evaluate(0.1, 1000)
    contest.returns = lambda policy, seed: 10.0 if policy == 0.2 else 10.9 + 10 * (-1) ** seed  # of 100: 10.9 - 1
    contest.finish(0.2)
    assert contest.best()[0] == 0.2
    contest = Contest(tmp_path, goal=None, eval_episodes=100)
    contest.evaluate(0.1, 1000)
    contest.returns = lambda policy, seed: 10.0 if policy == 0.2 else 11.1 + 10 * (-1) ** seed
    contest.finish(0.2)
    assert contest.best()[0] == 0.1


@pytest.mark.parametrize(
    ("last", "eval_episodes", "before", "solved"),
    [(200.5, 100, None, 10**6), (199.5, 100, None, None), (200.5, 99, None, None), (200.5, 100, 1000, 1000)],
)
def test_only_the_last_weights_may_solve_the_task_at_the_end(
    tmp_path: Path, last: float, eval_episodes: int, before: int | None, solved: int | None
) -> None:
    """By a hundred episodes or more; what had solved it first remains."""
    contest = Contest(tmp_path, eval_episodes=eval_episodes)
    contest.evaluate(0.1, 1000)
    contest.returns = lambda policy, seed: 300.0 if policy == 0.1 else policy
    contest.state.solved_at_step = before
    assert contest.finish(last)["solved_at_step"] == solved


# ---- Whole runs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("env_id", "total"), [(PENDULUM, 900), (TOY, 400)])
def test_other_environments_train_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, env_id: str, total: int
) -> None:
    """A periodic evaluation changes nothing that the training depends on; best.pt is what was tested."""
    evaluate = ppo_vec.evaluate

    def spy(envs: VecEnv, state: State, *rest: Any) -> None:
        before = decode(encode(state.state_dict()))
        evaluate(envs, state, *rest)
        after = decode(encode(state.state_dict()))
        changed = {"evaluations", "best", "selection_episodes", "selection_steps", "evaluation_steps"}
        for name in before.keys() - changed - TIMES:
            assert_same(before[name], after[name], name)

    monkeypatch.setattr(ppo_vec, "evaluate", spy)
    folder, tree = run_train(
        tmp_path, env_id=env_id, num_envs=5, num_workers=2, num_steps=64, total_timesteps=total, eval_episodes=4
    )
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["env_id"], summary["eval_episodes"], summary["finished"]) == (env_id, 4, True)
    assert total <= summary["global_step"] == tree["global_step"] < total + 5 * 64
    assert len(tree["evaluations"]) > 1
    tests = rows_of(folder / "evaluation.csv")
    assert np.mean([float(row["return"]) for row in tests]) == pytest.approx(summary["eval_mean"])
    arrays = decode((folder / "best.pt").read_bytes())["agent"]
    expected = by_hand(short_task(env_id, 200), make_args(env_id=env_id), arrays, [0, 1, 2, 3])
    found = [(float(r["return"]), int(r["length"]), r["fell"] == "True") for r in tests]
    assert found == [row[:3] for row in expected]


@pytest.mark.learning
def test_a_walker_learns_to_walk() -> None:
    """The default's recipe. Untrained policies have -17 at best; eleven seeds of eleven came past 50 by 310k steps."""
    args, mean = Options(env_id=WALKER, **ppo_vec.TUNED[WALKER]), -math.inf
    with trainer(args) as (state, envs):
        while mean < 50 and state.global_step < 400_000:
            until = max(150_000, state.global_step + 25_000)
            while state.global_step < until:
                iterate(state, envs)
            seeds = [SELECTION_SEEDS + i for i in range(8)]
            episodes = envs.play(state.agent.state_dict(), seeds)
            mean = float(np.mean([ret for ret, *_ in episodes]))
    assert mean >= 50
    assert state.smoothed_return > -70  # with noise; the first episodes have -100 and less
