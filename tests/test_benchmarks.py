"""The benchmarks in a tiny form: every row of ours is measured, a missing peer costs one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import ppo_vec

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))
import faults
import learning

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "throughput.py"
# As if no peer were installed, wherever this runs.
WITHOUT_PEERS = """
import runpy, sys
sys.modules |= dict.fromkeys(("envpool", "stable_baselines3", "skrl"))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(tmp_path: Path, *flags: str) -> subprocess.CompletedProcess:
    # The ppo_vec that Python finds, from a folder that has no other.
    env = {**os.environ, "PYTHONPATH": str(Path(ppo_vec.__file__).parent)}
    command = [sys.executable, "-c", WITHOUT_PEERS, str(SCRIPT), *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path, env=env)


def test_a_tiny_run_measures_every_row_of_ours(tmp_path: Path) -> None:
    size = ["--seconds", "0.02", "--repeats", "1", "--num-steps", "8", "--envs", "2", "3"]
    done = run(tmp_path, "--quick", *size, "--out", "results")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "results" / "throughput-quick.json").read_text())
    assert (tmp_path / "results" / "throughput-quick.md").read_text().strip() == done.stdout.strip()
    assert (tmp_path / "results" / "throughput-quick.png").read_bytes().startswith(b"\x89PNG")

    about = report["about"]
    assert {"command", "git_commit", "versions", "cpu", "cores", "date", "policy"} <= set(about)
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
    assert all(seconds >= 0 for parts in report["time_split"].values() for seconds in parts.values())


def test_a_policy_that_is_not_there_is_an_error_of_one_line(tmp_path: Path) -> None:
    done = run(tmp_path, "--quick", "--policy", "nowhere")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "throughput.py: error: there is no checkpoint at nowhere"
    assert not list(tmp_path.iterdir())


def test_statistics_of_learning() -> None:
    table = np.array([[1.0, 8], [2, 7], [3, 6], [100, -100]])
    assert learning.interquartile_mean(table).tolist() == [2.5, 6.5]
    low, high = learning.bootstrap(table)
    assert (low <= learning.interquartile_mean(table)).all()
    assert (learning.interquartile_mean(table) <= high).all()
    assert np.array_equal(learning.bootstrap(np.full((6, 1), 5.0)), [[5], [5]])


def test_a_run_of_other_settings_is_no_row(tmp_path: Path) -> None:
    folder = tmp_path / "default-3"
    with faults.quiet():
        args = [*faults.tiny(), "--seed", "3", "--runs-dir", str(tmp_path), "--run-name", folder.name]
        assert ppo_vec.main(args) == 0
    same = " ".join(faults.tiny())
    settings = {"default": same, "other": same.replace("--num-steps 20", "--num-steps 40")}
    with faults.replaced_attribute(learning, "SETTINGS", settings):
        learning.refuse_another_run(learning.Options("default"), folder, 3)
        for options, seed in ((learning.Options("other"), 3), (learning.Options("default"), 4)):
            with pytest.raises(SystemExit, match="other settings"):
                learning.refuse_another_run(options, folder, seed)
        learning.refuse_another_run(learning.Options("other"), tmp_path / "new", 3)
