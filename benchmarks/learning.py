"""Trains a named setting on a list of seeds; every seed counts. Table, JSON and curves go to benchmarks/results/.

    python benchmarks/learning.py                                   # the README's command on seeds 0-9
    python benchmarks/learning.py --setting notebook --seeds 0 1 2
    python benchmarks/learning.py --setting default --seeds 0 --jobs 1   # alone on the machine: results in seconds

A run is one `python ppo_vec.py`; its folder stays in runs/learning/, so a benchmark that was interrupted goes
on where it was: finished runs are not repeated, unfinished ones are resumed.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from cores import Cores, pin
from scipy.stats import trim_mean  # pip install -e ".[bench]"

import ppo_vec

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = {  # name: flags of ppo_vec.py beside --seed
    "default": "--num-envs 16 --cuda",
    "default-2m": "--num-envs 16 --cuda --total-timesteps 2000000",
    "lander": "--env-id LunarLanderContinuous-v3",
    "hardcore": "--env-id BipedalWalkerHardcore-v3",
    "lander-discrete": "--env-id LunarLander-v3",
    "cartpole": "--env-id CartPole-v1 --total-timesteps 100000",
    # The two systems of the README's last section.
    "notebook": "--env-id LunarLanderContinuous-v3 --activation relu --state-dependent-std --learning-rate 3e-4 "
    "--critic-learning-rate 1e-3 --value-lambda 1 --no-anneal-lr --num-steps 320 --num-minibatches 40 "
    "--update-epochs 10 --gamma 0.99 --gae-lambda 0.95 --ent-coef 0.001 --initial-std 1",
    "tutorial": "--actor-hidden-sizes 64 64 64 --critic-hidden-sizes 128 128 --activation relu --clip-vloss "
    "--initial-std 1 --learning-rate 3.5e-4",
    "sb3-zoo": "",  # benchmarks/sb3_zoo.py: Stable-Baselines3 with the hyperparameters of rl-baselines3-zoo
    # Ablations: the default without one ingredient.
    "no-action-cost": "--num-envs 16 --action-cost 0",
    "natural-price": "--num-envs 16 --fall-reward None --final-fall-reward None",
    "no-bounds-loss": "--num-envs 16 --bounds-loss-coef 0",
    "std-1": "--num-envs 16 --initial-std 1",
    "no-entropy-bonus": "--num-envs 16 --ent-coef 0",
}


@dataclass
class Options:
    setting: str = "default"
    """one of SETTINGS"""
    seeds: tuple[int, ...] = tuple(range(10))
    """training seeds"""
    jobs: int = max(1, ppo_vec.usable_cores())
    """runs at a time; with more than one, each has a core of its own (where the system can do that)"""
    flags: str = ""
    """more flags of ppo_vec.py; an equals sign is needed: '--flags=--action-cost 0'"""
    name: str | None = None
    """name of the results; default the setting's"""
    out: Path | None = None
    """where the results go; default benchmarks/results, but runs/learning if a run has failed, or for fewer seeds
    than the record there has"""


def train(options: Options, name: str, seed: int, cores: Cores) -> Path:
    """One run, new, resumed or already there. Returns its folder."""
    runs = ROOT / "runs" / "learning"
    folder = runs / f"{name}-{seed}"
    command = [sys.executable, str(ROOT / "ppo_vec.py")]
    if options.setting == "sb3-zoo":
        script = Path(__file__).with_name("sb3_zoo.py")
        command = [sys.executable, str(script), "--run-dir", str(folder), "--seed", str(seed)]
        command += shlex.split(options.flags)
    elif holds_run(folder):
        saved = ppo_vec.saved_args(ppo_vec.read_checkpoint(str(folder))[1])
        command += ["--resume", str(folder), *shlex.split(ppo_vec.code_flags(saved))]
    else:
        command += [*shlex.split(SETTINGS[options.setting]), *shlex.split(options.flags), "--seed", str(seed)]
        command += ["--runs-dir", str(runs), "--run-name", folder.name]
    runs.mkdir(parents=True, exist_ok=True)
    with cores.share() as mine, open(runs / f"{folder.name}.log", "a") as log:
        code = subprocess.run(
            command, stdout=log, stderr=log, cwd=ROOT, preexec_fn=functools.partial(pin, 0, mine)
        ).returncode
    row = result(folder)
    print(f"{folder.name}: exit code {code}, {row['text'] if row else 'no summary'}", flush=True)
    return folder


