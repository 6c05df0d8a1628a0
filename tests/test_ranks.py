"""Several processes that train together, on the CPU (gloo): started as torchrun does, once by torchrun itself."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ppo_vec

TINY = (
    "--env-id Pendulum-v1 --num-workers 1 --num-steps 50 --num-minibatches 1 --update-epochs 4 --eval-episodes 5 "
    "--actor-hidden-sizes 16 16 --critic-hidden-sizes 16 16 --total-timesteps 600 --no-anneal-lr"
)
PATH = os.pathsep.join([str(Path(ppo_vec.__file__).parent), os.environ.get("PYTHONPATH", "")])


def start(ranks: int, *flags: str, code: str | None = None, before: list[list[str]] | None = None) -> list[Any]:
    """The processes of one training, with the variables that torchrun sets; `before`: a command that starts each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(ranks):
        env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
        env |= {"MASTER_ADDR": "10.77.0.1" if before else "127.0.0.1", "PYTHONPATH": PATH}
        command = [sys.executable, *(["-c", code] if code else [ppo_vec.__file__]), *" ".join(flags).split()]
        env = {**os.environ, **{name: str(value) for name, value in env.items()}}
        pipes: dict[str, Any] = {
            "cwd": Path(ppo_vec.__file__).parent,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
            "text": True,
            "start_new_session": True,
        }
        processes.append(subprocess.Popen([*(before[rank] if before else []), *command], env=env, **pipes))
    return processes


@contextlib.contextmanager
def cleaned(processes: list[Any]) -> Iterator[list[Any]]:
    try:
        yield processes
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def finish(processes: list[Any], timeout: float = 100) -> list[tuple[int, str]]:
    """Exit code and stderr of each."""
    with cleaned(processes):
        said = [process.communicate(timeout=timeout)[1] for process in processes]
        return [(process.returncode, text) for process, text in zip(processes, said)]


def train(ranks: int, folder: Path, name: str, *flags: str) -> dict[str, Any]:
    run = folder / name
    where = f"--resume {run}" if run.exists() else f"{TINY} --runs-dir {folder} --run-name {name}"
    for code, said in finish(start(ranks, where, *flags)):
        assert code == 0, said
    return ppo_vec.read_checkpoint(run / "checkpoint.pt")[1]


