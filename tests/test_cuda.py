"""--cuda. Most tests need a GPU; on a machine without, one runs CudaGraph on a stand-in for torch.cuda."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import ppo_vec
from ppo_vec import Options, Rollout, State, descend_both, policy_loss, update

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = [pytest.param("stand-in"), pytest.param("cuda", marks=[pytest.mark.cuda, on_gpu])]
RATE = 2.0**-9  # exact in float32, as which a graph holds it


def make_args(**changed: Any) -> Options:
    small: dict[str, Any] = {
        "num_envs": 4, "num_steps": 32, "num_minibatches": 4, "update_epochs": 3, "anneal_lr": False,
        "learning_rate": RATE, "critic_learning_rate": 2 * RATE, "ent_coef": 2.0**-7, "bounds_loss_coef": 0.01,
        "actor_hidden_sizes": (16, 16), "critic_hidden_sizes": (16, 16),
    }  # fmt: skip
    args = Options(**{**small, **changed})
    ppo_vec.validate(args)
    return args


def make_state(args: Options, device: str) -> State:
    bound = np.ones(3, np.float32)
    return State(args, ppo_vec.Task(5, 0, -bound, bound, None, None), torch.device(device))


def fake_rollout(state: State, seed: int) -> Rollout:
    """Random numbers, as collect() would fill it."""
    rng, (T, N) = torch.Generator().manual_seed(seed), (state.args.num_steps, state.args.num_envs)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng)

    obs, actions = normal(T + 1, N, 5).to(state.device), normal(T, N, 3).to(state.device)
    flags = (torch.rand(T, N, generator=rng) < 0.1 for _ in range(2))
    rollout = Rollout(obs, normal(T, N, 5), actions, normal(T, N), *flags, torch.zeros(N, dtype=torch.bool), [])
    with torch.no_grad():
        x = state.agent.normalizer(obs)
        values = state.agent.value(x).cpu() + normal(T + 1, N)
        logprobs, _ = state.agent.distribution.log_prob_entropy(state.agent.policy(x[:-1]), actions)
    rollout.logprobs = logprobs + 0.02 * normal(T, N).to(state.device)
    rollout.values, rollout.next_values = values[:-1], values[1:]
    return rollout


class StandIn:
    """torch.cuda where there is none: what is recorded runs once, is undone, and a replay runs it again."""

    def __init__(self) -> None:
        self.state: State | None = None
        self.recorded = self.replays = 0
        self.Stream = self.current_stream = lambda: SimpleNamespace(wait_stream=lambda other: None)
        self.stream = contextlib.nullcontext

    def CUDAGraph(self) -> Any:
        return SimpleNamespace(replay=None)

    @contextlib.contextmanager
    def graph(self, graph: Any) -> Iterator[None]:
        kept = self.state.descend_both
        tensors = [self.state.agent.state_dict(), *(o.state_dict()["state"][0] for o in self.state.optimizers)]
        tensors.append({"found_inf": self.state.optimizers[0].found_inf})
        before = copy.deepcopy(tensors)
        yield
        for now, then in zip(tensors, before):
            for name, tensor in now.items():
                tensor.copy_(then[name])
        sums, step = kept.sums, kept.step
        self.recorded += 1

        def replay() -> None:
            step()
            for own, new in zip(sums, kept.sums):  # a replay writes to the same place
                own.copy_(new)
            kept.sums = sums
            self.replays += 1

        graph.replay = replay


@pytest.fixture
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Makes a pair of equal states: one that uses CUDA graphs, and one that does without."""
    stand_in = StandIn()
    if request.param == "stand-in":
        for name in ("Stream", "current_stream", "stream", "CUDAGraph", "graph"):
            monkeypatch.setattr(torch.cuda, name, getattr(stand_in, name))

    def pair(args: Options) -> tuple[State, State]:
        states = [make_state(args, "cpu" if request.param == "stand-in" else "cuda") for _ in range(2)]
        stand_in.state = states[0]
        states[0].descend_both, states[1].descend_both = ppo_vec.CudaGraph(), descend_both
        return tuple(states)

    return SimpleNamespace(pair=pair, stand_in=stand_in if request.param == "stand-in" else None)


def weights(state: State) -> Tensor:
    return torch.cat([o.param_groups[0]["params"][0].detach().flatten() for o in state.optimizers]).cpu()


with_devices = pytest.mark.parametrize("device", DEVICES, indirect=True)


@with_devices
def test_a_graph_does_what_its_kernels_do_one_by_one(device: SimpleNamespace) -> None:
    """To the bit, with other rates and another entropy bonus in each update; and it is recorded once."""
    args = make_args()
    graphed, plain = device.pair(args)
    for i in range(4):
        rates = {"learning_rate": RATE / 2**i, "critic_learning_rate": RATE / 2 ** (i + 1)}
        now = dataclasses.replace(args, **rates, ent_coef=2.0 ** -(5 + i), gamma=0.9 + i / 100)
        rows = [update(state, fake_rollout(plain, i), now) for state in (graphed, plain)]
        assert rows[0] == pytest.approx(rows[1], rel=1e-5, abs=1e-6)
        assert graphed.descend_both.graph is not None
        assert torch.equal(weights(graphed), weights(plain))
    assert int(graphed.optimizers[0].state_dict()["state"][0]["step"]) == 4 * 12
    if device.stand_in:
        assert (device.stand_in.recorded, device.stand_in.replays) == (1, 3 * 12)


