"""The command line: bad input, the files of a run, and the modes --evaluate, --resume and load_policy."""

from __future__ import annotations

import copy
import csv
import dataclasses
import glob
import hashlib
import io
import json
import logging
import math
import multiprocessing.process
import os
import pickle
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import filelock
import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.envs.classic_control.pendulum import PendulumEnv

import ppo_vec

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))

import faults
from faults import Trainer, fingerprint, start, tiny, tiny_id

Capture, Patch = pytest.CaptureFixture[str], pytest.MonkeyPatch
VIDEO = "imageio", "imageio_ffmpeg"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a short, finished run of BipedalWalker-v3, made by the command as a user types it."""
    run = tmp_path_factory.mktemp("runs") / "walker"
    start(run).finish().check()
    return run


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of a tiny environment: 120 steps."""
    run = tmp_path_factory.mktemp("runs") / "tiny"
    with faults.quiet(), faults.replaced_attribute(ppo_vec, "plot_learning_curve", lambda *_: None):
        assert train(run) == 0
    return run


@pytest.fixture(autouse=True)
def elsewhere(tmp_path_factory: pytest.TempPathFactory, monkeypatch: Patch) -> None:
    """An evaluation writes below the working directory."""
    monkeypatch.chdir(tmp_path_factory.mktemp("working directory"))


def train(run: Path, *args: str) -> int:
    return ppo_vec.main([*(args or tiny()), "--runs-dir", str(run.parent), "--run-name", run.name])


def main(*argv: str | Path) -> int:
    """main() where an exit of tyro's counts as its exit code."""
    try:
        return ppo_vec.main([str(word) for word in argv])
    except SystemExit as error:
        return int(error.code or 0)


def digests(folder: Path) -> dict[str, tuple[str, float]]:
    """The content and time of modification of every file."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(f): (hashlib.sha256(f.read_bytes()).hexdigest(), f.stat().st_mtime) for f in files}


def read(path: Path) -> dict[str, Any]:
    return ppo_vec.decode(path.read_bytes())


def changed(tree: dict[str, Any], value: Any, *path: str) -> bytes:
    """The bytes of a checkpoint with another value at `path` (without that key, if the value is `...`)."""
    tree = parent = dict(tree)
    for key in path[:-1]:
        parent[key] = parent = dict(parent[key])
    parent[path[-1]] = value
    if value is ...:
        del parent[path[-1]]
    return ppo_vec.encode(tree)


def sign(body: bytes) -> bytes:
    """With a valid digest, as anyone can make it who has read ppo_vec.py."""
    return body + ppo_vec.MAGIC + hashlib.sha256(body).digest()


def saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def assert_one_line(code: int, captured: Any, *words: str, expected: int = 2) -> None:
    assert code == expected, captured
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("ppo_vec.py: error: ")
    for word in words:
        assert word in lines[0], f"{word!r} is not in {lines[0]!r}"


def fail_with(error: Exception) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    return fail


# ---- Bad input -------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_process(monkeypatch: Patch, tmp_path: Path) -> Iterator[None]:
    """Fails the test if more than make_task's worker is started; runs it in an empty folder, which must stay empty."""
    fail, start = fail_with(AssertionError("a process was started")), multiprocessing.process.BaseProcess.start
    trials: list[bool] = []

    def start_trial(process: Any) -> None:
        trials.append(True)
        assert len(trials) == 1
        start(process)

    monkeypatch.setattr(ppo_vec.State, "__init__", fail)  # what a training makes first
    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", start_trial)
    monkeypatch.setattr(subprocess.Popen, "__init__", fail)
    folder = tmp_path / "empty"
    folder.mkdir()
    monkeypatch.chdir(folder)
    yield
    assert len(trials) <= 1, "more processes were started"
    assert not list(folder.glob("**/*")) or not list((folder / "runs").iterdir()), "bad input has left files"


REFUSED = [  # (arguments, words of the message; RUN is the folder of a finished run)
    *(
        (f"--{flag} {value}", f"--{flag}")
        for flags, values in (
            ("num-envs num-workers num-steps num-minibatches update-epochs total-timesteps eval-episodes", "0 -1"),
            ("learning-rate critic-learning-rate clip-coef max-grad-norm target-kl initial-std", "0 -1 nan inf"),
            ("gamma gae-lambda value-lambda", "-0.1 1.1 nan"),
            ("ent-coef bounds-loss-coef action-cost min-std", "-1 nan inf"),
            ("worker-timeout", "0 -1 nan inf"),
            ("swa-share", "-0.1 1 nan"), ("anneal-share", "0 1.1 nan"),
            ("actor-hidden-sizes critic-hidden-sizes", "0 -1"),
            ("run-name", "a/b .. . /absolute"),
            ("env-kwargs", "[1] 3 { " + "[" * 99999),
            ("wrappers", "module module: :f module:f:g a/b:f a:b-c"),
        )
        for flag in flags.split()
        for value in values.split()
    ),
    ("--seed -1", "--seed"), ("--fall-reward 1", "--fall-reward"),
    ("--resume=", "no checkpoint"), ("--evaluate=", "no checkpoint"),
    ("--num-steps 1e9", "more than this machine's memory"),
    ("--num-steps 100 --num-minibatches 7", "--num-minibatches must divide"),
    ("--num-envs 3 --num-workers 2 --num-steps 64 --num-minibatches 5", "--num-minibatches must divide"),
    ("--num-envs 1 --num-steps 1 --num-minibatches 1", "no advantages to normalise"),
    ("--num-envs 2 --num-steps 4 --num-minibatches 8 --norm-adv minibatch", "one step in each: no advantages"),
    ("--num-envs 2 --num-workers 1 --num-steps 8 --num-minibatches 32", "--num-minibatches must divide"),
    ("--actor-hidden-sizes 64 0", "--actor-hidden-sizes"),
    ("--fall-reward -1 --final-fall-reward 0", "--final-fall-reward"), ("--run-name " + "a" * 300, "cannot write"),
    ("--env-id Pendulum-v1 --final-fall-reward -1", "--final-fall-reward needs"),
    ("--initial-std 0.2 --min-std 0.3", "--min-std"), ("--min-std 0.1 --state-dependent-std", "--min-std"),
    ("--env-id BipedalWalkerHardcore-v3 --initial-std 0.2", "--min-std must not be more than --initial-std"),
    ("--initial-std 1e300", "--initial-std must lie in"),
    # Environments
    ("--env-id Nope-v0", "Nope"), ("--env-id BipedalWalker-v2", "BipedalWalker-v3"), ("--env-id=", "--env-id"),
    ("--env-id no_such_module:Nope-v0", "no_such_module"), ("--env-id CartPole-v1 --min-std 0.1", "are discrete"),
    ("--env-id FrozenLake-v1", "Discrete observations"), ("--env-id Blackjack-v1", "Tuple observations"),
    ("--env-id CartPole-v1 --state-dependent-std", "are discrete"),
    ("--env-id CartPole-v1 --action-cost 0.1", "--action-cost are for Box actions"),
    (f"--env-id {tiny_id('discrete')}", "Discrete observations"), (f"--env-id {tiny_id('unbounded')}", "finite bounds"),
    ('--env-id Pendulum-v1 --env-kwargs {"wind":1}', "wind"), ('--env-kwargs {"wind":1}', "wind"),
    ('--env-kwargs {"fast":true}', "fast"), ("--env-id Pendulum-v1 --wrappers no_such_module:f", "no_such_module"),
    ("--env-id Pendulum-v1 --wrappers gymnasium:no_such_function", "no_such_function"),
    ("--env-id FrozenLake-v1", "--wrappers gymnasium.wrappers:FlattenObservation makes Box observations"),
    ("--env-id Pendulum-v1 --wrappers gymnasium.wrappers:ClipAction", "leave it out: actions are clipped here"),
    ("--env-id Pendulum-v1 --wrappers a:b --wrappers c:d", "--wrappers takes several at once"),
    ("--env-id Pendulum-v1 --wrappers a:b c:d", "--env-id Pendulum-v1 --wrappers a:b c:d: "),
    ("--env-kwargs [1]", "--env-kwargs: 'list' object is not a mapping"),
    ("--env-id Pendulum-v1 --wrappers gymnasium.wrappers:TimeLimit", "max_episode_steps"),
    ("--env-id Pendulum-v1 --wrappers operator:not_", "operator:not_ returned bool, not a gymnasium.Env"),
    (f"--env-id {tiny_id()} --capture-video", "--capture-video: it has no render mode"),
    # Runs
    ("--resume RUN --env-id Pendulum-v1", tiny_id()), ("--evaluate RUN --env-id Pendulum-v1", tiny_id()),
    ("--resume RUN --num-envs 8", "--num-envs"), ("--resume RUN --seed 7", "--seed"),
    ("--resume RUN --gamma 0.5", "--gamma"), ("--resume RUN --actor-hidden-sizes 8", "--actor-hidden-sizes"),
    ("--resume RUN --wrappers a:b", "--wrappers"), ("--resume RUN --run-name x", "--run-name"),
    ("--resume RUN --evaluate RUN", "--evaluate exclude each other"),
    ("--resume RUN --total-timesteps 0", "--total-timesteps"), ("--resume RUN/args.json", "RUN/args.json"),
    ("--resume RUN/best.pt", "best.pt is another file"), ("--resume RUN/other.pt", "other.pt is another file"),
    ("--init-from RUN --env-id Pendulum-v1", "or actions (actor.0.weight differs)"), ("--init-from RUN/no", "RUN/no"),
    ("--init-from RUN --critic-progress", "--actor-hidden-sizes 4 --critic-hidden-sizes 4 --no-critic-progress"),
    ("--resume RUN --critic-progress", "--critic-progress cannot change"),
    ("--init-from=", "there is no checkpoint"),
    ("--init-from RUN --initial-std 0.3", "--initial-std has no effect with --init-from"),
    ("--lr 1e-3", "here it is --learning-rate"), ("--batch_size=64", "--num-minibatches"), ("--gpu", "--cuda"),
    ("--vf-coef 1", "here it is always 0.5"), ("--exp-name x", "here it is --run-name"),
    ("--resume RUN/nothing", "RUN/nothing"), ("--evaluate RUN/args.json/x", "RUN/args.json/x"),
    ("--evaluate " + "a" * 5000, "aaa"), ("--evaluate RUN --eval-episodes 0", "--eval-episodes"),
    ("--evaluate RUN --seed 7", "--seed cannot change when a run is evaluated"),
    ("--evaluate RUN --activation relu", "--activation"), ("--evaluate RUN --run-name x", "--run-name"),
    ("--evaluate latest", "in any folder of runs"), ("--resume latest --runs-dir RUN", "in any folder of"),
    ("--wrappers my_module", "--wrappers must be module:function"),
    ("--runs-dir RUN/.. --run-name tiny", "already holds a run; --resume"),
    ("--runs-dir RUN/.. --run-name tiny", "continues it, another --run-name begins a new one"),
    ("--runs-dir RUN --run-name args.json", "cannot write"),  # a file: even root cannot
    ("--runs-dir RUN/args.json --run-name x", "cannot write"),
    ("--runs-dir RUN/args.json/deeper --run-name x", "cannot write"),
]  # fmt: skip


