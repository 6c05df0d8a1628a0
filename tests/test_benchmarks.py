"""The benchmarks in a tiny form: every row of ours is measured, a missing peer is no failure, a failed row is one."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro

import ppo_vec

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))
import fingerprint
import learning
import throughput

REFERENCE = throughput.ROOT / "runs" / "reference" / throughput.ENV_ID
TINY = (
    "--env-id Pendulum-v1 --num-envs 2 --num-workers 1 --num-steps 20 --num-minibatches 2 --update-epochs 1 "
    "--total-timesteps 240 --eval-episodes 1 --actor-hidden-sizes 32 --critic-hidden-sizes 32"
)
# As if no peer were installed, wherever this runs.
WITHOUT_PEERS = """
import runpy, sys
from importlib.machinery import PathFinder
find, peers = PathFinder.find_spec, ("envpool", "stable_baselines3", "skrl")
PathFinder.find_spec = lambda name, *rest: None if name in peers else find(name, *rest)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


# ---- gpu.py and scaling.py -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "rows"), [("gpu", ["16-16", "2 x 64", "| 2 | 8 |", "delivered"]), ("scaling", ["| 4 | 1 | 1 |", "1024"])]
)
def test_a_quick_form_measures_every_row(tmp_path: Path, name: str, rows: list[str]) -> None:
    """It writes nothing; and every figure is a positive number."""
    env = {**os.environ, "PYTHONPATH": str(Path(ppo_vec.__file__).parent)}
    script = Path(throughput.__file__).with_name(f"{name}.py")
    done = subprocess.run(
        [sys.executable, str(script), "--quick", "--out", str(tmp_path / "results")],
        capture_output=True, text=True, timeout=300, cwd=tmp_path, env=env,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for row in rows:
        (line, *_) = [line for line in done.stdout.splitlines() if row in line] or [""]
        assert re.search(r"[1-9]", line.replace(row, "")), (row, done.stdout)
    assert "Failed" not in done.stdout
    assert not list(tmp_path.iterdir())


# ---- throughput.py ---------------------------------------------------------------------------------------------------


def run(tmp_path: Path, *flags: str) -> subprocess.CompletedProcess:
    # The ppo_vec that Python finds, from a folder that has no other.
    env = {**os.environ, "PYTHONPATH": str(Path(ppo_vec.__file__).parent)}
    command = [sys.executable, "-c", WITHOUT_PEERS, throughput.__file__, "--quick", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path, env=env)


def test_a_tiny_run_measures_every_row_of_ours(tmp_path: Path) -> None:
    size = ["--seconds", "0.02", "--repeats", "1", "--num-steps", "8", "--envs", "2", "3"]
    done = run(tmp_path, *size, "--out", "results")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "results" / "throughput-quick.json").read_text())
    assert (tmp_path / "results" / "throughput-quick.md").read_text().strip() == done.stdout.strip()
    assert (tmp_path / "results" / "throughput-quick.png").read_bytes().startswith(b"\x89PNG")

    about = report["about"]
    assert {"command", "git_commit", "versions", "cpu", "cores", "date", "policy"} <= set(about)
    assert {"stepping only, one process", "update", "whole training, 2 envs"} <= {
        row["group"] for row in report["rows"]
    }
    for row in report["rows"]:
        if row["name"].startswith(("EnvPool", "SB3", "skrl")):
            assert "median" not in row
            assert row["note"] == 'not installed: pip install -e ".[bench]"'
            lines = [line for line in done.stdout.splitlines() if row["name"] in line and row["note"] in line]
            assert len(lines) == sum(other["name"] == row["name"] for other in report["rows"])
        else:
            assert row["note"] == ""
            assert 0 < row["min"] <= row["median"] <= row["max"]
    for goal in report["goals"]:
        needs_peer = any(peer in goal["measure"] for peer in ("EnvPool", "SB3"))
        needs_cores = "from 1 to 2 workers" in goal["measure"] and about["cores"] < 2
        assert (goal["met"] is None) == (needs_peer or needs_cores), goal
    for parts in report["time_split"].values():
        assert len(parts) >= 2
        assert all(seconds >= 0 for seconds in parts.values())


def test_a_policy_that_is_not_there_is_an_error_of_one_line(tmp_path: Path) -> None:
    done = run(tmp_path, "--policy", "nowhere")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "throughput.py: error: there is no checkpoint at nowhere"
    assert not list(tmp_path.iterdir())