@with_devices
def test_a_graph_is_recorded_anew_for_other_arguments(device: SimpleNamespace) -> None:
    args = make_args()
    graphed, plain = device.pair(args)
    for i, clip_coef in enumerate((0.2, 0.2, 0.02, 0.02)):
        now = dataclasses.replace(args, clip_coef=clip_coef)
        for state in (graphed, plain):
            update(state, fake_rollout(plain, i), now)
        assert torch.equal(weights(graphed), weights(plain))
    if device.stand_in:
        assert (device.stand_in.recorded, device.stand_in.replays) == (2, 2 * 12)


@with_devices
def test_target_kl_stops_a_graph(device: SimpleNamespace) -> None:
    """In the middle of the replays, which all run; each update begins anew."""
    args = make_args(target_kl=0.01, learning_rate=8 * RATE)
    graphed, plain = device.pair(args)
    for i in range(4):
        before = [int(o.state_dict()["state"][0]["step"]) for o in graphed.optimizers]
        rows = [update(state, fake_rollout(plain, i), args) for state in (graphed, plain)]
        assert rows[0] == pytest.approx(rows[1], rel=1e-5, abs=1e-6)
        assert torch.equal(weights(graphed), weights(plain))
        actor, critic = (int(o.state_dict()["state"][0]["step"]) for o in graphed.optimizers)
        assert 0 < actor - before[0] < 12
        assert critic - before[1] == 12


