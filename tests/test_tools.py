"""compare.py on run folders of known numbers; sweep.py on tiny trainings, and on a script in place of a trainer."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import tyro

import ppo_vec

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))
import compare

Capture, Patch = pytest.CaptureFixture[str], pytest.MonkeyPatch


# ---- compare.py ------------------------------------------------------------------------------------------------------


def make_run(folder: Path, args: dict[str, Any] | None = None, **summary: Any) -> Path:
    """A run folder with what compare.py reads: 20 episodes of 10 steps with returns 0 to 19."""
    folder.mkdir(parents=True)
    args = {"seed": 0, "run_name": folder.name, "learning_rate": 1e-3, "actor_hidden_sizes": [64, 64], **(args or {})}
    info = {"args": args, "git_commit": "0123456789" * 4}
    found = {
        "env_id": "CartPole-v1", "seed": args["seed"], "global_step": 200, "sps": 100.0, "eval_mean": 1.0,
        "last_eval_mean": 1.0, "solved_at_step": None, "solved_at_s": None, "finished": True, **summary,
    }  # fmt: skip
    rows = [f"{10 * i + 10},{i / 10},{float(i)!r},10,0\n" for i in range(20)]
    (folder / "args.json").write_text(json.dumps(info))
    (folder / "summary.json").write_text(json.dumps(found))
    (folder / "episodes.csv").write_text("global_step,time_s,return,length,env\n" + "".join(rows))
    return folder


def run_compare(*argv: str | Path) -> None:
    compare.main(tyro.cli(compare.Options, args=[str(word) for word in argv]))


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Three seeds of one setting, and an unfinished run of another; a log beside them, as learning.py leaves it."""
    means, solved, seconds = (10, 20, 30), (100, None, 300), (1.0, None, 3.0)
    for seed in range(3):
        make_run(
            tmp_path / "runs" / f"a-{seed}", {"seed": seed}, eval_mean=means[seed], last_eval_mean=5.0,
            solved_at_step=solved[seed], solved_at_s=seconds[seed], sps=100.0 + 100 * seed,
        )  # fmt: skip
    unfinished = {"finished": False, "global_step": 150, "eval_frac_solved": None}  # without a goal
    make_run(tmp_path / "runs" / "b", {"learning_rate": 1e-4, "new": "x|y"}, **unfinished)
    (tmp_path / "runs" / "a-0.log").touch()
    return tmp_path / "runs"


def test_compare_prints_the_numbers_of_the_runs(runs: Path, tmp_path: Path, capsys: Capture) -> None:
    (runs / "b__evaluation__1795743749328").mkdir()  # what --evaluate writes is no run
    run_compare(runs / "*", runs / "b", "--out", tmp_path / "all.png")
    lines = capsys.readouterr().out.splitlines()
    # Of three runs' means, a resample is the lowest three times with a probability of 1/27, which is more than 2.5 %.
    assert lines[2:4] == [
        "| a-0 and 2 more | 3 | 0 1 2 | 200 | 20.0 (10.0 to 30.0) | 5.0 (5.0 to 5.0) | 2 of 3 | 300 | 3 | 200 |",
        "| b | 1 | 0 | 150 | 0 of 1 finished | 0 of 1 finished | - | - | - | 100 |",
    ]
    assert lines[5:9] == [
        "| argument | a-0 and 2 more | b |", "|---|---|---|",
        "| learning_rate | 0.001 | 0.0001 |", "| new | absent | x\\|y |",
    ]  # fmt: skip
    assert (tmp_path / "all.png").read_bytes().startswith(b"\x89PNG")


