"""export.py and model_card.py: the ONNX file acts as load_policy does, and a model card has the run's figures."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
import yaml

import ppo_vec

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))
import export
import model_card

Capture, Patch = pytest.CaptureFixture[str], pytest.MonkeyPatch
REFERENCE = ROOT / "runs" / "reference" / "BipedalWalker-v3"
MISSING = [name for name in export.PACKAGES if importlib.util.find_spec(name) is None]
needs_onnx = pytest.mark.skipif(bool(MISSING), reason=f'not installed: {MISSING}; pip install -e ".[export]"')
BOX = np.float32([-1, -1]), np.float32([1, 1])
SUMMARY = {
    "env_id": "My-v0", "global_step": 1000, "train_time_s": 12.5, "eval_episodes": 100, "eval_mean": -12.344,
    "eval_std": 0.126, "eval_min": -13.0, "eval_frac_solved": 0.25, "last_eval_mean": 3.0, "last_eval_std": 4.0,
    "solved_at_step": 600, "solved_at_s": 7.6, "finished": True,
}  # fmt: skip


def make_run(folder: Path, low: np.ndarray, high: np.ndarray, gain: float = 1, **args: Any) -> Path:
    """A run folder with a random policy. Its normaliser knows one number of seven digits."""
    options = ppo_vec.Options(env_id="My-v0", actor_hidden_sizes=(16, 8), **args)
    task = ppo_vec.Task(3, low, high, None, None)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        agent = ppo_vec.Agent(task.obs_dim, task.action_dim, options, task.discrete)
        for parameter in agent.parameters():
            parameter += 0.5 * torch.randn(parameter.shape)
        agent.actor[-1].weight *= gain
    agent.normalizer.mean.copy_(torch.tensor([1234567.0, 0.1, -3], dtype=torch.float64))
    agent.normalizer.var.copy_(torch.tensor([1e-4, 1, 1e6], dtype=torch.float64))
    folder.mkdir()
    (folder / "best.pt").write_bytes(ppo_vec.encode(ppo_vec.policy_dict(agent, options, task)))
    (folder / "summary.json").write_text(json.dumps(SUMMARY))
    info = ppo_vec.describe_run(options) | {"command": "python ppo_vec.py --resume latest"}
    (folder / "args.json").write_text(json.dumps(info | {"earlier": [{"command": "python ppo_vec.py --seed 3"}]}))
    return folder


# ---- export.py -------------------------------------------------------------------------------------------------------


def start(file: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def actions_of_both(run: Path, tmp_path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The file's and load_policy's actions for 506 observations, some of them far away."""
    assert export.main([str(run), str(tmp_path / "policy.onnx")]) == 0
    session, act = start(tmp_path / "policy.onnx"), ppo_vec.load_policy(run)
    obs = act.obs_mean + 3 * np.random.default_rng(1).normal(size=(506, 3)) / act.obs_scale
    obs[:6] += np.array([[1e9], [-1e9], [np.inf], [-np.inf], [99], [0]])
    parts = [session.run(None, {"observation": some})[0] for some in (obs[:1], obs[1:6], obs[6:])]
    ours, expected = np.concatenate(parts), act(obs)
    assert (ours.shape, ours.dtype) == (expected.shape, expected.dtype)
    return ours, expected


@needs_onnx
@pytest.mark.parametrize(
    ("activation", "state_dependent_std"), list(zip(ppo_vec.ACTIVATIONS, (False, True, True, False)))
)
def test_the_file_acts_as_load_policy_does(tmp_path: Path, activation: str, state_dependent_std: bool) -> None:
    run = make_run(tmp_path / "run", *BOX, activation=activation, state_dependent_std=state_dependent_std)
    ours, expected = actions_of_both(run, tmp_path)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)
    assert (abs(expected) < 1).mean() > 0.1  # not all of them at a bound, where every policy is the same


@needs_onnx
def test_actions_stay_within_odd_bounds(tmp_path: Path) -> None:
    low, high = np.float32([-0.1, -0.9, 1000, -3e-4, 0, -1e8]), np.float32([0.7, 0.8, 1001.5, -1e-4, 0, 3])
    ours, expected = actions_of_both(make_run(tmp_path / "run", low, high, gain=10), tmp_path)
    width = (high.astype(np.float64) - low).clip(1e-9)
    np.testing.assert_allclose(ours / width, expected / width, rtol=0, atol=1e-4)
    assert ((low <= ours) & (ours <= high)).all()
    assert (ours[:, 0].min(), ours[:, 1].max()) == (low[0], high[1])  # rounding alone would go past these two


@needs_onnx
def test_discrete_actions(tmp_path: Path) -> None:
    actions = np.arange(3, 8)
    ours, expected = actions_of_both(make_run(tmp_path / "run", actions, actions), tmp_path)
    assert np.array_equal(ours, expected)
    assert set(ours) <= set(actions)
    assert len(set(ours)) > 2