@pytest.mark.parametrize("flag", ["--run-name", "--runs-dir"])
@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
def test_a_name_that_is_not_utf8(flag: str, no_process: None, capfd: Capture) -> None:
    assert_one_line(main(flag, os.fsdecode(b"a\xffb")), capfd.readouterr(), f"{flag} must be")


@pytest.mark.parametrize(("argv", "words"), REFUSED, ids=[argv[:90] for argv, _ in REFUSED])
@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
def test_bad_input(argv: str, words: str, tiny_run: Path, no_process: None, capfd: Capture) -> None:
    shutil.copy2(tiny_run / "checkpoint.pt", tiny_run / "other.pt")  # it would take the run beside it with it
    before = digests(tiny_run)
    longer = ["--total-timesteps", "9999"] if argv.startswith("--resume RUN") and "--total" not in argv else []
    capfd.readouterr()
    code = main(*argv.replace("RUN", str(tiny_run)).split(), *longer)
    assert_one_line(code, capfd.readouterr(), words.replace("RUN", str(tiny_run)))
    assert digests(tiny_run) == before


@pytest.mark.parametrize(
    "argv",
    [
        "--bogus 3", "--num-envs many", "--activation sigmoid", "--learning-rate x", "extra", "--seed 1e999",
        "--total-timesteps 1.2.3e5", "--total-timesteps .e5", "--num-envs 1.5",
    ],
)  # fmt: skip
def test_what_tyro_refuses(argv: str, no_process: None, capsys: Capture) -> None:
    assert main(*argv.split()) == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err + captured.out


def test_numbers_with_an_exponent() -> None:
    """1e6 is a whole number, too; but a name is no number."""
    words = "--total-timesteps 1e3 --num-envs=2E1 --num-steps 1.5e2 --learning-rate 2.5e-4 --initial-std 1.5e0"
    args = ppo_vec.parse_args([*words.split(), "--run-name", "12e4", "--num-minibatches", "3"])[0]
    assert (args.total_timesteps, args.num_envs, args.num_steps) == (1000, 20, 150)
    assert (args.learning_rate, args.initial_std, args.run_name) == (2.5e-4, 1.5, "12e4")


@pytest.mark.parametrize("name", ["episodes.csv", "evaluation.csv", "learning_curve.png"])
def test_what_is_left_of_a_run_is_not_overwritten(name: str, tmp_path: Path, capsys: Capture) -> None:
    """Its checkpoints are elsewhere."""
    left = tmp_path / "left"
    left.mkdir()
    (left / ".lock").touch()
    (left / name).write_bytes(ppo_vec.EPISODES_HEADER + b"8,0.1,2.0,3,0\n")
    before = digests(left)
    assert_one_line(train(left, *tiny()), capsys.readouterr(), "already holds a run; another --run-name begins")
    assert digests(left) == before


def test_what_a_run_without_a_checkpoint_has_left_is_overwritten(tmp_path: Path) -> None:
    left = tmp_path / "left"
    left.mkdir()
    (left / "episodes.csv").write_bytes(ppo_vec.EPISODES_HEADER)
    (left / "args.json").write_text("{}")
    assert train(left, *tiny()) == 0


@pytest.mark.parametrize(
    "taking", [fail_with(MemoryError()), lambda *_: torch.empty(2**50), lambda *_: np.empty(2**50)]
)
def test_no_memory_left_is_one_clear_line(taking: Any, tmp_path: Path, monkeypatch: Patch, capsys: Capture) -> None:
    monkeypatch.setattr(ppo_vec, "Agent", taking)
    assert train(tmp_path / "run", *tiny()) == 1
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("ppo_vec.py: error: no memory left; smaller networks")


def test_an_error_of_ours_keeps_its_traceback(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(ppo_vec, "Agent", fail_with(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        train(tmp_path / "run", *tiny())


def test_a_copy_runs_itself_also_in_isolated_mode(tmp_path: Path) -> None:
    """python -I leaves the script's folder out of the path; another ppo_vec may be installed."""
    copied = tmp_path / "my-ppo.py"
    copied.write_text(Path(ppo_vec.__file__).read_text().replace("ppo_vec.py: error:", "my copy: error:"))
    done = subprocess.run(
        [sys.executable, "-I", copied, "--gamma", "2"], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr[:30]) == (2, "my copy: error: --gamma must l")


def test_walker_without_a_version_is_the_walker() -> None:
    """Gymnasium takes the newest version; it must be replayed as that one, with that one's tuned values."""
    args = ppo_vec.parse_args(["--env-id", "BipedalWalker"])[0]
    assert args == ppo_vec.parse_args([])[0]
    assert args.action_cost == 0.2
    assert isinstance(ppo_vec.make_env(args), ppo_vec.Walker)


def test_a_run_says_which_tuned_values_it_has(tmp_path: Path, monkeypatch: Patch, capfd: Capture) -> None:
    """Those that no flag has changed. Then a run of an environment that nobody tuned."""
    best = {"gamma": 0.9, "actor_hidden_sizes": (8, 8), "critic_progress": True, "clip_vloss": False}
    monkeypatch.setitem(ppo_vec.TUNED, "Pendulum-v1", best)
    flags = "--env-id Pendulum-v1 --num-envs 2 --num-workers 1 --num-steps 8 --num-minibatches 2 --total-timesteps 16"
    others = "--actor-hidden-sizes 8 8 --critic-progress --no-clip-vloss"  # as one types them
    for name, typed, said in (("a", [], f"--gamma 0.9 {others}"), ("b", ["--gamma", "0.8"], others)):
        assert train(tmp_path / name, *flags.split(), "--eval-episodes", "1", *typed) == 0
        line = capfd.readouterr().err.splitlines()[0]
        assert line == f"Pendulum-v1, seed 1, in {tmp_path / name}, tuned: {said}"
    monkeypatch.delitem(ppo_vec.TUNED, "Pendulum-v1")
    assert train(tmp_path / "c", *flags.split(), "--eval-episodes", "1") == 0
    assert capfd.readouterr().err.splitlines()[0].endswith(", tuned: nothing")


def test_a_schedule_that_no_recording_follows(tmp_path: Path, monkeypatch: Patch, capfd: Capture) -> None:
    """An argument that an edited `scheduled` changes is named if it is not in SCALARS."""
    before = ppo_vec.scheduled

    def edited(args: Any, global_step: int, shown: float | None = None) -> Any:
        left = 1 - global_step / args.total_timesteps
        now = before(args, global_step, shown)
        return dataclasses.replace(now, clip_coef=0.2 * left, bounds_loss_coef=0.1 * left)

    monkeypatch.setattr(ppo_vec, "scheduled", edited)
    assert train(tmp_path / "run", *tiny()) == 0
    warnings = [line for line in capfd.readouterr().err.splitlines() if "warning" in line]
    words = "updates are slow, for scheduled() changes bounds_loss_coef, which is not in SCALARS"
    assert warnings == [f"warning: {words}"]


def test_evaluate_is_refused_in_several_processes(monkeypatch: Patch) -> None:
    """Before anything is started: it uses all cores by itself."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ppo_vec.UserError, match="--evaluate uses all cores without torchrun"):
        ppo_vec.validate(ppo_vec.Options(evaluate="runs/a"))
    ppo_vec.validate(ppo_vec.Options(resume="runs/a"))


@pytest.mark.parametrize(("given", "limit"), [("-1", None), ("null", 1600), ("7", 7)])
def test_time_limit_of_a_walker(given: str, limit: int | None) -> None:
    """As in gym.make: -1 is none, null the registered one. Wrappers find it in the environment's spec."""
    args = ppo_vec.Options(env_kwargs=f'{{"max_episode_steps": {given}}}')
    assert ppo_vec.make_task(args).max_episode_steps == limit
    env = ppo_vec.make_env(args)
    assert (env.max_episode_steps, env.spec.max_episode_steps) == (limit or math.inf, limit)
    env.close()


def test_env_kwargs_of_a_walker() -> None:
    """They reach every form of it."""
    args = ppo_vec.Options(env_kwargs='{"max_episode_steps": 9, "hardcore": true}')
    assert ppo_vec.make_task(args).max_episode_steps == 9
    for published in (True, False):
        env = ppo_vec.make_env(args, published)
        ppo_vec.reset_env(env, 0)
        assert [env.step(np.zeros(4, np.float32))[3] for _ in range(9)] == [False] * 8 + [True]
        assert env.unwrapped.hardcore


@pytest.mark.parametrize(("flag", "module"), [("--track", "wandb"), *(("--capture-video", m) for m in VIDEO)])
def test_missing_extra(flag: str, module: str, no_process: None, monkeypatch: Patch, capsys: Capture) -> None:
    """What an option needs is missed at once, not after the training."""
    monkeypatch.setitem(sys.modules, module, None)
    assert_one_line(main("--env-id", "Pendulum-v1", flag), capsys.readouterr(), flag, "pip install")


def test_a_video_without_a_display(no_process: None, monkeypatch: Patch, capsys: Capture) -> None:
    monkeypatch.setattr(PendulumEnv, "render", fail_with(RuntimeError("no\nOpenGL")))
    code = main("--env-id", "Pendulum-v1", "--capture-video")
    assert_one_line(code, capsys.readouterr(), "--capture-video", "no OpenGL")


def test_track_that_wandb_refuses(tmp_path: Path, monkeypatch: Patch, capsys: Capture) -> None:
    """A second try, without --track or after `wandb login`, finds no half a run in its way."""
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=fail_with(ConnectionError("not\nlogged in"))))
    assert_one_line(train(tmp_path / "run", *tiny(), "--track"), capsys.readouterr(), "--track", "not logged in")
    assert train(tmp_path / "run") == 0


def test_a_folder_belongs_to_one_process(tmp_path: Path, capsys: Capture) -> None:
    """Two trainers would write the same checkpoints and logs, also before the first has written anything."""
    run = tmp_path / "run"
    run.mkdir()
    for argv in (tiny(), ("--resume", str(run), "--total-timesteps", "160")):
        with filelock.FileLock(run / ".lock"):
            before = digests(run)
            code = main(*argv) if "--resume" in argv else train(run, *argv)
            assert_one_line(code, capsys.readouterr(), "another process", str(run))
            assert digests(run) == before
        assert train(run) == 0 or "--resume" in argv, "a lock that was left behind keeps nobody out"
        capsys.readouterr()


def test_a_containers_share_of_the_machine_counts(monkeypatch: Patch) -> None:
    def read_text(path: Path, *_: Any) -> str:
        assert str(path) == "/sys/fs/cgroup/cpu.max"
        return quota

    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(Path, "read_text", read_text)
    found = []
    for quota in (  # noqa: B007
        "max 100000",
        "250000 100000",
        "50000 100000",
        "9900000 100000",
    ):
        found.append(ppo_vec.usable_cores())
    assert found == [8, 3, 1, 8]


def test_the_file_alone_says_what_it_needs() -> None:
    """PEP 723: `uv run ppo_vec.py`. The same as in pyproject.toml."""
    script = Path(ppo_vec.__file__).read_text()
    (block,) = re.findall(r"(?m)^# /// script$\n((?:^#(?:| .*)$\n)+?)^# ///$", script)  # the pattern of PEP 723
    alone = tomllib.loads("".join(line.removeprefix("#").removeprefix(" ") for line in block.splitlines(keepends=True)))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert alone == {name: project[name] for name in ("requires-python", "dependencies")}
    assert project["scripts"] == {"ppo-vec": "ppo_vec:main"}


def test_the_commands_in_the_readme(tiny_run: Path, monkeypatch: Patch) -> None:
    """The trainer takes their flags; benchmarks that they name exist, and have theirs."""
    text = re.sub(r"\\\n\s*", "", (ROOT / "README.md").read_text())
    found = re.findall(r"(?:    |`|&& |torchrun .*? )((?:python )?(?:ppo_vec|benchmarks/\w+)\.py[^#`\n]*)", text)
    trainings = [shlex.split(line.split(".py", 1)[1]) for line in found if "benchmarks/" not in line]
    assert len(trainings) >= 12
    for words in trainings:
        words = [str(tiny_run) if word in ("latest", "runs/NAME") or "reference" in word else word for word in words]
        if "--init-from" in words:
            words += ["--env-id", tiny_id()]
        ppo_vec.parse_args([word for word in words if word != "--help"])
    for line in (line for line in found if "benchmarks/" in line):
        source = (ROOT / re.search(r"benchmarks/\w+\.py", line)[0]).read_text()
        for flag in re.findall(r" --([a-z-]+)", line):
            assert re.search(rf"--{flag}\b|^ +{flag.replace('-', '_')}:", source, re.MULTILINE), line


def test_bad_input_in_a_process_of_its_own() -> None:
    result = Trainer("--env-id", "BipedalWalker-v2", "--runs-dir", "/dev/null").finish().check(2)
    assert (result.out, result.err.count("\n")) == ("", 1)
    assert result.err.startswith("ppo_vec.py: error: ")


def test_help_explains_every_flag(capsys: Capture) -> None:
    assert main("--help") == 0
    text = re.sub(r"[│╭╰╮╯─\s]+", " ", re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out))
    source = Path(ppo_vec.__file__).read_text()
    for f in dataclasses.fields(ppo_vec.Options):
        comment = re.search(rf"\n    {f.name}: [^#]*  # ([^\n]+)", source)
        assert comment, f"{f.name} has no comment"
        assert ppo_vec.flag(f.name) in text
        assert comment[1] in text, f"the help does not explain {ppo_vec.flag(f.name)}"
    assert not re.search(r"--(no-)?(batch|minibatch)-size", text), "a derived size is no flag"


