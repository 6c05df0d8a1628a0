"""The fault suite, fast form: whatever happens to a run, it ends as if undisturbed, or in a clear error.

benchmarks/faults.py is the long form, and holds the tools: runs in processes of their own, environments that go wrong,
broken checkpoints.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import functools
import itertools
import json
import multiprocessing
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))

import faults
from faults import EAGER, assert_same, fingerprint, start, tiny

import ppo_vec

SLOW = """import time; real, ppo_vec.GRACE = ppo_vec.update, 60
ppo_vec.update = lambda *a: (time.sleep(0.15), real(*a))[1]"""
Capture, Patch, Make = pytest.CaptureFixture[str], pytest.MonkeyPatch, Callable[..., dict[str, Any]]
PLOT = ppo_vec.plot_learning_curve


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> faults.Reference:
    """An undisturbed run of BipedalWalker-v3."""
    return faults.Reference.make(tmp_path_factory.mktemp("reference") / "run")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture(autouse=True)
def no_plots(monkeypatch: Patch) -> None:
    """matplotlib takes longer than a tiny training."""
    monkeypatch.setattr(ppo_vec, "plot_learning_curve", lambda *_: None)


def in_folder(run: Path, args: tuple[str, ...]) -> list[str]:
    return [*(args or tiny()), "--runs-dir", str(run.parent), "--run-name", run.name]


def train(run: Path, *args: str) -> int:
    return ppo_vec.main(in_folder(run, args))


def resume(run: Path, *args: str) -> int:
    return ppo_vec.main(["--resume", str(run), *args])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Gives the fingerprint of an undisturbed run with these arguments."""

    @functools.cache
    def make(*args: str) -> dict[str, Any]:
        run = tmp_path_factory.mktemp("undisturbed") / "run"
        assert train(run, *args) == 0
        return fingerprint(run)

    return make


class Fork:
    """A tiny training in a copy of this process, after `patch`. It leads a group of processes of its own."""

    def __init__(self, run: Path, *args: str, patch: Callable[[], Any]) -> None:
        self.err = run.with_name("err")
        self.process = multiprocessing.get_context("fork").Process(target=self.main, args=(in_folder(run, args), patch))
        self.process.start()
        self.pid = self.process.pid

    def main(self, argv: list[str], patch: Callable[[], Any]) -> None:
        os.setsid()
        descriptor = os.open(self.err, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1), os.dup2(descriptor, 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        patch()
        sys.exit(ppo_vec.main(argv))

    def wait_for(self, path: Path) -> None:
        end = time.monotonic() + 100
        while not path.exists():
            assert self.process.is_alive(), self.err.read_text()
            assert time.monotonic() < end, self.err.read_text()
            time.sleep(0.01)

    def group(self) -> list[int]:
        """The living processes of the run."""
        found = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                state, _, group = path.read_text().rsplit(")", 1)[1].split()[:3]
                found += [int(path.parent.name)] * (int(group) == self.pid and state not in "ZX")
        return found

    def finish(self) -> tuple[int, str]:
        """The exit code and stderr of a run that leaves no process behind."""
        self.process.join(200)
        code, end = self.process.exitcode, time.monotonic() + 20
        while (left := self.group()) and time.monotonic() < end:
            time.sleep(0.05)
        for pid in self.group():
            os.kill(pid, signal.SIGKILL)
        self.process.join()
        assert code is not None, f"hangs: {self.err.read_text()}"
        assert not left, "a process lived on"
        return code, self.err.read_text()


@pytest.mark.timeout(300)
def test_two_threads_may_begin_in_a_forked_process() -> None:
    """torch makes autograd's engine anew in a forked process: without set_up_torch, 1 in 20 of these crash in it."""
    ppo_vec.set_up_torch()
    weight, x = torch.ones(8, 8, requires_grad=True), torch.ones(4, 8)
    torch.autograd.grad((weight @ weight).sum(), weight)  # this process has an engine

    def begin() -> None:
        ppo_vec.set_up_torch()
        barrier = threading.Barrier(2)

        def work(_: int) -> None:
            barrier.wait()
            torch.autograd.grad(torch.nn.functional.linear(x, weight).sum(), weight)

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(work, range(2)))

    codes = collections.Counter()
    for _ in range(150):
        child = multiprocessing.get_context("fork").Process(target=begin)
        child.start()
        child.join(60)
        codes[child.exitcode] += 1
    assert codes == {0: 150}


