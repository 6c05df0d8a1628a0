"""The benchmarks in a tiny form: every row of ours is measured, a missing peer is no failure, a failed row is one."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import tyro

import ppo_vec

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))
import fingerprint
import learning
import peers
import throughput

TINY = (
    "--env-id Pendulum-v1 --num-envs 2 --num-workers 1 --num-steps 20 --num-minibatches 2 --update-epochs 1 "
    "--total-timesteps 240 --eval-episodes 1 --actor-hidden-sizes 32 --critic-hidden-sizes 32"
)
README = (throughput.ROOT / "README.md").read_text()
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


@pytest.mark.timeout(300)  # a minute on a free core
def test_the_quick_form_measures_every_row_of_ours(tmp_path: Path) -> None:
    """As a user types it, in another folder; only without peers, and with the ppo_vec that Python finds."""
    path = os.pathsep.join([str(Path(ppo_vec.__file__).parent), str(Path(throughput.__file__).parent)])
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_PEERS, throughput.__file__, "--quick", "--workers", "3", "--out", "results"],
        capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "failed" not in done.stdout
    assert "not measured: envpool, skrl, stable_baselines3; pip install" in done.stderr
    report = json.loads((tmp_path / "results" / "throughput.json").read_text())
    assert (tmp_path / "results" / "throughput.md").read_text().strip() == done.stdout.strip()
    assert (tmp_path / "results" / "throughput.png").read_bytes().startswith(b"\x89PNG")

    about = report["about"]
    assert {"command", "git_commit", "versions", "cpu", "cores", "workers", "threads", "date", "args"} <= set(about)
    for row in report["rows"]:
        if row["peer"]:
            assert "median" not in row
            assert row["note"] == 'not installed: pip install -e ".[bench]"'
        else:
            assert row["note"] == ""
            assert 0 < row["min"] <= row["median"] <= row["max"] or row["name"] == "resets"
    names = {row["name"] for row in report["rows"]}
    assert {"stock environment", "ours, whole", "ours, as shipped (tuned defaults)", *throughput.PARTS} <= names
    for goal in report["goals"]:
        unmeasured = any(words in goal["measure"] for words in ("EnvPool", "SB3", "command"))
        assert (goal["met"] is None) == unmeasured, goal


def test_a_row_that_fails_is_named_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(error: Exception) -> Any:
        raise error
        yield

    rows = {
        "good": throughput.Row("group", "a good one", (x for x in [1.0, 2.0, 4.0, 3.0])),
        "bad": throughput.Row("group", "a bad one", broken(ValueError("no luck"))),
        "old": throughput.Row(
            "group", "an old peer", broken(ImportError("no PPO_CFG", name="skrl.agents")), peer="skrl"
        ),
        "none": throughput.Row("group", "no peer", broken(ModuleNotFoundError("no", name="skrl")), peer="skrl"),
    }
    monkeypatch.setattr(throughput, "make_rows", lambda *_: rows)
    monkeypatch.setattr(throughput, "make_goals", lambda *_: [])
    monkeypatch.setattr(sys, "argv", ["throughput.py", "--quick", "--repeats", "3", "--out", str(tmp_path / "out")])
    assert throughput.main() == 1
    out, err = capsys.readouterr()
    assert [line for line in err.splitlines() if "error" in line] == [
        "throughput.py: error: group: a bad one: failed: ValueError: no luck",
        "throughput.py: error: group: an old peer: failed: ImportError: no PPO_CFG (is it the version of "
        'pip install -e ".[bench]"?)',
    ]
    assert "| a good one | 3 | 2 - 4 | steps/s | 1.00 |" in out  # the first turn is a warm-up
    assert "| a bad one | - | | failed: ValueError: no luck | |" in out
    assert '| no peer | - | | not installed: pip install -e ".[bench]" | |' in out
    assert not list(tmp_path.iterdir())  # a record of less than all rows would be none


@pytest.fixture(scope="module")
def bench() -> throughput.Bench:
    return throughput.Bench(seconds=0.01, quick=True)


def test_all_trainings_are_plain_ppo_and_walk_as_the_policy_does(bench: throughput.Bench) -> None:
    """The tricks may go from `Options`; as long as they are there, they are off in what is compared with peers."""
    off = {
        "critic_progress": False, "action_cost": 0, "fall_reward": None, "final_fall_reward": None,
        "swa_share": 0, "bounds_loss_coef": 0, "ent_coef": 0, "target_kl": None, "min_std": 0,
        "value_lambda": None, "critic_learning_rate": None, "clip_vloss": False, "state_dependent_std": False,
        "norm_adv": "minibatch",
    }  # fmt: skip
    args = bench.args(2)
    assert {name: getattr(args, name, value) for name, value in off.items()} == off
    weights = bench.tree["agent"]
    for some in (args, bench.shipped):
        state, _ = bench.start(some, ppo_vec.make_task(some))
        a, b = (ppo_vec.Policy(w, "tanh", np.zeros(4), np.ones(4)) for w in (state.agent.state_dict(), weights))
        assert all(np.array_equal(getattr(a, name), getattr(b, name)) for name in ("obs_mean", "obs_scale", "std"))
        assert all(map(np.array_equal, itertools.chain(*a.layers), itertools.chain(*b.layers)))


@pytest.mark.parametrize("peer", peers.NAMES)
def test_an_installed_peer_is_measured(peer: str, bench: throughput.Bench) -> None:
    pytest.importorskip(peer)
    args = bench.args(2)
    turns = {
        "envpool": lambda: throughput.vector_env(bench, peers.envpool, 2),
        "stable_baselines3": lambda: throughput.peer_training(bench, args, peers.sb3, "DummyVecEnv"),
        "skrl": lambda: throughput.peer_training(bench, args, peers.skrl, throughput.SyncVectorEnv),
    }[peer]()
    torch.use_deterministic_algorithms(False)
    with contextlib.closing(turns):
        assert next(turns) > 0


def test_the_first_command_is_timed(bench: throughput.Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    assert f"&& {throughput.COMMAND}\n" in README
    monkeypatch.setattr(throughput, "COMMAND", f"python ppo_vec.py {TINY}")
    with contextlib.closing(throughput.first_command(bench)) as turns:
        stock, command = next(turns)
    assert 0 < command < stock  # 240 steps, and seconds of imports


PROGRAM = """
SIZE, OTHER = 3, 4  # why

