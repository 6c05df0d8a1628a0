"""The fault suite, long form: kills, hangs and broken checkpoints by the hundred; every run must end as if undisturbed.

    python benchmarks/faults.py                            # all of it, about 25 minutes on 2 quiet cores
    python benchmarks/faults.py --only kill-worker --count 10

Writes benchmarks/results/faults.md and faults.json (a partial run prints only, unless --out names a folder; there it
takes the place of the rows it has measured).
tests/test_faults.py is the fast form and takes its tools from here: Trainer (a run in a process of its own),
fingerprint and differences (bit-equality of two runs), Tiny (environments that go wrong), Fuzz (broken checkpoints).
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import functools
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import unittest.mock
import uuid
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # last: a changed copy of ppo_vec on PYTHONPATH can be put to the test

import ppo_vec  # isort: skip  first: it chooses OpenBLAS's kernel, before NumPy is imported

import gymnasium as gym
import numpy as np
import torch

SMALL = (
    "--num-envs", "4", "--num-workers", "2", "--num-steps", "64", "--num-minibatches", "4", "--update-epochs", "2",
    "--total-timesteps", "4000", "--eval-episodes", "2",
)  # fmt: skip
ITERATIONS = 16  # of a run with these arguments
EAGER = "ppo_vec.should_save = lambda state: True"  # a patch: a checkpoint after every iteration
MARK = "PPO_VEC_FAULTS"  # an environment variable that tells the processes of one run from all others

# ---- A run in a process of its own -----------------------------------------------------------------------------------


def command(*args: str, patch: str = "") -> list[str]:
    """The command line of a training; with `patch`, Python code that is run between the import and main()."""
    if not patch:
        return [sys.executable, ppo_vec.__file__, *args]
    paths = [str(Path(ppo_vec.__file__).parent), str(Path(__file__).parent)]
    code = f"import sys; sys.path[:0] = {paths}\nimport ppo_vec, faults\n{patch}\nsys.exit(ppo_vec.main())"
    return [sys.executable, "-c", code, *args]


@dataclass
class Result:
    code: int
    out: str
    err: str
    seconds: float  # since the start, or since the last signal sent
    orphans: int  # processes of the run that lived on
    leaked: list[str]  # files in shared memory or the temporary folder

    def check(self, code: int = 0) -> Result:
        """Raises AssertionError unless the run ended with `code`, without a traceback or anything left behind."""
        assert self.code == code, f"exit code {self.code}, not {code}:\n{self.err}"
        assert "Traceback" not in self.err, self.err
        assert self.orphans == 0, f"{self.orphans} processes lived on"
        assert not self.leaked, f"left behind: {self.leaked}"
        return self


class Trainer:
    """A training in a process of its own. Every process it starts carries a mark, so that orphans can be found."""

    def __init__(self, *args: str, patch: str = "", env: dict[str, str] | None = None, **popen: Any) -> None:
        self.mark = uuid.uuid4().hex
        self.temporary = Path(tempfile.mkdtemp(prefix="faults-"))
        (self.temporary / "tmp").mkdir()
        self.shared = set(os.listdir("/dev/shm"))
        variables = {**os.environ, **(env or {}), MARK: self.mark, "TMPDIR": str(self.temporary / "tmp")}
        self.out, self.err = (open(self.temporary / name, "w+") for name in ("out", "err"))  # noqa: SIM115
        self.started = time.monotonic()
        files = {"stdin": subprocess.DEVNULL, "stdout": self.out, "stderr": self.err}
        self.process = subprocess.Popen(command(*args, patch=patch), env=variables, **files, **popen)

    pid = property(lambda self: self.process.pid)
    running = property(lambda self: self.process.poll() is None)

    def stderr(self) -> str:
        return (self.temporary / "err").read_text()

    def wait_for(self, condition: Callable[[], Any], limit: float = 250) -> bool:
        """Waits until `condition` holds; False if the run ended before it did."""
        end = time.monotonic() + limit
        while not condition():
            if not self.running:
                return bool(condition())
            if time.monotonic() > end:
                self.abandon()
                raise AssertionError(f"waited more than {limit:g} s:\n{self.stderr()}")
            time.sleep(0.002)
        return True

    def wait_moment(self, run: Path, iterations: int, seconds: float) -> None:
        """Waits until so many iterations of a run with a checkpoint are logged, and then so many seconds."""
        self.wait_for(lambda: (run / "checkpoint.pt").exists() and logged_iterations(run) >= iterations)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)

    def workers(self) -> list[int]:
        """Process ids of the workers: children that were forked and have run no other program."""
        with contextlib.suppress(OSError):
            children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
            mine = Path(f"/proc/{self.pid}/cmdline").read_bytes()
            return [int(pid) for pid in children if Path(f"/proc/{pid}/cmdline").read_bytes() == mine]
        return []

    def send(self, number: int) -> None:
        self.started = time.monotonic()
        self.process.send_signal(number)

    def marked(self) -> list[int]:
        """The processes of this run that are alive."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if f"{MARK}={self.mark}".encode() in (path / "environ").read_bytes():
                    found.append(int(path.name))
        return [pid for pid in found if state_of(pid) not in "ZX"]

    def abandon(self) -> None:
        for pid in self.marked():
            kill(pid, signal.SIGKILL)
        self.process.wait()

    def finish(self, limit: float = 250) -> Result:
        """Waits for the end; a run that does not end is a hang. Looks for what it left behind."""
        try:
            code = self.process.wait(limit)
        except subprocess.TimeoutExpired:
            err = self.stderr()
            self.abandon()
            raise AssertionError(f"hangs: no end within {limit:g} s:\n{err}") from None
        seconds = time.monotonic() - self.started
        end = time.monotonic() + 20  # workers notice within a second that their trainer is gone, if they get to run
        while ((alive := self.marked()) or self.leaked()) and time.monotonic() < end:
            time.sleep(0.05)
        leaked = self.leaked()
        self.abandon()
        self.out.close(), self.err.close()
        out, err = ((self.temporary / name).read_text() for name in ("out", "err"))
        shutil.rmtree(self.temporary)
        return Result(code, out, err, seconds, len(alive), leaked)

    def leaked(self) -> list[str]:
        """New files in shared memory that no living process uses, and in the run's temporary folder."""
        # Named semaphores of other programs come and go; those of a forked worker have no name.
        names = {name for name in os.listdir("/dev/shm") if not name.startswith("sem.mp-")} - self.shared
        for path in Path("/proc").glob("[0-9]*/maps") if names else ():  # those in use are another program's
            with contextlib.suppress(OSError):
                used = path.read_text()
                names = {name for name in names if f"/dev/shm/{name}" not in used}
        files = [name for name in os.listdir(self.temporary / "tmp") if not name.startswith("torchinductor")]  # a cache
        return [*names, *files]


