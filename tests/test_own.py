"""What people bring themselves: environments that own processes, draw from anywhere, return odd things, or fail."""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import ppo_vec

FLAGS = (
    "--num-envs 4 --num-workers 2 --num-steps 20 --num-minibatches 2 --update-epochs 1 --eval-episodes 2 "
    "--actor-hidden-sizes 8 --critic-hidden-sizes 8 --total-timesteps 240"
)
# A point on a line. Each kind does one thing in its own way; all of it is also in this process.
MODULE = '''
import multiprocessing, os, random, subprocess, time
import gymnasium as gym
import numpy as np
import torch

SHARED = np.zeros(3)

class Point(gym.Env):
    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}
    observation_space = gym.spaces.Box(-10, 10, (3,))
    action_space = gym.spaces.Box(-1, 1, (2,))
    resets = 0  # of all

    def __init__(self, kind="", folder="", render_mode=None):
        self.kind, self.folder, self.render_mode = kind, folder, render_mode
        if kind == "empty":
            self.observation_space = gym.spaces.Box(-10, 10, (3, 0))
        if "unbounded" in kind:
            self.action_space = gym.spaces.Box(-np.inf, np.inf, (2,))
        if "owns" in kind:
            self.child = subprocess.Popen(["sleep", "86399"])
            open(f"{folder}/{self.child.pid}", "w").close()
        if "keeps a fork" in kind:  # ended by SIGTERM
            self.child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(86399,))
            self.child.start()
            open(f"{folder}/{self.child.pid}", "w").close()
        elif "forks" in kind:
            self.fork = multiprocessing.Process(target=time.sleep, args=(0.01,))
            self.fork.start()
            self.fork.join()
        if kind == "leaves a child":
            multiprocessing.get_context("fork").Process(target=time.sleep, args=(20,), daemon=True).start()
        if kind == "late":
            time.sleep(60)
        if kind == "exits":
            os._exit(3)
        if "moves" in kind:
            os.chdir("/")

    def close(self):
        if "owns" in self.kind:
            self.child.terminate()
            self.child.wait()
            os.rename(f"{self.folder}/{self.child.pid}", f"{self.folder}/{self.child.pid}.closed")
        if "keeps a fork" in self.kind:
            self.child.terminate()
            self.child.join()
            os.rename(f"{self.folder}/{self.child.pid}", f"{self.folder}/{self.child.pid}.closed")
        if "no close" in self.kind:
            raise RuntimeError("it cannot be closed")

    def reset(self, *, seed=None, options=None):
        if self.kind != "forgets":
            super().reset(seed=seed)
        self.x, self.t = np.zeros(3), 0
        if self.kind in ("forgets", "shared", "plain"):
            self.x = self.np_random.uniform(-1, 1, 3)
        Point.resets += 1
        if self.kind == "draws":
            torch_number, space_number = float(torch.rand(())), self.action_space.sample()[0]
            self.x = np.array([np.random.uniform(), random.random(), torch_number + space_number])
        if self.kind == "no info":
            return self.x
        if self.kind == "blind at once" and os.path.exists(f"{self.folder}/now"):
            return self.x * np.nan, {}
        if self.kind == "far":
            return 1.7e9 + self.x, {}
        if self.kind == "short obs":
            return self.x[:2], {}
        if self.kind == "text":
            return "far", {}
        if self.kind == "nan":
            return self.x * np.nan, {}
        if self.kind == "flat":
            return self.x.reshape(1, 3), {}
        return (self.x.tolist() if self.kind == "list" else self.x), {}

    def step(self, action):
        self.t += 1
        time.sleep(0.05 * ("slow" in self.kind.split()))
        self.x = self.x + 0.1 * action.sum()
        reward, done, x = -float(abs(self.x[0])), self.t >= 15, np.clip(self.x, -10, 10)
        if self.kind == "far":
            x = 1.7e9 + x
        if self.kind == "harder":
            reward -= Point.resets
        if self.kind == "shared":
            SHARED[...] = x
            return SHARED, reward, False, done, {}
        if self.kind == "leaves a child" and self.t == 7:
            os._exit(3)
        if "ends" in self.kind and done:
            return x * (np.nan if "nan" in self.kind else 1), reward, True, False, {}
        if self.kind == "blind" and os.path.exists(f"{self.folder}/now"):
            return x * (np.nan if self.t > 4 else 1), reward, False, done, {}
        if "fails" in self.kind and self.t == 7:
            raise ArithmeticError("the string is broken" + "\\n    in\\n  two" * ("fails twice" in self.kind))
        if self.kind == "four":
            return x, reward, done, {}
        if self.kind == "no reward":
            return x, None, False, done, {}
        if self.kind == "too large":
            return x, 1e39 if self.t > 4 else reward, False, done, {}
        if self.kind == "two rewards":
            return x, [1.0, 2.0], False, done, {}
        if self.kind == "flat":
            return x.reshape(1, 3), np.array([reward]), np.array([False]), np.array(done), {}
        if self.kind == "mixed":
            return x, np.array([reward]) if x[0] > 0 else reward, False, done, {}
        if self.kind == "endless":
            return x, reward, False, False, {}
        if self.kind == "seven":
            return x, 0.7 if done else 0.0, done, False, {}
        if self.kind == "later short" and self.t > 4:
            return x[:1], reward, False, done, {}
        return (x.tolist() if self.kind == "list" else x), reward, False, done, {}

    def render(self):
        if self.kind == "no display":
            raise RuntimeError("GLFW is not initialized")
        picture = np.full((16, 24, 3), 0.5)
        return {
            "rgb": (255 * picture).astype(np.uint8), "rgba": np.full((16, 24, 4), 127, np.uint8), "float": picture,
            "gray": np.full((16, 24), 127, np.uint8), "gray1": np.full((16, 24, 1), 127, np.uint8),
            "list": [np.zeros((16, 24, 3), np.uint8), np.full((16, 24, 3), 127, np.uint8)],
            "bool": np.ones((16, 24), bool), "none": None, "line": np.zeros(7),
        }[self.kind.split()[0]]

gym.register("Point-v0", entry_point=Point)
gym.register("Goal-v0", entry_point=Point, reward_threshold=np.float64(9))
gym.register("NaNGoal-v0", entry_point=Point, reward_threshold=float("nan"))
'''  # fmt: skip


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "own_point.py").write_text(MODULE)
    (tmp_path / "owned").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(Path(ppo_vec.__file__).parent)]))
    yield
    sys.modules.pop("own_point", None)


