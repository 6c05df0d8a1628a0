"""What --cuda is worth on this machine, beside its own CPU. Made for a machine that has torch and little else.

    python benchmarks/gpu.py             # at most eight minutes; writes benchmarks/results/gpu.*
    python benchmarks/gpu.py --quick     # a minute or less, small sizes, prints only; without a GPU too

Measured: the tests that need a GPU; one minibatch of both networks on the GPU, as a CUDA graph and kernel by kernel,
and on the CPU; an iteration of 16 to 1,024 environments on both; a rollout on 1 to 16 workers; the copy of a rollout to
the GPU from pageable and from pinned memory; the README's first command, whole. Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import importlib.util
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # last: a changed copy of ppo_vec on PYTHONPATH can be measured

import ppo_vec as pv

# isort: split
import numpy as np
import torch

GPU = torch.cuda.is_available()
GOALS = (  # measure, its least value
    ("iteration with 64 environments, 256-256: CPU over --cuda", 1.5),
    ("update, 256-256, minibatches of 256: kernel by kernel over graph", 4.0),
    ("stepping on 16 workers over one", 12.0),
    ("seconds to a confirmed 300 (at most)", 20.0),
)


def log(message: str) -> None:
    print(f"[{time.perf_counter() - STARTED:5.0f} s] {message}", file=sys.stderr, flush=True)


def seconds(action: Callable[[], Any], repeats: int) -> list[float]:
    """The time of each call, until the GPU has ended too."""
    times = []
    for _ in range(repeats):
        if GPU:
            torch.cuda.synchronize()
        began = time.perf_counter()
        action()
        if GPU:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return times


def text(times: list[float]) -> str:
    return f"{statistics.median(times) * 1e3:.2f} ({min(times) * 1e3:.2f} to {max(times) * 1e3:.2f})"


def make_args(hidden: tuple[int, ...], **changed: Any) -> pv.Options:
    tuned = pv.TUNED["BipedalWalker-v3"]
    return pv.Options(**{**tuned, "actor_hidden_sizes": hidden, "critic_hidden_sizes": hidden, **changed})


# ---- The parts -------------------------------------------------------------------------------------------------------


def run_tests() -> str:
    command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "-p", "no:cacheprovider", "-o", "addopts="]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(min(4, pv.usable_cores()))]
    done = subprocess.run([*command, str(ROOT / "tests")], capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        print(done.stdout[-6000:], file=sys.stderr)
    return done.stdout.strip().splitlines()[-1]


def minibatch(hidden: int, size: int, how: str, limit: float) -> list[float]:
    """Seconds of one minibatch of both networks; `how`: graph, kernels (one by one, on the GPU), or cpu."""
    device = torch.device("cpu" if how == "cpu" else "cuda")
    args = pv.scheduled(make_args((hidden, hidden), num_envs=1, num_steps=size, num_minibatches=1), 0)
    state = pv.State(args, TASK, device)
    rows = 2 * size
    batch = {"obs": torch.randn(rows, 24), "actions": 0.5 * torch.randn(rows, 4), "logprobs": torch.full((rows,), -3.0)}
    batch |= {name: torch.randn(rows) for name in ("advantages", "returns", "values")}
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    for optimizer in state.optimizers:
        optimizer.learning_rate = 1e-6

    def descend(count: int) -> None:
        some = torch.stack([torch.randperm(rows)[:size] for _ in range(count)]).to(device)
        run = state.descend_all if how == "graph" else one_by_one if how == "kernels" else pv.descend_all
        for optimizer in state.optimizers:
            optimizer.learning_rate = 1e-6
        times.append(seconds(lambda: run(state.optimizers, batch, some, args), 1)[0] / count)

    if how == "kernels":
        one_by_one = pv.CudaGraph()
        one_by_one.works = False
    times: list[float] = []
    descend(1)  # warms up, and records the graph
    if how == "graph" and state.descend_all.graph is None:
        raise RuntimeError("no CUDA graph")
    if how == "cpu" and times[-1] > limit:
        return times
    descend(1)  # on the CPU records the losses
    descend(1)
    count, times = max(1, min(40, int(limit / times[-1] / 3))), []
    for _ in range(3):
        descend(count)
    return times


def iteration(hidden: int, envs: int, steps: int, device: str, repeats: int) -> dict[str, list[float]]:
    """Seconds of rollouts and updates of a training's first iterations, but for those that warm up."""
    gc.collect()  # no CUDA graph of the run before: forked workers would complain about it
    args = make_args((hidden, hidden), num_envs=envs, num_steps=steps, seed=3)
    state = pv.State(args, TASK, torch.device(device))
    times: dict[str, list[float]] = {"rollout": [], "update": []}
    with contextlib.closing(pv.VecEnv(args, TASK, state.snapshot)) as vec:
        warm_up = 1 if device == "cpu" else 2
        for _ in range(warm_up + repeats):
            now, began = pv.scheduled(args, state.global_step), time.perf_counter()
            rollout = pv.collect(vec, state, now)  # these two end with a wait for the GPU
            times["rollout"].append(time.perf_counter() - began)
            pv.update(state, rollout, now)
            times["update"].append(time.perf_counter() - began - times["rollout"][-1])
    return {name: values[warm_up:] for name, values in times.items()}