def test_help_begins_with_examples(capsys: Capture, monkeypatch: Patch) -> None:
    """The commands of the file's docstring, each on its line; and no line is wider than the terminal."""
    monkeypatch.setenv("COLUMNS", "80")
    examples = [line.split("  ")[0] for line in re.findall("(?m)^    (.*)", ppo_vec.__doc__)]
    assert examples[0] == "python ppo_vec.py --num-envs 16 --cuda"
    assert len(examples) == 7
    assert main("--help") == 0
    usage, gap, *lines = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out).splitlines()
    assert (usage[:6], gap) == ("usage:", "")
    assert [line.strip() for line in lines[: 2 * len(examples) : 2]] == examples
    assert all(line.strip().startswith("# ") for line in lines[1 : 2 * len(examples) : 2])
    assert lines[2 * len(examples) + 1].startswith("Tuned defaults depend on --env-id")
    assert max(map(len, lines)) <= 80


# ---- Checkpoints and run folders of strangers ------------------------------------------------------------------------


class Call:
    """Pickles into a call."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call[0], self.call[1:]


def repack(tree: dict[str, Any], compression: int | None = None) -> bytes:
    """A signed checkpoint, compressed; or, without `compression`, with all its tensors on the bytes of the first."""
    out, first = io.BytesIO(), None
    with zipfile.ZipFile(io.BytesIO(saved(tree))) as source, zipfile.ZipFile(out, "w", compression or 0) as target:
        for info in source.infolist():
            if first and compression is None and "/data/" in info.filename:
                target.filelist.append(copy.copy(first))
                target.filelist[-1].filename = target.filelist[-1].orig_filename = info.filename
                continue
            target.writestr(info.filename, source.read(info))
            if info.file_size == 4 * 10**6:
                first = target.getinfo(info.filename)
    return sign(out.getvalue())


def nested(depth: int) -> tuple[Any, ...]:
    """A tuple of few bytes that is a tree of 2**depth leaves."""
    return (nested(depth - 1),) * 2 if depth else ()


HOLLOW = torch.zeros(1).expand(50_000_000)  # the memory of one number


def wide(agent: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """An agent with 999 layers that share the memory of one."""
    one = torch.zeros(512, 512)
    layers = {f"actor.{i}.{name}": rows for i in range(999) for name, rows in (("weight", one), ("bias", one[0]))}
    return {**agent, **layers, "normalizer.mean": one[0].double(), "normalizer.var": one[0].double()}


def many(tree: dict[str, Any], hollow: bool) -> dict[str, Any]:
    """A checkpoint that says that it has a million environments."""
    envs = {k: v[:1].expand(10**6, *v.shape[1:]) for k, v in tree["snapshot"].items() if hollow and torch.is_tensor(v)}
    return {**tree, "args": {**tree["args"], "num_envs": 10**6}, "snapshot": {**tree["snapshot"], **envs}}


def as_format_4(tree: dict[str, Any]) -> dict[str, Any]:
    """One with a single row a minibatch, which was no fault before `norm_adv`."""
    args = {name: value for name, value in tree["args"].items() if name != "norm_adv"}
    args["num_minibatches"] = args["num_envs"] * args["num_steps"]
    rest = {name: value for name, value in tree.items() if name != "snapshot"}
    return {**rest, "format": "ppo_vec 4 Gaussian", "args": args, "envs": tree["snapshot"]}


# A broken checkpoint is made of an intact one, t (None: no file). R, E, L: --resume, --evaluate and load_policy refuse
# it, with these words; the others must get the right policy. The costly ones are small files that are made to take
# gigabytes or minutes.
BROKEN: dict[str, tuple[str, list[str], Callable[[dict[str, Any]], bytes | None]]] = {
    "missing": ("REL", ["no checkpoint"], lambda t: None),
    "empty": ("REL", ["checkpoint.pt"], lambda t: b""),
    "cut off": ("REL", ["checkpoint.pt", "cut off"], lambda t: ppo_vec.encode(t)[:-100]),
    "damaged": ("REL", ["checkpoint.pt", "damaged"], lambda t: ppo_vec.encode(t).replace(b"actor", b"actos", 1)),
    "foreign": ("REL", ["checkpoint.pt", "not a ppo_vec checkpoint"], lambda t: saved({"model": torch.zeros(3)})),
    "no dict": ("REL", ["checkpoint.pt", "format"], lambda t: ppo_vec.encode([1])),
    "other format": ("REL", ["checkpoint.pt", "format"], lambda t: changed(t, "ppo_vec 0", "format")),
    "older format": ("R", ["its format is ppo_vec 4 Gaussian"], lambda t: ppo_vec.encode(as_format_4(t))),
    "bare pickle": ("REL", ["cannot be read"], lambda t: sign(pickle.dumps(Call(os.system, "touch executed")))),
    "code": ("REL", ["cannot be read"], lambda t: sign(saved({**t, "format": Call(os.system, "touch executed")}))),
    "module:id": (
        "RE", ["would import code", "--env-id evil_module:X-v0"],
        lambda t: changed(t, "evil_module:X-v0", "args", "env_id"),
    ),
    "wrappers": (
        "RE", ["would import code", "--wrappers evil_module:f"],
        lambda t: changed(t, ["evil_module:f"], "args", "wrappers"),
    ),
    "another task": ("RE", [], lambda t: changed(t, "MountainCarContinuous-v0", "args", "env_id")),
    "old flag": ("R", ["another version", "ramp"], lambda t: changed(t, 1, "args", "ramp")),
    "bad argument": ("RE", ["--num-envs"], lambda t: changed(t, 0, "args", "num_envs")),
    "argument of another type": ("RE", ["arguments"], lambda t: changed(t, "x", "args", "swa_share")),
    "no weights": ("REL", [], lambda t: changed(t, ..., "agent")),
    "other critic": ("R", [], lambda t: changed(t, torch.zeros(2), "agent", "critic.0.weight")),
    "other actor": ("REL", [], lambda t: changed(t, torch.zeros(2), "agent", "actor.0.weight")),
    "NaN": ("REL", ["finite"], lambda t: changed(t, torch.full((4, 3), math.nan), "agent", "actor.0.weight")),
    "endless bounds": ("REL", [], lambda t: changed(t, t["high"] * math.inf, "high")),
    "no counter": ("R", [], lambda t: changed(t, ..., "finished")),
    "counter of another type": ("R", [], lambda t: changed(t, "x", "global_step")),
    "no numbers": ("REL", [], lambda t: changed(t, t["discounted_return"].to("meta"), "discounted_return")),
    "costly layers": ("R", [], lambda t: changed(t, [6000, 6000], "args", "actor_hidden_sizes")),
    "costly environments": ("R", [], lambda t: ppo_vec.encode(many(t, hollow=False))),
    "costly hollow environments": ("REL", [], lambda t: ppo_vec.encode(many(t, hollow=True))),
    "costly bounds": ("REL", [], lambda t: ppo_vec.encode({**t, "low": HOLLOW, "high": HOLLOW})),
    "costly weight": ("REL", [], lambda t: changed(t, HOLLOW.expand(3, -1).t(), "agent", "actor.0.weight")),
    "costly mean": ("REL", [], lambda t: changed(t, HOLLOW, "agent", "normalizer.mean")),
    "costly views": ("REL", [], lambda t: changed(t, wide(t["agent"]), "agent")),
    "costly zip": ("REL", [], lambda t: repack({**t, "x": torch.zeros(10**8)}, zipfile.ZIP_DEFLATED)),
    "costly overlap": ("REL", [], lambda t: repack({**t, "x": [torch.zeros(10**6) + i for i in range(99)]})),
    "costly call": ("REL", [], lambda t: sign(saved({**t, "x": Call(bytearray, 10**9)}))),
    "costly tuple": ("REL", [], lambda t: changed(t, nested(25), "args", "activation")),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_checkpoint_that_cannot_be_used(
    what: str, tiny_run: Path, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("evil_module.py").write_text("open('executed', 'w')")
    run = tmp_path / "run"
    run.mkdir()
    refusing, words, make = BROKEN[what]
    if (data := make(read(tiny_run / "checkpoint.pt"))) is not None:
        (run / "checkpoint.pt").write_bytes(data)
    before = digests(run)
    Path("/proc/self/clear_refs").write_text("5")  # the peak of this process's memory begins anew
    memory, began = peak_memory(), time.monotonic()

    if "R" in refusing:
        assert_one_line(main("--resume", run, "--total-timesteps", "160"), capsys.readouterr(), *words)
    code, obs = main("--evaluate", run), np.random.default_rng(0).normal(size=(9, 3))
    if "E" in refusing:
        assert_one_line(code, capsys.readouterr(), *words)
    else:
        mean = json.loads((tiny_run / "summary.json").read_text())["last_eval_mean"]
        assert (code, f": {mean:.1f} +- " in capsys.readouterr().out) == (0, True)
    if "L" in refusing:
        with pytest.raises(ppo_vec.UserError) as raised:
            ppo_vec.load_policy(run)
        assert all(word in str(raised.value) for word in words)
    else:
        expected = ppo_vec.load_policy(tiny_run / "checkpoint.pt")(obs)
        assert np.array_equal(ppo_vec.load_policy(run)(obs), expected)

    assert time.monotonic() - began < 15, "three tries of less than 5 s"
    assert peak_memory() - memory < 300, "MB of memory for a small file"
    assert not Path("executed").exists(), "a checkpoint has executed code"
    assert {k: v for k, v in digests(run).items() if not k.endswith(".lock")} == before


def peak_memory() -> int:
    """MB."""
    return int(re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]) // 1024


def test_what_a_checkpoint_may_not_decide(tiny_run: Path, tmp_path: Path, monkeypatch: Patch, capsys: Capture) -> None:
    """It asks for no network, no processes, no other folder; and its policy needs no extra package.

    A film it does ask for: a run that was begun with --capture-video is resumed with it.
    """
    monkeypatch.chdir(tmp_path)
    for module in ("wandb", *VIDEO):
        monkeypatch.setitem(sys.modules, module, None)
    wanted = {"track": True, "num_workers": 64, "capture_video": True, "runs_dir": "elsewhere", "run_name": "x"}
    wanted["start_method"] = "spawn"
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    for name in ("checkpoint.pt", "best.pt"):
        tree = read(run / name)
        args = {k: v for k, v in {**tree["args"], **wanted}.items() if k != "wrappers"}  # a newer flag has its default
        (run / name).write_bytes(changed(tree, args, "args"))
    assert main("--evaluate", run) == 0
    assert "video" not in capsys.readouterr().out
    assert_one_line(main("--resume", run), capsys.readouterr(), "--capture-video: it has no render mode")
    assert main("--resume", run, "--total-timesteps", "160", "--no-capture-video") == 0
    found = json.loads((run / "args.json").read_text())["args"]
    decided = False, None, False, str(tmp_path), "run", ppo_vec.Options().start_method
    assert tuple(found[name] for name in wanted) == decided
    assert read(run / "checkpoint.pt")["global_step"] == 160
    assert {path.name for path in tmp_path.iterdir()} == {"run", "runs"}
    assert [path.name for path in Path("runs").glob("*/*")] == ["evaluation.csv"]
    assert not (run / "videos").exists()
    args, *_ = ppo_vec.parse_args(["--resume", str(run), "--start-method", "spawn"])  # the user decides it, at any time
    assert args.start_method == "spawn"


@pytest.mark.parametrize(
    "name",
    ["episodes.csv", "events*", ".lock", "args.json.tmp", "best.pt", "checkpoint.previous.pt", "videos", "log.txt"],
)
def test_a_link_in_a_run_folder(name: str, tiny_run: Path, tmp_path: Path, capsys: Capture) -> None:
    """Its victim keeps its content: nothing begins."""
    run, victim = Path(shutil.copytree(tiny_run, tmp_path / "run")), tmp_path / "victim"
    victim.write_bytes(b"mine\n" * 9999)
    path = next(run.glob(name), run / name)
    path.unlink(missing_ok=True)
    path.symlink_to(victim)
    before = digests(tmp_path)[str(victim)]
    capsys.readouterr()
    assert_one_line(
        main("--resume", run, "--total-timesteps", "160"), capsys.readouterr(), f"{path} is no regular file"
    )
    assert digests(tmp_path)[str(victim)] == before


def test_what_is_no_regular_file(tiny_run: Path, tmp_path: Path, capsys: Capture) -> None:
    """Nothing waits for a pipe, reads an endless device or fills the memory."""
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    obs = np.ones(3)
    expected = ppo_vec.load_policy(run / "checkpoint.pt")(obs)
    (run / "best.pt").unlink()
    (run / "best.pt").symlink_to("/dev/zero")
    assert main("--evaluate", run) == 0
    assert np.array_equal(ppo_vec.load_policy(run)(obs), expected)
    assert capsys.readouterr().err.count("warning: ") == 2
    (run / "best.pt").unlink()
    with open(run / "best.pt", "wb") as file:
        file.truncate(2**40)
    assert np.array_equal(ppo_vec.load_policy(run)(obs), expected)
    assert "best.pt is too large; using checkpoint.pt" in capsys.readouterr().err
    for name in ("best.pt", "checkpoint.pt", "checkpoint.previous.pt"):
        (run / name).unlink()
        os.mkfifo(run / name)
    for argv in (["--resume", run], ["--evaluate", run], ["--resume", run / "checkpoint.pt"]):
        assert_one_line(main(*argv), capsys.readouterr(), "checkpoint.pt is no regular file")


def test_json_files_that_are_broken(tiny_run: Path, tmp_path: Path) -> None:
    """What was in them is lost, but the run goes on."""
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    broken = ("[1]", '"x"', "3", "{", "", "\xff", "[" * 99999, '{"earlier": 3, "finished": [1]}')
    for steps, text in zip(range(160, 999, 40), broken, strict=False):
        for name in ("args.json", "summary.json"):
            (run / name).write_text(text, encoding="latin-1")
        assert main("--resume", run, "--total-timesteps", steps) == 0, text
        assert json.loads((run / "args.json").read_text())["args"]["total_timesteps"] == steps
        assert json.loads((run / "summary.json").read_text())["global_step"] == steps


# ---- What a run leaves -----------------------------------------------------------------------------------------------

TAGS = (
    "charts/episodic_return", "charts/episodic_length", "charts/eval_return", "charts/fall_rate",
    "losses/policy_loss", "losses/value_loss", "losses/entropy", "losses/old_approx_kl",
    "losses/approx_kl", "losses/clipfrac", "losses/explained_variance", "losses/policy_loss_grad_norm",
    "losses/value_loss_grad_norm", "policy/learning_rate", "time/SPS", "time/SPS_rollout",
    "time/SPS_total", "time/rollout_s", "time/update_s", "test/return", "test/last_return", "test/fall_rate",
)  # fmt: skip


def test_tags(trained: Path) -> None:
    scalars = faults.scalars(trained)
    assert set(TAGS) == set(scalars)
    readme = (ROOT / "README.md").read_text()
    assert all(f"`{tag}`" in readme for tag in TAGS)
    assert all(math.isfinite(value) for points in scalars.values() for _, value in points)
    steps = [step for step, _ in scalars["time/SPS"]]
    assert steps == [step for step, _ in scalars["losses/policy_loss"]] == list(range(256, 4097, 256))
    rates = [value for _, value in scalars["policy/learning_rate"]]
    assert rates == pytest.approx([2.5e-4 * min(1, 5 * (1 - (step - 256) / 4000)) for step in steps])  # held until 80 %


def test_tensorboard_shows_arguments_curve_and_result(trained: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import plugin_data_pb2

    board = EventAccumulator(str(trained)).Reload()
    assert board.Tags()["images"] == ["learning_curve"]
    (picture,) = board.Images("learning_curve")
    assert picture.encoded_image_string == (trained / "learning_curve.png").read_bytes()
    assert (picture.step, picture.width, picture.height) == (4096, 960, 540)
    (text,) = board.Tensors("arguments/text_summary")
    assert "| num_steps | 64 |" in text.tensor_proto.string_val[0].decode()
    hparams = board.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    start = plugin_data_pb2.HParamsPluginData.FromString(hparams).session_start_info.hparams
    assert (start["num_envs"].number_value, start["gae_lambda"].number_value) == (4, 0.85)
    summary = json.loads((trained / "summary.json").read_text())
    assert faults.scalars(trained)["test/return"] == [(4096, pytest.approx(summary["eval_mean"], rel=1e-6))]
    assert faults.scalars(trained)["test/last_return"] == [(4096, pytest.approx(summary["last_eval_mean"], rel=1e-6))]


def test_episodes_csv(trained: Path) -> None:
    lines = (trained / "episodes.csv").read_text().splitlines()
    assert lines[0] == "global_step,time_s,return,length,env"
    rows, scalars = list(csv.DictReader(lines)), faults.scalars(trained)
    steps = [int(row["global_step"]) for row in rows]
    for name in ("return", "length"):
        found = [(step, float(np.float32(row[name]))) for step, row in zip(steps, rows, strict=True)]
        assert found == scalars[f"charts/episodic_{name}"]
    times = [float(row["time_s"]) for row in rows]
    assert times == sorted(times)
    envs = read(trained / "checkpoint.pt")["snapshot"]
    for env in range(4):
        lengths = [int(row["length"]) for row in rows if int(row["env"]) == env]
        assert all(1 <= length <= 1600 for length in lengths)
        assert sum(lengths) + sum(map(len, envs["actions"][env])) == 4096 / 4


def test_best_is_the_best(trained: Path) -> None:
    """By its mean less one standard error: a policy that once in a while falls may be lucky in a few episodes."""
    falls, never = ({"mean": 300.0, "std": std, "episodes": 100} for std in (50.0, 1.0))
    assert (ppo_vec.score(falls, None), ppo_vec.score(never, None)) == ((False, 295), (False, pytest.approx(299.9)))
    assert ppo_vec.score(falls, 300.0) > ppo_vec.score({**never, "episodes": 99}, 300.0)  # the first is confirmed
    tree, best = read(trained / "checkpoint.pt"), read(trained / "best.pt")
    assert ppo_vec.score(best["evaluation"], 200) >= ppo_vec.score(tree["evaluations"][-1], 200)
    assert best["evaluation"] == tree["best"]["evaluation"]
    assert all(torch.equal(best["agent"][name], w) for name, w in tree["best"]["agent"].items())


def test_the_command_to_continue_holds_what_no_checkpoint_restores() -> None:
    assert ppo_vec.resume_flags(ppo_vec.Options(), Path("a b")) == "--resume 'a b'"
    args = ppo_vec.Options(track=True, start_method="spawn")
    assert ppo_vec.resume_flags(args, Path("run")) == "--resume run --start-method spawn --track"


def test_args_json(trained: Path) -> None:
    found = json.loads((trained / "args.json").read_text())
    assert set(found["args"]) == {f.name for f in dataclasses.fields(ppo_vec.Options)}
    assert (found["args"]["num_steps"], found["args"]["run_name"], found["earlier"]) == (64, "walker", [])
    assert "ppo_vec.py" in found["command"]
    assert "--num-envs 4" in found["command"]
    assert found["versions"]["torch"] == torch.__version__
    assert set(found["versions"]) >= {"python", "torch", "numpy", "gymnasium", "box2d"}
    assert {"git_commit", "cpu", "cores", "gpu", "kernels"} <= set(found)
    assert found["processes"] == 1


def test_a_stderr_that_cannot_be_written_ends_no_run(tmp_path: Path) -> None:
    """As on a full disk. The progress bar draws itself at once."""
    small = (
        "--env-id CartPole-v1 --num-envs 2 --num-steps 16 --num-minibatches 2 --total-timesteps 64 --eval-episodes 1"
    )
    command = [sys.executable, ppo_vec.__file__, *small.split(), "--runs-dir", str(tmp_path), "--run-name", "run"]
    with open("/dev/full", "wb", buffering=0) as full:
        done = subprocess.run(command, stderr=full, timeout=120)
    assert done.returncode == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["finished"]


def test_summary_json_and_evaluation_csv(trained: Path, tiny_run: Path) -> None:
    summary = json.loads((trained / "summary.json").read_text())
    rows = list(csv.DictReader((trained / "evaluation.csv").read_text().splitlines()))
    returns = [float(row["return"]) for row in rows]
    assert summary.items() >= {
        "env_id": "BipedalWalker-v3", "seed": 1, "global_step": 4096, "eval_episodes": 2, "eval_frac_solved": 0,
        "eval_mean": np.mean(returns), "eval_std": np.std(returns), "eval_min": min(returns), "solved_at_step": None,
        "solved_at_s": None, "worker_restarts": 0, "finished": True,
    }.items()  # fmt: skip
    assert {"last_eval_mean", "last_eval_std", "last_eval_min"} <= set(summary)
    assert 0 < summary["train_time_s"] < summary["wall_time_s"]
    assert summary["sps"] == pytest.approx(4096 / summary["train_time_s"], rel=0.01)
    assert [list(row) for row in rows] == [["seed", "return", "length", "fell"]] * 2
    assert [row["seed"] for row in rows] == ["0", "1"]
    assert all((row["fell"] == "True") == (row["length"] != "1600") for row in rows)
    # An evaluation of 5 episodes of 20 steps; 1 episode each that chooses between it and the last weights; 1 that
    # tests the last weights, and 1 more if the other is delivered.
    assert json.loads((tiny_run / "summary.json").read_text())["evaluation_steps"] in (20 * 8, 20 * 9)


def test_files_that_others_read(trained: Path) -> None:
    """Checkpoints are plain tensors; the learning curve is a picture with something in it."""
    from matplotlib.image import imread

    for name in ("checkpoint.pt", "checkpoint.previous.pt", "best.pt"):
        tree = torch.load(trained / name, weights_only=True)
        assert tree["args"]["env_id"] == "BipedalWalker-v3"
        assert "normalizer.mean" in tree["agent"], "a policy without its normaliser"
    assert not list(trained.glob("*.tmp"))
    picture = imread(trained / "learning_curve.png")
    assert min(picture.shape[:2]) > 300
    colours = np.unique((picture[..., :3] * 255).astype(np.uint8).reshape(-1, 3), axis=0)
    assert len(colours) > 20, "an empty picture"


def test_no_curve_without_its_episodes(tmp_path: Path, capsys: Capture) -> None:
    """Somebody has moved the file away while the run went on: no reason to lose its end."""
    ppo_vec.plot_learning_curve(SimpleNamespace(), SimpleNamespace(folder=tmp_path))
    assert "warning: no learning_curve.png: No such file or directory" in capsys.readouterr().err


def test_a_run_name_is_no_formula(tmp_path: Path) -> None:
    """matplotlib takes text between dollar signs for mathematics."""
    assert train(tmp_path / "x$a_$") == 0
    assert (tmp_path / "x$a_$" / "learning_curve.png").exists()


def test_networks_without_hidden_layers(tmp_path: Path) -> None:
    assert train(tmp_path / "linear", *tiny(), "--actor-hidden-sizes", "--critic-hidden-sizes") == 0


def test_evaluation_with_a_strangers_numbers(
    tiny_run: Path, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    """Its counts cost no memory. Equal returns that are too large for ten bins have no histogram."""

    def play(envs: ppo_vec.VecEnv, weights: Any, seeds: Any, **how: Any) -> list[Any]:
        assert envs.args.num_envs <= 16 * ppo_vec.usable_cores()
        assert seeds == range(10**8)
        return [(1e17, 1, False, 0.0)] * 3

    monkeypatch.setattr(ppo_vec.VecEnv, "play", play)
    path, tree = tmp_path / "strange.pt", read(tiny_run / "best.pt")
    tree["args"] |= {"num_envs": 10**8, "eval_episodes": 10**8}
    path.write_bytes(ppo_vec.encode(tree))
    assert main("--evaluate", path, "--runs-dir", tmp_path) == 0
    assert len(next(tmp_path.glob("*/evaluation.csv")).read_text().splitlines()) == 4
    assert "highest 1" in capsys.readouterr().out


def test_init_from_another_network(tiny_run: Path, tmp_path: Path, capsys: Capture) -> None:
    """An activation has no weights: it must be asked for. The number of environments may be another."""
    assert main("--init-from", tiny_run, *tiny(), "--activation", "relu", "--runs-dir", tmp_path) == 2
    assert "its networks need --activation tanh" in capsys.readouterr().err
    more = "--num-envs", "6", "--num-minibatches", "1"
    assert main("--init-from", tiny_run / "checkpoint.pt", *tiny(), *more, "--runs-dir", tmp_path) == 0


def test_shortest_run(tmp_path: Path, monkeypatch: Patch, capfd: Capture) -> None:
    """One iteration, in which no episode ends: no warning, no tag twice at a step; and deterministic algorithms."""
    seen, update = [], ppo_vec.update
    torch.use_deterministic_algorithms(False)
    note = lambda *given: seen.append(torch.are_deterministic_algorithms_enabled()) or update(*given)  # noqa: E731
    monkeypatch.setattr(ppo_vec, "update", note)
    assert train(tmp_path / "run", *tiny(), "--num-steps", "8", "--total-timesteps", "8") == 0
    err = capfd.readouterr().err
    assert "arning" not in err
    assert "Traceback" not in err
    assert fingerprint(tmp_path / "run")["episodes"] == []
    assert seen == [True]


def test_log_txt(tmp_path: Path, monkeypatch: Patch, capsys: Capture) -> None:
    """What stderr says, with the time, and the error that a run ends with; a resumed run goes on in it."""
    run = tmp_path / "run"
    monkeypatch.setattr(ppo_vec, "GRACE", 600)
    with monkeypatch.context() as patch:
        patch.setattr(ppo_vec, "should_save", stop_at(50))
        assert train(run) == 143
    with monkeypatch.context() as patch:
        patch.setattr(ppo_vec, "collect", fail_with(ppo_vec.TrainingError("the spring broke")))
        assert main("--resume", run) == 1
    said = capsys.readouterr().err
    assert main("--resume", run) == 0
    said += capsys.readouterr().err
    lines = (run / "log.txt").read_text().splitlines()
    times, messages = zip(*((line[:23], line[24:]) for line in lines), strict=True)
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}", time) for time in times)
    assert list(times) == sorted(times)
    shown = [line.removeprefix("ppo_vec.py: ") for line in said.splitlines() if line.strip() and "%|" not in line]
    assert list(messages) == shown
    assert [line for line in messages if line.startswith(("error", "stopped"))] == [
        f"stopped by SIGTERM; continue with: --resume {run}", "error: the spring broke",
    ]  # fmt: skip
    assert not logging.getLogger("ppo_vec").handlers


def test_log_txt_on_a_full_disk(tmp_path: Path, capsys: Capture) -> None:
    """The run goes on without it, and quietly; with a folder in its place, too."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "log.txt").mkdir()
    assert train(run) == 0
    real, run = logging.FileHandler, tmp_path / "full"
    with faults.replaced_attribute(logging, "FileHandler", lambda *_, **__: real("/dev/full")):
        assert train(run) == 0
    err = capsys.readouterr().err
    assert "delivered: " in err
    assert "Traceback" not in err
    assert "Error" not in err