class Trainer:
    def step(self, x: int) -> int:
        'Takes a step.'
        raise ValueError(f"no {x}", "a message") if x else helper(x)

    def other(self): return OTHER

def helper(x):
    y = SIZE * x
    return y

def main(): return Trainer().step(2)
"""


@pytest.mark.parametrize(
    ("old", "new", "names"),
    [
        ("SIZE * x", "SIZE + x", {"helper"}),
        ("3, 4", "5, 4", {"SIZE"}),
        ("if x else", "if not x else", {"Trainer.step"}),
        ("  # why", "", set()),
        ("'Takes a step.'", "", set()),
        ('f"no {x}", "a message"', 'f"{x}?", "another message"', set()),
        ("x: int) -> int", "x: float) -> float", set()),
        ("y = SIZE", "y: int = SIZE", set()),
        ("def step(", "x: int\n\n    def step(", set()),
        ("def other(self): return OTHER", "def other(self): return 1", set()),
        ("step(2)", "step(3)", set()),
    ],
)
def test_a_fingerprint_changes_with_what_a_program_does(old: str, new: str, names: set[str]) -> None:
    before, after = (fingerprint.parts(text, ["Trainer.step"]) for text in (PROGRAM, PROGRAM.replace(old, new)))
    assert set(before) == {"Trainer.step", "helper", "SIZE"}
    assert {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)} == names


def test_the_work_that_is_timed_is_the_algorithm_the_workers_and_the_walkers() -> None:
    today = throughput.work()
    assert {"collect", "update", "policy_loss", "Agent", "VecEnv", "Worker", "Policy", "step_walkers"} <= set(today)
    assert not {"main", "train", "parse_args", "evaluate", "Log", "write_file"} & set(today)


def test_the_readme_cites_only_figures_of_today() -> None:
    """Between two marks it has the summary of the record, and the trainer still does the work that was timed."""
    cited = re.search(r"<!-- throughput -->\n(.*)<!-- /throughput -->", README, re.DOTALL)
    if not cited:
        pytest.skip("README.md has no <!-- throughput --> summary of a record <!-- /throughput -->")
    report = json.loads((throughput.ROOT / "benchmarks" / "results" / "throughput.json").read_text())
    assert cited[1].strip() == throughput.summary(report).strip(), "cite the first part of results/throughput.md"
    then, today = report["work"], throughput.work()
    names = sorted(name for name in then.keys() | today.keys() if then.get(name) != today.get(name))
    assert not names, (
        f"{', '.join(names)}: no longer as when README.md's figures were measured. Measure again: python "
        "benchmarks/throughput.py --seconds 2 --repeats 5 --command; or take the figures out of README.md"
    )


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

    options = learning.Options("tiny", (3, 4))
    record = root / "benchmarks" / "results" / "learning-tiny.json"
    assert learning.place(options, "tiny", 2) == record.parent
    assert learning.place(options, "tiny", 1) == folders[0].parent  # one has failed
    record.parent.mkdir(parents=True)
    record.write_text((root / "out" / "learning-tiny.json").read_text())
    assert learning.place(options, "tiny", 2) == record.parent
    assert learning.place(learning.Options("tiny", (3,)), "tiny", 1) == folders[0].parent  # the record has two seeds

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


@pytest.mark.usefixtures("avx2")
def test_fingerprints_are_the_same_whatever_kernel_the_user_has_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """ppo_vec names one itself; and a run that was killed and resumed has the same, or main() would end with 1."""
    monkeypatch.setattr(fingerprint, "SETTINGS", {"tiny": TINY})
    monkeypatch.setattr(fingerprint, "SHORT", "--total-timesteps 2000 --eval-episodes 2 --actor-hidden-sizes 64 64")
    monkeypatch.setattr(sys, "argv", ["fingerprint.py", "--program", ppo_vec.__file__])
    monkeypatch.delenv("OPENBLAS_CORETYPE", raising=False)
    fingerprint.main()
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")
    flags = f"{TINY} {fingerprint.SHORT}".split()
    fingerprint.train(Path(ppo_vec.__file__), tmp_path / "run", flags, None)
    name, *found = capsys.readouterr().out.split()
    assert (name, " ".join(found)) == ("tiny", fingerprint.fingerprint(tmp_path / "run"))