@contextlib.contextmanager
def stepping(workers: int, envs: int, steps: int, hidden: tuple[int, ...]) -> Iterator[Callable[[], float]]:
    """Gives a function that takes the reference policy through a rollout: steps a second."""
    args = make_args(hidden, num_envs=envs, num_steps=steps, num_workers=workers)
    state = pv.State(args, TASK, torch.device("cpu"))
    noise = state.agent.distribution.noise(state.noise_rng, steps, envs, 4).numpy()
    with contextlib.closing(pv.VecEnv(args, TASK, state.snapshot)) as vec:
        yield lambda: envs * steps / seconds(lambda: vec.rollout(REFERENCE["agent"], noise, 0), 1)[0]


def copies(envs: int, steps: int) -> dict[str, list[float]]:
    """Seconds of the copy of a rollout's observations to the GPU."""
    pageable = torch.randn(steps + 1, envs, 24)
    pinned = pageable.pin_memory()
    return {name: seconds(tensor.cuda, 30)[5:] for name, tensor in (("pageable", pageable), ("pinned", pinned))}


def run_trainer(flags: str, wait: Callable[[subprocess.Popen, Path], Any]) -> dict[str, Any]:
    """What summary.json has of a training, and what it said; `wait` decides how long it runs."""
    folder = Path(tempfile.mkdtemp())
    command = [sys.executable, str(ROOT / "ppo_vec.py"), *flags.split(), "--runs-dir", str(folder), "--run-name", "run"]
    began = time.perf_counter()
    try:
        with open(folder / "stderr", "w+") as stderr:
            process = subprocess.Popen(command, stderr=stderr, stdout=subprocess.DEVNULL)
            wait(process, folder / "run" / "summary.json")
            whole = time.perf_counter() - began
            said = (folder / "stderr").read_text().replace("\r", "\n")
        if not (folder / "run" / "summary.json").exists():
            raise RuntimeError(said[-3000:])
        said = re.findall(r"a rollout takes .*|warning: .*|delivered: .*|.*error: .*", said)
        return {"whole_s": whole, "said": said, **json.loads((folder / "run" / "summary.json").read_text())}
    finally:
        shutil.rmtree(folder)


def until_solved(process: subprocess.Popen, summary: Path) -> None:
    """Ends a training once it has solved the task, or after a minute."""
    end = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < end:
        time.sleep(0.2)
        if pv.read_json(summary).get("solved_at_step"):
            break
    process.terminate()
    process.wait()