def test_cuda_that_cannot_be_used(tiny_run: Path, tmp_path: Path, monkeypatch: Patch, capsys: Capture) -> None:
    """A device that torch reports may be too old for it, or taken: one warning, and the CPU does the same."""
    ones = torch.ones

    def fail(*size: int, device: str | None = None, **given: Any) -> torch.Tensor:
        if "cuda" in str(device):
            raise RuntimeError("CUDA error: no kernel image is available\nfor execution on the device")
        return ones(*size, device=device, **given)

    monkeypatch.setattr(torch, "ones", fail)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "an old one")
    assert train(tmp_path / "run", *tiny(), "--cuda") == 0
    (warning,) = (line for line in capsys.readouterr().err.splitlines() if "warning: --cuda" in line)
    assert "no kernel image is available for execution" in warning
    found = faults.differences(fingerprint(tmp_path / "run"), fingerprint(tiny_run))
    assert len(found) == len([place for place in found if "args/cuda" in place]) > 0


@pytest.mark.usefixtures("avx2")
@pytest.mark.parametrize(("given", "expected"), [({}, "Haswell"), ({"OPENBLAS_CORETYPE": "Sandybridge"},) * 2])
def test_numpy_takes_the_kernels_that_every_machine_has(given: dict[str, str], expected: Any) -> None:
    """What NumPy's OpenBLAS says itself; a value that the user has set stays."""
    code = """
import ctypes, glob, os, ppo_vec
(path,) = glob.glob(os.path.dirname(ppo_vec.np.__file__) + ".libs/libscipy_openblas*")
name = ctypes.CDLL(path).scipy_openblas_get_corename64_
name.restype = ctypes.c_char_p
print(os.environ["OPENBLAS_CORETYPE"], name().decode())"""
    env, here = {k: v for k, v in os.environ.items() if k != "OPENBLAS_CORETYPE"} | given, Path(ppo_vec.__file__).parent
    out = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=here, capture_output=True, text=True, check=True
    ).stdout
    assert out.split() == [given.get("OPENBLAS_CORETYPE", expected)] * 2