def checked_checkpoint(run: Path) -> dict[str, Any]:
    """The newest whole checkpoint, whose weights are finite."""
    tree = ppo_vec.read_checkpoint(run)[1]
    assert all(tensor.isfinite().all() for tensor in tree["agent"].values())
    return tree


# ---- The trainer is killed -------------------------------------------------------------------------------------------


def test_killed_trainer_resumes_bit_equal(reference: faults.Reference, run: Path) -> None:
    assert faults.kill_trainer(reference, run, [(0, 0.02), (7, 0.04)], EAGER).count("+") == 2


def test_killed_at_every_fifth_file_operation_resumes_bit_equal(run: Path, undisturbed: Make) -> None:
    """SIGKILL in the middle of the k-th write, or just before the k-th fsync or rename, of everything a run leaves."""
    expected = undisturbed()
    resumed = 0
    for k in range(1, 199, 5):
        path = run.with_name(f"run{k}")
        code, err = Fork(path, patch=lambda k=k: die_at(k)).finish()
        if code == 0:
            break
        assert code == -signal.SIGKILL, err
        if not any((path / name).exists() for name in ("checkpoint.pt", "checkpoint.previous.pt")):
            assert k <= 12, "no checkpoint"  # args.json, the logs and the first checkpoint are not yet written
            continue
        assert resume(path) == 0
        assert_same(path, expected)
        resumed += 1
    assert resumed >= 10


