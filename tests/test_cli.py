"""The command line: bad input, the files and tags of a run, and the modes."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch

import ppo_vec

SMALL = (
    "--num-envs 4 --num-steps 64 --num-minibatches 4 --update-epochs 2 --num-workers 2 --eval-episodes 4 "
    "--actor-hidden-sizes 16 --critic-hidden-sizes 16"
)
TAGS = {
    *(
        f"charts/{n}"
        for n in ("episodic_return", "episodic_length", "learning_rate", "SPS", "SPS_rollout", "SPS_total")
    ),
    *(f"charts/{n}" for n in ("eval_return", "valid_fraction", "action_std", "fall_rate")),
    *(f"losses/{n}" for n in ("policy_loss", "value_loss", "entropy", "old_approx_kl", "approx_kl", "clipfrac")),
    *("losses/explained_variance", "losses/grad_norm", "time/rollout_s", "time/update_s"),
}


def run(*words: str) -> int:
    return ppo_vec.main([w for word in words for w in word.split()])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 3,000 steps."""
    runs = tmp_path_factory.mktemp("runs")
    assert run(SMALL, f"--total-timesteps 3000 --runs-dir {runs} --run-name done") == 0
    return runs / "done"


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir()) if p.is_file()}


def altered(trained: Path, path: Path, **changes: object) -> Path:
    """An intact checkpoint (its digest fits) whose arguments were changed."""
    tree = ppo_vec.decode((trained / "checkpoint.pt").read_bytes())
    tree["args"].update(changes)
    path.write_bytes(ppo_vec.encode(tree))
    return path


class Unbounded(gym.Env):
    observation_space = gym.spaces.Box(-1, 1, (2,))
    action_space = gym.spaces.Box(-np.inf, np.inf, (1,))


gym.register("Unbounded-v0", Unbounded)

BAD = [
    "--num-envs 0", "--num-envs -3", "--num-steps 0", "--num-workers 0", "--num-minibatches 0", "--update-epochs 0",
    "--total-timesteps 0", "--eval-episodes 0", "--learning-rate 0", "--learning-rate -1e-3", "--learning-rate nan",
    "--critic-learning-rate 0", "--gamma 1.5", "--final-gamma 2", "--gae-lambda -0.1", "--value-lambda 2",
    "--clip-coef 0", "--max-grad-norm 0", "--target-kl 0", "--ent-coef -1", "--vf-coef inf", "--seed -1",
    "--reward-floor 0", "--reward-floor -11", "--worker-timeout 0", "--actor-hidden-sizes 64 0",
    "--num-envs 4 --num-steps 10 --num-minibatches 3", "--num-envs 4 --num-steps 10 --num-minibatches 40",
    "--num-envs 4 --num-workers 5", "--stochastic", "--resume a --evaluate b", "--run-name a/b", "--run-name ..",
    "--env-id NoSuchEnv-v0", "--env-id CartPole-v1", "--env-id FrozenLake-v1", "--env-id Unbounded-v0",
    "--env-id no_such_module:Env-v0", "--resume no/such/run", "--evaluate no/such/run",
]  # fmt: skip


@pytest.mark.parametrize("words", BAD)
def test_bad_arguments(
    words: str, tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ppo_vec, "Workers", None)  # starting a process would be a TypeError
    assert run(f"--runs-dir {tmp_path}", words) == 2
    check_one_line(capfd)
    assert not any(tmp_path.iterdir()), "something was left behind"


def check_one_line(capfd: pytest.CaptureFixture) -> str:
    out, err = capfd.readouterr()
    lines = err.strip().splitlines()
    assert out == ""
    assert len(lines) == 1, err
    assert lines[0].startswith("ppo_vec.py: error: ")
    return lines[0]