def test_runs_are_grouped_by_all_but_their_seed(runs: Path, tmp_path: Path, capsys: Capture) -> None:
    def first_cells(*flags: str | Path) -> list[str]:
        run_compare(*flags, "--out", tmp_path / "all.png")
        table = capsys.readouterr().out.split("\n\n")[0].splitlines()[2:]
        return [line.split(" | ")[0].removeprefix("| ") for line in table]

    assert first_cells(runs / "a-*", "--no-group") == ["a-0", "a-1", "a-2"]
    assert first_cells(runs / "*", "--ignore", "learning_rate", "new") == ["a-0 and 3 more"]
    info = json.loads((runs / "a-1" / "args.json").read_text())
    (runs / "a-1" / "args.json").write_text(json.dumps({**info, "git_commit": "f" * 40 + "-dirty"}))
    assert first_cells(runs / "a-*") == ["a-0 and 1 more", "a-1"]  # another commit is another trainer
    assert first_cells(runs / "a-*", "--ignore", "commit", "--iqm") == ["a-0 and 2 more"]
    (runs / "a-1" / "args.json").write_text(json.dumps({**info, "processes": 2}))
    assert first_cells(runs / "a-*") == ["a-0 and 1 more", "a-1"]  # with twice the environments


def test_a_curve_is_the_mean_of_a_window_on_a_common_axis(runs: Path) -> None:
    run = compare.read_run(runs / "a-0", ())
    assert run.steps.tolist() == [10 * i + 10 for i in range(1, 20)]  # windows of two episodes
    assert run.returns.tolist() == [i - 0.5 for i in range(1, 20)]
    with open(runs / "a-0" / "episodes.csv", "a") as file:
        file.write("210,2.1,2")  # of "20.0": the run goes on
    assert compare.read_run(runs / "a-0", ()).steps.tolist() == run.steps.tolist()

    table = np.array([[1.0, 8], [2, 7], [3, 6], [100, -100]])
    assert compare.average(table, iqm=False).tolist() == [26.5, -19.75]
    assert compare.average(table, iqm=True).tolist() == [2.5, 6.5]
    low, high = compare.bootstrap(table, iqm=True)
    assert (low < [2.5, 6.5]).all()
    assert (high > [2.5, 6.5]).all()


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        (None, None, ["there is no run folder"]),
        ("args.json", None, ["leave it out"]),
        ("summary.json", None, ["first evaluation", "leave the run out"]),
        ("episodes.csv", None, ["no curve"]),
        ("args.json", "{", ["leave the run out"]),
        ("args.json", "{}", ["has no 'git_commit'"]),
        ("summary.json", "[]", ["leave the run out"]),
        ("summary.json", '{"global_step": 1}', ["has no 'sps'"]),
        ("episodes.csv", "global_step,time_s,return,length,env\n", ["no episode has ended yet"]),
        ("episodes.csv", "global_step,time_s,return,length,env\n1,2,x,3,4\n", ["train it again"]),
    ],
)
def test_a_broken_run_folder_is_one_line(
    runs: Path, capsys: Capture, file: str | None, content: str | None, words: list[str]
) -> None:
    run = runs / ("a-1" if file else "nothing")
    if file:
        (run / file).unlink() if content is None else (run / file).write_text(content)
    with pytest.raises(SystemExit) as error:
        run_compare(runs / "a-0", run, "--out", runs / "all.png")
    out, err = capsys.readouterr()
    assert (error.value.code, out, len(err.splitlines())) == (2, "", 1), err
    assert err.startswith("compare.py: error: ")
    for word in (str(run / (file or "")), *words):
        assert word in err
    assert not (runs / "all.png").exists()


def test_no_code_is_imported_that_a_run_folder_names(tmp_path: Path, monkeypatch: Patch) -> None:
    (tmp_path / "stranger.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    run_compare(make_run(tmp_path / "run", env_id="stranger:Env-v0"), "--out", tmp_path / "all.png")


def test_a_picture_that_cannot_be_written_is_one_line(runs: Path, capsys: Capture) -> None:
    for name in ("no/folder.png", "picture.xyz"):
        with pytest.raises(SystemExit, match="2"):
            run_compare(runs / "a-0", "--out", runs / name)
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"compare.py: error: cannot write --out {runs / name}: ")


# ---- sweep.py --------------------------------------------------------------------------------------------------------