@with_devices
def test_a_loss_that_cannot_be_recorded(
    device: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """One warning; the update goes on kernel by kernel."""
    graph = torch.cuda.graph

    def waiting_loss(*args: Any) -> Any:
        loss, metrics = policy_loss(*args)
        return loss * (1.0 if loss.item() < 1e9 else 0.5), metrics

    @contextlib.contextmanager
    def fails(*args: Any) -> Iterator[None]:
        with graph(*args):
            yield
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(ppo_vec, "policy_loss", waiting_loss)
    waiting_loss.__name__ = "policy_loss"
    if device.stand_in:
        monkeypatch.setattr(torch.cuda, "graph", fails)
    args = make_args()
    graphed, plain = device.pair(args)
    for i in range(3):
        for state in (graphed, plain):
            update(state, fake_rollout(plain, i), args)
        assert torch.equal(weights(graphed), weights(plain))
    assert graphed.descend_both.graph is None
    assert capsys.readouterr().err.count("warning: --cuda: no CUDA graph") == 1


@with_devices
def test_the_time_on_the_cpu_is_measured_on_a_copy(device: SimpleNamespace) -> None:
    args = make_args()
    graphed, _ = device.pair(args)
    update(graphed, fake_rollout(graphed, 0), args)
    before = weights(graphed)
    assert 0 < graphed.descend_both.cpu_seconds(graphed.agent, args) < 10
    assert torch.equal(weights(graphed), before)


@pytest.mark.cuda
@on_gpu
def test_an_update_on_the_gpu_is_that_of_the_cpu() -> None:
    args = make_args(target_kl=0.02)
    gpu, cpu = make_state(args, "cuda"), make_state(args, "cpu")
    first = weights(cpu)
    for i in range(3):
        rows = [update(state, fake_rollout(state, i), args) for state in (gpu, cpu)]
    assert (weights(gpu) - weights(cpu)).norm() < 0.01 * (weights(cpu) - first).norm()
    assert rows[0] == pytest.approx(rows[1], rel=0.05, abs=0.01)


# ---- Whole trainings on a GPU ----------------------------------------------------------------------------------------

TINY = (
    "--cuda --env-id Pendulum-v1 --num-envs 4 --num-workers 2 --num-steps 64 --num-minibatches 4 --update-epochs 4 "
    "--actor-hidden-sizes 16 16 --critic-hidden-sizes 16 16 --eval-episodes 1 --anneal-share 0.001"
)
KILLS_A_WORKER = """
import os, signal, sys
import ppo_vec
rollout, seen = ppo_vec.VecEnv.rollout, []
def killing(self, *args):
    seen.append(self.restarts)
    if len(seen) == 3:
        os.kill(self.processes[1].pid, signal.SIGKILL)
    return rollout(self, *args)
ppo_vec.VecEnv.rollout = killing
code = ppo_vec.main(sys.argv[1:])
print(seen)
sys.exit(code)
"""


def program(folder: Path, name: str, flags: str, code: str | None = None, **env: str) -> subprocess.CompletedProcess:
    """One ppo_vec.py in a process of its own."""
    start = ["-c", code] if code else [ppo_vec.__file__]
    where = "" if "--resume" in flags else f"--runs-dir {folder} --run-name {name}"
    path = {"PYTHONPATH": os.pathsep.join([str(Path(ppo_vec.__file__).parent), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, *start, *f"{flags} {where}".split()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, **path, **env})


def learned(run: Path) -> dict[str, Tensor]:
    tree = ppo_vec.read_checkpoint(run / "checkpoint.pt")[1]
    return {**tree["agent"], **{f"exp_avg{i}": state[0]["exp_avg"] for i, state in enumerate(tree["optimizers"])}}


def weights_of(run: Path) -> Tensor:
    agent = ppo_vec.read_checkpoint(run / "checkpoint.pt")[1]["agent"]
    return torch.cat([agent[name].flatten() for name in agent if "normalizer" not in name])


@pytest.mark.cuda
@on_gpu
def test_a_training_on_the_gpu_says_so_resumes_and_heals_to_the_bit(tmp_path: Path) -> None:
    """Whole; in two parts, where the second records its own graph; and with a worker killed."""
    whole = program(tmp_path, "whole", f"{TINY} --total-timesteps 1536")
    assert whole.returncode == 0, whole.stderr
    assert whole.stderr.count("as a CUDA graph; on the CPU about") == 1
    killed = program(tmp_path, "killed", f"{TINY} --total-timesteps 1536", KILLS_A_WORKER)
    assert killed.returncode == 0, killed.stderr
    assert "ended with exit code -9" in killed.stderr
    assert killed.stdout.strip() == "[0, 0, 0, 1, 1, 1]"
    parts = program(tmp_path, "parts", f"{TINY} --total-timesteps 768")
    assert parts.returncode == 0, parts.stderr
    done = program(tmp_path, "parts", f"--resume {tmp_path / 'parts'} --total-timesteps 1536")
    assert done.returncode == 0, done.stderr
    expected = learned(tmp_path / "whole")
    for other in ("killed", "parts"):
        for name, tensor in learned(tmp_path / other).items():
            assert torch.equal(tensor, expected[name]), (other, name)


@pytest.mark.cuda
@on_gpu
def test_a_run_may_change_its_device(tmp_path: Path) -> None:
    """Its checkpoint is the same on both; only last bits of the updates differ."""
    assert program(tmp_path, "first", f"{TINY} --total-timesteps 256 --learning-rate 1e-9").returncode == 0
    for flag, other in (("--cuda", "--no-cuda"), ("--no-cuda", "--cuda")):
        flags = TINY.replace("--cuda", flag)
        assert program(tmp_path, flag, f"{flags} --total-timesteps 512").returncode == 0
        done = program(tmp_path, flag, f"--resume {tmp_path / flag} {other} --total-timesteps 1024")
        assert done.returncode == 0, done.stderr
        assert program(tmp_path, f"whole{flag}", f"{flags} --total-timesteps 1024").returncode == 0
    first, expected = (weights_of(tmp_path / run) for run in ("first", "whole--no-cuda"))
    for run in ("--cuda", "--no-cuda", "whole--cuda"):
        assert (weights_of(tmp_path / run) - expected).norm() < 0.1 * (expected - first).norm(), run


@pytest.mark.cuda
@on_gpu
@pytest.mark.parametrize("value", ["", ":0:0", ":16:8"])
def test_the_users_own_cublas_setting(tmp_path: Path, value: str) -> None:
    """One that torch refuses, for its sums may have other bits, is replaced."""
    done = program(tmp_path, "run", f"{TINY} --total-timesteps 512", CUBLAS_WORKSPACE_CONFIG=value)
    assert (done.returncode, "no CUDA device" in done.stderr) == (0, False), done.stderr


@pytest.mark.cuda
@on_gpu
def test_no_memory_left_on_the_gpu_is_one_clear_line(tmp_path: Path) -> None:
    code = "import sys, torch, ppo_vec; torch.cuda.set_per_process_memory_fraction(1e-3); sys.exit(ppo_vec.main())"
    flags = f"{TINY} --total-timesteps 512 --critic-hidden-sizes 4096 4096"
    done = program(tmp_path, "run", flags, code)
    assert done.returncode == 1
    assert "error: no memory left on the GPU" in done.stderr
    assert "Traceback" not in done.stderr
    assert "--num-minibatches" in done.stderr


@pytest.mark.cuda
@on_gpu
def test_ctrl_c_on_the_gpu_ends_in_time_and_loses_nothing(tmp_path: Path) -> None:
    flags = f"{TINY} --total-timesteps 10000000 --runs-dir {tmp_path} --run-name run"
    with subprocess.Popen([sys.executable, ppo_vec.__file__, *flags.split()], stderr=subprocess.PIPE) as process:
        for line in process.stderr:
            if b"CUDA graph" in line:
                break
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 130
    assert program(tmp_path, "run", f"--resume {tmp_path / 'run'} --total-timesteps 100000").returncode == 0