# ---- --evaluate ------------------------------------------------------------------------------------------------------


def test_evaluate(trained: Path, capsys: Capture) -> None:
    """The same with any number of workers, and the same as the test at the end of training."""
    before = digests(trained)
    outputs = []
    for extra in ([], ["--num-workers", "1"], ["--eval-episodes", "3"]):
        assert main("--evaluate", trained, *extra) == 0
        outputs.append(re.sub("__[0-9]+/", "/", capsys.readouterr().out))
    assert outputs[0] == outputs[1]
    files = [path.read_bytes() for path in sorted(Path("runs").glob("walker__evaluation__*/evaluation.csv"))]
    assert files[0] == files[1] == (trained / "evaluation.csv").read_bytes()
    assert (len(files), files[2].count(b"\n"), files[2].startswith(files[0])) == (3, 4, True)
    summary = json.loads((trained / "summary.json").read_text())
    assert f"{summary['eval_mean']:.1f} +- {summary['eval_std']:.1f}" in outputs[0]
    assert "deterministic" in outputs[0]
    assert "3 episodes" in outputs[2]
    episodes = [[int(line.split()[-1]) for line in output.splitlines()[2:-1]] for output in outputs]
    assert [(len(counts), sum(counts)) for counts in episodes] == [(10, 2), (10, 2), (10, 3)]
    falls = [row["fell"] for row in csv.DictReader((trained / "evaluation.csv").read_text().splitlines())].count("True")
    assert f", {falls} falls;" in outputs[0]
    assert main("--evaluate", trained / "best.pt") == 0
    assert f"{summary['eval_mean']:.1f} +- " in capsys.readouterr().out
    assert digests(trained) == before


