"""The command line: bad input, the files of a run, and the modes --evaluate, --resume and load_policy."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import itertools
import json
import math
import multiprocessing.process
import os
import re
import signal
import subprocess
import sys
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

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))

import faults
from faults import Trainer, fingerprint, start, tiny, tiny_id


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a short, finished run of BipedalWalker-v3, made by the command as a user types it."""
    run = tmp_path_factory.mktemp("runs") / "walker"
    start(run).finish().check()
    return run


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of a tiny environment."""
    run = tmp_path_factory.mktemp("runs") / "tiny"
    with faults.quiet(), faults.replaced_attribute(ppo_vec.Run, "write_curve", lambda run: None):
        assert train(run) == 0
    return run


def train(run: Path, *args: str) -> int:
    return ppo_vec.main([*(args or tiny()), "--runs-dir", str(run.parent), "--run-name", run.name])


def main(argv: list[str]) -> int:
    """main() where an exit of tyro's counts as its exit code."""
    try:
        return ppo_vec.main(argv)
    except SystemExit as error:
        return int(error.code or 0)


def digests(folder: Path) -> dict[str, tuple[str, float]]:
    """The content and time of modification of every file."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(f): (hashlib.sha256(f.read_bytes()).hexdigest(), f.stat().st_mtime) for f in files}


# ----------------------------------------------------------------------------------------------------------------------
# Bad input
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Fails the test if a process is started; runs it in an empty folder, which must stay empty."""

    def fail(*_: Any, **__: Any) -> None:
        pytest.fail("a process was started")

    monkeypatch.setattr(ppo_vec.AsyncVectorEnv, "__init__", fail)
    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", fail)
    monkeypatch.setattr(subprocess.Popen, "__init__", fail)
    folder = tmp_path / "empty"
    folder.mkdir()
    monkeypatch.chdir(folder)
    yield
    assert not [path for path in folder.rglob("*") if path.is_file()], "bad input has left files"
    assert not list((folder / "runs").glob("*")), "bad input has left a run folder"


def assert_one_line(code: int, captured: Any, *words: str) -> None:
    assert code == 2, captured
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("ppo_vec.py: error: ")
    for word in words:
        assert word in lines[0], f"{word!r} is not in {lines[0]!r}"


@pytest.mark.parametrize("env_id", ppo_vec.TUNED)
def test_the_tuned_values_that_are_printed_can_be_typed(env_id: str) -> None:
    args, _ = ppo_vec.parse_args(["--env-id", env_id])
    typed, _ = ppo_vec.parse_args(["--env-id", "Pendulum-v1", *ppo_vec.tuned_flags(args).split()])
    assert dataclasses.replace(typed, env_id=env_id) == args


BAD_ARGUMENTS = [
    *(
        f"--{flag} {value}"
        for flag in ("num-envs", "num-workers", "num-steps", "num-minibatches", "update-epochs", "total-timesteps")
        for value in (0, -1)
    ),
    "--eval-episodes 0",
    "--seed -1",
    "--num-steps 100 --num-minibatches 7",
    "--num-envs 3 --num-workers 2 --num-steps 64 --num-minibatches 5",
    "--num-envs 2 --num-workers 1 --num-steps 8 --num-minibatches 16",  # one sample a minibatch
    "--num-envs 2 --num-workers 1 --num-steps 8 --num-minibatches 32",  # less than one
    "--num-workers 5 --num-envs 4",
    "--num-steps 1000000000",  # more than the memory
    *(f"--learning-rate {value}" for value in ("nan", "inf", "0", "-0.001")),
    *(f"--critic-learning-rate {value}" for value in ("nan", "0", "-1")),
    *(
        f"--{flag} {value}"
        for flag in ("gamma", "final-gamma", "gae-lambda", "value-lambda")
        for value in ("-0.1", "1.1", "nan")
    ),
    *(f"--{flag} {value}" for flag in ("clip-coef", "max-grad-norm", "target-kl") for value in ("0", "-1", "inf")),
    *(
        f"--{flag} {value}"
        for flag in ("ent-coef", "vf-coef", "bounds-loss-coef", "action-cost")
        for value in ("-1", "nan")
    ),
    *(f"--worker-timeout {value}" for value in ("0", "-1", "nan", "inf", "1e300")),
    "--fall-reward 1",
    "--fall-reward -1 --final-fall-reward 0",
    "--env-id Pendulum-v1 --final-fall-reward -1",
    "--initial-std 0",
    "--min-std -0.1",
    "--initial-std 0.2 --min-std 0.3",
    "--env-id BipedalWalkerHardcore-v3 --initial-std 0.2",
    "--min-std 0.1 --state-dependent-std",
    "--swa-share -0.1",
    "--swa-share 1",
    "--swa-share nan",
    "--practice -0.1",
    "--practice 1",
    "--practice nan",
    "--env-id Pendulum-v1 --practice 0.5",
    "--final-gamma 1",
    "--gamma 1 --final-gamma 0.99",
    "--actor-hidden-sizes 64 0",
    "--critic-hidden-sizes -1",
    "--stochastic",
    "--run-name a/b",
    "--run-name ..",
    "--run-name .",
    "--run-name /absolute",
    "--exp-name a/b",
    "--resume=",
    "--evaluate=",
]  # fmt: skip