def kill(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def state_of(pid: int) -> str:
    """The letter of a process's state; X for one that does not exist."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return "X"


def start(run: Path, *args: str, **options: Any) -> Trainer:
    return Trainer(*SMALL, "--runs-dir", str(run.parent), "--run-name", run.name, *args, **options)


def logged_iterations(run: Path) -> int:
    return sum(file.read_bytes().count(b"losses/entropy") for file in run.glob("events.out.tfevents.*"))


# ---- Bit-equality of two runs ----------------------------------------------------------------------------------------

TIMES = {"time_s", "wall_time_s", "train_time_s", "solved_at_s", "sps", "log_sizes"}
FREE = {"run_name", "runs_dir", "num_workers", "worker_timeout", "resume", "worker_restarts"}  # change no result


def fingerprint(run: Path) -> dict[str, Any]:
    """Everything of a run that a fault must not change. Raises AssertionError if a step was logged twice."""
    rows = [line.split(",") for line in (run / "episodes.csv").read_text().splitlines()]
    assert rows[0] == ["global_step", "time_s", "return", "length", "env"], rows[0]
    episodes = [(int(step), ret, int(length), int(env)) for step, _, ret, length, env in rows[1:]]
    assert len({(step, env) for step, *_, env in episodes}) == len(episodes), "an episode was written twice"
    assert episodes == sorted(episodes, key=lambda e: e[0]), "episodes.csv goes back in steps"
    readers: dict[str, Callable[[bytes], Any]] = {
        "checkpoint.pt": ppo_vec.decode, "best.pt": ppo_vec.decode, "summary.json": json.loads, "evaluation.csv": bytes,
    }  # fmt: skip
    files = {name.split(".")[0]: (run / name, read) for name, read in readers.items()}
    return {
        **{name: read(path.read_bytes()) if path.exists() else None for name, (path, read) in files.items()},
        "episodes": episodes,
        "scalars": {tag: points for tag, points in scalars(run).items() if not tag.startswith("time/")},
    }


def events(run: Path) -> dict[str, list[Any]]:
    """{tag: events} of the run's one event file, through TensorBoard's own reader."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = run.glob("events.out.tfevents.*")
    reader = EventAccumulator(str(file), size_guidance={"scalars": 0})
    reader.Reload()
    return {tag: reader.Scalars(tag) for tag in reader.Tags()["scalars"]}


def scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    """{tag: [(step, value)]}. Raises AssertionError if a step was logged twice."""
    result = {tag: [(e.step, e.value) for e in points] for tag, points in events(run).items()}
    for tag, points in result.items():
        steps = [step for step, _ in points]
        episodic = tag in ("charts/episodic_return", "charts/episodic_length")  # two may end in the same step
        in_order = all(a < b or (a == b and episodic) for a, b in itertools.pairwise(steps))
        assert in_order, f"{tag}: a step comes twice"
    return result


def differences(a: Any, b: Any, where: str = "") -> list[str]:
    """The places where two trees of plain types and tensors are not the same to the bit; times are left out."""
    if isinstance(a, dict) and isinstance(b, dict):
        keys = [k for k in {**a, **b} if k not in TIMES | FREE]
        missing = [f"{where}/{k} is in one only" for k in keys if (k in a) != (k in b)]
        return missing + [d for k in keys if k in a and k in b for d in differences(a[k], b[k], f"{where}/{k}")]
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        if len(a) != len(b):
            return [f"{where}: {len(a)} and {len(b)} entries"]
        return [d for i, (x, y) in enumerate(zip(a, b)) for d in differences(x, y, f"{where}/{i}")]
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()
        return [] if same else [f"{where}: tensors differ"]
    same = type(a) is type(b) and (a == b or (a != a and b != b))
    return [] if same else [f"{where}: {a!r} and {b!r}"]


def assert_same(run: Path, reference: dict[str, Any]) -> None:
    found = differences(fingerprint(run), reference)
    assert not found, f"{run.name} is not the undisturbed run: {'; '.join(found[:5])}"


# ---- Environments that go wrong --------------------------------------------------------------------------------------


class Tiny(gym.Env):
    """A little arithmetic a step, episodes of 20 steps; `fault` says what goes wrong.

    Faults happen at step 9 of every fourth training episode or so, the same ones whenever they are played again.
    Training episodes have reset seeds of ppo_vec.TRAINING_SEEDS and above.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": []}

    def __init__(self, fault: str = "", render_mode: str | None = None) -> None:
        self.fault, self.render_mode = fault, render_mode
        if fault == "slow-reset":
            time.sleep(0.25)
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float32)
        if fault == "discrete":
            self.observation_space = gym.spaces.Discrete(3)
        bound = np.inf if fault == "unbounded" else 2.0
        self.action_space = gym.spaces.Box(-bound, bound, (1,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        if self.fault == "slow-reset":
            time.sleep(0.25)
        self.evaluation = (seed or 0) < ppo_vec.TRAINING_SEEDS
        self.faulty = self.evaluation if "evaluation" in self.fault else not self.evaluation and seed % 4 == 0
        self.elapsed = 0
        source = np.random.default_rng() if self.fault == "unrepeatable" else self.np_random
        self.state = source.uniform(-1, 1, 3)
        return self.state.astype(np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.elapsed += 1
        self.state = 0.9 * self.state + 0.1 * np.roll(self.state, 1) * np.cos(float(action[0]))
        obs, reward = self.state.astype(np.float32), float(1 - np.abs(self.state).sum())
        fault = self.fault if self.faulty and self.elapsed == 9 else ""
        if fault == "nan-obs":
            obs[1] = np.nan
        elif fault == "raise":
            raise ArithmeticError("the spring broke")
        elif fault == "exit":
            os._exit(7)
        elif fault.startswith(("nan", "inf")):
            reward = float(fault[:3])
        slow = self.faulty and self.fault == "slow-evaluation"
        time.sleep(0.5 * slow)
        return obs, reward, False, slow and self.elapsed == 3, {}


class Film(Tiny):
    """One that can be filmed."""

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"], "render_fps": 30}

    def render(self) -> np.ndarray:
        return np.full((16, 16, 3), self.elapsed, np.uint8)


FAULTS = (
    "", "nan-obs", "nan-reward", "inf-reward", "nan-in-evaluation", "raise", "exit", "unrepeatable", "unbounded",
    "discrete", "slow-reset", "slow-evaluation", "film",
)  # fmt: skip


def tiny_id(fault: str = "") -> str:
    return f"Tiny{fault.title().replace('-', '')}-v0"


def tiny(fault: str = "", steps: int = 120) -> tuple[str, ...]:
    """The arguments of a training of a tenth of a second. At the end of its first rollout both episodes end, too."""
    return (
        "--env-id", tiny_id(fault), "--num-envs", "2", "--num-workers", "2", "--num-steps", "20",
        "--num-minibatches", "2", "--update-epochs", "1", "--total-timesteps", str(steps), "--eval-episodes", "1",
        "--actor-hidden-sizes", "4", "--critic-hidden-sizes", "4", "--swa-share", "0.5",
    )  # fmt: skip


for _fault in FAULTS:
    _kind = Film if _fault == "film" else Tiny
    gym.register(tiny_id(_fault), entry_point=_kind, max_episode_steps=20, kwargs={"fault": _fault})

# ---- Faults ----------------------------------------------------------------------------------------------------------


@dataclass
class Reference:
    """An undisturbed run."""

    run: Path
    state: dict[str, Any]

    @classmethod
    def make(cls, run: Path, patch: str = "") -> Reference:
        start(run, patch=patch).finish().check()
        return cls(run, fingerprint(run))

    def moments(self, rng: random.Random, count: int = 1) -> list[tuple[int, float]]:
        """Random moments for Trainer.wait_moment, in order; one in six after the last iteration."""
        iterations = sorted(min(rng.randrange(ITERATIONS * 6 // 5), ITERATIONS) for _ in range(count))
        seconds = self.state["summary"]["wall_time_s"]
        return [(i, rng.uniform(0, seconds * (0.3 if i == ITERATIONS else 0.06))) for i in iterations]


def kill_trainer(reference: Reference, run: Path, moments: list[tuple[int, float]], patch: str = "") -> str:
    """`kill -9` of the trainer at each of the moments, --resume after each; ends bit-equal or raises.

    Returns a note of when it was killed; an empty one if the run had ended before.
    """
    killed = []
    trainer = start(run, patch=patch)
    for moment in moments:
        trainer.wait_moment(run, *moment)
        if not trainer.running:
            break
        trainer.send(signal.SIGKILL)
        trainer.finish().check(-signal.SIGKILL)
        killed.append("{} + {:.2f} s".format(*moment))
        args_json, now = run / "args.json", time.time()
        trainer = Trainer("--resume", str(run), patch=patch)  # it cuts off what is logged after its checkpoint
        trainer.wait_for(lambda path=args_json, now=now: path.stat().st_mtime > now)
    trainer.finish().check()
    assert_same(run, reference.state)
    return f"killed after iteration {', '.join(killed)}" if killed else ""


def disturb_worker(number: int, reference: Reference, run: Path, rng: random.Random, *args: str) -> str:
    """SIGKILL or SIGSTOP of a worker at a random moment; the run ends bit-equal, or this raises."""
    trainer = start(run, *args)
    (moment,) = reference.moments(rng)
    trainer.wait_moment(run, *moment)
    workers: list[int] = []
    if hit := trainer.wait_for(lambda: workers.extend(trainer.workers()) or workers):
        kill(rng.choice(workers), number)
    trainer.finish().check()
    assert_same(run, reference.state)
    restarts = json.loads((run / "summary.json").read_text())["worker_restarts"]
    return "after iteration {} + {:.2f} s, {} restarts".format(*moment, restarts) if hit else ""


# ---- Broken checkpoints ----------------------------------------------------------------------------------------------


@dataclass
class Bomb:
    """Pickles into a call that creates the file `sentinel`."""

    sentinel: Path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.sentinel}",)


def sign(body: bytes) -> bytes:
    """A valid digest, as someone who has read ppo_vec.py can make it."""
    return body + ppo_vec.MAGIC + ppo_vec.hashlib.sha256(body).digest()


def torch_bytes(tree: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(tree, buffer, **options)
    return buffer.getvalue()


JUNK: tuple[Any, ...] = (
    None, -1, 0, 0.5, math.nan, "x", "a\nb", [], [1, "x"], {}, {"x": 1}, True, torch.zeros(2), torch.tensor(math.nan),
)  # fmt: skip


def places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in a tree of dicts and lists."""
    if path:
        yield path
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield from places(value, (*path, key))


def replaced(tree: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy of `tree` with another value at `path` (without that key, if the value is `...`)."""
    if not path:
        return value
    key, *rest = path
    copy = dict(tree) if isinstance(tree, dict) else list(tree)
    if not rest and value is ...:
        del copy[key]
    else:
        copy[key] = replaced(tree[key], tuple(rest), value) if rest else value
    return copy


class Fuzz:
    """Broken checkpoints of one unfinished run of a tiny environment, and what must come of them."""

    def __init__(self, folder: Path, rng: random.Random) -> None:
        """Trains the run whose checkpoints are broken, up to its next to last iteration."""
        self.folder, self.rng, self.sentinel = folder, rng, folder / "executed"
        self.tried, self.outcomes, self.problems = Counter(), Counter(), []
        kept, real = [], ppo_vec.save

        def save(state: ppo_vec.State, log: ppo_vec.Log) -> None:
            real(state, log)
            kept.append((log.folder / "checkpoint.pt").read_bytes())

        eager = replaced_attribute(ppo_vec, "should_save", lambda state: True)
        with quiet(), eager, replaced_attribute(ppo_vec, "save", save):
            assert ppo_vec.main([*tiny(), "--runs-dir", str(folder), "--run-name", "whole"]) == 0
        self.previous, self.good = [data for data in kept if ppo_vec.decode(data)["global_step"] < 120][-2:]
        self.tree = ppo_vec.decode(self.good)
        self.places = [path for path in places(self.tree) if path[-1] != "total_timesteps"]  # the default is a million
        (self.folder / "evil_module.py").write_text(f"open({str(self.sentinel)!r}, 'w')\n")
        self.kinds: dict[str, Callable[[], bytes]] = {
            "truncated": lambda: self.good[: self.rng.randrange(len(self.good))],
            "flipped bits": lambda: self.flip(self.good),
            "overwritten block": self.overwrite,
            "foreign": self.foreign,
            "malicious": self.malicious,
            "module:id": self.module_id,
            "wrappers": lambda: self.with_value(("args", "wrappers"), ["evil_module:wrap"]),
            "deflated": self.deflated,
            "signed, flipped bits": self.signed_flip,
            "signed, a value missing": lambda: self.with_value(self.rng.choice(self.places), ...),
            "signed, a value replaced": lambda: self.with_value(self.rng.choice(self.places), self.rng.choice(JUNK)),
            "signed, a tensor of another shape": self.misshapen,
            "signed, a hollow tensor": lambda: self.misshapen(hollow=True),
        }

    def with_value(self, path: tuple[Any, ...], value: Any) -> bytes:
        return ppo_vec.encode(replaced(self.tree, path, value))

    def flip(self, data: bytes) -> bytes:
        broken = bytearray(data)
        for _ in range(self.rng.choice((1, 1, 2, 8, 64))):
            broken[self.rng.randrange(len(broken))] ^= 1 << self.rng.randrange(8)
        return bytes(broken)

    def signed_flip(self) -> bytes:
        """Not one that asks for a billion steps: such a training is long, not broken."""
        while True:
            data = sign(self.flip(self.good[:-40]))
            try:
                args = ppo_vec.decode(data)["args"].values()
                if all(abs(value) < 1000 for value in args if isinstance(value, int)):
                    return data
            except Exception:  # the usual case: it cannot be read
                return data

    def overwrite(self) -> bytes:
        start, length = self.rng.randrange(len(self.good)), self.rng.randrange(1, 4096)
        block = self.rng.choice((bytes(length), self.rng.randbytes(length)))
        return self.good[:start] + block + self.good[start + length :]

    def foreign(self) -> bytes:
        return self.rng.choice((
            b"", b"\0" * 4096, self.rng.randbytes(self.rng.randrange(1, 9999)), b"hello, world\n", b'{"a": 1}',
            b"PK\5\6" + bytes(18), pickle.dumps({"format": ppo_vec.FORMAT}),
            torch_bytes({"model": torch.zeros(3)}), torch_bytes(torch.nn.Linear(2, 2)), torch_bytes(self.tree),
            sign(b""), sign(b"junk"), ppo_vec.encode({}), ppo_vec.encode({"format": "ppo_vec 999"}),
            ppo_vec.encode({"format": ppo_vec.FORMAT}), ppo_vec.encode([1]), ppo_vec.encode(torch.zeros(3)),
            ppo_vec.MAGIC, self.good[-40:], self.good + b"\0", self.good + self.good[-40:],
        ))  # fmt: skip

    def malicious(self) -> bytes:
        bomb = Bomb(self.sentinel)
        place = self.rng.choice(self.places)
        return self.rng.choice((
            lambda: pickle.dumps(bomb), lambda: sign(pickle.dumps(bomb)), lambda: sign(pickle.dumps(bomb, 0)),
            lambda: torch_bytes(bomb), lambda: sign(torch_bytes(bomb)),
            lambda: sign(torch_bytes(replaced(self.tree, place, bomb))),
            lambda: sign(torch_bytes(replaced(self.tree, place, bomb), _use_new_zipfile_serialization=False)),
            lambda: sign(torch_bytes({**self.tree, "format": bomb})),
        ))()  # fmt: skip

    def module_id(self) -> bytes:
        env_id = self.rng.choice((f"evil_module:{tiny_id()}", "evil_module:X-v0", ":x", "a:b:c"))
        return self.with_value(("args", "env_id"), env_id)

    def deflated(self) -> bytes:
        """A small file that takes much more memory than it has bytes; this one a little."""
        compressed = io.BytesIO()
        with (
            zipfile.ZipFile(io.BytesIO(torch_bytes(self.tree))) as old,
            zipfile.ZipFile(compressed, "w", zipfile.ZIP_DEFLATED) as new,
        ):
            for name in old.namelist():
                new.writestr(name, old.read(name))
        return sign(compressed.getvalue())

    def misshapen(self, hollow: bool = False) -> bytes:
        """Torch's fused Adam writes past the end of a tensor that is too small: such a file can corrupt memory."""
        nets = [(key, *path) for key in ("agent", "optimizers") for path in places(self.tree[key])]
        tensors = {path: functools.reduce(lambda tree, key: tree[key], path, self.tree) for path in nets}
        shapes = {path: t.shape for path, t in tensors.items() if isinstance(t, torch.Tensor) and t.numel() > 1}
        place = self.rng.choice(list(shapes))
        other = self.rng.choice((torch.zeros(()), torch.zeros(2), torch.zeros(1, 999)))
        if hollow:  # of the right shape, with the memory of one number
            other = torch.zeros(1, dtype=tensors[place].dtype).expand(shapes[place])
        return self.with_value(place, other)

    def run(self, count: int) -> dict[str, Any]:
        """Tries `count` broken checkpoints, each kind as often."""
        for i, (name, make) in enumerate(itertools.islice(itertools.cycle(self.kinds.items()), count)):
            try:
                self.try_one(name, make())
            except Exception:
                self.problems.append(f"case {i}, {name}: {traceback.format_exc()}")
            self.tried[name] += 1
        return {"tried": self.tried, "outcomes": self.outcomes, "problems": self.problems}

    def try_one(self, kind: str, data: bytes) -> None:
        """Resumes, evaluates or loads; raises if code was executed, or for anything but success or one clear line."""
        mode = self.rng.choice(("resume", "evaluate", "load", "previous", "previous"))
        run = self.folder / "broken"
        shutil.rmtree(run, ignore_errors=True)
        run.mkdir()
        (run / "checkpoint.pt").write_bytes(data)
        if mode == "previous":
            (run / "checkpoint.previous.pt").write_bytes(self.previous)
        no_plots = replaced_attribute(ppo_vec, "plot_learning_curve", lambda *_: None)  # they take most of the time
        path = replaced_attribute(sys, "path", [str(self.folder), *sys.path])
        with path, no_plots, quiet() as err:
            if mode == "load":
                code = self.load(run)
            else:
                words = "--evaluate" if mode == "evaluate" else "--resume", str(run), "--runs-dir", str(self.folder)
                code = ppo_vec.main(words)
        outcome = f"{mode}: exit code {code}"
        self.outcomes[outcome] += 1
        lines, where = err.getvalue().splitlines(), f"{kind}, {outcome}: {err.getvalue()}"
        assert not self.sentinel.exists(), f"code was executed: {where}"
        assert "Traceback" not in err.getvalue(), where
        assert code in (0, 1, 2), where
        assert code == 0 or lines[-1].startswith("ppo_vec.py: error: "), where
        assert code != 2 or len(lines) == 1, where
        if kind in self.DAMAGED and data != self.good:
            assert code == (0 if mode == "previous" else 2), where
            assert code or "using checkpoint.previous.pt" in lines[0], where
        if kind == "signed, a tensor of another shape" and mode in ("resume", "previous"):
            assert code == 2, where
        if kind in ("module:id", "wrappers"):
            assert mode == "load" or (code, "would import code" in lines[0]) == (2, True), where

    DAMAGED = ("truncated", "flipped bits", "overwritten block", "deflated", "signed, a hollow tensor")

    @staticmethod
    def load(run: Path) -> int:
        try:
            ppo_vec.load_policy(run)(np.zeros(3, np.float32))
            return 0
        except ppo_vec.UserError as error:
            print(f"ppo_vec.py: error: {error}", file=sys.stderr)
            return 2


replaced_attribute = unittest.mock.patch.object


@contextlib.contextmanager
def quiet() -> Iterator[io.StringIO]:
    """Gives what is written to stderr."""
    with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()):
        yield err


def fuzz(count: int, seed: int) -> dict[str, Any]:
    """Tries `count` broken checkpoints in this process."""
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        return Fuzz(Path(folder), random.Random(seed)).run(count)


def isolated(function: Callable[..., Any], *args: Any, limit: float = 500) -> Any:
    """Calls `function` in a process of its own: a checkpoint that corrupts memory shall not end the suite with it."""
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        future = pool.submit(function, *args)
        watchdog = threading.Timer(limit, lambda: [process.kill() for process in pool._processes.values()])
        watchdog.start()
        try:
            return future.result()
        except concurrent.futures.process.BrokenProcessPool:
            raise AssertionError(f"{function.__name__}{args} crashed, or hung for {limit:g} s") from None
        finally:
            watchdog.cancel()


# ---- The long form ---------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """One line of the table."""

    name: str
    tried: int = 0
    passed: int = 0
    seconds: float = 0.0
    notes: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    run: str = ""  # the command, date and commit

    @property
    def ok(self) -> bool:
        return self.tried == self.passed and not self.problems


def repeat(name: str, case: Callable[[Path, random.Random, int], str], count: int, options: argparse.Namespace) -> Row:
    """Runs `case` (folder, rng, index) `count` times, `--jobs` at a time; a case that missed its moment is repeated."""
    row = Row(name, tried=count)

    def one(i: int) -> str:
        for attempt in range(30):
            rng = random.Random(f"{options.seed} {name} {i} {attempt}")
            with tempfile.TemporaryDirectory(prefix="faults-run-") as folder:
                if note := case(Path(folder) / "run", rng, i):
                    return note
        raise AssertionError("the run ended before the fault, thirty times")

    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        for i, future in enumerate([pool.submit(one, i) for i in range(count)]):
            try:
                note = future.result()
                row.passed += 1
            except Exception as error:
                note = f"FAILED: {error}"
                row.problems.append(f"case {i}: {' '.join(str(error).split())[:500]}")
            print(f"{name} {i + 1}/{count}: {note}", flush=True)
    row.notes = {"orphans and leaked shared memory": 0 if row.ok else "see below"}
    return row


def bench_kill_trainer(options: argparse.Namespace, folder: Path) -> Row:
    """Every other case writes a checkpoint after each iteration: more states to resume from, more writes to hit."""
    references = {patch: Reference.make(folder / f"r{bool(patch)}", patch) for patch in ("", EAGER)}
    assert not differences(references[""].state, references[EAGER].state)

    def case(run: Path, rng: random.Random, i: int) -> str:
        patch = EAGER if i % 2 else ""
        return kill_trainer(references[patch], run, references[patch].moments(rng, rng.randint(1, 2)), patch)

    return repeat("kill -9 of the trainer, then --resume", case, options.count or 100, options)


def bench_worker(name: str, count: int, number: int, args: list[str], options: Any, folder: Path) -> Row:
    reference = Reference.make(folder / "r")

    def case(run: Path, rng: random.Random, i: int) -> str:
        return disturb_worker(number, reference, run, rng, *args)

    return repeat(name, case, options.count or count, options)


def bench_fuzz(options: argparse.Namespace, folder: Path) -> Row:
    row, tried, outcomes = Row("broken checkpoints", tried=options.count or 1000), Counter(), Counter()
    for first in range(0, row.tried, 250):
        count = min(250, row.tried - first)
        try:
            part = isolated(fuzz, count, options.seed * 1000 + first, limit=600)
            row.passed += count - len(part["problems"])
            row.problems += part["problems"]
            tried.update(part["tried"]), outcomes.update(part["outcomes"])
        except AssertionError as error:
            row.problems.append(str(error))
        print(f"{row.name}: {row.passed} of {first + count} as they must", flush=True)
    row.notes = {"tried": dict(tried), "outcomes": dict(outcomes)}
    return row


def bench_cost(options: argparse.Namespace, folder: Path) -> Row:
    """Steps a second of training at the defaults, with and without saving and watching, in turns."""
    common = "ppo_vec.should_evaluate = lambda *_: False; ppo_vec.deliver = lambda *_: None"
    timed = f"""{common}
import atexit, time
real, spent = ppo_vec.save, [0.0]
def save(*args):
    began = time.perf_counter()
    real(*args)
    spent[0] += time.perf_counter() - began
ppo_vec.save = save
atexit.register(lambda: print("saving took", spent[0], file=sys.stderr))"""
    bare = f"""{common}
ppo_vec.save = ppo_vec.plot_learning_curve = lambda *_: None
def call(envs, name, policy, *args):
    envs.processes or envs.start()
    acting = ppo_vec.Policy(policy, envs.args.activation, envs.task.low, envs.task.high)
    envs.call_async("run", name, acting, *args)
    return list(envs.call_wait())
ppo_vec.VecEnv.call = call"""
    speeds, shares = {"on": [], "off": []}, []
    for i in range(options.count or 4):
        for name, patch in (("on", timed), ("off", bare))[:: 1 if i % 2 else -1]:
            run = folder / f"{name}{i}"
            args = "--total-timesteps", "60000", "--runs-dir", str(folder), "--run-name", run.name
            result = Trainer(*args, patch=patch).finish(600).check()
            first, *_, last = events(run)["time/SPS"]
            seconds = last.wall_time - first.wall_time
            speeds[name].append(round((last.step - first.step) / seconds))
            if name == "on":
                shares.append(float(result.err.split("saving took")[1].split()[0]) / seconds)
            print(f"cost: {name} {speeds[name][-1]} steps/s", flush=True)
    cost, share = 1 - statistics.median(speeds["on"]) / statistics.median(speeds["off"]), statistics.median(shares)
    notes = {f"sps_{k}": v for k, v in speeds.items()} | {
        "cost": round(cost, 4),
        "share_of_time_saving": round(share, 4),
    }
    return Row("cost of checkpoints and healing", tried=1, passed=int(cost <= 0.02), notes=notes)


STOP = "kill -STOP of a worker, --worker-timeout 2", 20, signal.SIGSTOP, ["--worker-timeout", "2"]
BENCHES: dict[str, Callable[[argparse.Namespace, Path], Row]] = {
    "kill-trainer": bench_kill_trainer,
    "kill-worker": functools.partial(bench_worker, "kill -9 of a worker", 100, signal.SIGKILL, []),
    "stop-worker": functools.partial(bench_worker, *STOP),
    "fuzz": bench_fuzz,
    "cost": bench_cost,
}


def markdown(rows: list[Row], about: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    text = f"""# The fault suite

{about["cpu"]}, {about["cores"]} cores; {versions}.

A run is as it must be if it ends with the exit code, weights, optimizer, normalisers, random states, rows of
episodes.csv, TensorBoard scalars and results of the undisturbed one, to the bit, with no traceback and with
no process and no shared memory left behind. A broken checkpoint executes nothing and ends in one clear line,
or in the use of the previous one.

| fault | tried | as it must be | minutes | notes | run |
|---|---|---|---|---|---|
"""
    for row in rows:
        notes = "; ".join(f"{k}: {v}" for k, v in row.notes.items())
        text += f"| {row.name} | {row.tried} | {row.passed} | {row.seconds / 60:.1f} | {notes} | {row.run} |\n"
    return text + "".join(f"\n- {row.name}: {problem}\n" for row in rows for problem in row.problems)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help=f"comma-separated, of {', '.join(BENCHES)}")
    parser.add_argument("--count", type=int, help="cases of each kind, instead of 100, 100, 20, 1000 and 4")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments and damages")
    parser.add_argument("--out", type=Path, help="folder of the results; default benchmarks/results for a whole run")
    options = parser.parse_args()
    names = options.only.split(",") if options.only else list(BENCHES)
    if unknown := set(names) - set(BENCHES):
        parser.error(f"--only: unknown {', '.join(sorted(unknown))}")
    out = options.out or (None if options.only or options.count else ROOT / "benchmarks" / "results")
    about = ppo_vec.describe_run(ppo_vec.Options())
    del about["args"]
    # Parts can be run one by one: rows that are there already stay, each with its own command, date and commit.
    rows = {}
    if out and (out / "faults.json").exists():
        rows = {name: Row(**row) for name, row in json.loads((out / "faults.json").read_text())["rows"].items()}
    for name in names:
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="faults-") as folder:
            row = rows[name] = BENCHES[name](options, Path(folder))
        row.seconds = time.monotonic() - began
        row.run = f"`{about['command']}`, {time.strftime('%Y-%m-%d %H:%M')}, commit {about['git_commit']}"
    rows = {name: rows[name] for name in BENCHES if name in rows}
    text = markdown(list(rows.values()), about)
    print(text)
    if out:
        out.mkdir(parents=True, exist_ok=True)
        (out / "faults.md").write_text(text)
        report = {**about, "rows": {name: vars(row) for name, row in rows.items()}}
        (out / "faults.json").write_text(json.dumps(report, indent=2) + "\n")
    return 0 if all(rows[name].ok for name in names) else 1


if __name__ == "__main__":
    sys.exit(main())