def flags(folder: Path, kind: str, more: str = "") -> list[str]:
    kwargs = f'{{"kind":"{kind}","folder":"{folder / "owned"}"}}'
    where = f"--runs-dir {folder / 'runs'} --run-name run {more}"
    return ["--env-id", "own_point:Point-v0", "--env-kwargs", kwargs, *f"{FLAGS} {where}".split()]


def tree(folder: Path) -> dict[str, Any]:
    return ppo_vec.read_checkpoint(folder / "runs" / "run" / "checkpoint.pt")[1]


# ---- Environments that own something outside Python ------------------------------------------------------------------


def check_closed(folder: Path, least: int) -> None:
    """Every environment that was made has been closed, within seconds, and its process has gone."""
    end = time.monotonic() + 10
    while any(path.suffix == "" for path in (folder / "owned").iterdir()) and time.monotonic() < end:
        time.sleep(0.1)
    names = [path.name for path in (folder / "owned").iterdir()]
    alive = [name for name in names if Path(f"/proc/{name.split('.')[0]}").exists()]
    for name in alive:
        with contextlib.suppress(OSError):
            os.kill(int(name.split(".")[0]), signal.SIGKILL)
    assert not alive
    assert [name for name in names if not name.endswith(".closed")] == []
    assert len(names) >= least