def vector(agent: dict[str, Tensor]) -> Tensor:
    return torch.cat([agent[name].flatten() for name in agent if "normalizer" not in name])


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process with four environments."""
    folder = tmp_path_factory.mktemp("ranks")
    train(1, folder, "one", "--num-envs 4")
    return folder / "one"


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes, started by torchrun, with two environments each."""
    folder = tmp_path_factory.mktemp("ranks")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    flags = f"{TINY} --runs-dir {folder} --run-name two --num-envs 2".split()
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": PATH}
    done = subprocess.run([*torchrun, ppo_vec.__file__, *flags], capture_output=True, text=True, timeout=100, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("2 processes of 2 environments each") == 1
    assert done.stderr.count("delivered") == 1
    assert [path.name for path in folder.iterdir()] == ["two"]
    return folder / "two"


def checkpoint(run: Path) -> dict[str, Any]:
    return ppo_vec.read_checkpoint(run / "checkpoint.pt")[1]


# ---- The numbers -----------------------------------------------------------------------------------------------------

ONE_UPDATE = """
import os, sys
import numpy as np, torch, ppo_vec
from ppo_vec import Options, State, Task
ppo_vec.join_ranks([])
T, ALL, rank, size = STEPS, 12, ppo_vec.rank(), ppo_vec.world_size()

def one_update(columns):
    N = columns.stop - columns.start
    args = Options(num_envs=N, num_steps=T, num_minibatches=4, update_epochs=3, actor_hidden_sizes=(16, 16),
                   critic_hidden_sizes=(16, 16), ent_coef=0.01, bounds_loss_coef=0.1, target_kl=TARGET_KL,
                   norm_adv="NORM_ADV")
    bound = np.ones(3, np.float32)
    state = State(args, Task(5, -bound, bound, None, None), torch.device("cpu"))
    rng = torch.Generator().manual_seed(5)
    for p in state.agent.parameters():
        p.data.normal_(0, 0.4, generator=rng)
    def normal(*shape):
        return 1 + 2 * torch.randn(shape, generator=rng)[:, columns]
    done = torch.rand(2, T, ALL, generator=rng)[:, :, columns] < 0.1
    rollout = ppo_vec.Rollout(normal(T + 1, ALL, 5), normal(T, ALL, 5), normal(T, ALL, 3), normal(T, ALL), *done,
                              torch.zeros(N, dtype=torch.bool), [])
    rollout.rewards = ppo_vec.scale_rewards(state, rollout.rewards, rollout, 0.9)
    rollout.values, rollout.next_values = normal(T, ALL), normal(T, ALL)
    rollout.normalized_obs = state.agent.normalizer(rollout.obs)
    x = rollout.normalized_obs[:-1]
    noise = 0.05 * normal(T, ALL)
    with torch.no_grad():
        rollout.logprobs = state.agent.distribution.log_prob_entropy(state.agent.policy(x), rollout.actions)[0] + noise
    found = {}
    def noting(vector, group):
        found.setdefault(vector.numel(), ORIGINAL(vector, group).clone())  # the first of each network
        return vector
    ORIGINAL, ppo_vec.mean_of_group = ppo_vec.mean_of_group, noting
    metrics = ppo_vec.update(state, rollout, args)
    ppo_vec.mean_of_group = ORIGINAL
    metrics = ppo_vec.update(state, rollout, args)  # the second plays recordings
    assert all(o.recording for o in (state.optimizers if ppo_vec.world_size() == 1 else [state.optimizers[rank % 2]]))
    norm = state.agent.normalizer
    gradients = {o.loss_of.__name__: found[o.flat.numel()] for o in state.optimizers if o.flat.numel() in found}
    weights = [o.flat for o in state.optimizers]
    steps = torch.tensor([float(o.state["step"]) for o in state.optimizers])
    stats = [norm.mean, norm.var, norm.count, state.return_statistics.mean, state.return_statistics.var]
    moments = [tensor for o in state.optimizers for tensor in o.state.values()]
    return gradients, [*weights, *moments, *stats, steps, torch.tensor(list(metrics.values()))]

gradients, mine = one_update(slice(ALL // size * rank, ALL // size * (rank + 1)))
for first, *others in zip(*ppo_vec.all_ranks(mine)):
    assert all(torch.equal(first, other) for other in others), "the ranks differ"
os.environ["WORLD_SIZE"], os.environ["RANK"] = "1", "0"
whole_gradients, whole = one_update(slice(0, ALL))
assert list(gradients) == [("policy_loss", "value_loss")[rank % 2]]
for name, gradient in gradients.items():
    apart = float((gradient - whole_gradients[name]).norm() / whole_gradients[name].norm())
    print("gradient", apart, file=sys.stderr)
    assert apart < 1e-6 or LEFT_OUT, apart
for one, other in zip(mine, whole, strict=True):
    apart = float((one - other).norm() / other.norm())
    assert apart < 1e-4 or LEFT_OUT, apart
"""


@pytest.mark.parametrize(
    ("ranks", "steps", "target_kl", "norm_adv"),
    [
        (2, 40, None, "minibatch"), (2, 40, 0.02, "minibatch"), (3, 40, 0.02, "rollout"), (3, 35, None, "rollout"),
        (4, 40, None, "rollout"), (4, 40, None, "minibatch"),
    ],
)  # fmt: skip
def test_ranks_update_as_one_process_with_all_environments(
    ranks: int, steps: int, target_kl: float | None, norm_adv: str
) -> None:
    """Two updates: gradients, weights, Adam's moments, statistics, metrics and the stop at the target KL, on all ranks.

    Of two each trains a network alone. Of three and four two share one; 35 steps make minibatches of 105 rows, of
    which they leave out one; and two that share a network normalise the advantages of their own rows with "minibatch":
    then the ranks agree, but not with one process.
    """
    code = ONE_UPDATE.replace("TARGET_KL", repr(target_kl)).replace("STEPS", str(steps)).replace("NORM_ADV", norm_adv)
    other = steps == 35 or (ranks > 2 and norm_adv == "minibatch")
    for returned, said in finish(start(ranks, code=code.replace("LEFT_OUT", str(other)))):
        assert returned == 0, said
        assert said.count("gradient") == 1


def test_two_ranks_train_as_one_process_with_all_environments(one: Path, two: Path) -> None:
    """The same seeds, noise and episodes; weights and statistics to rounding."""
    expected, found = checkpoint(one), checkpoint(two)
    for name in ("global_step", "evaluation_steps", "selection_episodes"):
        assert found[name] == expected[name]
    for saved in ("agent", "average", "return_statistics"):
        for name, tensor in expected[saved].items():
            torch.testing.assert_close(found[saved][name], tensor, rtol=1e-3, atol=1e-4)
    for name in ("obs", "returns", "episode"):
        torch.testing.assert_close(found["snapshot"][name], expected["snapshot"][name], rtol=1e-3, atol=1e-3)
    rows = [(run / "evaluation.csv").read_text().splitlines() for run in (one, two)]
    assert [row.split(",")[0] for row in rows[0]] == [row.split(",")[0] for row in rows[1]]
    assert len(rows[0]) == 6
    episodes = [(run / "episodes.csv").read_text().splitlines() for run in (one, two)]
    assert [row.split(",")[0::4] for row in episodes[0]] == [row.split(",")[0::4] for row in episodes[1]]


# ---- Faults ----------------------------------------------------------------------------------------------------------

STOPS = """
import os, signal, sys, ppo_vec
collect, seen = ppo_vec.collect, []
def stopping(*args):
    seen.append(1)
    if len(seen) == 3 and ppo_vec.rank() == WHO:
        os.kill(os.getpid(), signal.SIGNAL)
    return collect(*args)
ppo_vec.collect = stopping
ppo_vec.should_save = lambda state: True
sys.exit(ppo_vec.main())
"""


def stop(folder: Path, who: int, number: str) -> list[tuple[int, str]]:
    """One rank gets a signal in the third of four iterations, and the run is resumed. How the two ended."""
    code = STOPS.replace("WHO", str(who)).replace("SIGNAL", number)
    flags = f"{TINY} --num-envs 2 --runs-dir {folder} --run-name run".replace("timesteps 600", "timesteps 800")
    return finish(start(2, flags, code=code))


@pytest.mark.parametrize("who", [0, 1])
def test_a_killed_rank_ends_the_other(tmp_path: Path, two: Path, who: int) -> None:
    """Within seconds, with one clear line; and the run goes on to the same bits."""
    began = time.monotonic()
    ends = stop(tmp_path, who, "SIGKILL")
    assert time.monotonic() - began < 40
    code, said = ends[1 - who]
    assert (ends[who][0], code) == (-9, 1), said
    (line,) = (line for line in said.splitlines() if "error" in line)
    assert f"rank {1 - who}: another process of this training has ended" in line
    assert "Traceback" not in said
    assert ppo_vec.read_checkpoint(tmp_path / "run")[1]["global_step"] == 400
    if who == 0:
        return
    resumed = train(2, tmp_path, "run", "--total-timesteps 600")
    assert torch.equal(vector(resumed["agent"]), vector(checkpoint(two)["agent"]))
    assert torch.equal(resumed["snapshot"]["obs"], checkpoint(two)["snapshot"]["obs"])


DYING_WORKER = """
import os, pathlib, sys, ppo_vec
rollout, dead = ppo_vec.Worker.rollout, pathlib.Path("DEAD")
def dying(self):
    if ppo_vec.rank() == 1 and not dead.exists():
        dead.touch()
        os._exit(7)
    return rollout(self)
ppo_vec.Worker.rollout = dying
sys.exit(ppo_vec.main())
"""


def test_a_dead_worker_of_rank_1_is_replaced_named_and_counted(tmp_path: Path, two: Path) -> None:
    flags = f"{TINY} --num-envs 2 --runs-dir {tmp_path} --run-name run --start-method fork"
    ends = finish(start(2, flags, code=DYING_WORKER.replace("DEAD", str(tmp_path / "dead"))))
    assert [code for code, _ in ends] == [0, 0], ends
    assert "rank 1: warning: worker 0 ended with exit code 7; starting new workers" in ends[1][1]
    assert "exit code 7" not in ends[0][1]
    assert ppo_vec.read_json(tmp_path / "run" / "summary.json")["worker_restarts"] == 1
    assert torch.equal(vector(checkpoint(tmp_path / "run")["agent"]), vector(checkpoint(two)["agent"]))


FILMING = """
import sys, numpy as np, ppo_vec
from gymnasium.envs.classic_control.pendulum import PendulumEnv
PendulumEnv.render = lambda self: np.zeros((16, 16, 3), np.uint8)
sys.exit(ppo_vec.main())
"""


def test_rank_0_films(tmp_path: Path, two: Path) -> None:
    """Alone: what it does for its video waits for no other rank."""
    pytest.importorskip("imageio_ffmpeg")
    flags = f"{TINY} --num-envs 2 --runs-dir {tmp_path} --run-name run --start-method fork --capture-video"
    ends = finish(start(2, flags, code=FILMING))
    assert [code for code, _ in ends] == [0, 0], ends
    assert [path.name for path in (tmp_path / "run" / "videos").iterdir()] == ["Pendulum-v1-seed0.mp4"]
    assert torch.equal(vector(checkpoint(tmp_path / "run")["agent"]), vector(checkpoint(two)["agent"]))


def test_a_run_says_how_many_processes_it_had(two: Path) -> None:
    info = ppo_vec.read_json(two / "args.json")
    assert (info["processes"], info["args"]["num_envs"]) == (2, 2)
    assert info["command"].startswith("torchrun --nproc-per-node=2 ")


def test_a_signal_to_one_rank_stops_all(tmp_path: Path) -> None:
    ends = stop(tmp_path, 1, "SIGTERM")
    assert [code for code, _ in ends] == [143, 143], ends
    assert "stopped by SIGTERM; continue with: --resume" in ends[0][1]
    assert checkpoint(tmp_path / "run")["global_step"] == 600


@pytest.mark.parametrize("after", [1, 2])  # from two processes to one, and from one to two
def test_another_number_of_ranks_goes_on(tmp_path: Path, one: Path, two: Path, after: int) -> None:
    """Environments that are no longer there are dropped, new ones begin; the others go on where they were."""
    before, run, size = (two, one)[after - 1], tmp_path / "run", (2, 4)[after - 1]
    shutil.copytree(before, run)
    said = [text for _, text in finish(start(after, f"--resume {run} --total-timesteps 800"))]
    assert f"the checkpoint has 4 environments, this run has {size * after}" in said[0]
    first, second = checkpoint(before), checkpoint(run)
    steps = {1: 100, 2: 50}[after]  # of each environment, in whole rollouts of 50
    assert (first["global_step"], second["global_step"]) == (600, 600 + steps * size * after)
    assert len(second["snapshot"]["episode"]) == len(second["discounted_return"]) == size * after
    # An episode of Pendulum has 200 steps. Each of the 4 environments has taken 150.
    lengths = [sum(len(chunk) for chunk in chunks) for chunks in second["snapshot"]["actions"]]
    assert lengths == [(150 + steps) % 200] * min(4, size * after) + [steps] * (size * after - 4)


def test_a_world_size_without_rank_is_not_torchruns(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As some launchers leave it."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    cores = ppo_vec.usable_cores()
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert (ppo_vec.world_size(), ppo_vec.usable_cores()) == (1, cores)
    assert ppo_vec.main(f"{TINY} --num-envs 2 --runs-dir {tmp_path} --run-name run".split()) == 0


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"RANK": "1"}, "RANK is set, but not by torchrun: unset it, or start torchrun --nproc-per-node N ppo_vec.py"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "RANK is set, but not by torchrun"),
    ],
)
def test_rank_without_torchrun_is_an_error(env: dict[str, str], words: str) -> None:
    env = {**os.environ, "PYTHONPATH": PATH, **env}
    done = subprocess.run([sys.executable, ppo_vec.__file__], capture_output=True, text=True, timeout=60, env=env)
    assert done.returncode == 2
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("ranks", "minibatches", "good"),
    [(1, 4, True), (1, 8, False), (2, 8, True), (3, 4, True), (3, 8, False), (4, 8, True)],
)
def test_every_rank_has_steps_to_normalise(
    ranks: int, minibatches: int, good: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has 8. Of three ranks two share the actor's minibatches: 24 steps, 8 minibatches, and one step for each."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    args = ppo_vec.Options(num_envs=2, num_steps=4, num_minibatches=minibatches)
    with contextlib.nullcontext() if good else pytest.raises(ppo_vec.UserError, match="one step in each"):
        ppo_vec.validate(args)
    args.norm_adv = "rollout"
    ppo_vec.validate(args)


@pytest.mark.parametrize("what", ["arguments", "ppo_vec.py"])
def test_a_rank_of_another_kind_is_named(tmp_path: Path, what: str) -> None:
    """The program of rank 1 differs, or what it is told."""
    other = "ppo_vec.__file__ = FILE; sys.argv[1:] += EXTRA; sys.exit(ppo_vec.main())"
    (tmp_path / "other.py").write_text("another version")
    file, extra = (
        ("ppo_vec.__file__", ["--seed", "2"]) if what == "arguments" else (repr(str(tmp_path / "other.py")), [])
    )
    other = other.replace("FILE", file).replace("EXTRA", repr(extra))
    code = f"import os, sys, ppo_vec\nif os.environ['RANK'] == '1': {other}\nsys.exit(ppo_vec.main())"
    ends = finish(start(2, f"{TINY} --num-envs 2 --runs-dir {tmp_path / 'runs'}", code=code))
    assert [code for code, _ in ends] == [2, 2], ends
    assert f"rank 1 has {what} " in ends[0][1]
    assert "Traceback" not in ends[0][1] + ends[1][1]
    assert not (tmp_path / "runs").exists()


def test_other_environments_in_another_rank_are_refused(tmp_path: Path) -> None:
    """The same name and spaces of the same shape, but other bounds."""
    code = """
import os, sys, numpy as np, ppo_vec
from gymnasium.envs.classic_control.pendulum import PendulumEnv
import gymnasium as gym

class Own(PendulumEnv):
    def __init__(self):
        super().__init__()
        self.action_space = gym.spaces.Box(-1 - np.float32(os.environ["RANK"]), 1, (1,))

gym.register("Own-v0", entry_point=Own, max_episode_steps=20)
sys.exit(ppo_vec.main())
"""
    ends = finish(start(2, f"{TINY} --num-envs 2 --env-id Own-v0 --runs-dir {tmp_path / 'runs'}", code=code))
    assert [code for code, _ in ends] == [2, 2], ends
    assert "rank 1 has the environment's low '[-2.0]', rank 0 has '[-1.0]'\n" in ends[0][1]
    assert "Traceback" not in ends[0][1] + ends[1][1]


def test_help_of_several_ranks_is_no_error() -> None:
    assert [code for code, _ in finish(start(2, "--help"))] == [0, 0]


def test_a_torchrun_that_was_killed_stops_its_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state: Any = types.SimpleNamespace(finished=False)
    monkeypatch.setattr(ppo_vec, "all_ranks", lambda value: [value, 0])
    for name, signal_number in (("TORCHELASTIC_RUN_ID", signal.SIGTERM), ("RANK", None)):  # or started by hand
        parents = iter([7, 7, 1])
        with monkeypatch.context() as patch:
            patch.setattr(os, "getppid", functools.partial(next, parents))
            patch.setenv(name, "0")
            with ppo_vec.stop_signals(tmp_path, state) as stopped:
                assert [stopped(), stopped()] == [None, signal_number]


def test_bad_input_is_said_once(tmp_path: Path) -> None:
    ends = finish(start(2, f"{TINY} --num-envs 2 --clip-coef -1 --runs-dir {tmp_path / 'runs'}"))
    assert [code for code, _ in ends] == [2, 2], ends
    assert "--clip-coef must" in ends[0][1]
    assert ends[1][1] == ""


# ---- Two machines ----------------------------------------------------------------------------------------------------


@pytest.fixture
def two_machines() -> Iterator[list[list[str]]]:
    """Two network namespaces with a cable between them; gives the command that starts a process in each."""
    names, why = ["ppo-a", "ppo-b"], "needs root, and ip"
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip(why)

    def ip(*words: str) -> bool:
        return subprocess.run(["ip", *words], capture_output=True).returncode == 0

    made = ip("netns", "add", names[0]) and ip("netns", "add", names[1])
    made = made and ip(
        "link", "add", "ppo0", "netns", "ppo-a", "type", "veth", "peer", "name", "ppo0", "netns", "ppo-b"
    )
    for i, name in enumerate(names, start=1):
        made = made and ip("-n", name, "addr", "add", f"10.77.0.{i}/24", "dev", "ppo0")
        made = made and ip("-n", name, "link", "set", "ppo0", "up") and ip("-n", name, "link", "set", "lo", "up")
    try:
        if not made:
            pytest.skip("network namespaces cannot be made here")
        yield [["ip", "netns", "exec", name, "env", "GLOO_SOCKET_IFNAME=ppo0", "LOCAL_RANK=0"] for name in names]
    finally:
        for name in names:
            ip("netns", "del", name)


def test_two_machines(two_machines: list[list[str]], two: Path, tmp_path: Path) -> None:
    """The second has no run folder; what it needs of the first comes over the network."""
    flags = f"{TINY} --num-envs 2 --run-name run"
    for code, said in finish(start(2, flags, f"--runs-dir {tmp_path}", before=two_machines)):
        assert code == 0, said
    assert torch.equal(vector(checkpoint(tmp_path / "run")["agent"]), vector(checkpoint(two)["agent"]))
