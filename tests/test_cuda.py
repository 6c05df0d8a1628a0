"""--cuda. Most tests need a GPU; on a machine without, one runs CudaGraph on a stand-in for torch.cuda."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc
import multiprocessing
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
from ppo_vec import Options, Rollout, State, descend_all, policy_loss, update

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
    return State(args, ppo_vec.Task(5, -bound, bound, None, None), torch.device(device))


def fake_rollout(state: State, seed: int) -> Rollout:
    """Random numbers, as collect() would fill it."""
    rng, (T, N) = torch.Generator().manual_seed(seed), (state.args.num_steps, state.args.num_envs)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng)

    obs, actions = normal(T + 1, N, 5).to(state.device), normal(T, N, 3).to(state.device)
    flags = (torch.rand(T, N, generator=rng) < 0.1 for _ in range(2))
    rollout = Rollout(obs, normal(T, N, 5), actions, normal(T, N), *flags, torch.zeros(N, dtype=torch.bool), [])
    with torch.no_grad():
        rollout.normalized_obs = x = state.agent.normalizer(obs)
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
        kept = self.state.descend_all
        tensors = [self.state.agent.state_dict(), *(o.state for o in self.state.optimizers)]
        tensors.append({"stopped": self.state.optimizers[0].halted})
        before = copy.deepcopy(tensors)
        yield
        for now, then in zip(tensors, before):
            for name, tensor in now.items():
                tensor.copy_(then[name])
        sums, step = kept.sums, kept.run_minibatch
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
        states[0].descend_all, states[1].descend_all = ppo_vec.CudaGraph(), descend_all
        return tuple(states)

    return SimpleNamespace(pair=pair, stand_in=stand_in if request.param == "stand-in" else None)


def weights(state: State) -> Tensor:
    return torch.cat([o.flat for o in state.optimizers]).cpu()


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
        assert graphed.descend_all.graph is not None
        assert torch.equal(weights(graphed), weights(plain))
    assert int(graphed.optimizers[0].state["step"]) == 4 * 12
    if device.stand_in:
        assert (device.stand_in.recorded, device.stand_in.replays) == (1, 3 * 12)


@with_devices
def test_a_graph_is_recorded_anew_for_other_arguments(device: SimpleNamespace) -> None:
    args = make_args()
    graphed, plain = device.pair(args)
    for i, norm in enumerate((0.5, 0.5, 0.02, 0.02)):
        now = dataclasses.replace(args, max_grad_norm=norm, clip_coef=0.2 / 2**i)  # the second is copied
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
        before = [int(o.state["step"]) for o in graphed.optimizers]
        rows = [update(state, fake_rollout(plain, i), args) for state in (graphed, plain)]
        assert rows[0] == pytest.approx(rows[1], rel=1e-5, abs=1e-6)
        assert torch.equal(weights(graphed), weights(plain))
        actor, critic = (int(o.state["step"]) for o in graphed.optimizers)
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
    assert graphed.descend_all.graph is None
    assert capsys.readouterr().err.count("warning: --cuda: no CUDA graph") == 1


@with_devices
def test_the_time_on_the_cpu_is_measured_on_a_copy(device: SimpleNamespace) -> None:
    args = make_args()
    graphed, _ = device.pair(args)
    update(graphed, fake_rollout(graphed, 0), args)
    before = weights(graphed)
    assert 0 < graphed.descend_all.cpu_seconds(graphed.agent, args) < 10
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


def test_no_memory_left_at_the_start_is_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    """The workers have been started by then."""

    def no_memory(*_: Any) -> State:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 16.00 MiB")

    monkeypatch.setattr(State, "move_to", no_memory)
    assert ppo_vec.main(f"{TINY} --cuda --total-timesteps 512 --runs-dir {tmp_path}".split()) == 1
    gc.collect()
    said = capfd.readouterr().err
    assert "error: no memory left on the GPU" in said
    assert "--num-minibatches" in said
    assert "Traceback" not in said
    assert not multiprocessing.active_children()


# ---- Whole trainings on a GPU ----------------------------------------------------------------------------------------

TINY = (
    "--env-id Pendulum-v1 --num-envs 4 --num-workers 2 --num-steps 64 --num-minibatches 4 --update-epochs 4 "
    "--actor-hidden-sizes 16 16 --critic-hidden-sizes 16 16 --eval-episodes 1 --anneal-share 0.001"
)


def train(folder: Path, name: str, flags: str) -> Path:
    """A new run, or one that is there and goes on."""
    run = folder / name
    where = f"--resume {run}" if run.exists() else f"{TINY} --runs-dir {folder} --run-name {name}"
    assert ppo_vec.main(f"{where} {flags}".split()) == 0
    return run


def learned(run: Path) -> dict[str, Tensor]:
    tree = ppo_vec.read_checkpoint(run / "checkpoint.pt")[1]
    return {**tree["agent"], **{f"exp_avg{i}": state[0]["exp_avg"] for i, state in enumerate(tree["optimizers"])}}


def weights_of(run: Path) -> Tensor:
    return torch.cat(
        [tensor.flatten() for name, tensor in learned(run).items() if name.startswith(("actor", "critic"))]
    )


@pytest.mark.cuda
@on_gpu
def test_a_training_on_the_gpu_says_so_resumes_and_heals_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    """Whole; in two parts, where the second records its own graph; and with a worker killed."""
    whole = learned(train(tmp_path, "whole", "--cuda --total-timesteps 1536"))
    said = capfd.readouterr().err
    assert said.count("as a CUDA graph; on the CPU about") == 1
    assert "no CUDA graph" not in said
    train(tmp_path, "parts", "--cuda --total-timesteps 768")
    parts = learned(train(tmp_path, "parts", "--cuda --total-timesteps 1536"))
    rollout, seen = ppo_vec.VecEnv.rollout, []

    def killing(self: ppo_vec.VecEnv, *args: Any) -> Rollout:
        seen.append(self.replacements)
        if len(seen) == 3:
            os.kill(self.processes[1].pid, signal.SIGKILL)
        return rollout(self, *args)

    monkeypatch.setattr(ppo_vec.VecEnv, "rollout", killing)
    killed = learned(train(tmp_path, "killed", "--cuda --total-timesteps 1536"))
    assert "ended with exit code -9" in capfd.readouterr().err
    assert seen == [0, 0, 0, 1, 1, 1]
    for other in (killed, parts):
        for name, tensor in other.items():
            assert torch.equal(tensor, whole[name]), name


@pytest.mark.cuda
@on_gpu
def test_a_run_may_change_its_device(tmp_path: Path) -> None:
    """Its checkpoint is the same on both; only last bits of the updates differ."""
    first = weights_of(train(tmp_path, "first", "--no-cuda --total-timesteps 256 --learning-rate 1e-9"))
    expected = weights_of(train(tmp_path, "cpu", "--no-cuda --total-timesteps 1024"))
    found = {"whole": weights_of(train(tmp_path, "gpu", "--cuda --total-timesteps 1024"))}
    for flag, other in (("--cuda", "--no-cuda"), ("--no-cuda", "--cuda")):
        train(tmp_path, f"then{other}", f"{flag} --total-timesteps 512")
        found[other] = weights_of(train(tmp_path, f"then{other}", f"{other} --total-timesteps 1024"))
    apart = {name: float((each - expected).norm() / (expected - first).norm()) for name, each in found.items()}
    assert max(apart.values()) < 0.1, apart


def start(code: str, *flags: str, **env: str) -> subprocess.Popen:
    """A process of its own, for what is settled once in a process."""
    path = {"PYTHONPATH": os.pathsep.join([str(Path(ppo_vec.__file__).parent), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", f"import sys, torch, ppo_vec; {code}; sys.exit(ppo_vec.main())", *flags]
    there = Path(ppo_vec.__file__).parent
    return subprocess.Popen(command, cwd=there, stderr=subprocess.PIPE, text=True, env={**os.environ, **path, **env})


@pytest.mark.cuda
@on_gpu
def test_a_cublas_setting_that_torch_refuses_is_replaced(tmp_path: Path) -> None:
    flags = f"{TINY} --cuda --total-timesteps 512 --runs-dir {tmp_path}".split()
    _, said = (process := start("pass", *flags, CUBLAS_WORKSPACE_CONFIG=":0:0")).communicate(timeout=100)
    assert (process.returncode, "no CUDA device" in said) == (0, False), said


@pytest.mark.cuda
@on_gpu
def test_no_memory_left_on_the_gpu_is_one_clear_line(tmp_path: Path) -> None:
    flags = f"{TINY} --cuda --total-timesteps 512 --critic-hidden-sizes 2048 2048 --runs-dir {tmp_path}".split()
    code = "torch.cuda.set_per_process_memory_fraction(7e7 / torch.cuda.mem_get_info()[1])"
    _, said = (process := start(code, *flags)).communicate(timeout=100)
    assert process.returncode == 1, said
    assert "error: no memory left on the GPU" in said
    assert "--num-minibatches" in said
    assert "Traceback" not in said


@pytest.mark.cuda
@on_gpu
def test_ctrl_c_on_the_gpu_loses_nothing(tmp_path: Path) -> None:
    flags = f"{TINY} --cuda --total-timesteps 10000000 --runs-dir {tmp_path} --run-name run".split()
    with start("pass", *flags) as process:
        for line in process.stderr:
            if "CUDA graph" in line:
                break
        process.send_signal(signal.SIGINT)
        process.stderr.read()
        assert process.wait(timeout=30) == 130
    step = ppo_vec.read_checkpoint(tmp_path / "run")[1]["global_step"]
    run = train(tmp_path, "run", f"--total-timesteps {step + 1000}")
    assert ppo_vec.read_checkpoint(run / "checkpoint.pt")[1]["global_step"] >= step + 1000