def test_a_row_that_fails_is_named_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(error: Exception) -> object:
        raise error
        yield

    rows = {
        "good": throughput.Row("group", "a good one", iter([1.0, 2.0, 4.0, 3.0])),
        "bad": throughput.Row("group", "a bad one", broken(ValueError("no luck"))),
        "old": throughput.Row("group", "an old peer", broken(ImportError("no PPO_CFG", name="skrl.agents"))),
        "none": throughput.Row("group", "no peer", broken(ImportError("no module", name="stable_baselines3"))),
    }
    rows["good"].turns = (x for x in rows["good"].turns)  # that can be closed
    monkeypatch.setattr(throughput, "make_rows", lambda *_: rows)
    monkeypatch.setattr(throughput, "make_goals", lambda *_: [])
    monkeypatch.setattr(throughput, "time_split", lambda *_: {})
    monkeypatch.setattr(sys, "argv", ["throughput.py", "--quick", "--repeats", "3"])
    assert throughput.main() == 1
    out, err = capsys.readouterr()
    assert [line for line in err.splitlines() if "error" in line] == [
        "throughput.py: error: a row failed: group: a bad one",
        "throughput.py: error: a row failed: group: an old peer",
    ]
    assert "| a good one | 3 | 2 - 4 | steps/s | 1.00 |" in out  # the first turn is a warm-up
    assert "| a bad one | - | | failed: ValueError: no luck | |" in out
    assert '| no peer | - | | not installed: pip install -e ".[bench]" | |' in out


@pytest.fixture(scope="module")
def bench() -> throughput.Bench:
    return throughput.Bench(argparse.Namespace(seconds=0.01, num_steps=8, quick=True, policy=str(REFERENCE)))


def test_all_rows_have_the_same_hyperparameters_and_the_policy_that_walks(bench: throughput.Bench) -> None:
    weights = ppo_vec.read_checkpoint(REFERENCE, policy=True)[1]["agent"]
    args, tuned = bench.args_for(2), ppo_vec.Options(**ppo_vec.TUNED[throughput.ENV_ID])
    assert (args.practice, args.critic_progress, args.action_cost, args.fall_reward) == (0, False, 0, None)
    assert (args.gamma, args.gae_lambda, args.ent_coef) == (tuned.gamma, tuned.gae_lambda, tuned.ent_coef)
    for some, inputs in ((args, 24), (bench.tuned, 26)):
        state, _ = bench.start(some)
        assert state.agent.critic[0].in_features == inputs
        a, b = (ppo_vec.Policy(w, "tanh", np.zeros(4), np.ones(4)) for w in (state.agent.state_dict(), weights))
        assert all(np.array_equal(getattr(a, name), getattr(b, name)) for name in ("obs_mean", "obs_scale", "std"))
        assert all(map(np.array_equal, itertools.chain(*a.layers), itertools.chain(*b.layers)))


@pytest.mark.parametrize("peer", ["envpool", "stable_baselines3", "skrl"])
def test_an_installed_peer_is_measured(peer: str, bench: throughput.Bench) -> None:
    pytest.importorskip(peer)
    args = bench.args_for(2)
    turns = {
        "envpool": lambda: throughput.vector_env(bench, lambda: throughput.envpool(2)),
        "stable_baselines3": lambda: throughput.sb3(bench, args, parallel=False),
        "skrl": lambda: throughput.skrl(bench, args, throughput.SyncVectorEnv),
    }[peer]()
    torch.use_deterministic_algorithms(False)
    with contextlib.closing(turns):
        assert next(turns) > 0


# ---- learning.py and fingerprint.py ----------------------------------------------------------------------------------