def test_environments_are_closed_at_a_normal_end(tmp_path: Path) -> None:
    assert ppo_vec.main(flags(tmp_path, "owns forks")) == 0
    check_closed(tmp_path, 1 + 4 + 2)  # trial, training, evaluation
    where = "--evaluate", str(tmp_path / "runs" / "run"), "--runs-dir", str(tmp_path / "runs")
    assert ppo_vec.main([*where, "--env-id", "own_point:Point-v0"]) == 0
    check_closed(tmp_path, 1 + 4 + 2 + 1 + 2)


def test_an_environment_that_keeps_a_fork(tmp_path: Path) -> None:
    """The fork ends by terminate(), which the worker itself would not."""
    assert ppo_vec.main(flags(tmp_path, "keeps a fork", "--worker-timeout 20")) == 0
    check_closed(tmp_path, 1 + 4 + 2)


def test_an_environment_that_cannot_be_closed(tmp_path: Path) -> None:
    """What it is closed after has happened by then."""
    assert ppo_vec.main(flags(tmp_path, "rgb no close", "--capture-video")) == 0
    assert tree(tmp_path)["finished"]
    assert list((tmp_path / "runs" / "run" / "videos").iterdir())


def test_an_environment_that_is_refused_is_closed(tmp_path: Path) -> None:
    assert ppo_vec.main(flags(tmp_path, "owns unbounded")) == 2
    check_closed(tmp_path, 1)


def test_environments_are_closed_when_one_fails(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    """In training, where new workers try it again, and in its evaluation."""
    assert ppo_vec.main(flags(tmp_path, "owns fails")) == 1
    err = capfd.readouterr().err
    assert err.count("Traceback") == 1
    assert err.splitlines()[-1].endswith(
        "gave up after 2 attempts without progress: worker 0 failed: ArithmeticError: the string is broken"
    )
    check_closed(tmp_path, 1 + 2 * 4)


def test_an_error_of_three_lines(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    assert ppo_vec.main(flags(tmp_path, "owns fails twice")) == 1
    assert capfd.readouterr().err.splitlines()[-1].endswith(": ArithmeticError: the string is broken in two")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_the_environment_is_tried(tmp_path: Path, number: signal.Signals) -> None:
    """A constructor that takes a minute: its process does not outlive the trainer's, which does not wait for it."""
    command = [sys.executable, ppo_vec.__file__, *flags(tmp_path, "late")]

    def living() -> list[str]:
        found = (path.read_text().rsplit(")", 1)[1].split() for path in Path("/proc").glob("[0-9]*/stat"))
        return [fields[0] for fields in found if int(fields[3]) == process.pid and fields[0] not in "ZX"]

    with subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True) as process:
        end = time.monotonic() + 30
        while len(living()) < 2:
            assert time.monotonic() < end
            time.sleep(0.05)
        time.sleep(1)  # it has its watch
        process.send_signal(number)
        assert process.wait(timeout=3) == (130 if number == signal.SIGINT else -15)
    end = time.monotonic() + 10
    while living():
        assert time.monotonic() < end, "a process lived on"
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGKILL])
def test_environments_are_closed_when_the_run_is_stopped(tmp_path: Path, number: signal.Signals) -> None:
    """In the middle of a rollout of two seconds."""
    command = [sys.executable, ppo_vec.__file__, *flags(tmp_path, "owns slow", "--total-timesteps 1000000")]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True) as process:
        end = time.monotonic() + 60
        while len(list((tmp_path / "owned").iterdir())) < 5:
            assert time.monotonic() < end
            time.sleep(0.05)
        if number == signal.SIGKILL:
            process.send_signal(number)
        else:
            os.killpg(process.pid, number)  # as a terminal does: to the workers, and to what they have started
        assert process.wait(timeout=60) == (-9 if number == signal.SIGKILL else 128 + number)
    check_closed(tmp_path, 1 + 4)