@pytest.mark.parametrize("argv", BAD_ARGUMENTS)
def test_bad_argument(argv: str, no_process: None, capsys: pytest.CaptureFixture[str]) -> None:
    *_, flag = (word for word in argv.split() if word.startswith("--"))
    assert_one_line(main(argv.split()), capsys.readouterr(), flag.rstrip("="))


@pytest.mark.parametrize(
    ("env_id", "words"),
    [
        ("Nope-v0", ["Nope"]),
        ("BipedalWalker-v2", ["BipedalWalker-v3"]),
        ("no_such_module:Nope-v0", ["no_such_module"]),
        ("", []),
        ("CartPole-v1", ["Discrete", "Box"]),
        ("MountainCar-v0", ["Discrete"]),
        ("FrozenLake-v1", ["Discrete observations"]),
        ("Blackjack-v1", ["Tuple observations"]),
        (tiny_id("discrete"), ["Discrete observations"]),
        (tiny_id("unbounded"), ["unbounded actions"]),
    ],
)
@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
def test_environment_that_does_not_fit(
    env_id: str, words: list[str], no_process: None, capfd: pytest.CaptureFixture[str]
) -> None:
    code = main(["--env-id", env_id])
    assert_one_line(code, capfd.readouterr(), "--env-id", *words)


@pytest.mark.parametrize("argv", ["--bogus 3", "--num-envs many", "--activation sigmoid", "--learning-rate x", "extra"])
def test_what_tyro_refuses(argv: str, no_process: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv.split()) == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err + captured.out


def test_walker_without_a_version_is_the_walker() -> None:
    """Gymnasium takes the newest version; it must be replayed as that one, with that one's tuned values."""
    args, _ = ppo_vec.parse_args(["--env-id", "BipedalWalker"])
    assert args == dataclasses.replace(ppo_vec.parse_args([])[0], env_id="BipedalWalker")
    assert isinstance(ppo_vec.Task.of(args).make_env(), ppo_vec.FastWalker)


def broken_checkpoints(tree: dict[str, Any]) -> dict[str, tuple[bytes | None, list[str]]]:
    """{what is wrong: the file's bytes (None: no file) and words of the message}."""
    good = ppo_vec.encode(tree)
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 16
    return {
        "missing": (None, ["no checkpoint"]),
        "empty": (b"", ["checkpoint.pt"]),
        "cut off": (good[:-100], ["checkpoint.pt", "cut off"]),
        "damaged": (bytes(flipped), ["checkpoint.pt", "damaged"]),
        "foreign": (faults.torch_bytes({"model": torch.zeros(3)}), ["checkpoint.pt", "not a ppo_vec checkpoint"]),
        "a module": (faults.torch_bytes(torch.nn.Linear(2, 2)), ["checkpoint.pt", "not a ppo_vec checkpoint"]),
        "other format": (ppo_vec.encode({**tree, "format": "ppo_vec 0"}), ["checkpoint.pt", "format"]),
        "module:id": (
            ppo_vec.encode(faults.replaced(tree, ("args", "env_id"), f"evil_module:{tiny_id()}")),
            ["evil_module", "would import code"],
        ),
        "another environment": (ppo_vec.encode(faults.replaced(tree, ("args", "env_id"), "Pendulum-v1")), []),
        "unknown argument": (ppo_vec.encode(faults.replaced(tree, ("args", "x"), 1)), []),
        "bad argument": (ppo_vec.encode(faults.replaced(tree, ("args", "num_envs"), 0)), ["--num-envs"]),
        "argument of another type": (ppo_vec.encode(faults.replaced(tree, ("args", "num_workers"), "x")), []),
        "no weights": (ppo_vec.encode(faults.replaced(tree, ("agent",), ...)), []),
        "other weights": (ppo_vec.encode(faults.replaced(tree, ("agent", "critic.0.weight"), torch.zeros(2))), []),
    }


BROKEN = (
    "missing", "empty", "cut off", "damaged", "foreign", "a module", "other format", "module:id", "another environment",
    "unknown argument", "bad argument", "argument of another type", "no weights", "other weights",
)  # fmt: skip