@pytest.mark.parametrize(("mean", "effort"), [(0.25, "0.25"), (-3.0, "1.00")])
def test_effort(mean: float, effort: str, tiny_run: Path, tmp_path: Path, capsys: Capture) -> None:
    """The mean |action| in units of the bounds, which are 2, of a policy that always does the same."""
    tree = read(tiny_run / "best.pt")
    last = max(name for name in tree["agent"] if re.fullmatch(r"actor\.\d\.bias", name)).removesuffix("bias")
    agent = tree["agent"] | {f"{last}weight": torch.zeros_like(tree["agent"][f"{last}weight"])}
    (tmp_path / "best.pt").write_bytes(changed(tree, {**agent, f"{last}bias": torch.tensor([mean])}, "agent"))
    assert main("--evaluate", tmp_path) == 0
    assert f", mean length 20, effort {effort}\n" in capsys.readouterr().out


def test_a_progress_bar_of_episodes(tmp_path: Path, monkeypatch: Patch, capsys: Capture) -> None:
    """On a terminal, for the choice and the test after the training, and for --evaluate; then it disappears."""
    bars, real = [], ppo_vec.progress_bar

    def note(*given: Any) -> Any:
        bars.append((*given, parts := []))
        bar = real(*given)
        update, bar.update = bar.update, lambda n: (parts.append(n), update(n))
        return bar

    monkeypatch.setattr(ppo_vec, "progress_bar", note)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    flags = *tiny(), "--num-envs", "2", "--num-steps", "20", "--eval-episodes", "5"
    assert train(tmp_path / "run", *flags) == 0
    episodes = [(total, show, parts) for total, _, unit, show, parts in bars[1:]]
    assert bars[0][:3] == (120, 0, "step")
    assert episodes[:1] == [(5, False, [5])], "a periodic evaluation has a bar"
    assert len([True for _, show, _ in episodes if show]) >= 2
    assert all((total, parts) == (5, [2, 2, 1]) for total, show, parts in episodes if show)
    capsys.readouterr()
    assert main("--evaluate", tmp_path / "run") == 0
    *_, before, after = err = capsys.readouterr().err.split("\r")
    assert any("0/5 [" in line for line in err)
    assert (before.strip(), after, sum(bars[-1][-1])) == ("", "", 5)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False)
    assert main("--evaluate", tmp_path / "run") == 0
    assert capsys.readouterr().err == "", "a log file needs no bar that disappears"


@pytest.mark.parametrize("name", ["BipedalWalker-v3", "BipedalWalkerHardcore-v3"])
def test_policies_of_older_versions(name: str, capsys: Capture) -> None:
    """The committed ones were made by earlier versions, with other flags; they walk to the end."""
    run = ROOT / "runs" / "reference" / name
    assert ppo_vec.load_policy(run)(np.zeros((5, 24), np.float32)).shape == (5, 4)
    assert main("--evaluate", run, "--eval-episodes", "2") == 0
    mean = float(re.search(rf"{name}, deterministic: (\S+) \+- .*2 episodes", capsys.readouterr().out)[1])
    assert mean > 280


def test_a_policy_whose_critic_saw_two_numbers_more(tiny_run: Path, tmp_path: Path) -> None:
    """Files of walkers were so for a while: the normaliser has columns that the policy never sees."""
    _, tree = ppo_vec.read_checkpoint(tiny_run, policy=True)
    for name in ("normalizer.mean", "normalizer.var"):
        tree["agent"][name] = torch.cat((tree["agent"][name], torch.full((2,), 9.0, dtype=torch.float64)))
    (tmp_path / "older.pt").write_bytes(ppo_vec.encode(tree))
    obs = np.random.default_rng(0).normal(size=(5, 3))
    assert np.array_equal(ppo_vec.load_policy(tmp_path / "older.pt")(obs), ppo_vec.load_policy(tiny_run)(obs))