TINY = (
    "--env-id CartPole-v1 --num-envs 2 --num-workers 1 --num-steps 64 --update-epochs 1 --total-timesteps 256 "
    "--eval-episodes 2 --actor-hidden-sizes 8 --critic-hidden-sizes 8"
)
# In the place of ppo_vec.py: what a run does depends on the number of its trial.
TRAINER = """
import json, os, signal, sys, time
flags = dict(word.lstrip("-").split("=", 1) for word in sys.argv[1:] if "=" in word)
number = int(flags["run-name"].split("-")[1])
run = os.path.join(flags["runs-dir"], flags["run-name"])
os.mkdir(run)
if number == 6:
    sys.exit("no luck")
if number == 7:
    os.kill(os.getppid(), signal.SIGTERM)
for step in (500, 1000):
    with open(run + "/new", "w") as file:
        mean = -100 if number == 5 else number + int(flags["seed"])
        json.dump({"global_step": step, "last_eval_mean": mean, "finished": step == 1000}, file)
    os.replace(run + "/new", run + "/summary.json")
    time.sleep(100 if number in (5, 7) else 0.2)
"""


@pytest.fixture
def sweep() -> ModuleType:
    pytest.importorskip("optuna", reason='needs Optuna: pip install -e ".[sweep]"')
    import sweep

    return sweep


def run_sweep(sweep: ModuleType, folder: Path, *argv: str) -> int:
    argv = ("--jobs", "1", "--runs-dir", str(folder), *argv)
    return sweep.main(tyro.cli(sweep.Options, args=argv))


def trials(folder: Path) -> list[Any]:
    import optuna

    return optuna.load_study(study_name="sweep", storage=f"sqlite:///{folder}/sweep/study.db").trials


@pytest.mark.timeout(300)
def test_a_sweep_trains_and_goes_on(sweep: ModuleType, tmp_path: Path, capsys: Capture) -> None:
    flags = (f"--flags={TINY}", "--space", "learning_rate=log:1e-4:1e-2", "num_minibatches=2,4")
    assert run_sweep(sweep, tmp_path, *flags, "--trials", "2") == 0
    before = trials(tmp_path)
    assert [trial.state.name for trial in before] == ["COMPLETE", "COMPLETE"]
    for trial in before:
        run = tmp_path / "sweep" / f"trial-{trial.number}-seed-1"
        tree = ppo_vec.read_checkpoint(run)[1]
        assert trial.value == tree["evaluations"][-1]["mean"]
        assert tree["args"]["learning_rate"] == trial.params["learning_rate"]
        assert str(tree["args"]["num_minibatches"]) == trial.params["num_minibatches"]
    out = capsys.readouterr().out
    best = max(before, key=lambda trial: trial.value)
    assert f"python ppo_vec.py {TINY} --learning-rate={best.params['learning_rate']}" in out
    assert (tmp_path / "sweep" / "importance.png").read_bytes().startswith(b"\x89PNG")

    assert run_sweep(sweep, tmp_path, *flags, "--trials", "3") == 0
    after = trials(tmp_path)
    assert len(after) == 3
    assert [(trial.params, trial.value) for trial in after[:2]] == [(trial.params, trial.value) for trial in before]
    assert after[2].params not in [trial.params for trial in before]
    assert run_sweep(sweep, tmp_path, *flags, "--trials", "3", "--seeds", "1", "2") == 2
    assert "was begun with --seeds [1]" in capsys.readouterr().err