@pytest.mark.parametrize("mode", ["--resume", "--evaluate", "load_policy"])
@pytest.mark.parametrize("what", BROKEN)
def test_checkpoint_that_cannot_be_used(
    what: str, mode: str, trained: Path, no_process: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, words = broken_checkpoints(ppo_vec.decode((trained / "checkpoint.pt").read_bytes()))[what]
    (tmp_path / "evil_module.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')")
    run = tmp_path / "run"
    run.mkdir()
    if data is not None:
        (run / "checkpoint.pt").write_bytes(data)
    sys.path.insert(0, str(tmp_path))
    try:
        if mode == "load_policy":
            if what in ("another environment", "module:id"):  # shapes are all that a policy needs
                ppo_vec.load_policy(run)
                return
            with pytest.raises(ppo_vec.UserError) as raised:
                ppo_vec.load_policy(run)
            assert all(word in str(raised.value) for word in words)
            return
        total = [] if mode == "--evaluate" else ["--total-timesteps", "8000"]  # it is finished otherwise
        assert_one_line(main([mode, str(run), *total]), capsys.readouterr(), *words)
    finally:
        sys.path.remove(str(tmp_path))
        assert not (tmp_path / "executed").exists(), "a checkpoint has executed code"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--resume RUN --env-id Pendulum-v1", ["BipedalWalker-v3", "Pendulum-v1"]),
        ("--evaluate RUN --env-id BipedalWalkerHardcore-v3", ["BipedalWalker-v3", "Hardcore"]),
        ("--resume RUN --total-timesteps 9999 --num-envs 8", ["--num-envs"]),
        ("--resume RUN --total-timesteps 9999 --seed 7", ["--seed"]),
        ("--resume RUN --total-timesteps 9999 --gamma 0.5", ["--gamma"]),
        ("--resume RUN --total-timesteps 9999 --actor-hidden-sizes 8", ["--actor-hidden-sizes"]),
        ("--resume RUN --total-timesteps 0", ["--total-timesteps"]),
        ("--resume RUN --stochastic", ["--stochastic"]),
        ("--resume RUN --evaluate RUN", ["--resume", "--evaluate"]),
        ("--resume RUN/best.pt", ["best.pt", "policy only"]),
        ("--resume RUN/args.json", ["args.json"]),
        ("--resume RUN/nothing", ["RUN/nothing"]),
        ("--evaluate RUN/args.json/x", []),
        ("--evaluate " + "a" * 5000, []),
        ("--evaluate RUN --eval-episodes 0", ["--eval-episodes"]),
        ("--evaluate RUN --seed 7", ["--seed", "evaluated"]),
        ("--evaluate RUN --activation relu", ["--activation"]),
        ("--evaluate RUN --run-name x", ["--run-name"]),
        ("--resume RUN --total-timesteps 9999 --run-name x", ["--run-name"]),
        ("--runs-dir RUN/.. --run-name NAME", ["already holds a run", "--resume"]),
        ("--runs-dir RUN/args.json --run-name x", ["cannot write"]),  # below a file: even root cannot
        ("--runs-dir RUN/args.json/deeper --run-name x", ["cannot write"]),
        ("--run-name " + "a" * 300, ["cannot write"]),
    ],
)
def test_run_that_does_not_fit(
    argv: str, words: list[str], trained: Path, no_process: None, capsys: pytest.CaptureFixture[str]
) -> None:
    before = digests(trained)
    filled = [word.replace("RUN", str(trained)).replace("NAME", trained.name) for word in argv.split()]
    words = [word.replace("RUN", str(trained)) for word in words]
    assert_one_line(main(filled), capsys.readouterr(), *words)
    assert digests(trained) == before