# ---- Report ----------------------------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes; print only")
    parser.add_argument("--out", type=Path, help="where the results go; default benchmarks/results, failed: runs/gpu")
    options = parser.parse_args()
    quick, failed = options.quick, []
    cores = pv.usable_cores()
    pv.set_up_torch()
    pv.choose_device(dataclasses.replace(make_args((8,)), cuda=GPU))
    report: dict[str, Any] = {"update": [], "iteration": [], "stepping": [], "copies": [], "solved": []}
    goals: dict[str, float] = {}

    @contextlib.contextmanager
    def part(name: str) -> Iterator[None]:
        """A part that fails makes the exit code 1, and the others go on."""
        log(name)
        try:
            yield
        except Exception as error:
            failed.append(f"{name}: {type(error).__name__}: {pv.one_line(error)}")
            log(f"FAILED {failed[-1]}")
        gc.collect()
        write()  # what there is, should the time run out

    def write(done: bool = False) -> Path:
        about = pv.describe_run(dataclasses.replace(make_args((8,)), cuda=GPU))
        report["about"] = {**about, "date": time.strftime("%Y-%m-%d"), "seconds": time.perf_counter() - STARTED}
        report["goals"], report["failed"] = goals, failed
        out = options.out or (ROOT / "benchmarks" / "results" if done and not failed else ROOT / "runs" / "gpu")
        if not quick:
            out.mkdir(parents=True, exist_ok=True)
            (out / "gpu.json").write_text(json.dumps(report, indent=1))
            (out / "gpu.md").write_text(table(report) + "\n")
        return out

    workers = [1, 2] if quick else [n for n in (1, 2, 4, 8, 16, 32, 64) if n <= cores]
    with part("stepping"), contextlib.ExitStack() as stack:
        envs, steps = (8, 8) if quick else (256, 32)
        hidden = tuple(REFERENCE["args"]["actor_hidden_sizes"])
        rows = {n: stack.enter_context(stepping(n, envs, steps, hidden)) for n in workers}
        rates: dict[int, list[float]] = {n: [] for n in workers}
        for turn in range(2 if quick else 5):
            for n, run in rows.items():
                rates[n] += [run()] if turn else [run()][:0]
        report["stepping"] = [{"workers": n, "envs": envs, "steps_per_s": r} for n, r in rates.items()]
        goals["stepping on 16 workers over one"] = (
            statistics.median(rates[16]) / statistics.median(rates[1]) if 16 in rates else float("nan")
        )

    with part("first command"):
        flags = "--num-envs 16 --cuda"
        if quick:
            flags += " --total-timesteps 6000 --eval-episodes 2"
        report["first_command"] = run_trainer(flags, lambda process, _: process.wait())

    for flags in () if quick else ("--num-envs 16", "--num-envs 32 --num-steps 64"):
        with part(f"seconds to 300, {flags}"):
            runs = [report["first_command"]] if flags == "--num-envs 16" else []  # seed 1
            seeds = range(len(runs) + 1, 4)
            runs += [run_trainer(f"{flags} --cuda --seed {seed}", until_solved) for seed in seeds]
            report["solved"].append({"flags": flags, "runs": runs})
            times = [run["solved_at_s"] or float("inf") for run in runs]
            name = "seconds to a confirmed 300 (at most)"
            goals[name] = min(goals.get(name, float("inf")), statistics.median(times))

    sizes = [256] if quick else [256, 1024, 4096, 32768]
    for hidden in [16] if quick else [64, 128, 256, 1024]:
        for size in sizes:
            with part(f"update {hidden}-{hidden}, {size}"):
                how = ["graph", "kernels", "cpu"] if GPU else ["cpu"]
                row = {name: minibatch(hidden, size, name, 0.2 if quick else 0.3) for name in how}
                report["update"].append({"hidden": hidden, "minibatch": size, **row})
                if GPU and (hidden, size) == (256, 256):
                    medians = {name: statistics.median(values) for name, values in row.items()}
                    goals["update, 256-256, minibatches of 256: kernel by kernel over graph"] = (
                        medians["kernels"] / medians["graph"]
                    )

    for envs in [2] if quick else [16, 64, 256, 1024]:
        with part(f"iteration of {envs} environments"):
            steps, hidden = (64, 16) if quick else (128, 256)
            row = {"envs": envs, "steps": steps, "hidden": hidden}
            for device in ["cuda", "cpu"] if GPU else ["cpu"]:
                repeats = 1 if quick or (device, envs) == ("cpu", 1024) else 3 if envs > 64 else 6
                row[device] = iteration(hidden, envs, steps, device, repeats)
            report["iteration"].append(row)
            if GPU:
                totals = {d: sum(statistics.median(t) for t in row[d].values()) for d in ("cuda", "cpu")}
                if envs == 64:
                    goals["iteration with 64 environments, 256-256: CPU over --cuda"] = totals["cpu"] / totals["cuda"]
                report["copies"].append({"envs": envs, **copies(envs, steps)})

    if GPU and not quick:
        with part("tests"):
            report["tests"] = run_tests()
            if "failed" in report["tests"] or "passed" not in report["tests"]:
                raise RuntimeError(report["tests"])

    out = write(done=True)
    print(table(report))
    if not quick:
        draw(report, out / "gpu.png")
    return 1 if failed else 0