def test_environments_are_closed_when_a_worker_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but those of the worker that was killed, whose processes nobody can close."""
    rollout, calls = ppo_vec.VecEnv.rollout, []

    def killing(self: ppo_vec.VecEnv, *args: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            os.kill(self.processes[1].pid, signal.SIGKILL)
        return rollout(self, *args)

    monkeypatch.setattr(ppo_vec.VecEnv, "rollout", killing)
    assert ppo_vec.main(flags(tmp_path, "owns")) == 0
    open_ones = [path for path in (tmp_path / "owned").iterdir() if path.suffix == ""]
    assert len(open_ones) == 2
    for path in open_ones:
        os.kill(int(path.name), signal.SIGKILL)
        path.unlink()
    check_closed(tmp_path, 1 + 4 + 2)


def test_a_worker_that_ends_and_leaves_a_child(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    """The child holds the worker's pipe open; the worker is missed all the same, and at once."""
    began = time.monotonic()
    assert ppo_vec.main(flags(tmp_path, "leaves a child", "--worker-timeout 60")) == 1
    assert time.monotonic() - began < 30
    assert "ended with exit code 3" in capfd.readouterr().err.splitlines()[-1]


# ---- Numbers from anywhere -------------------------------------------------------------------------------------------


def test_all_that_an_environment_draws_at_a_reset_follows_the_seed(tmp_path: Path) -> None:
    """NumPy's, Python's and torch's global generators, and the spaces': not the workers, nor the run."""
    results = []
    for i, workers in enumerate((1, 2, 2)):
        folder = tmp_path / str(i)
        (folder / "owned").mkdir(parents=True)
        assert ppo_vec.main(flags(folder, "draws", f"--num-workers {workers}")) == 0
        results.append(tree(folder)["agent"])
    for other in results[1:]:
        assert all(torch.equal(other[name], tensor) for name, tensor in results[0].items())
    env = ppo_vec.make_env(ppo_vec.Options(env_id="own_point:Point-v0", env_kwargs='{"kind":"draws"}'))
    starts = [ppo_vec.reset_env(env, seed) for seed in (1, 2, 1)]
    assert np.array_equal(starts[0], starts[2])
    assert not np.isclose(starts[0], starts[1]).any()


def test_an_environment_that_forgets_the_seed(tmp_path: Path) -> None:
    """Its reset() does not call super().reset(seed=seed): it is seeded all the same, as the one that does."""
    starts = []
    for kind in ("forgets", "plain"):
        env = ppo_vec.make_env(ppo_vec.Options(env_id="own_point:Point-v0", env_kwargs=f'{{"kind":"{kind}"}}'))
        starts += [ppo_vec.reset_env(env, seed) for seed in (1, 2, 1)]
    assert np.array_equal(starts[:3], starts[3:])
    assert np.array_equal(starts[0], starts[2])
    assert not np.isclose(starts[0], starts[1]).any()


def test_a_wrapper_that_remembers(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    """NormalizeObservation: an evaluation's environments would have statistics of their own."""
    assert ppo_vec.main(flags(tmp_path, "plain", "--wrappers gymnasium.wrappers:NormalizeObservation")) == 0
    err = capfd.readouterr().err
    assert "warning: a second reset(seed=0) gives another observation" in err
    (tmp_path / "2" / "owned").mkdir(parents=True)
    assert ppo_vec.main(flags(tmp_path / "2", "plain", "--wrappers gymnasium.wrappers:RecordEpisodeStatistics")) == 0
    assert "warning" not in capfd.readouterr().err


# ---- What reset and step return --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["flat", "list", "mixed"])
def test_harmless_returns_are_taken(tmp_path: Path, kind: str) -> None:
    """A flat image of shape (1, 3), rewards and flags of shape (1,), lists: with the result of the plain ones."""
    results = []
    for i, (each, workers) in enumerate(((kind, 1), (kind, 2), ("", 2))):
        folder = tmp_path / str(i)
        (folder / "owned").mkdir(parents=True)
        assert ppo_vec.main(flags(folder, each, f"--num-workers {workers}")) == 0
        results.append(tree(folder)["agent"])
    for other in results[1:]:
        assert all(torch.equal(other[name], tensor) for name, tensor in results[0].items())


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("no info", "reset() returned ndarray, not (observation, info)"),
        ("short obs", "the observation of reset() has the shape (2,), not (3,)"),
        ("text", "the observation of reset() cannot be numbers"),
        ("nan", "the observation of reset() is not finite"),
        ("four", "step() returned tuple of 4, not (observation, reward, terminated, truncated, info)"),
        ("no reward", "the reward of step()"),
        ("two rewards", "the reward of step() has the shape (2,), not ()"),
        ("exits", "worker 0 ended with exit code 3"),
        ("empty", "its observations or actions have no numbers"),
    ],
)
def test_harmful_returns_are_named_before_anything_starts(
    tmp_path: Path, kind: str, words: str, capfd: pytest.CaptureFixture
) -> None:
    assert ppo_vec.main(flags(tmp_path, kind)) == 2
    err = capfd.readouterr().err
    assert words in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