def test_a_flag_that_has_gone_and_was_off_does_no_harm(tiny_run: Path) -> None:
    _, tree = ppo_vec.read_checkpoint(tiny_run)
    assert ppo_vec.saved_args({**tree, "args": {**tree["args"], "practice": 0, "final_gamma": None}}).env_id
    with pytest.raises(ppo_vec.UserError, match=r"other flags \(final_gamma\)"):
        ppo_vec.saved_args({**tree, "args": {**tree["args"], "practice": 0, "final_gamma": 0.99}})


def test_capture_video(tmp_path: Path, monkeypatch: Patch, capsys: Capture) -> None:
    import imageio

    run = tmp_path / "pendulum"
    args = "--env-id Pendulum-v1 --num-envs 2 --num-workers 1 --num-steps 32 --total-timesteps 64 --eval-episodes 1"
    assert train(run, *args.split(), "--capture-video") == 0
    path = run / "videos" / "Pendulum-v1-seed0.mp4"
    pictures = imageio.mimread(path)
    assert len(pictures) == 201  # the whole episode of 200 steps
    assert pictures[0].shape == (500, 500, 3)
    assert any((picture != pictures[0]).any() for picture in pictures), "a still"
    before = digests(run)
    assert main("--evaluate", run, "--capture-video", "--runs-dir", tmp_path / "films") == 0
    *_, video, episodes = capsys.readouterr().out.splitlines()
    (folder,) = (tmp_path / "films").iterdir()
    assert re.fullmatch(r"pendulum__evaluation__\d{13}", folder.name)
    assert video == f"video: {folder / 'videos' / path.name}"
    assert episodes == f"episodes: {folder / 'evaluation.csv'}"
    assert (folder / "videos" / path.name).read_bytes() == path.read_bytes()
    assert (folder / "evaluation.csv").read_bytes() == (run / "evaluation.csv").read_bytes()
    assert sorted(file.name for file in folder.rglob("*")) == [path.name, "evaluation.csv", "videos"]
    assert digests(run) == before, "the run has changed"

    monkeypatch.setattr(imageio, "get_writer", fail_with(OSError("no space\nleft")))  # it takes nothing with it
    assert train(tmp_path / "other", *args.split(), "--capture-video") == 1
    *_, last = capsys.readouterr().err.splitlines()
    hint = f"; mend that, and --resume {tmp_path}/other loses nothing"
    assert last == f"ppo_vec.py: error: cannot write {tmp_path}/other/videos/{path.name}: no space left{hint}"
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (run, tmp_path / "other")]
    assert [summary["finished"] for summary in summaries] == [True, False]
    assert len({summary["eval_mean"] for summary in summaries}) == 1  # the result is there, as without a film
    assert main("--evaluate", tmp_path / "other", "--capture-video") == 1
    captured = capsys.readouterr()
    assert "Pendulum-v1, deterministic: " in captured.out
    assert re.search(rf"cannot write /.*/runs/other__evaluation__\d+/videos/{path.name}: no space left$", captured.err)


def test_evaluation_that_cannot_be_written(tiny_run: Path, tmp_path: Path, capsys: Capture) -> None:
    """It is told before it has cost anything."""
    (tmp_path / "file").touch()
    with faults.replaced_attribute(ppo_vec.VecEnv, "play", fail_with(AssertionError("it was played"))):
        code = main("--evaluate", tiny_run, "--runs-dir", tmp_path / "file")
    assert_one_line(
        code, capsys.readouterr(), f"cannot make the folder {tmp_path}/file/tiny__evaluation__", "--runs-dir"
    )