def holds_run(folder: Path) -> bool:
    """A kill between two renames can leave the previous checkpoint alone."""
    return any((folder / name).exists() for name in ("checkpoint.pt", "checkpoint.previous.pt"))


def refuse_another_run(options: Options, folder: Path, seed: int) -> None:
    """A folder of that name may hold a run of other settings, which must not stand in the table for these."""
    if options.setting == "sb3-zoo" or not holds_run(folder):
        return
    wanted, *_ = ppo_vec.parse_args(
        [*shlex.split(SETTINGS[options.setting]), *shlex.split(options.flags), "--seed", str(seed)]
    )
    try:
        found = ppo_vec.saved_args(ppo_vec.read_checkpoint(str(folder))[1])
        # These change no result, or are not saved.
        same = "cuda", "worker_timeout", "capture_video", *ppo_vec.NEVER_FROM_A_FILE
        found = dataclasses.replace(found, **{name: getattr(wanted, name) for name in same})
    except ppo_vec.UserError:
        found = None
    if found != wanted:
        sys.exit(f"learning.py: error: {folder} holds a run of other settings; move it away or choose another --name")


def result(folder: Path) -> dict | None:
    """The figures of one run, or None if it has left none."""
    if not (folder / "summary.json").exists():
        return None
    summary = json.loads((folder / "summary.json").read_text())
    falls = "" if summary["eval_frac_solved"] is None else f", {summary['eval_frac_solved']:.0%} solved"
    summary["text"] = f"{summary['eval_mean']:.1f} (min {summary['eval_min']:.0f}{falls})"
    return summary