def test_bad_checkpoints(trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    data = (trained / "checkpoint.pt").read_bytes()
    cut, flipped, foreign = tmp_path / "cut.pt", tmp_path / "flipped.pt", tmp_path / "foreign.pt"
    cut.write_bytes(data[:-100])
    flipped.write_bytes(data[:500] + bytes([data[500] ^ 1]) + data[501:])
    torch.save({"model": torch.zeros(3)}, foreign)
    cases = {
        str(cut): "not a ppo_vec checkpoint, or is cut off",
        str(flipped): "damaged",
        str(foreign): "not a ppo_vec checkpoint",
        str(altered(trained, tmp_path / "module.pt", env_id="os:Env-v0")): "would import code; refused",
        str(altered(trained, tmp_path / "type.pt", num_envs="4")): "num_envs",
        f"{trained} --env-id Pendulum-v1": "was trained on BipedalWalker-v3, not on Pendulum-v1",
        str(altered(trained, tmp_path / "other.pt", env_id="Pendulum-v1")): "",
    }
    capfd.readouterr()
    for words, reason in cases.items():
        for mode in ("--resume", "--evaluate"):
            assert run(f"{mode} {words}") == 2, words
            assert reason in check_one_line(capfd)
    assert run(f"--resume {trained / 'best.pt'}") == 2
    assert "policy only" in check_one_line(capfd)
    assert run(f"--resume {trained} --num-envs 8") == 2
    assert "--num-envs cannot change" in check_one_line(capfd)


def test_run_folders_that_cannot_be_written(trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    (tmp_path / "file").touch()
    capfd.readouterr()
    assert run(f"--runs-dir {tmp_path / 'file'}") == 2
    assert "cannot write the run folder" in check_one_line(capfd)
    assert run(f"--runs-dir {trained.parent} --run-name {trained.name}") == 2
    assert "already holds a run" in check_one_line(capfd)


@pytest.mark.timeout(60)
def test_unknown_flags_and_help() -> None:
    script = [sys.executable, ppo_vec.__file__]
    unknown = subprocess.run([*script, "--no-such-flag"], capture_output=True, text=True)
    assert unknown.returncode == 2
    assert "no-such-flag" in unknown.stderr
    shown = subprocess.run([*script, "--help"], capture_output=True, text=True).stdout
    for name in ppo_vec.Args.__dataclass_fields__:
        assert f"--{name.replace('_', '-')}" in shown


@pytest.mark.timeout(120)
def test_the_files_and_tags_of_a_run(trained: Path) -> None:
    from matplotlib.image import imread
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    names = {p.name for p in trained.iterdir()}
    assert {"args.json", "best.pt", "checkpoint.pt", "episodes.csv", "summary.json", "learning_curve.png"} <= names
    assert sum(name.startswith("events.out.tfevents") for name in names) == 1
    events = EventAccumulator(str(trained), size_guidance={"scalars": 0})
    events.Reload()
    assert set(events.Tags()["scalars"]) == TAGS

    lines = (trained / "episodes.csv").read_text().splitlines()
    assert lines[0] == "global_step,time_s,return,length,env"
    rows = np.array([[float(x) for x in line.split(",")] for line in lines[1:]])
    returns = events.Scalars("charts/episodic_return")
    np.testing.assert_array_equal(rows[:, 0], [e.step for e in returns])
    np.testing.assert_allclose(rows[:, 2], [e.value for e in returns], rtol=1e-6)
    assert (np.diff(rows[:, 0]) >= 0).all()
    assert set(rows[:, 4]) <= {0, 1, 2, 3}

    summary = json.loads((trained / "summary.json").read_text())
    expected = "env_id seed global_step wall_time_s train_time_s sps eval_episodes eval_mean eval_std eval_min "
    expected += "eval_frac_solved last_eval_mean last_eval_std last_eval_min solved_at_step solved_at_s"
    assert set(expected.split()) <= set(summary)
    steps = [e.step for e in events.Scalars("losses/value_loss")]
    assert summary["global_step"] == steps[-1] >= 3000 > steps[-2]
    assert summary["eval_episodes"] == 4
    # Every environment has as many steps as its episodes and the one under way; a reset row is no step.
    tree = torch.load(trained / "checkpoint.pt", weights_only=True)
    assert tree["global_step"] == rows[:, 3].sum() + tree["envs"]["lengths"].sum()

    told = json.loads((trained / "args.json").read_text())
    assert told["args"]["num_envs"] == 4
    assert set(told["versions"]) == {"python", "torch", "numpy", "gymnasium", "box2d"}
    assert imread(trained / "learning_curve.png").std() > 0.05


@pytest.mark.timeout(120)
def test_evaluate(trained: Path, capfd: pytest.CaptureFixture) -> None:
    def evaluate(words: str = "") -> str:
        assert run(f"--evaluate {trained} --eval-episodes 4 {words}") == 0
        return capfd.readouterr().out

    first = evaluate()
    assert first == evaluate()
    assert f"{json.loads((trained / 'summary.json').read_text())['eval_mean']:.1f} +-" in first  # the same test
    assert "stochastic" in evaluate("--stochastic")


@pytest.mark.timeout(120)
def test_a_video_of_the_whole_episode(trained: Path, capfd: pytest.CaptureFixture) -> None:
    import imageio_ffmpeg

    assert run(f"--evaluate {trained} --eval-episodes 1 --capture-video") == 0
    (path,) = (trained / "videos").glob("*.mp4")
    frames, _ = imageio_ffmpeg.count_frames_and_secs(str(path))
    task = ppo_vec.Task.of(ppo_vec.Args())
    (_, length), *_ = ppo_vec.run_episodes(task, ppo_vec.load_policy(trained), [ppo_vec.TEST_SEEDS], as_published=True)
    assert frames == length + 1  # the first observation, and one after each step


def test_load_policy(trained: Path) -> None:
    act = ppo_vec.load_policy(trained)
    obs = np.random.default_rng(0).normal(size=(7, 24))
    batch = act(obs)
    assert batch.shape == (7, 4)
    assert (np.abs(batch) <= 1).all()
    one = act(obs[0])
    assert one.shape == (4,)
    np.testing.assert_array_equal(one, batch[0])
    np.testing.assert_array_equal(ppo_vec.load_policy(trained / "best.pt")(obs), batch)


@pytest.mark.timeout(120)
def test_resume_of_a_finished_run(trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    before = digests(trained)
    capfd.readouterr()
    assert run(f"--resume {trained}") == 0
    assert "is finished" in capfd.readouterr().err
    assert digests(trained) == before


@pytest.mark.timeout(120)
def test_a_longer_run_extends_a_finished_one(tmp_path: Path) -> None:
    run(SMALL, f"--total-timesteps 1000 --runs-dir {tmp_path} --run-name a")
    first = ppo_vec.read_checkpoint(str(tmp_path / "a"))[1]
    assert run(f"--resume {tmp_path / 'a'} --total-timesteps 2000") == 0
    second = ppo_vec.read_checkpoint(str(tmp_path / "a"))[1]
    assert second["global_step"] >= 2000
    assert second["iteration"] > first["iteration"]
    assert second["finished"]
    assert not torch.equal(first["agent"]["actor.0.weight"], second["agent"]["actor.0.weight"])
    rows = np.loadtxt(tmp_path / "a" / "episodes.csv", delimiter=",", skiprows=1)
    assert (np.diff(rows[:, 0]) >= 0).all()