def test_environments_that_return_the_same_array() -> None:
    """Each row is that of its environment, and stays so after the next step."""
    options = ppo_vec.Options(env_id="own_point:Point-v0", env_kwargs='{"kind":"shared"}')
    envs = [ppo_vec.make_env(options) for _ in range(3)]
    starts = np.array([ppo_vec.reset_env(env, seed) for seed, env in enumerate(envs)])
    actions = np.array([[0.5, 0.5], [-1.0, 0.0], [0.0, 0.25]], np.float32)
    rows, *_ = ppo_vec.step_envs(envs, actions)
    ppo_vec.step_envs(envs, actions)
    np.testing.assert_allclose(rows - starts, np.repeat([[0.1], [-0.1], [0.025]], 3, axis=1), atol=1e-6)


def test_a_last_observation_that_is_not_finite(tmp_path: Path) -> None:
    """Where an episode is terminated, nobody needs it: the weights are the same as where it is finite."""
    weights = []
    for name in ("nan", "finite"):
        (tmp_path / name / "owned").mkdir(parents=True)
        assert ppo_vec.main(flags(tmp_path / name, f"ends {name}")) == 0
        weights.append(tree(tmp_path / name)["agent"])
    assert all(torch.equal(weights[0][name], tensor) for name, tensor in weights[1].items())


@pytest.mark.parametrize("kind", ["blind", "blind at once"])
def test_an_observation_that_is_not_finite_in_an_evaluation(tmp_path: Path, kind: str) -> None:
    """In a step, or at the reset."""
    options = ppo_vec.Options(
        env_id="own_point:Point-v0", num_envs=1, num_steps=1,
        env_kwargs=f'{{"kind":"{kind}","folder":"{tmp_path / "owned"}"}}',
    )  # fmt: skip
    task = ppo_vec.make_task(options)
    state = ppo_vec.State(options, task, torch.device("cpu"))
    (tmp_path / "owned" / "now").touch()
    raises = pytest.raises(ppo_vec.TrainingError, match="an observation in an evaluation is not finite")
    with contextlib.closing(ppo_vec.VecEnv(options, task, state.snapshot)) as envs, raises:
        envs.play(state.agent.state_dict(), [0])


class OwnGenerator(ppo_vec.gym.Env):
    """Of a simulator, which cannot be replaced."""

    observation_space, action_space = ppo_vec.gym.spaces.Box(-1, 1, (1,)), ppo_vec.gym.spaces.Box(-1, 1, (1,))

    @property
    def np_random(self) -> np.random.Generator:
        return self.simulator.random

    def reset(self, seed: int | None = None, options: dict | None = None) -> Any:
        self.simulator = SimpleNamespace(random=np.random.default_rng(seed))
        return self.np_random.uniform(-1, 1, 1), {}


def test_a_generator_that_cannot_be_replaced() -> None:
    env = OwnGenerator()
    starts = [ppo_vec.reset_env(env, seed) for seed in (1, 2, 1)]
    assert starts[0] == starts[2] != starts[1]