@pytest.mark.timeout(120)
def test_trials_are_pruned_fail_and_stop(
    sweep: ModuleType, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    (tmp_path / "trainer.py").write_text(TRAINER)
    monkeypatch.setattr(sweep, "PROGRAM", tmp_path / "trainer.py")
    monkeypatch.setattr(sweep, "POLL", 0.02)
    monkeypatch.setattr(
        sweep, "last_evaluation", lambda run: json.loads((run / "summary.json").read_text())["last_eval_mean"]
    )
    flags = ("--flags=--total-timesteps 1000", "--space", "activation=tanh,relu", "gamma=0.9:0.99", "--seeds", "1", "3")
    assert run_sweep(sweep, tmp_path, *flags, "--trials", "9") == 130
    found = trials(tmp_path)
    assert [t.state.name[0] for t in found] == [*"CCCCCPFR"], capsys.readouterr().out
    assert [t.value for t in found[:6]] == [2, 3, 4, 5, 6, -100]  # the mean of two seeds; the last one reported
    assert found[0].intermediate_values.keys() <= {10, 30}
    out = capsys.readouterr().out
    assert re.search(r"trial 5 \(.*\): pruned, -100.0 at step 500", out)
    assert re.search(r"trial 6 \(.*\): failed, exit code 1: no luck \(see .*trial-6-seed-1.log\)", out)
    assert re.search(r"trial 7 \(.*\): stopped", out)
    assert out.count("| 4 | 6.0 |") == 1

    # What was interrupted begins anew. Seven trials had a result; the failed one is not counted.
    assert run_sweep(sweep, tmp_path, *flags, "--trials", "8") == 0
    found = trials(tmp_path)
    assert [t.state.name[0] for t in found] == [*"CCCCCPFFCC"]
    assert found[8].params == found[7].params


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--space learning_rat=1:2", "'learning_rat' is no argument of ppo_vec.py; do you mean learning_rate?"),
        ("--space gamma", "'gamma' is no argument"),
        ("--space seed=1,2", "seed cannot be searched"),
        ("--space gamma=0.9:0.9", "LOW must be less than HIGH"),
        ("--space ent_coef=log:0:0.1", "greater than 0 with log"),
        ("--space gamma=lin:0.9:0.95", "a range is LOW:HIGH or log:LOW:HIGH"),
        ("--space gamma=a:b", "could not convert"),
        ("--space gamma=0.9", "two different values"),
        ("--space clip_vloss=yes,no", "its values are True,False"),
        ("--space gamma=0.9:1.5", "--space gamma, value 1.5: --gamma must lie in [0, 1]"),
        ("--space activation=tanh,gelu", "--space activation, value gelu: "),
        ("--space num_minibatches=8,7", "--space num_minibatches, value 7: --num-minibatches must divide"),
        ("--space gamma=0.9:0.95 gamma=0.9,0.95", "gamma is given twice"),
        ("--space gamma=0.9:0.95 --flags=--gamma=0.9", "gamma is given twice"),
        ("--space gamma=0.9:0.95 --flags=--seed=3", "--flags: --seed cannot be used"),
        ("--space gamma=0.9:0.95 --flags=--gama=3", "--flags: "),
        ("--space", "--space is empty"),
        ("--space gamma=0.9:0.95 --flags=--env-id=Nothing-v0", "Nothing"),
        ("--space gamma=0.9:0.95 --trials 0", "at least 1"),
        ("--space gamma=0.9:0.95 --seeds 1 1", "--seeds must be different"),
        ("--space gamma=0.9:0.95 --name ../x", "plain folder name"),
    ],
)
def test_a_sweep_refuses_in_one_line(sweep: ModuleType, tmp_path: Path, capsys: Capture, argv: str, words: str) -> None:
    assert run_sweep(sweep, tmp_path, *argv.split()) == 2
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines())) == ("", 1)
    assert err.startswith("sweep.py: error: ")
    assert words in err
    assert not list(tmp_path.iterdir())


def test_a_sweep_keeps_out_of_a_folder_that_is_not_its_own(sweep: ModuleType, tmp_path: Path, capsys: Capture) -> None:
    import filelock

    (tmp_path / "sweep" / "trial-0-seed-1").mkdir(parents=True)
    for message in ("another sweep", "holds runs without their study"):
        with filelock.FileLock(tmp_path / ("sweep" if "another" in message else "") / "study.lock"):
            assert run_sweep(sweep, tmp_path, "--space", "gamma=0.9:0.95") == 2
        assert message in capsys.readouterr().err


# ---- The files of the project ----------------------------------------------------------------------------------------


def test_citation_names_the_version() -> None:
    yaml = pytest.importorskip("yaml", reason="needs PyYAML, which Optuna brings")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (citation["cff-version"], citation["version"]) == ("1.2.0", project["version"])
    assert {"message", "title", "authors"} <= citation.keys()  # what the format demands
    assert citation["license"] == project["license"]
    for name in (".pre-commit-config.yaml", ".github/workflows/test.yml"):
        assert yaml.safe_load((ROOT / name).read_text())


def test_the_types_are_right(tmp_path: Path) -> None:
    """As in CONTRIBUTING.md, whatever an earlier run has cached."""
    pytest.importorskip("mypy", reason="needs mypy: pip install -e .[dev]")
    command = [sys.executable, "-m", "mypy", "--cache-dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
