"""The fault suite, fast form: whatever happens to a run, it ends as if undisturbed, or in a clear error.

benchmarks/faults.py is the long form, and holds the tools: runs in processes of their own, environments that go wrong,
broken checkpoints.
"""

from __future__ import annotations

import errno
import functools
import json
import multiprocessing
import os
import random
import re
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import pytest
import torch
from gymnasium.vector import AutoresetMode

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))

import faults
from faults import EAGER, Trainer, assert_same, fingerprint, start, tiny

import ppo_vec

SLOW = "import time; real = ppo_vec.update; ppo_vec.update = lambda *a: (time.sleep(0.15), real(*a))[1]"
STUCK = "import time; ppo_vec.update = lambda *a: time.sleep(200)"
NO_ALARM = "ppo_vec.signal.setitimer = lambda *a: None"  # a stuck iteration is given up by a second signal only
SOON = 60  # seconds: far from STUCK's, and enough for an exit on a machine that is busy


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> faults.Reference:
    """An undisturbed run of BipedalWalker-v3."""
    return faults.Reference.make(tmp_path_factory.mktemp("reference") / "run")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


WRITE_CURVE = ppo_vec.Run.write_curve


@pytest.fixture(autouse=True)
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """matplotlib takes longer than a tiny training."""
    monkeypatch.setattr(ppo_vec.Run, "write_curve", lambda run: None)


def train(run: Path, *args: str) -> int:
    return ppo_vec.main([*(args or tiny()), "--runs-dir", str(run.parent), "--run-name", run.name])


def undisturbed(run: Path, *args: str) -> dict[str, Any]:
    other = run.with_name("undisturbed")
    assert train(other, *args) == 0
    return fingerprint(other)


def forked(argv: list[str], patch: Callable[[], None], err: Path) -> int:
    """main(argv) in a copy of this process, after `patch`; returns the exit code."""
    process = multiprocessing.get_context("fork").Process(target=forked_main, args=(argv, patch, err))
    process.start()
    process.join(200)
    code = process.exitcode
    process.kill()
    process.join()
    assert code is not None, f"hangs: {err.read_text()}"
    return code


def forked_main(argv: list[str], patch: Callable[[], None], err: Path) -> None:
    descriptor = os.open(err, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1), os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    patch()
    sys.exit(ppo_vec.main(argv))


def checked_checkpoint(run: Path) -> dict[str, Any]:
    """The newest checkpoint, whose weights are finite."""
    tree = ppo_vec.decode((run / "checkpoint.pt").read_bytes())
    assert all(tensor.isfinite().all() for tensor in tree["agent"].values())
    return tree


# ----------------------------------------------------------------------------------------------------------------------
# The trainer is killed
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("patch", ["", EAGER], ids=["usual checkpoints", "a checkpoint an iteration"])
def test_killed_trainer_resumes_bit_equal(reference: faults.Reference, run: Path, patch: str) -> None:
    for attempt in range(3):
        if faults.kill_trainer(reference, run.with_name(f"run{attempt}"), random.Random(f"{patch}{attempt}"), patch):
            return
    pytest.fail("the run ended before the fault, three times")


def test_killed_at_every_fifth_file_operation_resumes_bit_equal(run: Path) -> None:
    """SIGKILL in the middle of the k-th write, or just before the k-th fsync or rename, of everything a run leaves."""
    expected = undisturbed(run)
    resumed = 0
    for k in range(1, 199, 5):
        path, err = run.with_name(f"run{k}"), run.with_name("err")
        argv = [*tiny(), "--runs-dir", str(path.parent), "--run-name", path.name]
        code = forked(argv, lambda k=k: die_at(k), err)
        if code == 0:
            break
        assert code == -signal.SIGKILL, err.read_text()
        if not any((path / name).exists() for name in ("checkpoint.pt", "checkpoint.previous.pt")):
            assert k <= 12, "no checkpoint"  # args.json, the logs and the first checkpoint are not yet written
            continue
        assert ppo_vec.main(["--resume", str(path)]) == 0
        assert_same(path, expected)
        resumed += 1
    assert resumed >= 10