def test_a_goal_that_is_a_numpy_number() -> None:
    """It becomes a plain one: checkpoints hold what the policy has shown, a share of the goal, and take no other."""
    task = ppo_vec.make_task(ppo_vec.Options(env_id="own_point:Goal-v0"))
    assert (task.goal, type(task.goal)) == (9.0, float)
    with pytest.raises(ppo_vec.UserError, match="its reward_threshold is nan"):
        ppo_vec.make_task(ppo_vec.Options(env_id="own_point:NaNGoal-v0"))


def test_an_error_of_the_environment_says_where_it_was_raised() -> None:
    options = ppo_vec.Options(env_id="own_point:Point-v0", env_kwargs='{"kind":"four"}')
    env = ppo_vec.gym.wrappers.TimeLimit(ppo_vec.make_env(options), 9)  # its own step() takes five values
    with pytest.raises(ValueError, match=r"^step\(\): not enough values to unpack"):
        ppo_vec.take_steps(env)


def test_an_environment_that_takes_too_long_to_make(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(ppo_vec, "START_TIMEOUT", 1.0)
    began = time.monotonic()
    assert ppo_vec.main(flags(tmp_path, "late", "--worker-timeout 0.5")) == 2
    assert time.monotonic() - began < 4
    assert "worker 0 took no step for 1 s (--worker-timeout)" in capfd.readouterr().err


def test_a_module_that_is_not_found_names_pythonpath(capfd: pytest.CaptureFixture) -> None:
    assert ppo_vec.main(["--env-id", "no_such_module:Env-v0"]) == 2
    assert "is its folder in PYTHONPATH?" in capfd.readouterr().err


def test_episodes_that_an_evaluation_cuts_off_are_counted(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    assert ppo_vec.main(flags(tmp_path, "endless", "--eval-max-steps 30")) == 0
    assert "warning: 2 of 2 episodes were cut off after 30 steps (--eval-max-steps)" in capfd.readouterr().err
    rows = (tmp_path / "runs" / "run" / "evaluation.csv").read_text().splitlines()[1:]
    assert [row.split(",")[2] for row in rows] == ["30", "30"]


# ---- Frames ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["rgb", "rgba", "float", "gray", "gray1", "list", "bool"])
def test_frames_of_any_kind(tmp_path: Path, kind: str) -> None:
    """All of these are a gray picture of 127, but the last: that is white."""
    env = ppo_vec.make_env(
        ppo_vec.Options(env_id="own_point:Point-v0", env_kwargs=f'{{"kind":"{kind}"}}'), True, "rgb_array"
    )
    env.reset(seed=0)
    frame = ppo_vec.render_frame(env)
    assert (frame.shape, frame.dtype) == ((16, 24, 3), np.uint8)
    assert set(frame.ravel().tolist()) == {255 if kind == "bool" else 127}


@pytest.mark.parametrize("kind", ["none", "line"])
def test_no_picture_is_said_before_the_training(tmp_path: Path, kind: str, capfd: pytest.CaptureFixture) -> None:
    assert ppo_vec.main(flags(tmp_path, kind, "--capture-video")) == 2
    assert "render() gives no picture" in capfd.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_missing_display_names_mujoco_gl(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.delenv("DISPLAY", raising=False)
    assert ppo_vec.main(flags(tmp_path, "no display", "--capture-video")) == 2
    hint = "it cannot be rendered (there is no display; MUJOCO_GL=egl may help): GLFW is not initialized"
    assert hint in capfd.readouterr().err
    assert not (tmp_path / "runs").exists()


# ---- Where it runs ---------------------------------------------------------------------------------------------------


def test_workers_that_cannot_start_are_one_clear_line(tmp_path: Path) -> None:
    """Too few files may be open for so many workers."""
    command = [sys.executable, ppo_vec.__file__, *flags(tmp_path, "", "--num-envs 40 --num-workers 40")]
    limit = lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))  # noqa: E731
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, preexec_fn=limit)
    assert done.returncode == 1, done.stderr
    assert (
        "error: cannot start the workers; fewer --num-workers, or a higher ulimit, may help: Too many open files"
        in done.stderr
    )
    assert "Traceback" not in done.stderr
    time.sleep(0.5)
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            assert str(tmp_path).encode() not in path.read_bytes(), "a worker lived on"