def evaluations(folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps, seconds and mean returns of a run's periodic evaluations."""
    if (folder / "evaluations.json").exists():
        rows = json.loads((folder / "evaluations.json").read_text())
    elif holds_run(folder):
        rows = ppo_vec.read_checkpoint(str(folder))[1]["evaluations"]
    else:
        rows = []
    return tuple(np.array([row[key] for row in rows]) for key in ("global_step", "time_s", "mean"))


def interquartile_mean(values: np.ndarray, axis: int = 0) -> np.ndarray:
    return trim_mean(values, 0.25, axis=axis)


def bootstrap(table: np.ndarray) -> np.ndarray:
    """The 95 % interval of the interquartile mean over the first axis, the seeds: (2, ...)."""
    picks = np.random.default_rng(0).integers(len(table), size=(2000, len(table)))
    return np.percentile([interquartile_mean(table[pick]) for pick in picks], (2.5, 97.5), axis=0)


def commits(folders: list[Path]) -> str:
    """Those that the runs began or went on at."""
    infos = [json.loads((f / "args.json").read_text()) for f in folders if (f / "args.json").exists()]
    infos += [session for info in infos for session in info.get("earlier", ())]
    return ", ".join(sorted({str(info["git_commit"]) for info in infos})) or str(
        ppo_vec.describe_run(ppo_vec.Options())["git_commit"]
    )


def place(options: Options, name: str, finished: int) -> Path:
    """The folder of the results. A record is not replaced by one that says less."""
    if options.out is not None:
        return options.out
    results = ROOT / "benchmarks" / "results"
    before = len(ppo_vec.read_json(results / f"learning-{name}.json").get("runs", ()))
    return results if max(before, len(options.seeds)) == finished else ROOT / "runs" / "learning"


def draw(name: str, folders: list[Path], goal: float | None, path: Path) -> None:
    """Return against steps and against seconds: every seed, the interquartile mean and its bootstrap interval."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    curves = [evaluations(folder) for folder in folders]
    for axes, column, label in zip(figure.subplots(1, 2, sharey=True), (0, 1), ("environment steps", "seconds")):
        grid = np.linspace(0, max(curve[column][-1] for curve in curves), 100)
        table = np.array([np.interp(grid, curve[column], curve[2]) for curve in curves])
        for curve in curves:
            axes.plot(curve[column], curve[2], color="C0", lw=0.7, alpha=0.4)
        axes.plot(grid, interquartile_mean(table), color="C0", lw=2, label=f"interquartile mean of {len(curves)} seeds")
        axes.fill_between(grid, *bootstrap(table), color="C0", alpha=0.2, lw=0, label="95 % bootstrap interval")
        if goal is not None:
            axes.axhline(goal, color="0.4", lw=1, ls="--")
        axes.set(xlabel=label)
        axes.grid(alpha=0.3)
    figure.axes[0].set(ylabel="return, deterministic evaluation", title=name)
    figure.axes[0].legend(loc="lower right", fontsize="small")
    figure.savefig(path, dpi=110)


def main(options: Options) -> None:
    if options.setting not in SETTINGS:
        sys.exit(f"learning.py: error: --setting {options.setting} is not one of {', '.join(SETTINGS)}")
    name = options.name or options.setting
    if options.jobs > 1:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    for seed in options.seeds:
        refuse_another_run(options, ROOT / "runs" / "learning" / f"{name}-{seed}", seed)
    cores = Cores(options.jobs)
    with ThreadPoolExecutor(options.jobs) as pool:
        folders = list(pool.map(lambda seed: train(options, name, seed, cores), options.seeds))
    rows = [result(folder) for folder in folders]
    lines = [
        "| seed | last weights: mean (min) | delivered: mean (min, solved) | solved at step | after s | train s "
        "| evaluation steps |",
        "|---|---|---|---|---|---|---|",
    ]
    for seed, row in zip(options.seeds, rows):
        if row is None or not row["finished"]:
            lines.append(f"| {seed} | did not finish | | | | | |")
            continue
        after = "-" if row["solved_at_s"] is None else f"{row['solved_at_s']:.0f}"
        lines.append(
            f"| {seed} | {row['last_eval_mean']:.1f} ({row['last_eval_min']:.0f}) | {row['text']} | "
            f"{row['solved_at_step'] or '-'} | {after} | {row['train_time_s']:.0f} | "
            f"{row.get('evaluation_steps', '')} |"
        )
    finished = [row for row in rows if row is not None and row["finished"]]
    means = np.array([row["eval_mean"] for row in finished])
    solved = [row["solved_at_step"] or np.inf for row in finished]
    lines.append(f"\n{len(finished)} of {len(rows)} runs finished")
    if len(finished) == len(rows):  # figures of fewer would leave the failed out
        lines[-1] += f"; delivered mean: lowest {means.min():.1f}, mean {means.mean():.1f}"
    if len(finished) == len(rows) >= 5:
        lines[-1] += (
            f", median {np.median(means):.1f}, interquartile mean {interquartile_mean(means):.1f} (95 % bootstrap "
            f"interval {' to '.join(f'{bound:.1f}' for bound in bootstrap(means))}); median steps to a confirmed "
            f"solve: {np.median(solved):.0f}"
        )
    info = ppo_vec.describe_run(ppo_vec.Options())
    program = " ".join(["python ppo_vec.py", SETTINGS[options.setting], options.flags]).strip()
    if options.setting == "sb3-zoo":
        program = f"python benchmarks/sb3_zoo.py --run-dir DIR {options.flags}".strip()
    head = (
        f"# {name}: `{program} --seed SEED`\n\n"
        f"`{info['command']}`, commit {commits(folders)}, {time.strftime('%Y-%m-%d')}, {info['cpu']}, "
        f"{info['cores']} cores, {options.jobs} at a time, Python {platform.python_version()}, "
        f"torch {info['versions']['torch']}, gymnasium {info['versions']['gymnasium']}, numpy "
        f"{info['versions']['numpy']}. Deterministic, 100 test episodes on the published environment.\n"
    )
    text = "\n".join([head, *lines]) + "\n"
    out = place(options, name, len(finished))
    out.mkdir(parents=True, exist_ok=True)
    (out / f"learning-{name}.md").write_text(text)
    record = {"setting": name, "flags": SETTINGS[options.setting], "info": info, "runs": rows}
    (out / f"learning-{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    with open(out / f"learning-{name}.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("seed", "global_step", "time_s", "mean"))
        for seed, folder in zip(options.seeds, folders):
            writer.writerows((seed, *row) for row in zip(*evaluations(folder)))
    drawable = [f for f in folders if len(evaluations(f)[0])]
    if drawable:
        goal = ppo_vec.gym.spec(json.loads((drawable[0] / "summary.json").read_text())["env_id"]).reward_threshold
        draw(name, drawable, goal, out / f"learning-{name}.png")
    print(f"{text}\nThis is {out / f'learning-{name}.md'}")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