def table(report: dict[str, Any]) -> str:
    about = report["about"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    lines = [
        f"# --cuda on {about['gpu'] or 'a machine without a GPU'}",
        "",
        f"`{about['command']}`, commit {about['git_commit']}, {about['date']}, {about['cpu']}, {about['cores']} cores, "
        f"{versions}; {about['seconds']:.0f} s. Medians (minimum to maximum).",
        "",
        "| goal | at least | measured |",
        "|---|---|---|",
    ]
    lines += [f"| {name} | {goal:g} | {report['goals'].get(name, float('nan')):.2f} |" for name, goal in GOALS]
    lines += [f"\nFailed: {line}" for line in report["failed"]]
    if "tests" in report:
        lines += ["", f"Tests that need a GPU: {report['tests']}"]
    lines += ["", "## One minibatch of both networks, ms", ""]
    lines += [
        "| networks | rows | CUDA graph | kernel by kernel | this CPU | CPU over graph |",
        "|---|--:|---|---|---|--:|",
    ]
    for row in report["update"]:
        cells = [text(row[name]) if name in row else "" for name in ("graph", "kernels", "cpu")]
        ratio = f"{statistics.median(row['cpu']) / statistics.median(row['graph']):.1f}" if "graph" in row else ""
        lines.append(f"| {row['hidden']}-{row['hidden']} | {row['minibatch']} | {' | '.join(cells)} | {ratio} |")
    lines += ["", "## One iteration, ms (10 epochs of 8 minibatches)", ""]
    lines += ["| environments x steps | networks | where | rollout | update |", "|---|---|---|---|---|"]
    for row in report["iteration"]:
        for device in ("cuda", "cpu"):
            if device in row:
                cells = f"{text(row[device]['rollout'])} | {text(row[device]['update'])}"
                name = f"{row['envs']} x {row['steps']} | {row['hidden']}-{row['hidden']}"
                lines.append(f"| {name} | {device} | {cells} |")
    lines += ["", "## Stepping the walking policy, steps a second", "", "| workers | environments | rate | over one |"]
    lines += ["|--:|--:|---|--:|"]
    for row in report["stepping"]:
        one, rates = statistics.median(report["stepping"][0]["steps_per_s"]), row["steps_per_s"]
        middle = statistics.median(rates)
        rate = f"{middle:,.0f} ({min(rates):,.0f} to {max(rates):,.0f})"
        lines.append(f"| {row['workers']} | {row['envs']} | {rate} | {middle / one:.2f} |")
    if report["copies"]:
        lines += [
            "",
            "## The copy of a rollout's observations to the GPU, ms",
            "",
            "| environments | pageable | pinned |",
        ]
        lines += ["|--:|---|---|"]
        lines += [f"| {row['envs']} | {text(row['pageable'])} | {text(row['pinned'])} |" for row in report["copies"]]
    if first := report.get("first_command"):
        lines += ["", "## The README's first command, whole", ""]
        lines += [f"{first['whole_s']:.0f} s; solved at step {first['solved_at_step']} after {first['solved_at_s']} s."]
        lines += [f"    {line}" for line in first["said"]]
    if report["solved"]:
        lines += ["", "## Seconds to a confirmed 300 with --cuda", ""]
        lines += ["| flags | seed | seconds | of which rollouts and updates | at step |", "|---|--:|--:|--:|--:|"]
    for row in report["solved"]:
        for seed, run in enumerate(row["runs"], start=1):
            solved = f"{run['solved_at_s'] or float('nan'):.1f} | {run['train_time_s']:.1f} | {run['solved_at_step']}"
            lines.append(f"| {row['flags']} | {seed} | {solved} |")
    return "\n".join(lines)


def draw(report: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for color, hidden in enumerate(sorted({row["hidden"] for row in report["update"]})):
        rows = [row for row in report["update"] if row["hidden"] == hidden]
        for name, style in (("graph", "-o"), ("kernels", ":"), ("cpu", "--")):
            points = [(row["minibatch"], statistics.median(row[name]) * 1e3) for row in rows if name in row]
            if points:
                left.plot(*zip(*points), style, color=f"C{color}", ms=4, label=f"{hidden}-{hidden} {name}")
    left.set(
        xscale="log", yscale="log", xlabel="rows of a minibatch", ylabel="ms", title="One minibatch, both networks"
    )
    left.legend(fontsize="x-small", ncols=2)
    places = np.arange(len(report["iteration"]))
    for shift, device in ((-0.2, "cuda"), (0.2, "cpu")):
        if all(device in row for row in report["iteration"]):
            rates = []
            for row in report["iteration"]:
                spent = sum(statistics.median(times) for times in row[device].values())
                rates.append(row["envs"] * row["steps"] / spent)
            right.bar(places + shift, rates, 0.4, label=device)
    right.set_xticks(places, [str(row["envs"]) for row in report["iteration"]])
    right.set(xlabel="environments", ylabel="steps a second", title="Whole iterations, 256-256")
    right.legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    STARTED = time.perf_counter()
    TASK = pv.make_task(pv.Options())
    REFERENCE = pv.read_checkpoint(ROOT / "runs" / "reference" / "BipedalWalker-v3", policy=True)[1]
    sys.exit(main())