def test_a_file_system_that_cannot_sync_is_no_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As some shared ones, for which it is an invalid argument. Any other error is one."""

    def fail(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    number = errno.EINVAL
    assert ppo_vec.main(flags(tmp_path, "")) == 0
    assert tree(tmp_path)["finished"]
    number = errno.ENOSPC
    assert ppo_vec.main(flags(tmp_path, "", "--run-name other")) == 1


def test_without_a_stderr(tmp_path: Path) -> None:
    command = [sys.executable, ppo_vec.__file__, *flags(tmp_path, "")]
    assert subprocess.run(["sh", "-c", 'exec "$@" 2>&-', "sh", *command], timeout=100).returncode == 0
    assert tree(tmp_path)["finished"]


def test_a_script_that_is_a_link_in_another_folder(tmp_path: Path) -> None:
    link = tmp_path / "train.py"
    link.symlink_to(ppo_vec.__file__)
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, str(link), *flags(tmp_path, "")], capture_output=True, timeout=100, env=env)
    assert done.returncode == 0, done.stderr


def test_an_environment_that_changes_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it is filmed, in the trainer's own process; the run folder is given relative to the first one."""
    monkeypatch.chdir(tmp_path)
    where = [
        word if word != str(tmp_path / "runs") else "runs" for word in flags(tmp_path, "rgb moves", "--capture-video")
    ]
    assert ppo_vec.main(where) == 0
    assert Path.cwd() != tmp_path
    assert len(list((tmp_path / "runs" / "run" / "videos").iterdir())) == 1
    assert tree(tmp_path)["finished"]


def test_an_environment_gets_a_goal_while_its_run_is_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    assert ppo_vec.main(flags(tmp_path, "")) == 0
    import gymnasium as gym
    import own_point  # noqa: F401

    monkeypatch.setattr(gym.registry["Point-v0"], "reward_threshold", -1.0)
    more = ["--env-id", "own_point:Point-v0", "--total-timesteps", "480"]  # the id: a checkpoint may not name code
    assert ppo_vec.main(["--resume", str(tmp_path / "runs" / "run"), *more]) == 0
    assert "% solved" in capfd.readouterr().err