def watch_files(set_attribute: Callable[..., Any], event: Callable[..., None]) -> None:
    """Lets `event` happen before each open, write, fsync and rename of ppo_vec: event(way, path, file, data)."""
    fsync, replace = os.fsync, os.replace

    def open_watched(path: Path, mode: str) -> Any:
        event("open", path)
        file = open(path, mode)  # noqa: SIM115
        write = file.write
        file.write = lambda data: (event("write", path, file, data), write(data))[1]
        return file

    vars(ppo_vec).setdefault("open", open)  # monkeypatch only replaces what is there
    set_attribute(ppo_vec, "open", open_watched)
    set_attribute(os, "fsync", lambda fd: (event("fsync", os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    set_attribute(os, "replace", lambda old, new: (event("rename", new), replace(old, new)))


def die_at(k: int) -> None:
    """Lets the k-th write, fsync or rename of the trainer kill it."""
    calls = itertools.count(1)

    def event(way: str, path: Any, file: Any = None, data: bytes = b"") -> None:
        if way != "open" and next(calls) == k:
            if file:
                type(file).write(file, data[: len(data) // 2])
                file.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    watch_files(setattr, event)
    ppo_vec.should_save = lambda state: True


def test_write_file_reaches_the_disk_before_it_replaces(run: Path, monkeypatch: Patch) -> None:
    """Against a power cut: the bytes before the rename, the rename before whatever follows."""
    run.mkdir()
    calls: list[tuple[str, str]] = []
    watch_files(monkeypatch.setattr, lambda way, path, *_: calls.append((way, Path(path).name)))
    for data in (b"old", b"new"):
        ppo_vec.write_file(run / "file", data, keep=run / "kept")
    temporary = calls[0][1]
    assert temporary not in ("file", "kept")
    start = [(way, temporary) for way in ("open", "write", "fsync")]
    end = [("rename", "file"), ("fsync", run.name)]
    assert calls == [*start, *end, *start, ("rename", "kept"), *end]
    assert (run / "file").read_bytes() == b"new"
    assert (run / "kept").read_bytes() == b"old"


@pytest.mark.parametrize(
    ("update_s", "save_s", "every"), [(0.7, 0.0, 3), (10.0, 0.45, 5)], ids=["a quick disk", "a slow disk"]
)
def test_a_checkpoint_every_two_seconds_or_a_hundred_times_its_cost(
    run: Path, monkeypatch: Patch, update_s: float, save_s: float, every: int
) -> None:
    """On a clock that only updates and checkpoints move on, and each look at it by a little."""
    clock, saved, real, update, encode = [0.0], [], ppo_vec.save, ppo_vec.update, ppo_vec.encode

    def tick(seconds: float = 1e-6) -> float:
        clock[0] += seconds
        return clock[0]

    def save(state: ppo_vec.State, log: ppo_vec.Log) -> None:
        real(state, log)
        saved.append(checked_checkpoint(log.folder)["global_step"] // 40)

    monkeypatch.setattr(ppo_vec, "save", save)
    monkeypatch.setattr(ppo_vec, "update", lambda *args: (tick(update_s), update(*args))[1])
    monkeypatch.setattr(ppo_vec, "encode", lambda tree: (tick(save_s), encode(tree))[1])
    monkeypatch.setattr(ppo_vec, "should_evaluate", lambda *_: False)
    monkeypatch.setattr(time, "perf_counter", tick)
    assert train(run, *tiny("", 880)) == 0
    assert saved == [*range(0, 22, every), 22, 22]  # before the choice, too


def test_workers_end_with_a_killed_trainer(run: Path) -> None:
    """Also while one is stopped: it holds the pipes of those forked before it, so that theirs do not close."""
    mark = run.with_name("mark")
    fork = Fork(run, *tiny(), "--num-envs", "3", "--num-workers", "3", patch=lambda: stall("update", 200, mark))
    fork.wait_for(mark)
    *others, last = sorted(set(fork.group()) - {fork.pid})
    assert len(others) == 2
    os.kill(last, signal.SIGSTOP)
    os.kill(fork.pid, signal.SIGKILL)
    end = time.monotonic() + 60
    while set(others) & set(fork.group()) and time.monotonic() < end:
        time.sleep(0.05)
    left = fork.group()
    os.kill(last, signal.SIGCONT)
    code, err = fork.finish()
    assert code == -signal.SIGKILL
    assert "Traceback" not in err
    assert left == [last]


def test_an_unexpected_error_leaves_no_worker(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the trainer would wait at its exit, for ever, for workers that wait for it."""

    def no_device(args: Any) -> Any:
        assert len(multiprocessing.active_children()) == 2
        raise RuntimeError("CUDA error")

    monkeypatch.setattr(ppo_vec, "choose_device", no_device)
    with pytest.raises(RuntimeError, match="CUDA error"):
        train(run, *tiny(), "--num-workers", "2")
    assert multiprocessing.active_children() == []


def stall(name: str, seconds: float, mark: Path, when: Callable[..., Any] = lambda *_, **__: True) -> None:
    """Lets calls of a function of ppo_vec make the file `mark` and wait."""
    real = getattr(ppo_vec, name)

    def wrapper(*args: Any, **options: Any) -> Any:
        if when(*args, **options):
            mark.touch()
            time.sleep(seconds)
        return real(*args, **options)

    setattr(ppo_vec, name, wrapper)


# ---- Signals ---------------------------------------------------------------------------------------------------------

SIGNALS = [(signal.SIGINT, 130), (signal.SIGTERM, 143)]


@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_first_signal_saves_and_exits(reference: faults.Reference, run: Path, number: int, code: int) -> None:
    trainer = start(run, patch=SLOW, start_new_session=True)
    trainer.wait_moment(run, 3, 0.0)
    os.killpg(trainer.pid, number)  # as a terminal does: the workers get it, too
    result = trainer.finish().check(code)
    assert result.err.splitlines()[-1] == f"stopped by {signal.Signals(number).name}; continue with: --resume {run}"
    assert "starting new workers" not in result.err
    stopped = checked_checkpoint(run)
    assert 3 * 256 <= stopped["global_step"] < 4000
    assert stopped["global_step"] == 256 * faults.logged_iterations(run)
    assert resume(run) == 0
    assert_same(run, reference.state)


@pytest.mark.parametrize(("number", "code"), SIGNALS)
@pytest.mark.parametrize("second", [False, True], ids=["a long iteration", "a second signal"])
def test_a_run_that_does_not_end_by_itself_is_ended(
    run: Path, undisturbed: Make, number: int, code: int, second: bool
) -> None:
    expected, mark = undisturbed(), run.with_name("mark")

    def patch() -> None:
        stall("update", 200, mark, lambda state, *_: state.global_step == 120)
        if second:
            ppo_vec.GRACE = 100.0

    fork = Fork(run, patch=patch)
    fork.wait_for(mark)
    began = time.monotonic()
    os.kill(fork.pid, number)
    if second:
        time.sleep(0.5)
        assert fork.process.is_alive()
        os.kill(fork.pid, number)
    result, err = fork.finish()
    assert result == code, err
    assert (0.5 if second else ppo_vec.GRACE) < time.monotonic() - began < ppo_vec.GRACE + 15
    assert err.splitlines()[-1] == f"stopped by {signal.Signals(number).name}; continue with: --resume {run}"
    assert checked_checkpoint(run)["global_step"] < 120
    assert resume(run) == 0
    assert_same(run, expected)


def test_a_terminal_that_closes(run: Path, undisturbed: Make) -> None:
    """It sends SIGHUP, maybe twice; stderr cannot be written any more. What takes too long is ended all the same."""
    expected, mark = undisturbed(), run.with_name("mark")

    def patch() -> None:
        def gone(*_: Any) -> int:
            raise OSError(errno.EIO, "the terminal has gone")

        os.write = gone
        stall("update", 200, mark, lambda state, *_: state.global_step == 120)

    fork = Fork(run, patch=patch)
    fork.wait_for(mark)
    began = time.monotonic()
    for _ in range(2):
        os.kill(fork.pid, signal.SIGHUP)
        time.sleep(0.2)
    assert fork.finish()[0] == 129
    assert ppo_vec.GRACE < time.monotonic() - began < ppo_vec.GRACE + 15
    assert resume(run) == 0
    assert_same(run, expected)


def test_nohup(run: Path) -> None:
    """SIGHUP is ignored then."""
    few = "--env-id Pendulum-v1 --num-envs 2 --num-workers 1 --num-steps 64 --total-timesteps 6400 --eval-episodes 1"
    command = [sys.executable, ppo_vec.__file__, *in_folder(run, tuple(few.split()))]
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    finally:
        signal.signal(signal.SIGHUP, before)
    with process:
        while not (run / "checkpoint.pt").exists():
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGHUP)
        assert process.wait(timeout=60) == 0


# What a run does at its end: a function, and which calls of it are meant.
ENDING: dict[str, tuple[str, Callable[..., Any]]] = {
    "choice": ("play_seeds", lambda *args, **how: args[4] == 1 and "published" not in how),
    "test": ("play_seeds", lambda *args, **how: how.get("published")),
    "video": ("record_video", lambda *_: True),
    "last checkpoint": ("save", lambda state, log: state.finished),
    "picture": ("plot_learning_curve", lambda *_: True),
}


@pytest.mark.parametrize("ends", [True, False], ids=["in time", "too late"])
@pytest.mark.parametrize("phase", ENDING)
def test_signal_at_the_end_of_a_run(run: Path, undisturbed: Make, phase: str, ends: bool) -> None:
    """Exit code, checkpoint and summary agree, whether the run is finished when it ends."""
    args, mark = (*tiny("film"), "--capture-video"), run.with_name("mark")
    expected = undisturbed(*args)

    def patch() -> None:
        ppo_vec.GRACE = 60.0 if ends else 1.0
        name, when = ENDING[phase]
        stall(name, 0.3 if ends else 3, mark, when)

    fork = Fork(run, *args, patch=patch)
    fork.wait_for(mark)
    os.kill(fork.pid, signal.SIGTERM)
    code, err = fork.finish()
    assert "Traceback" not in err
    finished = ends or phase in ("last checkpoint", "picture")  # all is done but to write it down
    assert code == (0 if finished else 143), err
    checkpoint = checked_checkpoint(run)
    assert (checkpoint["finished"], checkpoint["global_step"]) == (finished, 120)
    assert json.loads((run / "summary.json").read_text())["finished"] == finished
    assert resume(run, "--capture-video") == 0
    assert_same(run, expected)
    assert (run / "videos" / f"{faults.tiny_id('film')}-seed0.mp4").stat().st_size > 100


def test_interrupt_while_spawned_workers_import(run: Path) -> None:
    """Ctrl-C reaches them, too; they must not print a traceback for each."""
    args = in_folder(run, (*tiny(), "--env-id", "Pendulum-v1"))
    trainer = faults.Trainer(*args, "--start-method", "spawn", start_new_session=True)

    def spawned() -> int:
        text = Path(f"/proc/{trainer.pid}/task/{trainer.pid}/children").read_text()
        with contextlib.suppress(OSError):  # one has just ended
            return sum(b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes() for pid in text.split())
        return 0

    assert trainer.wait_for(lambda: spawned() == 2)
    time.sleep(0.5)
    os.killpg(trainer.pid, signal.SIGINT)
    result = trainer.finish().check(130)
    assert f"\nstopped by SIGINT; continue with: --resume {run} --start-method spawn\n" in result.err
    assert "starting new workers" not in result.err


# ---- Workers fail ----------------------------------------------------------------------------------------------------


def lose(monkeypatch: Patch, method: str, number: int, which: int, once: Path) -> None:
    """Lets the last worker get a signal, once: before its call number `which` of a method, or between two rollouts."""
    trainer, calls, owner = os.getpid(), itertools.count(1), ppo_vec.Worker
    if method == "between rollouts":
        owner, method = ppo_vec.VecEnv, "rollout"
    real = getattr(owner, method)

    def wrapper(self: Any, *args: Any, **how: Any) -> Any:
        process = self.processes[1] if owner is ppo_vec.VecEnv and self.processes else None
        here = process is not None or (os.getpid() != trainer and getattr(self, "index", 0) == 1)
        if here and next(calls) == which and not once.exists():
            once.touch()
            os.kill(process.pid if process else os.getpid(), number)
            if process and number == signal.SIGKILL:
                process.join()
        return real(self, *args, **how)

    monkeypatch.setattr(owner, method, wrapper)


WARNING = {
    signal.SIGKILL: "worker 1 ended with exit code -9",
    signal.SIGSTOP: r"worker 1 took no step for 3 s \(--worker-timeout\)",
}
MOMENTS = [  # also in the midst of an episode; the third batch that is played is of the choice, the fourth of the test
    ("run", 1), ("between rollouts", 2), ("step", 35), ("play_batch", 3),
    ("restore", 1), ("between rollouts", 1), ("play_batch", 1), ("play_batch", 4),
]  # fmt: skip


@pytest.mark.parametrize(
    ("number", "method", "which"),
    [(signal.SIGKILL, *moment) for moment in MOMENTS] + [(signal.SIGSTOP, *moment) for moment in MOMENTS[:4]],
)
def test_lost_worker(
    run: Path, undisturbed: Make, monkeypatch: Patch, capsys: Capture, number: int, method: str, which: int
) -> None:
    """While starting, training, between rollouts, and in evaluations."""
    args = (*tiny("", 480), "--num-envs", "8", "--num-steps", "10", "--eval-episodes", "8", "--worker-timeout", "3")
    expected, once = undisturbed(*args), run.with_name("once")
    monkeypatch.setattr(ppo_vec, "START_TIMEOUT", 3.0)
    monkeypatch.setattr(ppo_vec, "CLOSE_TIMEOUT", 0.5)
    lose(monkeypatch, method, number, which, once)
    capsys.readouterr()
    assert train(run, *args) == 0
    assert once.exists()
    assert re.search(rf"warning: ({WARNING[number]}|a worker .*); starting new workers where", capsys.readouterr().err)
    assert_same(run, expected)
    assert json.loads((run / "summary.json").read_text())["worker_restarts"] >= 1


def test_large_weights_for_a_stopped_worker(run: Path, undisturbed: Make, monkeypatch: Patch, capsys: Capture) -> None:
    """They do not fit into its pipe, so that sending them would wait for good."""
    args = (*tiny("", 480), "--num-steps", "20", "--actor-hidden-sizes", "256", "256", "--worker-timeout", "2")
    expected = undisturbed(*args)
    monkeypatch.setattr(ppo_vec, "START_TIMEOUT", 2.0)
    monkeypatch.setattr(ppo_vec, "CLOSE_TIMEOUT", 0.5)
    lose(monkeypatch, "between rollouts", signal.SIGSTOP, 2, run.with_name("once"))
    began = time.monotonic()
    assert train(run, *args) == 0
    assert time.monotonic() - began < 60
    assert "warning: a worker takes no messages; starting new workers where" in capsys.readouterr().err
    assert_same(run, expected)


def test_lost_worker_of_walkers(reference: faults.Reference, run: Path, monkeypatch: Patch) -> None:
    """Their episodes are replayed in Box2D."""
    lose(monkeypatch, "step", signal.SIGKILL, 64 * 12 + 30, run.with_name("once"))
    assert train(run, *faults.SMALL) == 0
    assert_same(run, reference.state)
    assert json.loads((run / "summary.json").read_text())["worker_restarts"] == 1


@pytest.mark.parametrize(
    ("fault", "message"), [("raise", "ArithmeticError: the spring broke"), ("exit", "ended with exit code 7")]
)
def test_worker_that_always_fails(run: Path, capsys: Capture, fault: str, message: str) -> None:
    """An environment's own error is shown once, and tried twice; a worker that dies gets a third chance."""
    assert train(run, *tiny(fault, 1000)) == 1
    err = capsys.readouterr().err
    attempts = 2 if fault == "raise" else 3
    assert f"ppo_vec.py: error: gave up after {attempts} attempts without progress" in err
    assert message in err.split("gave up after")[1]
    assert err.count("Traceback") == ("in step\n" in err) == (fault == "raise"), "not the worker's own traceback, once"
    assert len(err.split("gave up after")[1].splitlines()) == 1
    assert checked_checkpoint(run)["global_step"] < 1000


@pytest.mark.parametrize(
    "args",
    [
        (*tiny("slow-reset", 200), "--num-envs", "10", "--eval-episodes", "4", "--worker-timeout", "2"),
        (*tiny("slow-evaluation", 40), "--eval-episodes", "2", "--worker-timeout", "1.5"),
        (*tiny("", 40), "--worker-timeout", "1e300"),
    ],
    ids=["resets", "steps of an evaluation", "as good as no limit"],
)
def test_slow_is_no_hang(run: Path, capsys: Capture, args: tuple[str, ...]) -> None:
    """A worker makes, resets and steps many environments in a row; each is progress."""
    assert train(run, *args, "--num-workers", "1", "--swa-share", "0") == 0
    assert "took no step" not in capsys.readouterr().err


def test_environment_that_cannot_be_replayed(run: Path, monkeypatch: Patch, capsys: Capture) -> None:
    """After a lost worker and on resume its episodes start anew; it says so, and training goes on."""
    lose(monkeypatch, "rollout", signal.SIGKILL, 3, run.with_name("once"))
    assert train(run, *tiny("unrepeatable", 150), "--num-steps", "15") == 0
    assert "cannot be replayed" in capsys.readouterr().err
    assert resume(run, "--total-timesteps", "300") == 0
    assert "cannot be replayed" in capsys.readouterr().err
    state = fingerprint(run)
    assert state["checkpoint"]["global_step"] == 300
    assert all(length == 20 for _, _, length, _ in state["episodes"])


# ---- Numbers that go wrong -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (tiny("nan-obs", 1000), r"obs\[\d\] of environment [01] at step 9 of the rollout is nan"),
        (tiny("nan-reward", 1000), r"rewards of environment [01] at step 8 of the rollout is nan"),
        (tiny("inf-reward", 1000), r"rewards of environment [01] at step 8 of the rollout is inf"),
        (tiny("nan-in-evaluation", 1000), r"the return of the evaluation episode with seed \d+ is nan"),
        (
            (*tiny("", 1000), "--learning-rate", "3e38", "--num-minibatches", "1"),
            r"actions\[\d\] of environment \d at step 0 of the rollout is -?(nan|inf)",
        ),
        ((*tiny(), "--critic-learning-rate", "1e30"), r"losses/value_loss\w* is (nan|inf)"),
    ],
    ids=["obs", "reward", "infinite reward", "evaluation", "actor", "critic"],
)
def test_a_number_is_named(run: Path, capsys: Capture, args: tuple[str, ...], named: str) -> None:
    assert train(run, *args) == 1
    err = capsys.readouterr().err
    assert re.fullmatch(rf"ppo_vec\.py: error: {named}.*", err.splitlines()[-1]), err
    assert "Traceback" not in err
    checked_checkpoint(run)


# ---- Full disks ------------------------------------------------------------------------------------------------------


def fill_disk(patches: Patch, name: str, way: str, after: int, code: int) -> list[Any]:
    """From the n-th time on that a file whose name contains `name` is written in this way, its disk is full.

    Gives the list of what is refused then.
    """
    count, refused = itertools.count(-after), []

    def event(now: str, path: Any, file: Any = None, data: bytes = b"") -> None:
        if now == way and name in Path(path).name and next(count) >= 0:
            refused.append(path)
            if file is None:
                raise OSError(code, os.strerror(code), str(path))
            full = os.open("/dev/full", os.O_WRONLY)  # the kernel's own error, from now on
            os.dup2(full, file.fileno())
            os.close(full)

    watch_files(patches.setattr, event)
    return refused


@pytest.mark.parametrize(
    ("name", "way", "after"),
    [
        ("checkpoint.pt", "write", 3), ("checkpoint.pt", "fsync", 2), ("checkpoint.pt", "rename", 4),
        ("checkpoint.previous", "rename", 1), ("checkpoint.pt", "open", 1), ("events", "write", 9),
        ("events", "fsync", 2), ("episodes.csv", "write", 3), ("best.pt", "write", 0), ("best.pt", "rename", 1),
        ("summary.json", "write", 0), ("summary.json", "rename", 1), ("evaluation.csv", "fsync", 0),
        ("learning_curve.png", "write", 0), (".mp4", "rename", 0), ("args.json", "write", 0),
    ],
)  # fmt: skip
def test_full_disk(
    run: Path, undisturbed: Make, monkeypatch: Patch, capsys: Capture, name: str, way: str, after: int
) -> None:
    """The run ends with one line and exit code 1; with space again, --resume loses nothing."""
    args, film = (*tiny("film", 200), "--capture-video"), ["--capture-video"]
    expected = undisturbed(*args)
    if name == "args.json":  # it is written first: here by --resume
        with monkeypatch.context() as patches:
            patches.setattr(ppo_vec, "should_save", lambda state: signal.raise_signal(signal.SIGTERM))
            assert train(run, *args) == 143
    code = errno.EROFS if way == "open" else errno.ENOSPC
    capsys.readouterr()
    with monkeypatch.context() as patches:
        patches.setattr(ppo_vec, "should_save", lambda state: True)
        patches.setattr(ppo_vec, "plot_learning_curve", PLOT)
        refused = fill_disk(patches, name, way, after, code)
        assert (resume(run, *film) if name == "args.json" else train(run, *args)) == 1
    assert refused
    err = capsys.readouterr().err
    errors = [line for line in err.splitlines() if "error" in line]
    assert errors == err.splitlines()[-1:], err
    path = rf"{run}/\S*{name.split('.prev')[0]}\S*"
    assert re.fullmatch(rf"ppo_vec\.py: error: cannot write {path}: .*{os.strerror(code)}.*", errors[0])
    assert "Traceback" not in err
    checked_checkpoint(run)
    monkeypatch.setattr(ppo_vec, "plot_learning_curve", PLOT)
    assert resume(run, *film) == 0
    assert_same(run, expected)
    assert (run / "learning_curve.png").stat().st_size > 1000
    assert not [path for path in run.glob("**/*.tmp*") if path.suffix != ".lock"]


def test_full_disk_before_the_first_checkpoint(run: Path, undisturbed: Make, monkeypatch: Patch) -> None:
    """There is nothing to resume; the same command starts the run."""
    with monkeypatch.context() as patches:
        fill_disk(patches, "checkpoint.pt", "write", 0, errno.ENOSPC)
        assert train(run) == 1
    assert train(run) == 0
    assert_same(run, undisturbed())


@pytest.mark.parametrize("limit", [15_000, 1], ids=["checkpoints only", "everything, stderr too"])
def test_file_size_limit_of_the_kernel(run: Path, undisturbed: Make, limit: int) -> None:
    """A real error in the middle of a write, of every file that grows past `limit` bytes: partial writes included."""

    def update(state: ppo_vec.State, *args: Any) -> Any:
        if state.global_step == 120:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        return real(state, *args)

    def patch() -> None:
        ppo_vec.update, ppo_vec.should_save = update, lambda state: True

    real = ppo_vec.update
    code, err = Fork(run, *tiny("", 400), patch=patch).finish()
    assert code == 1
    if limit > 1:
        line = f"ppo_vec.py: error: cannot write {run}/checkpoint.pt: File too large; mend that, and --resume {run} "
        assert err.splitlines()[-1].startswith(line), err
        assert "Traceback" not in err
    assert checked_checkpoint(run)["global_step"] == 80
    assert resume(run) == 0
    assert_same(run, undisturbed(*tiny("", 400)))


def test_a_log_that_is_cut_off(run: Path, monkeypatch: Patch) -> None:
    """As by a crash of the system, on a disk that does not do what fsync asks for: no reason for a traceback."""
    with monkeypatch.context() as patches:
        patches.setattr(ppo_vec, "should_save", lambda state: signal.raise_signal(signal.SIGTERM))
        assert train(run) == 143
    log = run / "episodes.csv"
    log.write_bytes(log.read_bytes()[:-9])
    monkeypatch.setattr(ppo_vec, "plot_learning_curve", PLOT)
    assert resume(run) == 0
    assert checked_checkpoint(run)["finished"]


# ---- Broken checkpoints ----------------------------------------------------------------------------------------------


def test_broken_checkpoints() -> None:
    result = faults.isolated(faults.fuzz, 156, 0)
    assert not result["problems"], "\n\n".join(result["problems"][:5])
    assert len(result["tried"]) == 13


@pytest.mark.parametrize(
    "path",
    [
        "optimizers", "evaluations", "evaluations/0", "evaluations/0/mean", "evaluations/0/min", "best",
        "best/agent/critic.0.bias", "snapshot/actions", "snapshot/returns", "solved_at_step", "solved_at_s",
    ],
)  # fmt: skip
def test_an_entry_of_another_kind_is_refused(path: str) -> None:
    """With a right digest: a file made by hand. An empty list is right where entries are added as a run goes on."""
    args = ppo_vec.Options(num_envs=2, actor_hidden_sizes=(4,), critic_hidden_sizes=(4,))
    state = ppo_vec.State(args, ppo_vec.make_task(args), torch.device("cpu"))
    state.evaluations = [{"global_step": 9, "time_s": 9.0, **ppo_vec.summarize([(1.0, 9, False, 0.0)], 300)}]
    data = ppo_vec.encode(state.state_dict())
    keys = tuple(int(key) if key.isdigit() else key for key in path.split("/"))
    for value in ([], (), {}, None, torch.zeros(()), torch.zeros(3)):
        tree = faults.replaced(ppo_vec.decode(data), keys, value)
        if (value == [] and path == "evaluations") or (value is None and path.startswith("solved")):
            state.load(tree)
        else:
            with pytest.raises(ppo_vec.UserError, match="the checkpoint does not fit"):
                state.load(tree)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "missing"])
def test_damaged_newest_checkpoint(
    run: Path, undisturbed: Make, monkeypatch: Patch, capsys: Capture, damage: str
) -> None:
    """The previous one is used, with a warning, and remains until a good one has taken its place."""
    expected, older = undisturbed(*tiny("", 200)), []
    newest, previous = run / "checkpoint.pt", run / "checkpoint.previous.pt"

    def stop(state: ppo_vec.State) -> bool:
        if state.global_step == 120:
            older.append(newest.read_bytes())
            signal.raise_signal(signal.SIGTERM)
        return True

    monkeypatch.setattr(ppo_vec, "should_save", stop)
    assert train(run, *tiny("", 200)) == 143
    whole = newest.read_bytes()
    previous.write_bytes(older[0])
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    newest.write_bytes({"truncated": whole[:-1], "flipped": bytes(flipped)}.get(damage, b""))
    if damage == "missing":
        newest.unlink()
    real, saves = ppo_vec.save, []

    def save(*args: Any) -> None:
        real(*args)
        saves.append([ppo_vec.decode(path.read_bytes())["global_step"] for path in (previous, newest)])

    monkeypatch.setattr(ppo_vec, "save", save)
    monkeypatch.setattr(ppo_vec, "should_save", lambda state: True)
    capsys.readouterr()
    assert resume(run) == 0
    err = capsys.readouterr().err
    assert damage == "missing" or re.search(rf"warning: {newest} is .*; using checkpoint.previous.pt\n", err)
    assert saves[:3] == [[80, 80], [80, 120], [120, 160]]
    assert_same(run, expected)