@needs_onnx
def test_the_reference_walker_in_a_process_of_its_own(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
    command = [sys.executable, export.__file__, str(REFERENCE), "walker.onnx"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path, env=env)
    assert (done.returncode, done.stderr) == (0, "")
    assert os.listdir(tmp_path) == ["walker.onnx"]
    session, act = start(tmp_path / "walker.onnx"), ppo_vec.load_policy(REFERENCE)
    about = session.get_modelmeta().custom_metadata_map
    assert about["env_id"] == "BipedalWalker-v3"
    expected = json.loads((REFERENCE / "summary.json").read_text())
    mean, std = re.fullmatch(r"(\S+) \+/- (\S+) over 100 test episodes", about["test_result"]).groups()
    assert (float(mean), float(std)) == (round(expected["eval_mean"], 1), round(expected["eval_std"], 1))
    walker = gym.make("BipedalWalker-v3")
    obs, _ = walker.reset(seed=0)
    for _ in range(300):
        ((ours,),) = session.run(None, {"observation": obs[None].astype(np.float64)})
        np.testing.assert_allclose(ours, act(obs), rtol=0, atol=1e-5)
        obs, *_ = walker.step(ours)
    walker.close()


@needs_onnx
def test_a_file_that_acts_otherwise_is_not_written(tmp_path: Path, monkeypatch: Patch, capsys: Capture) -> None:
    run, forward = make_run(tmp_path / "run", *BOX), export.Network.forward
    monkeypatch.setattr(export.Network, "forward", lambda self, obs: forward(self, obs) + 1e-3)
    assert export.main([str(run), str(tmp_path / "policy.onnx")]) == 1
    assert "differ from load_policy's by 0.001\n" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["run"]


def refused(program: Any, argv: list[Any], capsys: Capture) -> str:
    assert program.main([str(word) for word in argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith(f"{program.__name__}.py: error: ")
    return line


def test_export_says_in_one_line_what_is_wrong(tmp_path: Path, monkeypatch: Patch, capsys: Capture) -> None:
    run, out = make_run(tmp_path / "run", *BOX), tmp_path / "policy.onnx"
    assert "there is no checkpoint at nowhere" in refused(export, ["nowhere", out], capsys)
    assert "must end in .onnx" in refused(export, [run, run / "best.pt"], capsys)
    assert "in a folder that exists" in refused(export, [run, tmp_path / "none" / "policy.onnx"], capsys)
    monkeypatch.setattr(export, "PACKAGES", ("no_such_package",))
    line = refused(export, [run, out], capsys)
    assert line.endswith('not installed: no_such_package; pip install -e ".[export]"')
    (run / "best.pt").write_bytes((run / "best.pt").read_bytes()[:-1])
    assert "best.pt is not a ppo_vec checkpoint, or is cut off" in refused(export, [run, out], capsys)
    assert not out.exists()


@needs_onnx
def test_a_distribution_that_export_does_not_know(tmp_path: Path, monkeypatch: Patch, capsys: Capture) -> None:
    monkeypatch.setattr(ppo_vec, "Distribution", type("Beta", (ppo_vec.Gaussian,), {}))
    run = make_run(tmp_path / "run", *BOX)
    assert "Beta is new" in refused(export, [run, tmp_path / "policy.onnx"], capsys)


# ---- model_card.py ---------------------------------------------------------------------------------------------------


def read_card(run: Path) -> tuple[dict[str, Any], str]:
    _, head, text = (run / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(head), text


def test_a_card_has_the_figures_of_the_run(tmp_path: Path, capsys: Capture) -> None:
    run = make_run(tmp_path / "my run", *BOX, env_kwargs='{"g": 1}')
    (run / "videos").mkdir()
    for name in ("learning_curve.png", "videos/a b.gif", "videos/My-v0-seed0.mp4"):
        (run / name).touch()
    assert model_card.main([str(run), "--repo", "me/walker"]) == 0
    upload = (
        f"hf upload me/walker '{run}' . --exclude 'checkpoint*'\nhf upload me/walker '{run}/videos/My-v0-seed0.mp4' "
    )
    assert f"\n{upload}replay.mp4" in capsys.readouterr().out
    head, text = read_card(run)
    (model,) = head["model-index"]
    assert model == {
        "name": "PPO-My-v0",
        "results": [
            {
                "task": {"type": "reinforcement-learning", "name": "reinforcement-learning"},
                "dataset": {"type": "My-v0", "name": "My-v0"},
                "metrics": [
                    {"type": "mean_reward", "name": "mean_reward", "value": "-12.34 +/- 0.13", "verified": False}
                ],
            }
        ],
    }
    assert head["library_name"] == "ppo_vec"
    assert {"reinforcement-learning", "My-v0"} <= set(head["tags"])
    info = json.loads((run / "args.json").read_text())
    for words in (
        "| return over 100 unseen episodes | -12.3 ± 0.1 (min -13.0) |", "| of these, solved | 25% |",
        "| training | 1000 steps, 12 s |", "| solved after | 600 steps, 8 s |", 'env_kwargs `{"g": 1}`, trained',
        "![learning_curve.png](learning_curve.png)", "![a b.gif](videos/a%20b.gif)",
        "\n[My-v0-seed0.mp4](videos/My-v0-seed0.mp4)", "hf download me/walker --local-dir walker\n",
        "```\npython ppo_vec.py --seed 3\npython ppo_vec.py --resume latest\n```", 'load_policy("walker")', "(3,)",
        f"torch {torch.__version__}", f"commit {info['git_commit']}",
    ):  # fmt: skip
        assert words in text, text


def test_a_card_of_the_reference_walker(tmp_path: Path, capsys: Capture) -> None:
    """And huggingface_hub, where it is installed, reads the card as we mean it."""
    run = tmp_path / "BipedalWalker-v3__1"
    shutil.copytree(REFERENCE, run, ignore=shutil.ignore_patterns("*.mp4", "*.gif"))
    assert model_card.main([str(run)]) == 0
    assert f"hf upload USER/BipedalWalker-v3__1 {run} . --exclude" in capsys.readouterr().out
    head, text = read_card(run)
    value = head["model-index"][0]["results"][0]["metrics"][0]["value"]
    expected = json.loads((REFERENCE / "summary.json").read_text())
    assert [float(x) for x in value.split(" +/- ")] == [round(expected[k], 2) for k in ("eval_mean", "eval_std")]
    assert ".mp4" not in text
    assert "{" not in text
    if importlib.util.find_spec("huggingface_hub"):
        from huggingface_hub import ModelCard

        (result,) = ModelCard.load(run / "README.md").data.eval_results
        assert (result.dataset_type, result.metric_value) == ("BipedalWalker-v3", value)


def test_what_the_run_has_not_is_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", *BOX)
    nothing = {"eval_frac_solved": None, "solved_at_step": None, "solved_at_s": None}
    (run / "summary.json").write_text(json.dumps(SUMMARY | nothing | {"env_id": 'a: "b"-v0'}))
    assert model_card.main([str(run)]) == 0
    head, text = read_card(run)
    assert head["model-index"][0]["results"][0]["dataset"]["type"] == 'a: "b"-v0'
    assert "    python ppo_vec.py --evaluate run --env-id 'a: \"b\"-v0'\n" in text  # it would import code
    assert "solved" not in text
    assert "![" not in text


def test_only_its_own_card_is_overwritten(tmp_path: Path, capsys: Capture) -> None:
    run = make_run(tmp_path / "run", *BOX)
    readme, text = run / "README.md", "My own words.\n"
    readme.write_text(text)
    assert "was not written by this program" in refused(model_card, [run], capsys)
    assert readme.read_text() == text
    readme.unlink()
    for repo in ("me/one", "me/two"):
        assert model_card.main([str(run), "--repo", repo]) == 0
        assert repo in readme.read_text(encoding="utf-8")
    card = readme.read_text(encoding="utf-8").replace(model_card.MARKER + "\n", "")
    capsys.readouterr()
    for content in (card, None):
        readme.unlink()
        readme.write_text(card, encoding="utf-8") if content else readme.symlink_to(tmp_path / "none")
        assert "was not written by this program" in refused(model_card, [run], capsys)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("best.pt", None, "there is no checkpoint at"),
        ("best.pt", "x", "best.pt is not a ppo_vec checkpoint"),
        ("args.json", None, "args.json is missing or damaged"),
        ("args.json", "[]", "args.json is missing or damaged"),
        ("args.json", '{"args": 1}', "lacks what a card needs"),
        ("args.json", '{"args": {}}', "lacks what a card needs"),
        ("summary.json", "{", "summary.json is missing or damaged"),
        ("summary.json", json.dumps(SUMMARY | {"finished": False}), "--resume"),
        ("summary.json", json.dumps(SUMMARY | {"eval_mean": None}), "lacks what a card needs"),
        ("summary.json", '{"finished": true, "env_id": "My-v0"}', "lacks what a card needs: 'eval_mean'"),
    ],
)
def test_a_broken_run_is_one_line(tmp_path: Path, capsys: Capture, file: str, content: str | None, words: str) -> None:
    run = make_run(tmp_path / "run", *BOX)
    (run / file).unlink()
    if content is not None:
        (run / file).write_text(content)
    assert words in refused(model_card, [run], capsys)
    assert not (run / "README.md").exists()


def test_a_wrong_folder_or_name_is_one_line(tmp_path: Path, capsys: Capture) -> None:
    assert "there is no run folder" in refused(model_card, [tmp_path / "none"], capsys)
    assert "--repo must be USER/NAME" in refused(model_card, [tmp_path, "--repo", "me"], capsys)