def test_an_environment_whose_state_outlives_its_episodes(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    """On resume it begins at its easiest again: the same observations, other rewards."""
    assert ppo_vec.main(flags(tmp_path, "harder", "--total-timesteps 160")) == 0  # in the middle of episodes
    more = ["--env-id", "own_point:Point-v0", "--total-timesteps", "480"]
    assert ppo_vec.main(["--resume", str(tmp_path / "runs" / "run"), *more]) == 0
    assert "environments cannot be replayed; their episodes start anew" in capfd.readouterr().err


def test_an_environment_of_the_users_own_script_reaches_spawned_workers(tmp_path: Path) -> None:
    script = tmp_path / "mine.py"
    where = f"{FLAGS} --env-id Mine-v0 --runs-dir {tmp_path / 'runs'} --run-name run --start-method spawn"
    script.write_text(f"""
import gymnasium as gym, sys, ppo_vec
from own_point import Point
print("this is", __name__)
gym.register("Mine-v0", entry_point=Point)
if __name__ == "__main__":
    sys.exit(ppo_vec.main({where.split()}))
""")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("this is __mp_main__") == 3  # two workers, and the one that tries the environment
    spawned = tree(tmp_path)
    assert ppo_vec.main(flags(tmp_path, "", "--run-name forked")) == 0
    forked = ppo_vec.read_checkpoint(tmp_path / "runs" / "forked")[1]
    assert all(torch.equal(forked["agent"][name], tensor) for name, tensor in spawned["agent"].items())
    assert torch.equal(forked["snapshot"]["obs"], spawned["snapshot"]["obs"])


def test_a_policy_can_be_pickled(tmp_path: Path) -> None:
    """For Pool.map, whatever its activation."""
    assert ppo_vec.main(flags(tmp_path, "", "--activation relu")) == 0
    policy = ppo_vec.load_policy(tmp_path / "runs" / "run")
    obs = np.ones((5, 3))
    assert np.array_equal(pickle.loads(pickle.dumps(policy))(obs), policy(obs))


def test_an_offset_of_the_observations_costs_no_digits(tmp_path: Path) -> None:
    """Times in seconds since 1970, for example. In float32 they would be 128 apart."""
    assert ppo_vec.main(flags(tmp_path, "far")) == 0
    normalizer = {k: v for k, v in tree(tmp_path)["agent"].items() if k.startswith("normalizer.")}
    assert (normalizer["normalizer.mean"] - 1.7e9).abs().max() < 10
    assert (normalizer["normalizer.var"] > 1e-4).all()
    assert (normalizer["normalizer.var"] < 10).all()
    policy = ppo_vec.load_policy(tmp_path / "runs" / "run")
    here = normalizer["normalizer.mean"].numpy()
    assert np.abs(policy(here + 0.1) - policy(here)).max() > 1e-4


# ---- Numbers ---------------------------------------------------------------------------------------------------------


def test_returns_are_sums_of_what_the_environment_gave(tmp_path: Path) -> None:
    """0.7 in float32 is less: a task with that goal would never count as solved."""
    assert ppo_vec.main(flags(tmp_path, "seven")) == 0
    means = [evaluation["mean"] for evaluation in tree(tmp_path)["evaluations"]]
    assert means
    assert set(means) == {0.7}
    rows = (tmp_path / "runs" / "run" / "episodes.csv").read_text().splitlines()[1:]
    assert {row.split(",")[2] for row in rows} == {"0.7"}


def test_an_observation_that_becomes_shorter_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ppo_vec.main(flags(tmp_path, "later short")) == 1
    assert "an observation has shape (1,); its space has (3,)" in capsys.readouterr().err.splitlines()[-1]


def test_a_reward_beyond_float32_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It would make the statistics of the returns NaN, for good."""
    assert ppo_vec.main(flags(tmp_path, "too large")) == 1
    assert "error: rewards of environment 0 at step 4 of the rollout is 1e+39\n" in capsys.readouterr().err


def test_a_film_has_the_whole_episode(tmp_path: Path) -> None:
    """--eval-max-steps is for environments without a limit of their own."""
    import imageio

    args = ppo_vec.Options(env_id="Pendulum-v1", eval_max_steps=20)
    policy = ppo_vec.Policy(ppo_vec.Agent(3, 1, args).state_dict(), "tanh", np.float32([-2]), np.float32([2]))
    path, _ = ppo_vec.record_video(args, policy, tmp_path)
    assert len(imageio.mimread(path)) == 201


def test_actions_that_are_whole_numbers_are_rounded() -> None:
    seen: list[int] = []

    class Whole(ppo_vec.gym.Env):
        observation_space = ppo_vec.gym.spaces.Box(-1, 1, (1,))
        action_space = ppo_vec.gym.spaces.Box(-2, 2, (1,), np.int64)

        def step(self, action: np.ndarray) -> Any:
            assert action.dtype == np.int64
            seen.append(int(action[0]))
            return np.zeros(1), 0.0, False, False, {}

    class Switch(ppo_vec.gym.Env):
        observation_space = ppo_vec.gym.spaces.Box(-1, 1, (1,))
        action_space = ppo_vec.gym.spaces.Box(0, 1, (1,), np.bool_)

        def step(self, action: np.ndarray) -> Any:
            return np.zeros(1), float(action[0]), False, False, {}

    assert ppo_vec.step_envs([Switch()] * 4, np.float32([[0.0], [0.4], [0.6], [1.0]]))[1].tolist() == [0, 0, 1, 1]
    actions = np.linspace(-2.4999, 2.4999, 1000, dtype=np.float32)[:, None]
    ppo_vec.step_envs([Whole()] * 1000, actions)
    assert [seen.count(number) for number in range(-2, 3)] == [200] * 5