def die_at(k: int) -> None:
    """Lets the k-th write, fsync or rename of the trainer kill it."""
    calls, real_open = [0], open

    def due() -> bool:
        calls[0] += 1
        return calls[0] == k

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def deadly(real: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: die() if due() else real(*args)

    def deadly_open(*args: Any) -> Any:
        file = real_open(*args)
        if args[1] == "rb":
            return file
        write = file.write

        def half(data: bytes) -> int:
            if due():
                write(data[: len(data) // 2])
                file.flush()
                die()
            return write(data)

        file.write = half
        return file

    ppo_vec.open = deadly_open
    os.fsync, os.replace = deadly(os.fsync), deadly(os.replace)
    ppo_vec.Run.save_now_and_then = ppo_vec.Run.save


def test_write_file_reaches_the_disk_before_it_replaces(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a power cut: the bytes before the rename, the rename before whatever follows."""
    run.mkdir()
    calls: list[tuple[str, str]] = []
    fsync, replace = os.fsync, os.replace

    def sync(descriptor: int) -> None:
        fsync(descriptor)
        calls.append(("sync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))

    def rename(old: Path, new: Path) -> None:
        calls.append(("rename", Path(new).name))
        replace(old, new)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", rename)
    for data in (b"old", b"new"):
        ppo_vec.write_file(run / "file", data, keep=run / "kept")
    temporary = calls[0][1]
    assert temporary not in ("file", "kept")
    first = [("sync", temporary), ("rename", "file"), ("sync", run.name)]
    assert calls == [*first, first[0], ("rename", "kept"), *first[1:]]
    assert (run / "file").read_bytes() == b"new"
    assert (run / "kept").read_bytes() == b"old"


def test_workers_end_with_a_killed_trainer(run: Path) -> None:
    trainer = start(run, "--num-workers", "3", patch=STUCK)
    trainer.wait_checkpoint(run)
    trainer.wait_for(lambda: len(trainer.workers()) == 3)
    trainer.send(signal.SIGKILL)
    trainer.finish().check(-signal.SIGKILL)


def test_workers_end_where_the_kernel_does_not_end_them(run: Path) -> None:
    trainer = start(run, "--num-workers", "3", patch=f"{STUCK}; ppo_vec.ctypes = None")  # no prctl
    trainer.wait_checkpoint(run)
    trainer.wait_for(lambda: len(trainer.workers()) == 3)
    *others, last = sorted(trainer.workers())
    os.kill(last, signal.SIGSTOP)  # it holds the pipes of those forked before it: theirs do not close
    trainer.send(signal.SIGKILL)
    end = time.monotonic() + SOON
    while set(others) & set(trainer.marked()) and time.monotonic() < end:
        time.sleep(0.05)
    left = trainer.marked()
    os.kill(last, signal.SIGCONT)
    trainer.finish().check(-signal.SIGKILL)
    assert left == [last]


# ----------------------------------------------------------------------------------------------------------------------
# Signals
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_first_signal_saves_and_exits(reference: faults.Reference, run: Path, number: int, code: int) -> None:
    trainer = start(run, patch=SLOW, start_new_session=True)
    trainer.wait_checkpoint(run)
    time.sleep(0.5)
    before = ppo_vec.decode((run / "checkpoint.pt").read_bytes())["global_step"]
    trainer.started = time.monotonic()
    os.killpg(trainer.pid, number)  # as a terminal does: the workers get it, too
    result = trainer.finish().check(code)
    assert result.seconds < SOON
    assert f"--resume {run}" in result.err
    assert "starting new workers" not in result.err
    stopped = checked_checkpoint(run)
    assert before < stopped["global_step"] < 4000
    Trainer(*faults.resume_args(run)).finish().check()
    assert_same(run, reference.state)


def test_signal_in_a_long_iteration_gives_it_up(run: Path, reference: faults.Reference) -> None:
    trainer = start(run, patch=STUCK)
    trainer.wait_checkpoint(run)
    trainer.wait_for(trainer.workers)
    time.sleep(0.5)
    trainer.send(signal.SIGTERM)
    result = trainer.finish().check(143)
    assert result.seconds < SOON
    Trainer(*faults.resume_args(run)).finish().check()
    assert_same(run, reference.state)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_second_signal_exits_at_once(run: Path, number: int, code: int) -> None:
    trainer = start(run, patch=f"{STUCK}; {NO_ALARM}")
    trainer.wait_checkpoint(run)
    trainer.wait_for(trainer.workers)
    time.sleep(0.3)
    trainer.send(number)
    time.sleep(0.3)
    assert trainer.running
    trainer.send(number)
    result = trainer.finish().check(code)
    assert result.seconds < SOON
    checked_checkpoint(run)


# ----------------------------------------------------------------------------------------------------------------------
# Workers fail
# ----------------------------------------------------------------------------------------------------------------------


def test_killed_worker_while_training(reference: faults.Reference, run: Path) -> None:
    for attempt in range(3):
        if faults.disturb_worker(signal.SIGKILL, reference, run.with_name(f"run{attempt}"), random.Random(attempt)):
            return
    pytest.fail("the run ended before the fault, three times")


@pytest.mark.parametrize(("number", "args"), [(signal.SIGKILL, ()), (signal.SIGSTOP, ("--worker-timeout", "5"))])
def test_killed_or_stopped_worker_in_evaluation(
    reference: faults.Reference, run: Path, number: int, args: tuple[str, ...]
) -> None:
    mark = run.with_name("evaluating")
    patch = f"""real = ppo_vec.VecEnv.evaluate
def evaluate(*args, **options):
    open({str(mark)!r}, "w").close()
    return real(*args, **options)
ppo_vec.VecEnv.evaluate = evaluate"""
    trainer = start(run, *args, patch=patch)
    assert trainer.wait_for(mark.exists)
    time.sleep(0.02)
    assert trainer.signal_worker(number, random.Random(0))
    if number == signal.SIGKILL:
        assert trainer.wait_for(lambda: "was ended by signal 9" in trainer.stderr())
        trainer.wait_for(lambda: not trainer.zombies())
    result = trainer.finish().check()
    assert re.search(r"warning: worker \d (was ended by signal 9|took no step for 5 s); starting new", result.err)
    assert_same(run, reference.state)
    assert json.loads((run / "summary.json").read_text())["worker_restarts"] >= 1


def before_rollout(monkeypatch: pytest.MonkeyPatch, action: Callable[[ppo_vec.VecEnv], None], which: int) -> None:
    """Lets `action` happen before the rollout number `which`."""
    real, count = ppo_vec.VecEnv.rollout, [0]

    def rollout(envs: ppo_vec.VecEnv, *args: Any) -> Any:
        count[0] += 1
        if count[0] == which:
            action(envs)
        return real(envs, *args)

    monkeypatch.setattr(ppo_vec.VecEnv, "rollout", rollout)


@pytest.mark.parametrize("which", [2, 3], ids=["at an episode's end", "in an episode"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_lost_worker_between_rollouts(run: Path, monkeypatch: pytest.MonkeyPatch, number: int, which: int) -> None:
    args = (*tiny(), "--worker-timeout", "5")
    expected = undisturbed(run, *args)
    before_rollout(monkeypatch, lambda envs: os.kill(envs.workers.processes[1].pid, number), which)
    assert train(run, *args) == 0
    assert_same(run, expected)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_lost_worker_while_starting(run: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    args = (*tiny(), "--worker-timeout", "5")
    expected = undisturbed(run, *args)
    real, trainer, once = ppo_vec.Block.__init__, os.getpid(), run.with_name("once")

    def init(block: ppo_vec.Block, *args: Any) -> None:
        if os.getpid() != trainer and not once.exists():
            once.touch()
            os.kill(os.getpid(), number)
        real(block, *args)

    monkeypatch.setattr(ppo_vec.Block, "__init__", init)
    assert train(run, *args) == 0
    assert_same(run, expected)
    assert json.loads((run / "summary.json").read_text())["worker_restarts"] >= 1


@pytest.mark.parametrize(
    ("fault", "message"), [("raise", "ArithmeticError: the spring broke"), ("exit", "ended with exit code 7")]
)
def test_worker_that_always_fails(run: Path, capsys: pytest.CaptureFixture[str], fault: str, message: str) -> None:
    assert train(run, *tiny(fault, 1000)) == 1
    err = capsys.readouterr().err
    assert "ppo_vec.py: error: gave up after 3 attempts without progress" in err
    assert message in err.split("gave up after")[1]
    if fault == "raise":
        assert "in step\n" in err.split("gave up after")[1], "not the worker's own traceback"
    assert checked_checkpoint(run)["global_step"] < 1000


def test_slow_resets_are_no_hang(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A worker makes and resets many environments in a row, for training and for evaluations; each is progress."""
    args = (*tiny("slow-reset", 200), "--num-envs", "10", "--num-workers", "1", "--eval-episodes", "5")
    assert train(run, *args, "--worker-timeout", "3") == 0
    assert "took no step" not in capsys.readouterr().err


def test_environment_that_cannot_be_replayed(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """After a lost worker and on resume its episodes start anew; it says so, and training goes on."""
    before_rollout(monkeypatch, lambda envs: os.kill(envs.workers.processes[0].pid, signal.SIGKILL), which=3)
    assert train(run, *tiny("unrepeatable", 150)) == 0
    assert "cannot be replayed" in capsys.readouterr().err
    assert ppo_vec.main(["--resume", str(run), "--total-timesteps", "300"]) == 0
    assert "cannot be replayed" in capsys.readouterr().err
    state = fingerprint(run)
    assert state["checkpoint"]["global_step"] >= 300
    assert all(length == 20 for _, _, length, _ in state["episodes"])


# ----------------------------------------------------------------------------------------------------------------------
# Numbers that go wrong
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        ("nan-obs", r"obs\w* of environment [01] at step \d+.*nan"),
        ("nan-reward", r"rewards? of environment [01] at step \d+.*nan"),
        ("inf-reward", r"rewards? of environment [01] at step \d+.*inf"),
        ("nan-in-evaluation", r"evaluation.*nan|nan.*evaluation"),
    ],
)
def test_number_from_an_environment_is_named(
    run: Path, capsys: pytest.CaptureFixture[str], fault: str, named: str
) -> None:
    assert train(run, *tiny(fault, 1000)) == 1
    err = capsys.readouterr().err
    assert re.fullmatch(rf"ppo_vec\.py: error: .*({named}).*", err.splitlines()[-1]), err
    assert "Traceback" not in err
    checked_checkpoint(run)


@pytest.mark.parametrize(
    ("argv", "named"),
    [("--learning-rate 1e18", r"actions of environment \d"), ("--vf-coef 1e38", r"losses/value_grad_norm is")],
)
def test_number_from_training_is_named(run: Path, capsys: pytest.CaptureFixture[str], argv: str, named: str) -> None:
    assert train(run, *tiny("", 1000), *argv.split()) == 1
    err = capsys.readouterr().err
    assert re.search(rf"ppo_vec\.py: error: .*{named}.*(nan|inf)", err), err
    assert "Traceback" not in err
    checked_checkpoint(run)


# ----------------------------------------------------------------------------------------------------------------------
# Full disks
# ----------------------------------------------------------------------------------------------------------------------


class Disk:
    """Makes ppo_vec's open() for writing and renames below a folder fail while `full`."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, error: int) -> None:
        self.full, self.refused = False, 0

        def guard(real: Callable[..., Any]) -> Callable[..., Any]:
            def wrapper(path: Any, *args: Any, **options: Any) -> Any:
                writing = real is os.replace or (args and args[0] != "rb")
                if self.full and writing and str(path).startswith(str(folder)):
                    self.refused += 1
                    raise OSError(error, os.strerror(error), str(path))
                return real(path, *args, **options)

            return wrapper

        monkeypatch.setattr(ppo_vec, "open", guard(open), raising=False)
        monkeypatch.setattr(os, "replace", guard(os.replace))


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EROFS])
def test_full_disk_for_a_while(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: int
) -> None:
    """Warns once of each file, goes on, and in the end nothing is missing."""
    monkeypatch.setattr(ppo_vec.Run, "save_now_and_then", ppo_vec.Run.save)
    expected = undisturbed(run, *tiny("", 400))
    capsys.readouterr()
    disk = Disk(run, monkeypatch, error)

    def fill(envs: ppo_vec.VecEnv) -> None:
        disk.full = True

    def free(envs: ppo_vec.VecEnv) -> None:
        disk.full = False

    before_rollout(monkeypatch, fill, which=3)
    before_rollout(monkeypatch, free, which=9)
    assert train(run, *tiny("", 400)) == 0
    assert disk.refused > 10
    err = capsys.readouterr().err
    assert os.strerror(error) in err
    assert 1 <= err.count(f"cannot write {run / 'episodes.csv'}") <= 1, err
    assert len(re.findall("cannot write .*tfevents", err)) == 1, err
    assert "again" in err
    assert_same(run, expected)


@pytest.mark.parametrize("name", ["rank_candidates", "Run.write_summary"])
def test_full_disk_for_results(run: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """best.pt and summary.json are written at evaluations only; one that failed is made good for later."""
    expected = undisturbed(run)
    disk = Disk(run, monkeypatch, errno.ENOSPC)
    owner = ppo_vec.Run if "." in name else ppo_vec
    real = getattr(owner, name.split(".")[-1])

    def on_full_disk(*args: Any) -> None:
        disk.full = True
        real(*args)
        disk.full = False

    monkeypatch.setattr(owner, name.split(".")[-1], on_full_disk)
    assert train(run, *tiny()) == 0
    assert disk.refused
    assert_same(run, expected)


def test_a_log_that_a_full_disk_has_cut_off(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The picture is missed, with a warning; it must not take the place of the error or exit code of the run."""
    assert train(run) == 0
    log = run / "episodes.csv"
    log.write_bytes(log.read_bytes()[:-9])
    stub = SimpleNamespace(path=run, task=SimpleNamespace(goal=None))
    WRITE_CURVE(stub)
    assert "cannot write learning_curve.png" in capsys.readouterr().err


def test_full_disk_to_the_end_is_an_error(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A training whose result could not be written has not succeeded."""
    disk = Disk(run, monkeypatch, errno.ENOSPC)
    before_rollout(monkeypatch, lambda envs: setattr(disk, "full", True), which=3)
    assert train(run, *tiny()) == 1
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert err.splitlines()[-1].startswith("ppo_vec.py: error: ")
    assert checked_checkpoint(run)["global_step"] < 100


@pytest.mark.parametrize("limit", [5_000, 1], ids=["checkpoints only", "everything, stderr too"])
def test_file_size_limit_of_the_kernel(run: Path, limit: int) -> None:
    """A real error in the middle of a write, of every file that grows past `limit` bytes: partial writes included."""
    trainer = Trainer(
        *tiny("", 800), "--runs-dir", str(run.parent), "--run-name", run.name, patch=f"{EAGER}\n{SLOW}"
    )  # fmt: skip
    trainer.wait_checkpoint(run)
    trainer.wait_for(lambda: len(trainer.workers()) == 2)  # to start them takes a semaphore: a file, too
    _, hard = resource.prlimit(trainer.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(trainer.pid, resource.RLIMIT_FSIZE, (limit, hard))
    if limit > 1:
        trainer.wait_for(lambda: "cannot write a checkpoint" in trainer.stderr())
    else:
        time.sleep(1)  # of 3 or more: the evaluation at the end takes semaphores, too
    resource.prlimit(trainer.pid, resource.RLIMIT_FSIZE, (hard, hard))
    result = trainer.finish().check()
    if limit > 1:
        assert result.err.count("cannot write a checkpoint") == 1, result.err
        assert "checkpoints can be written again" in result.err
    assert_same(run, undisturbed(run, *tiny("", 800)))


# ----------------------------------------------------------------------------------------------------------------------
# Broken checkpoints
# ----------------------------------------------------------------------------------------------------------------------


def test_broken_checkpoints() -> None:
    result = faults.isolated(faults.fuzz, 120, 0)
    assert not result["problems"], "\n\n".join(result["problems"][:5])
    assert len(result["tried"]) == 10


@pytest.mark.parametrize(
    "path", ["optimizers", "evaluations", "candidates", "recent", "envs/actions"], ids=lambda path: path.split("/")[-1]
)
@pytest.mark.parametrize("value", [[], (), {}, None, torch.zeros(()), torch.zeros(3)], ids=str)
def test_a_list_that_is_none_or_too_short_is_refused(recwarn: pytest.WarningsRecorder, path: str, value: Any) -> None:
    """With a right digest: a file made by hand. An empty list is right where entries are added as a run goes on."""
    args = ppo_vec.Args(env_id="Pendulum-v1", num_envs=2, actor_hidden_sizes=(4,), critic_hidden_sizes=(4,))
    state = ppo_vec.State(args, ppo_vec.Task.of(args), torch.device("cpu"))
    state.log_sizes = {"events": 0, "episodes": 0}
    tree = ppo_vec.decode(ppo_vec.encode(state.state_dict()))
    state.load(tree)
    *parents, name = path.split("/")
    into = tree
    for parent in parents:
        into = into[parent]
    into[name] = value
    if value == [] and name in ("evaluations", "candidates", "recent"):
        state.load(tree)
    else:
        with pytest.raises(ppo_vec.UserError, match="the checkpoint does not fit"):
            state.load(tree)
    assert not recwarn.list


def test_a_worker_whose_trainer_has_gone_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    """The kernel kills a worker with its trainer; but the pipe breaks first, and a worker may get to notice."""
    context = multiprocessing.get_context("fork")
    for send in (False, True):
        ours, theirs = context.Pipe()
        block = functools.partial(gym.make, "Pendulum-v1")
        process = context.Process(
            target=ppo_vec.serve,
            args=(0, block, theirs, ours, None, context.Queue(), AutoresetMode.DISABLED, None),
        )
        process.start()
        theirs.close()
        if send:
            ours.send(("reset", {}))
        ours.close()
        process.join(30)
        assert process.exitcode == 1
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "missing"])
def test_damaged_newest_checkpoint(run: Path, capsys: pytest.CaptureFixture[str], damage: str) -> None:
    """The previous one is used, with a warning, and remains until a good one has taken its place."""
    kept: list[bytes] = []
    with faults.replaced_attribute(ppo_vec.Run, "save_now_and_then", ppo_vec.Run.save):
        assert train(run.with_name("whole")) == 0
    expected = fingerprint(run.with_name("whole"))
    real = ppo_vec.Run.save

    def stop_after_four(run: ppo_vec.Run) -> None:
        real(run)
        kept.append((run.path / "checkpoint.pt").read_bytes())
        if len(kept) == 4:
            run.stopped = signal.SIGTERM

    with (
        faults.replaced_attribute(ppo_vec.Run, "save_now_and_then", stop_after_four),
        faults.replaced_attribute(ppo_vec.Run, "save", stop_after_four),
    ):
        assert train(run) == 143
    newest = run / "checkpoint.pt"
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    whole = newest.read_bytes()
    newest.write_bytes({"truncated": whole[:-1], "flipped": bytes(data), "empty": b""}.get(damage, b""))
    if damage == "missing":
        newest.unlink()
    capsys.readouterr()

    def safe(run: ppo_vec.Run) -> None:
        real(run)
        ppo_vec.decode((run.path / "checkpoint.pt").read_bytes())
        if damage != "missing":
            ppo_vec.decode((run.path / "checkpoint.previous.pt").read_bytes())

    with faults.replaced_attribute(ppo_vec.Run, "save", safe):
        assert ppo_vec.main(["--resume", str(run)]) == 0
    err = capsys.readouterr().err
    assert damage == "missing" or f"warning: {newest} is" in err
    assert damage == "missing" or "using checkpoint.previous.pt" in err
    assert_same(run, expected)