def test_track_logs_to_wandb(tmp_path: Path, monkeypatch: Patch) -> None:
    """What TensorBoard gets, at the same steps, under the name of the run; at the end of a finished one its files."""
    logged: dict[str, list[tuple[int, float]]] = {}
    session, ended, sent = {}, [], []

    def log(values: dict[str, float], step: int) -> None:
        for tag, value in values.items():
            logged.setdefault(tag, []).append((step, pytest.approx(value, rel=1e-6)))  # TensorBoard has float32

    def save(pattern: str, base_path: str, policy: str) -> None:
        """As wandb does: both are patterns; the place in the run is what follows base_path."""
        assert (ended, policy) == ([], "now")
        (path,) = map(Path, glob.glob(pattern))
        (base,) = map(Path, glob.glob(base_path))
        sent.append((str(path.relative_to(base)), path.read_bytes()))

    wandb = SimpleNamespace(log=log, save=save, finish=lambda: ended.append(not sent))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **given: session.update(given) or wandb))
    for name in ("WANDB_PROJECT", "WANDB_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(ppo_vec, "GRACE", 600)
    run = tmp_path / "run [1]"
    with monkeypatch.context() as patch:
        patch.setattr(ppo_vec, "should_save", stop_at(50))
        assert train(run, *tiny("film"), "--track", "--capture-video") == 143
    assert (session["project"], session["name"], session["id"]) == ("ppo_vec", run.name, run.name)
    assert (session["resume"], session["config"]["num_steps"]) == ("allow", 20)
    assert (ended, sent) == ([True], [])
    (run / "videos").mkdir(exist_ok=True)
    (run / "videos" / "stranger.mp4").symlink_to(__file__)
    monkeypatch.setenv("WANDB_PROJECT", "walkers")
    monkeypatch.setenv("WANDB_NAME", "mine")
    ended.clear()
    assert main("--resume", run, "--track", "--capture-video") == 0
    assert (session["project"], session["name"], session["id"]) == ("walkers", "mine", run.name)
    assert logged == faults.scalars(run)
    assert ended == [False]
    names = "best.pt", "evaluation.csv", "summary.json", "learning_curve.png", f"videos/{tiny_id('film')}-seed0.mp4"
    assert sent == [(name, (run / name).read_bytes()) for name in names]


def test_interrupted_evaluation_is_quiet(trained: Path, tmp_path: Path) -> None:
    trainer = Trainer("--evaluate", str(trained), "--eval-episodes", "50000", "--runs-dir", str(tmp_path))
    trainer.wait_for(lambda: list(tmp_path.iterdir()) and trainer.workers())
    trainer.send(signal.SIGINT)
    assert trainer.finish().check(130).seconds < 60


# ---- --resume --------------------------------------------------------------------------------------------------------


def test_resuming_a_finished_run_changes_nothing(
    tiny_run: Path, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    before = digests(tiny_run)
    monkeypatch.chdir(tiny_run)
    for where in (tiny_run, tiny_run / "checkpoint.pt", "."):
        assert main("--resume", where) == 0
        assert "is finished; a longer --total-timesteps" in capsys.readouterr().err
    assert main("--evaluate", "checkpoint.pt", "--runs-dir", tmp_path) == 0
    assert [path.name.rstrip("0123456789") for path in tmp_path.iterdir()] == ["tiny__evaluation__"]
    assert digests(tiny_run) == before


def stop_at(steps: int) -> Callable[..., bool]:
    """In place of should_save: ends the run as a signal does, at this step."""

    def should_save(state: ppo_vec.State) -> bool:
        if state.global_step >= steps:
            signal.raise_signal(signal.SIGTERM)
        return False

    return should_save


def test_resume_continues_folder_counters_and_schedule(tmp_path: Path, monkeypatch: Patch, capsys: Capture) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    monkeypatch.setattr(ppo_vec, "GRACE", 600)
    assert train(whole, *tiny("", 300), "--anneal-share", "1") == 0
    with monkeypatch.context() as patch:
        patch.setattr(ppo_vec, "should_save", stop_at(150))
        assert train(run, *tiny("", 300), "--anneal-share", "1") == 143
        assert fingerprint(run)["checkpoint"]["global_step"] == 160
        moved = run.rename(tmp_path / "moved")  # the run is where its folder is
        for path in (moved / "episodes.csv", *moved.glob("events*")):  # written after the checkpoint: will come again
            path.write_bytes(path.read_bytes() + b"160,1.0,5.0,20,0\n")
        patch.setattr(ppo_vec, "should_save", stop_at(220))
        assert main("--resume", moved) == 143
        assert f"continue with: --resume {moved}" in capsys.readouterr().err
    assert main("--resume", moved / "checkpoint.pt", "--num-workers", "1") == 0
    assert not run.exists()
    assert len(list(moved.glob("events*"))) == 1
    found = faults.differences(fingerprint(moved), fingerprint(whole))
    assert not found, found
    rates = fingerprint(moved)["scalars"]["policy/learning_rate"]
    assert rates == [(40 * i, pytest.approx(3e-4 * (1 - 40 * (i - 1) / 300))) for i in range(1, 9)]


def test_a_new_run_begins_with_the_policy_of_another(tiny_run: Path, tmp_path: Path, capsys: Capture) -> None:
    """With its networks and normaliser; counters, optimizer and episodes are new."""
    agents: list[dict[str, Any]] = []

    def note(*args: Any) -> Any:
        agents.append(copy.deepcopy(args[1].agent.state_dict()))
        return collect(*args)

    collect, run = ppo_vec.collect, tmp_path / "run"
    with faults.replaced_attribute(ppo_vec, "collect", note):
        assert train(run, *tiny(), "--init-from", str(tiny_run), "--seed", "5") == 0
    best, state = read(tiny_run / "best.pt"), read(run / "checkpoint.pt")
    assert_same_tensors(agents[0], best["agent"])
    assert state["global_step"] == read(tiny_run / "checkpoint.pt")["global_step"]
    assert not torch.equal(state["agent"]["actor.0.weight"], best["agent"]["actor.0.weight"])
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "alone").mkdir()
    shutil.copy(tiny_run / "best.pt", tmp_path / "alone")
    capsys.readouterr()
    assert_one_line(main("--resume", tmp_path / "alone"), capsys.readouterr(), "it holds a policy only", "--init-from")


def assert_same_tensors(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_longer_total_timesteps_extends(tmp_path: Path, monkeypatch: Patch) -> None:
    run = tmp_path / "run"
    monkeypatch.setattr(ppo_vec, "GRACE", 600)
    assert train(run, *tiny("", 100), "--anneal-share", "1") == 0
    first = fingerprint(run)
    with monkeypatch.context() as patch:
        patch.setattr(ppo_vec, "should_save", stop_at(150))
        assert main("--resume", run, "--total-timesteps", "200") == 143
    assert fingerprint(run)["checkpoint"]["finished"] is False, "it would not be continued"
    assert json.loads((run / "summary.json").read_text())["finished"] is False
    assert main("--resume", run) == 0
    last = fingerprint(run)
    assert (last["checkpoint"]["global_step"], last["checkpoint"]["finished"]) == (200, True)
    assert last["episodes"][: len(first["episodes"])] == first["episodes"]
    assert len(last["episodes"]) > len(first["episodes"])
    losses, rates = (last["scalars"][tag] for tag in ("losses/policy_loss", "policy/learning_rate"))
    assert losses[:3] == first["scalars"]["losses/policy_loss"]
    # The schedule had come to its end, and goes back to where the longer one has it at that step.
    assert [rate for _, rate in rates] == pytest.approx([3e-4, 1.8e-4, 0.6e-4, 1.2e-4, 0.6e-4])
    found = json.loads((run / "args.json").read_text())
    sessions = [*found["earlier"], found]
    assert [session["args"]["total_timesteps"] for session in sessions] == [100, 200, 200]
    assert all(session["git_commit"] == found["git_commit"] and session["command"] for session in sessions)


def test_resume_with_the_checkpoint_alone(tiny_run: Path, tmp_path: Path) -> None:
    """Logs that were left behind begin anew, with their headers."""
    run = tmp_path / "moved"
    run.mkdir()
    shutil.copy(tiny_run / "checkpoint.pt", run)
    assert main("--resume", run, "--total-timesteps", "200") == 0
    header, *rows = (run / "episodes.csv").read_text().splitlines()
    assert header == "global_step,time_s,return,length,env"
    assert [row.split(",")[0] for row in rows] == ["160", "160", "200", "200"]
    assert [step for step, _ in faults.scalars(run)["losses/policy_loss"]] == [160, 200]


def test_the_latest_run(tiny_run: Path, tmp_path: Path, monkeypatch: Patch, capsys: Capture) -> None:
    """That whose checkpoint is the newest; in runs/, or in --runs-dir."""
    monkeypatch.chdir(tmp_path)
    for i, name in enumerate("bcad"):
        shutil.copytree(tiny_run, tmp_path / "runs" / name)
        for file in (tmp_path / "runs" / name).glob("checkpoint*.pt"):
            os.utime(file, (1e9 - i % 3, 1e9 - i % 3))
    os.utime("runs/c/checkpoint.pt", (1e9 + 5, 1e9 + 5))
    os.rename("runs/c/checkpoint.pt", "runs/c/checkpoint.previous.pt")  # as between the two renames of a save
    (tmp_path / "runs" / "e").mkdir()
    (tmp_path / "runs" / "e" / "checkpoint.pt").symlink_to("nowhere")
    assert main("--resume", "latest") == 0
    assert "runs/c is finished" in capsys.readouterr().err
    assert main("--resume", "latest", "--total-timesteps", "160") == 0
    assert read(Path("runs/c/checkpoint.pt"))["global_step"] == 160
    (tmp_path / "runs").rename("others")
    os.utime("others/a/checkpoint.pt")
    shutil.copy("others/a/checkpoint.pt", "others/a/best.pt")
    capsys.readouterr()
    assert main("--evaluate", "latest", "--runs-dir", "others") == 0
    mean = json.loads((tiny_run / "summary.json").read_text())["last_eval_mean"]
    assert f": {mean:.1f} +- " in capsys.readouterr().out


DRIFT = """
import gymnasium as gym, numpy as np

class Drift(gym.Env):
    metadata = {"render_modes": ["rgb_array"], "render_fps": 25}
    observation_space, action_space = gym.spaces.Box(-9, 9, (2,)), gym.spaces.Box(-1, 1, (1,))

    def __init__(self, pull=0.0, render_mode=None):
        self.pull, self.render_mode = pull, render_mode
    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.state = self.np_random.uniform(-1, 1, 2).astype(np.float32)
        return self.state, {}
    def step(self, action):
        self.state = 0.9 * self.state + 0.1 * action
        return self.state, self.pull, False, False, {}
    def render(self):
        return np.full((64, 96, 3), 128 + 100 * self.state[0], np.uint8)

gym.register("Drift-v0", Drift, max_episode_steps=20)
stack = lambda env: gym.wrappers.FrameStackObservation(env, 3)
"""


@pytest.mark.filterwarnings("ignore:.*Overriding environment")
def test_env_kwargs_and_wrappers(tmp_path: Path, monkeypatch: Patch, capsys: Capture) -> None:
    """An environment of the user's own is trained, evaluated, filmed and resumed. Its code is imported when typed."""
    import imageio

    (tmp_path / "drift.py").write_text(DRIFT)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(ppo_vec, "GRACE", 600)
    typed = "--env-id", "drift:Drift-v0", "--wrappers", "drift:stack"
    args = *tiny(), *typed, "--env-kwargs", '{"pull": 0.25}', "--capture-video"
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert train(whole, *args) == 0
    with monkeypatch.context() as patch:
        patch.setattr(ppo_vec, "should_save", stop_at(50))
        assert train(run, *args) == 143
    assert f"continue with: --resume {run} {' '.join(typed)}\n" in capsys.readouterr().err
    for given, wanted in (((), typed[:2]), (typed[:2], typed[2:]), (typed[2:], typed[:2])):
        sys.modules.pop("drift", None)
        for mode in ("--resume", "--evaluate"):
            capsys.readouterr()
            assert_one_line(main(mode, run, *given), capsys.readouterr(), "would import code", " ".join(wanted))
            assert "drift" not in sys.modules
    assert main("--resume", run, *typed) == 0
    found = faults.differences(fingerprint(run), fingerprint(whole))
    assert not found, found
    assert {float(ret) for _, ret, *_ in fingerprint(run)["episodes"]} == {5.0}  # 20 steps, 0.25 each
    capsys.readouterr()
    assert main("--evaluate", run, *typed) == 0
    assert "drift:Drift-v0, deterministic: 5.0 +- 0.0 (min 5.0, 1 episodes)" in capsys.readouterr().out
    pictures = imageio.mimread(run / "videos" / "drift_Drift-v0-seed0.mp4")
    assert (len(pictures), pictures[0].shape) == (21, (64, 96, 3))
    sys.modules.pop("drift")
    act = ppo_vec.load_policy(run)  # of three frames of two numbers
    assert (act(np.zeros((4, 6))).shape, act(np.zeros((3, 2))).shape) == ((4, 1), (1,))
    assert "drift" not in sys.modules


@pytest.mark.filterwarnings("ignore:.*Overriding environment")
def test_the_environment_in_the_readme(tmp_path: Path, monkeypatch: Patch) -> None:
    """Its two commands train it, and with the wind it learns to stay longer in 16,000 steps."""
    readme = (ROOT / "README.md").read_text()
    (code,) = re.findall(r"```python\n(import gymnasium.*?)```", readme, re.DOTALL)
    (tmp_path / "my_module.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    commands = [shlex.split(line) for line in re.findall(r"    python ppo_vec.py (--env-id my_module:.*)", readme)]
    short = "--num-workers", "1", "--eval-episodes", "20", "--total-timesteps"
    for number, (words, steps) in enumerate(zip(commands, ("512", "16384"), strict=True)):
        assert train(tmp_path / f"run{number}", *words, *short, steps) == 0
        sys.modules.pop("my_module", None)
    returns = [float(ret) for _, ret, *_ in fingerprint(tmp_path / "run1")["episodes"]]
    best = json.loads((tmp_path / "run1" / "summary.json").read_text())["eval_mean"]
    assert best > np.mean(returns[:20]) + 30


# ---- load_policy -----------------------------------------------------------------------------------------------------


def test_load_policy(trained: Path, tiny_run: Path) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    act = ppo_vec.load_policy(trained)
    assert torch.equal(torch.get_rng_state(), before)
    space = gym.make("BipedalWalker-v3").action_space
    batch = np.random.default_rng(0).normal(scale=3, size=(37, 24)).astype(np.float32)
    actions = act(batch)
    assert actions.shape == (37, 4)
    assert actions.dtype == np.float32
    assert all(space.contains(action) for action in actions)
    for row, action in zip(batch, actions, strict=True):
        alone = act(row)
        assert alone.shape == (4,)
        assert alone.tobytes() == action.tobytes(), "another action in another batch"
    assert np.array_equal(act(batch.astype(np.float64)), actions)
    assert act(batch[:0]).shape == (0, 4)
    for name in ("best.pt", "checkpoint.pt"):
        assert ppo_vec.load_policy(str(trained / name))(batch).shape == (37, 4)
    far = ppo_vec.load_policy(tiny_run)(np.random.default_rng(0).normal(scale=100, size=(1000, 3)))
    assert np.abs(far).max() <= 2, "beyond the bounds of the tiny environment"


def test_policy_of_a_run_under_way(trained: Path, tmp_path: Path, capsys: Capture) -> None:
    """Before the first evaluation there is no best.pt; a damaged one is noticed, and the checkpoint used."""
    shutil.copy(trained / "checkpoint.pt", tmp_path)
    (tmp_path / "best.pt").write_bytes(b"junk")
    obs = np.ones(24, np.float32)
    expected = ppo_vec.load_policy(trained / "checkpoint.pt")(obs)
    capsys.readouterr()
    assert np.array_equal(ppo_vec.load_policy(tmp_path)(obs), expected)
    assert "best.pt" in capsys.readouterr().err
    (tmp_path / "best.pt").unlink()
    assert np.array_equal(ppo_vec.load_policy(tmp_path)(obs), expected)
    assert capsys.readouterr().err == ""