@pytest.mark.parametrize(("flag", "module"), [("--track", "wandb"), ("--capture-video", "imageio_ffmpeg")])
def test_missing_extra(
    flag: str, module: str, no_process: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What an option needs is missed at once, not after the training."""
    monkeypatch.setitem(sys.modules, module, None)
    assert_one_line(main([*tiny(), flag]), capsys.readouterr(), flag)


def fail_with(error: Exception) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    return fail


def test_a_video_of_what_cannot_be_rendered(no_process: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert_one_line(main([*tiny(), "--capture-video"]), capsys.readouterr(), "--capture-video", "render")


def test_a_video_without_a_display(
    no_process: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(PendulumEnv, "render", fail_with(RuntimeError("no\nOpenGL")))
    code = main(["--env-id", "Pendulum-v1", "--capture-video"])
    assert_one_line(code, capsys.readouterr(), "--capture-video", "no OpenGL")


def test_track_that_wandb_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=fail_with(ConnectionError("not\nlogged in"))))
    assert_one_line(train(tmp_path / "run", *tiny(), "--track"), capsys.readouterr(), "--track", "not logged in")


def test_compile_without_a_compiler(
    tiny_run: Path, no_process: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """A training needs one; what was trained with one does not."""
    tree = ppo_vec.decode((tiny_run / "best.pt").read_bytes())
    compiled = tmp_path / "best.pt"
    compiled.write_bytes(ppo_vec.encode(faults.replaced(tree, ("args", "compile"), True)))
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("no-such-compiler",))
    monkeypatch.setattr(subprocess, "check_output", fail_with(FileNotFoundError()))
    assert_one_line(main([*tiny(), "--compile"]), capsys.readouterr(), "--compile", "C++ compiler")
    assert main(["--evaluate", str(compiled), "--eval-episodes", "1"]) == 0


def test_a_folder_belongs_to_one_process(tiny_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two trainers would write the same checkpoints and logs."""
    held = filelock.FileLock(tiny_run / ".lock")
    with held:
        before = digests(tiny_run)
        code = main(["--resume", str(tiny_run), "--total-timesteps", "9999"])
        assert_one_line(code, capsys.readouterr(), "another process", str(tiny_run))
        assert digests(tiny_run) == before


def test_a_new_folder_belongs_to_one_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its name may be that of a run which has been started in the same second, and has written nothing yet."""
    run = tmp_path / "run"
    run.mkdir()
    with filelock.FileLock(run / ".lock"):
        assert_one_line(train(run), capsys.readouterr(), "another process", str(run))
    assert train(run) == 0, "a lock that was left behind keeps nobody out"


@pytest.mark.parametrize(
    "argv",
    ["--num-envs 0", "--env-id CartPole-v1", "--env-id BipedalWalker-v2", "--runs-dir /dev/null", "--resume /nowhere"],
)
def test_bad_input_in_a_process_of_its_own(argv: str) -> None:
    result = Trainer(*argv.split()).finish().check(2)
    assert result.out == ""
    assert re.fullmatch(r"ppo_vec\.py: error: [^\n]+\n", result.err), result.err


def test_help_explains_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = re.sub(r"[│╭╰╮╯─\s]+", " ", re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out))
    flags = {f.name: f"--{f.name.replace('_', '-')}" for f in dataclasses.fields(ppo_vec.Args)}
    for flag in flags.values():
        assert flag in text
    source = Path(ppo_vec.__file__).read_text()
    for name in flags:
        doc = re.search(rf'\n    {name}: [^\n]*\n    """(.*?)"""', source, re.S)
        assert doc, f"{name} has no docstring"
        assert " ".join(doc[1].split()) in text, f"the help does not explain {flags[name]}"
    assert not re.search(r"--(no-)?(batch|minibatch)-size", text), "a derived size is no flag"


# ----------------------------------------------------------------------------------------------------------------------
# What a run leaves
# ----------------------------------------------------------------------------------------------------------------------

TAGS = (
    "charts/episodic_return", "charts/episodic_length", "charts/learning_rate", "charts/SPS", "losses/policy_loss",
    "losses/value_loss", "losses/entropy", "losses/old_approx_kl", "losses/approx_kl", "losses/clipfrac",
    "losses/explained_variance", "time/rollout_s", "time/update_s", "charts/SPS_rollout", "charts/SPS_total",
    "charts/eval_return", "charts/valid_fraction", "charts/action_std", "charts/fall_rate", "charts/practice_fall_rate",
    "losses/grad_norm",
)  # fmt: skip


def test_tags(trained: Path) -> None:
    scalars = faults.scalars(trained)
    assert set(TAGS) == set(scalars)
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    assert all(f"`{tag}`" in readme for tag in TAGS)
    assert all(math.isfinite(value) for points in scalars.values() for _, value in points)
    steps = [step for step, _ in scalars["charts/SPS"]]
    assert steps == [step for step, _ in scalars["losses/policy_loss"]]
    assert 4000 <= steps[-1] < 4000 + 256
    assert len(steps) == ppo_vec.decode((trained / "checkpoint.pt").read_bytes())["iteration"]
    assert all(0 < value <= 1 for _, value in scalars["charts/valid_fraction"])
    rows = np.array([value for _, value in scalars["charts/valid_fraction"]]) * 256
    assert rows.sum() == pytest.approx(steps[-1])  # rows in which an environment only resets are no steps
    rates = [value for _, value in scalars["charts/learning_rate"]]
    assert all(a > b > 0 for a, b in itertools.pairwise(rates))


def test_episodes_csv(trained: Path) -> None:
    lines = (trained / "episodes.csv").read_text().splitlines()
    assert lines[0] == "global_step,time_s,return,length,env"
    rows = list(csv.DictReader(lines))
    assert rows
    scalars = faults.scalars(trained)
    steps = [int(row["global_step"]) for row in rows]
    assert [(s, float(np.float32(row["return"]))) for s, row in zip(steps, rows, strict=True)] == scalars[
        "charts/episodic_return"
    ]
    assert [(s, float(row["length"])) for s, row in zip(steps, rows, strict=True)] == scalars["charts/episodic_length"]
    times = [float(row["time_s"]) for row in rows]
    assert times == sorted(times)
    tree = ppo_vec.decode((trained / "checkpoint.pt").read_bytes())
    assert tree["episode_count"] == len(rows)
    envs = {k: v.numpy() for k, v in tree["envs"].items() if k not in ("actions", "started")}
    begun = envs["places"].view(ppo_vec.PLACE)["length"][:, 0]
    assert envs["practice_steps"][:, 1].sum() > 0
    for env in range(4):
        lengths = [int(row["length"]) for row in rows if int(row["env"]) == env]
        assert all(1 <= length <= 1600 for length in lengths)
        assert sum(lengths) == envs["practice_steps"][env, 0]
        running = 0 if envs["done"][env] else envs["lengths"][env] - begun[env]
        assert envs["practice_steps"][env].sum() + running == tree["iteration"] * 64 - envs["episode"][env]


def test_only_a_training_needs_memory_for_its_rollout(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sysconf", lambda name: 1)
    assert main(["--evaluate", str(trained), "--eval-episodes", "1"]) == 0
    assert main(["--resume", str(trained)]) == 2


def test_best_is_the_best(trained: Path) -> None:
    """By its mean less one standard error: a policy that once in a while falls may be lucky in a few episodes."""
    tree, best = (ppo_vec.decode((trained / name).read_bytes()) for name in ("checkpoint.pt", "best.pt"))

    def standing(row: dict) -> float:
        return row["mean"] - row["std"] / row["episodes"] ** 0.5

    rows = [candidate["evaluation"] for candidate in tree["candidates"]]
    assert len(rows) > 1
    assert standing(best["evaluation"]) == max(map(standing, rows))
    assert standing(best["evaluation"]) >= standing(tree["evaluations"][-1])


def test_two_equal_means_rank_by_their_spread() -> None:
    falls, never = ({"evaluation": {"mean": 300.0, "std": std, "episodes": 100}} for std in (50.0, 1.0))
    assert ppo_vec.standing(falls) == 295
    assert ppo_vec.standing(never) == pytest.approx(299.9)


def test_args_json(trained: Path) -> None:
    saved = json.loads((trained / "args.json").read_text())
    assert set(saved["args"]) == {f.name for f in dataclasses.fields(ppo_vec.Args)}
    assert saved["args"]["num_steps"] == 64
    assert saved["args"]["run_name"] == "walker"
    assert "ppo_vec.py" in saved["command"]
    assert "--num-envs 4" in saved["command"]
    assert saved["versions"]["torch"] == torch.__version__
    assert set(saved["versions"]) >= {"python", "torch", "numpy", "gymnasium", "box2d"}
    assert {"git_commit", "cpu", "gpu"} <= set(saved)


def test_summary_json(trained: Path) -> None:
    summary = json.loads((trained / "summary.json").read_text())
    names = (
        "env_id seed global_step wall_time_s train_time_s sps eval_episodes eval_mean eval_std eval_min "
        "eval_frac_solved last_eval_mean last_eval_std last_eval_min solved_at_step solved_at_s"
    )
    assert set(names.split()) <= set(summary)
    assert summary["env_id"] == "BipedalWalker-v3"
    assert summary["seed"] == 1
    assert summary["eval_episodes"] == 2
    assert 0 < summary["train_time_s"] < summary["wall_time_s"]
    assert summary["sps"] == pytest.approx(summary["global_step"] / summary["train_time_s"], rel=0.01)
    assert summary["eval_min"] <= summary["eval_mean"]
    assert summary["solved_at_step"] is None


def test_checkpoints_load_as_plain_tensors(trained: Path) -> None:
    for name in ("checkpoint.pt", "checkpoint.previous.pt", "best.pt"):
        tree = torch.load(trained / name, weights_only=True)
        assert tree["args"]["env_id"] == "BipedalWalker-v3"
        assert "normalizer.mean" in tree["agent"], "a policy without its normaliser"
    assert not list(trained.glob("*.tmp"))


def test_learning_curve_is_a_picture(trained: Path) -> None:
    from matplotlib.image import imread

    picture = imread(trained / "learning_curve.png")
    assert picture.shape[0] > 300
    assert picture.shape[1] > 500
    colours = np.unique((picture[..., :3] * 255).astype(np.uint8).reshape(-1, 3), axis=0)
    assert len(colours) > 20, "an empty picture"


def test_shortest_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """One iteration, in which no episode ends: no warning, no tag twice at a step."""
    assert train(tmp_path / "run", *tiny(), "--num-steps", "8", "--total-timesteps", "8") == 0
    err = capfd.readouterr().err
    assert "Warning" not in err
    assert "Traceback" not in err
    assert fingerprint(tmp_path / "run")["episodes"] == []


def test_name_of_the_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert ppo_vec.main([*tiny(), "--exp-name", "trial", "--seed", "5"]) == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(rf"{tiny_id()}__trial__5__\d+", folder.name)


# ----------------------------------------------------------------------------------------------------------------------
# --evaluate
# ----------------------------------------------------------------------------------------------------------------------


def test_evaluate(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Deterministic by default: the same twice, and the same as the test at the end of training."""
    before = digests(trained)
    outputs = []
    for extra in ([], [], ["--stochastic"], ["--stochastic"], ["--eval-episodes", "3"]):
        assert ppo_vec.main(["--evaluate", str(trained), *extra]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]
    assert outputs[2] == outputs[3]
    assert outputs[0].split(":")[1] != outputs[2].split(":")[1]
    summary = json.loads((trained / "summary.json").read_text())
    assert f"{summary['eval_mean']:.1f} +- {summary['eval_std']:.1f}" in outputs[0]
    assert "deterministic" in outputs[0]
    assert "stochastic" in outputs[2].replace("deterministic", "")
    assert "3 episodes" in outputs[4]
    assert all(output.count("\n") == 1 for output in outputs)
    assert digests(trained) == before


def test_evaluate_a_checkpoint(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A checkpoint holds the last weights, best.pt and the folder the delivered ones."""
    summary = json.loads((trained / "summary.json").read_text())
    for name, mean in (("checkpoint.pt", "last_eval_mean"), ("best.pt", "eval_mean")):
        assert ppo_vec.main(["--evaluate", str(trained / name)]) == 0
        assert f"{summary[mean]:.1f} +- " in capsys.readouterr().out


def test_capture_video(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import imageio_ffmpeg

    run = tmp_path / "pendulum"
    args = "--env-id Pendulum-v1 --num-envs 2 --num-workers 1 --num-steps 32 --total-timesteps 64 --eval-episodes 1"
    assert train(run, *args.split(), "--capture-video") == 0
    assert len(list((run / "videos").glob("*.mp4"))) == 1
    assert ppo_vec.main(["--evaluate", str(run), "--capture-video"]) == 0
    (path,) = re.findall(r"video: (.*\.mp4)", capsys.readouterr().out)
    frames = imageio_ffmpeg.read_frames(path)
    size = next(frames)["size"]
    pictures = [np.frombuffer(frame, np.uint8) for frame in frames]
    assert min(size) >= 100
    assert len(pictures) > 190  # the whole episode of 200 steps
    assert any((picture != pictures[0]).any() for picture in pictures), "a still"


def test_a_video_that_fails_takes_nothing_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import imageio_ffmpeg

    run = tmp_path / "pendulum"
    args = "--env-id Pendulum-v1 --num-envs 2 --num-workers 1 --num-steps 32 --total-timesteps 64 --eval-episodes 1"
    monkeypatch.setattr(imageio_ffmpeg, "write_frames", fail_with(OSError("no space\nleft")))
    assert train(run, *args.split(), "--capture-video") == 1
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("ppo_vec.py: error: cannot write ")
    assert last.endswith("no space left")
    assert json.loads((run / "summary.json").read_text())["finished"] is True
    assert fingerprint(run)["checkpoint"]["finished"] is True
    assert ppo_vec.main(["--evaluate", str(run), "--capture-video"]) == 1
    captured = capsys.readouterr()
    assert "Pendulum-v1, deterministic: " in captured.out
    assert captured.err.splitlines()[-1] == last


def test_track_logs_to_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What TensorBoard gets, at the same steps, under the name of the run."""
    logged: dict[str, list[tuple[int, float]]] = {}
    session, ended = {}, []

    class Wandb:
        def log(self, values: dict[str, float], step: int) -> None:
            for tag, value in values.items():
                logged.setdefault(tag, []).append((step, pytest.approx(value, rel=1e-6)))  # TensorBoard has float32

        def finish(self) -> None:
            ended.append(True)

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **given: session.update(given) or Wandb()))
    run = tmp_path / "run"
    assert train(run, *tiny(), "--track") == 0
    assert (session["id"], session["resume"], session["config"]["num_steps"]) == ("run", "allow", 20)
    scalars = fingerprint(run)["scalars"]
    assert set(scalars) <= set(logged)
    assert all(logged[tag] == rows for tag, rows in scalars.items())
    assert ended == [True]