def test_statistics_of_learning() -> None:
    table = np.array([[1.0, 8], [2, 7], [3, 6], [100, -100]])
    assert learning.interquartile_mean(table).tolist() == [2.5, 6.5]
    low, high = learning.bootstrap(table)
    assert (low <= learning.interquartile_mean(table)).all()
    assert (learning.interquartile_mean(table) <= high).all()
    assert np.array_equal(learning.bootstrap(np.full((6, 1), 5.0)), [[5], [5]])


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where learning.py finds the trainer and keeps its runs; with one setting, and another one."""
    (tmp_path / "ppo_vec.py").write_bytes(Path(ppo_vec.__file__).read_bytes())
    monkeypatch.setattr(learning, "ROOT", tmp_path)
    monkeypatch.setattr(learning, "SETTINGS", {"tiny": TINY, "other": f"{TINY} --gamma 0.9"})
    return tmp_path


def learn(root: Path, *flags: str) -> None:
    out = ("--jobs", "1", "--out", str(root / "out"))
    learning.main(tyro.cli(learning.Options, args=["--setting", "tiny", *flags, *out]))


def test_runs_are_made_resumed_and_not_mixed_up(root: Path) -> None:
    flags = "--flags=--num-steps 40"
    learn(root, "--seeds", "3", "4", flags)
    folders = [root / "runs" / "learning" / f"tiny-{seed}" for seed in (3, 4)]
    args = ppo_vec.saved_args(ppo_vec.read_checkpoint(folders[0])[1])
    assert (args.seed, args.num_steps, args.env_id) == (3, 40, "Pendulum-v1")
    text = (root / "out" / "learning-tiny.md").read_text()
    assert f"`python ppo_vec.py {TINY} --num-steps 40 --seed SEED`" in text
    for folder, seed in zip(folders, (3, 4)):
        summary = json.loads((folder / "summary.json").read_text())
        (line,) = (line for line in text.splitlines() if line.startswith(f"| {seed} |"))
        assert f" {summary['eval_mean']:.1f} (min {summary['eval_min']:.0f}) " in line
    assert "2 of 2 runs finished" in text
    rows = (root / "out" / "learning-tiny.csv").read_text().splitlines()
    assert {row.split(",")[0] for row in rows} == {"seed", "3", "4"}

    before = [fingerprint.fingerprint(folder) for folder in folders]
    assert before[0] != before[1]
    (folders[0] / "checkpoint.pt").unlink()  # a kill between two renames leaves the previous one alone
    assert not ppo_vec.read_checkpoint(folders[0])[1]["finished"]
    learn(root, "--seeds", "3", flags)
    (earlier,) = json.loads((folders[0] / "args.json").read_text())["earlier"]
    assert "--resume" not in earlier["command"]
    assert f"--resume {folders[0]}" in json.loads((folders[0] / "args.json").read_text())["command"]
    assert fingerprint.fingerprint(folders[0]) == before[0]

    same, other = learning.Options("tiny", flags="--num-steps 40"), learning.Options("other", flags="--num-steps 40")
    learning.refuse_another_run(same, folders[0], 3)
    learning.refuse_another_run(other, root / "new", 3)
    for options, seed in ((other, 3), (same, 4), (learning.Options("tiny"), 3)):
        with pytest.raises(SystemExit, match="other settings"):
            learning.refuse_another_run(options, folders[0], seed)


@pytest.mark.timeout(120)
def test_a_log_that_cannot_be_opened_ends_only_its_run(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "ppo_vec.py").write_text("raise SystemExit(7)")
    (root / "runs" / "learning" / "tiny-1.log").mkdir(parents=True)
    with pytest.raises(IsADirectoryError):
        learn(root, "--seeds", "0", "1", "2")
    assert capsys.readouterr().out.splitlines() == [f"tiny-{seed}: exit code 7, no summary" for seed in (0, 2)]


def avx2() -> bool:
    return sys.platform == "linux" and " avx2 " in Path("/proc/cpuinfo").read_text()


@pytest.mark.skipif(not avx2(), reason="needs a processor with AVX2")
def test_fingerprints_are_the_same_whatever_kernel_the_user_has_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """ppo_vec names one itself; and a run that was killed and resumed has the same, or main() would end with 1."""
    monkeypatch.setattr(fingerprint, "SETTINGS", {"tiny": TINY})
    monkeypatch.setattr(fingerprint, "SHORT", "--total-timesteps 4000 --eval-episodes 2 --actor-hidden-sizes 64 64")
    monkeypatch.setattr(sys, "argv", ["fingerprint.py", "--program", ppo_vec.__file__])
    monkeypatch.delenv("OPENBLAS_CORETYPE", raising=False)
    fingerprint.main()
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")
    flags = f"{TINY} {fingerprint.SHORT}".split()
    fingerprint.train(Path(ppo_vec.__file__), tmp_path / "run", flags, None)
    name, *found = capsys.readouterr().out.split()
    assert (name, " ".join(found)) == ("tiny", fingerprint.fingerprint(tmp_path / "run"))