def test_interrupted_evaluation_is_quiet(trained: Path) -> None:
    trainer = Trainer("--evaluate", str(trained), "--eval-episodes", "50000")
    trainer.wait_for(lambda: "0/50000" in trainer.stderr())
    trainer.send(signal.SIGINT)
    assert trainer.finish().check(130).seconds < 60


# ----------------------------------------------------------------------------------------------------------------------
# --resume
# ----------------------------------------------------------------------------------------------------------------------


def test_resuming_a_finished_run_changes_nothing(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = digests(trained)
    for where in (trained, trained / "checkpoint.pt"):
        assert ppo_vec.main(["--resume", str(where)]) == 0
        captured = capsys.readouterr()
        assert "finished" in captured.err + captured.out
        assert "--total-timesteps" in captured.err + captured.out
    assert digests(trained) == before


def stop_at(steps: int) -> Callable[..., None]:
    """In place of Run.save_now_and_then: ends the run as a signal would."""

    def save(run: ppo_vec.Run) -> None:
        if run.state.global_step >= steps:
            run.stopped = signal.SIGTERM

    return save


def test_resume_continues_folder_counters_and_schedule(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    assert train(whole, *tiny("", 300)) == 0
    with monkeypatch.context() as patch:
        patch.setattr(ppo_vec.Run, "save_now_and_then", stop_at(150))
        assert train(run, *tiny("", 300)) == 143
        assert 150 <= fingerprint(run)["checkpoint"]["global_step"] < 300
        moved = run.rename(tmp_path / "moved")  # the run is where its folder is
        patch.setattr(ppo_vec.Run, "save_now_and_then", stop_at(220))
        assert ppo_vec.main(["--resume", str(moved)]) == 143
    assert ppo_vec.main(["--resume", str(moved / "checkpoint.pt"), "--num-workers", "1"]) == 0
    assert not run.exists()
    assert len(list(moved.glob("events*"))) == 1
    found = faults.differences(fingerprint(moved), fingerprint(whole))
    assert not found, found
    rates = [value for _, value in faults.scalars(moved)["charts/learning_rate"]]
    assert np.allclose(np.diff(rates), np.diff(rates)[0], rtol=0.1), "a jump in the schedule"
    assert json.loads((moved / "summary.json").read_text())["wall_time_s"] > 0


def test_longer_total_timesteps_extends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    assert train(run, *tiny("", 100)) == 0
    first = fingerprint(run)
    with monkeypatch.context() as patch:
        patch.setattr(ppo_vec.Run, "save_now_and_then", stop_at(150))
        assert ppo_vec.main(["--resume", str(run), "--total-timesteps", "200"]) == 143
    interrupted = fingerprint(run)["checkpoint"]
    assert interrupted["finished"] is False, "it would not be continued"
    assert json.loads((run / "summary.json").read_text())["finished"] is False
    assert ppo_vec.main(["--resume", str(run)]) == 0
    last = fingerprint(run)
    assert 200 <= last["checkpoint"]["global_step"] < 240
    assert last["checkpoint"]["finished"] is True
    assert last["episodes"][: len(first["episodes"])] == first["episodes"]
    assert len(last["episodes"]) > len(first["episodes"])
    count = len(first["scalars"]["losses/policy_loss"])
    assert last["scalars"]["losses/policy_loss"][:count] == first["scalars"]["losses/policy_loss"]
    # The schedule had come to its end, and goes back to where the longer one has it at that step.
    (before, _), (_, rate) = last["scalars"]["charts/learning_rate"][count - 1 : count + 1]
    assert rate == pytest.approx(ppo_vec.Args.learning_rate * (1 - before / 200))
    saved = json.loads((run / "args.json").read_text())
    sessions = [*saved["earlier"], saved]
    assert [session["args"]["total_timesteps"] for session in sessions] == [100, 200, 200]
    assert all(session["git_commit"] == saved["git_commit"] and session["command"] for session in sessions)


def test_run_in_another_folder_than_saved(tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A relative path, from inside the run folder."""
    before, here = digests(tiny_run), os.getcwd()
    os.chdir(tiny_run)
    try:
        assert ppo_vec.main(["--resume", "."]) == 0
        assert ppo_vec.main(["--evaluate", "checkpoint.pt"]) == 0
    finally:
        os.chdir(here)
    assert digests(tiny_run) == before


# ----------------------------------------------------------------------------------------------------------------------
# load_policy
# ----------------------------------------------------------------------------------------------------------------------


def test_load_policy(trained: Path) -> None:
    act = ppo_vec.load_policy(trained)
    space = gym.make("BipedalWalker-v3").action_space
    rng = np.random.default_rng(0)
    batch = rng.normal(scale=3, size=(37, 24)).astype(np.float32)
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


def test_loaded_policy_respects_other_bounds(tiny_run: Path) -> None:
    """The actions of the tiny environment lie in [-2, 2]."""
    act = ppo_vec.load_policy(tiny_run)
    actions = act(np.random.default_rng(0).normal(scale=100, size=(1000, 3)))
    assert np.abs(actions).max() <= 2


def test_a_policy_needs_no_extra_of_its_training(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One trained with --track or --capture-video can be used and evaluated where those packages are not installed."""
    tree = ppo_vec.decode((tiny_run / "best.pt").read_bytes())
    tree["args"] |= {"track": True, "capture_video": True}
    (tmp_path / "best.pt").write_bytes(ppo_vec.encode(tree))
    for module in ("wandb", "imageio_ffmpeg", "matplotlib"):
        monkeypatch.setitem(sys.modules, module, None)
    assert ppo_vec.load_policy(tmp_path)(np.zeros(3)).shape == (1,)
    assert ppo_vec.main(["--evaluate", str(tmp_path)]) == 0
    assert "video" not in capsys.readouterr().out


def test_an_environment_of_a_module_is_trusted_when_it_is_typed(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """module:id imports code, so a checkpoint alone cannot ask for it; the policy itself needs no environment."""
    (tmp_path / "good_module.py").write_text("loaded = True\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    tree = ppo_vec.decode((tiny_run / "best.pt").read_bytes())
    tree["args"]["env_id"] = env_id = f"good_module:{tiny_id()}"
    (tmp_path / "best.pt").write_bytes(ppo_vec.encode(tree))
    assert ppo_vec.load_policy(tmp_path)(np.zeros(3)).shape == (1,)
    assert_one_line(
        main(["--evaluate", str(tmp_path)]), capsys.readouterr(), "would import code", f"--env-id '{env_id}'"
    )
    assert "good_module" not in sys.modules
    assert ppo_vec.main(["--evaluate", str(tmp_path), "--env-id", env_id]) == 0
    assert sys.modules.pop("good_module").loaded


def test_resume_with_the_checkpoint_alone(tiny_run: Path, tmp_path: Path) -> None:
    """Logs that were left behind begin anew, with their headers."""
    run = tmp_path / "moved"
    run.mkdir()
    (run / "checkpoint.pt").write_bytes((tiny_run / "checkpoint.pt").read_bytes())
    with faults.quiet(), faults.replaced_attribute(ppo_vec.Run, "write_curve", lambda run: None):
        assert ppo_vec.main(["--resume", str(run), "--total-timesteps", "200"]) == 0
    header, *rows = (run / "episodes.csv").read_text().splitlines()
    assert header == "global_step,time_s,return,length,env"
    assert len(rows) >= 2
    (events,) = run.glob("events.out.tfevents.*")
    assert b"brain.Event:2" in events.read_bytes()[:60]


def test_load_policy_of_a_stranger(tmp_path: Path) -> None:
    with pytest.raises(ppo_vec.UserError, match="no checkpoint"):
        ppo_vec.load_policy(tmp_path)
    (tmp_path / "best.pt").write_bytes(faults.sign(faults.pickle.dumps(faults.Bomb(tmp_path / "executed"))))
    with pytest.raises(ppo_vec.UserError, match=r"best\.pt"):
        ppo_vec.load_policy(tmp_path / "best.pt")
    assert not (tmp_path / "executed").exists()


def test_load_policy_changes_no_random_state(trained: Path) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    ppo_vec.load_policy(trained)
    assert torch.equal(torch.get_rng_state(), before)


def test_policy_of_a_run_under_way(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before the first evaluation there is no best.pt; a damaged one is noticed, and the checkpoint used."""
    for name in ("checkpoint.pt", "best.pt"):
        (tmp_path / name).write_bytes((trained / name).read_bytes())
    (tmp_path / "best.pt").write_bytes(b"junk")
    obs = np.ones(24, np.float32)
    expected = ppo_vec.load_policy(trained / "checkpoint.pt")(obs)
    capsys.readouterr()
    assert np.array_equal(ppo_vec.load_policy(tmp_path)(obs), expected)
    assert "best.pt" in capsys.readouterr().err
    (tmp_path / "best.pt").unlink()
    assert np.array_equal(ppo_vec.load_policy(tmp_path)(obs), expected)
    assert capsys.readouterr().err == ""
