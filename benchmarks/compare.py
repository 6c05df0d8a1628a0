"""Compares any runs of ppo_vec.py: their learning curves in one picture, their results in one Markdown table.

    python benchmarks/compare.py runs/BipedalWalker*                  # writes compare.png, prints the table
    python benchmarks/compare.py runs/learning/default-* --iqm        # the interquartile mean in place of the mean
    python benchmarks/compare.py runs/a runs/b --no-group             # one curve and one row for each run

Runs that differ only in their seed make one group. Its curve is the mean over its runs, and the band is the 95 %
bootstrap interval of that mean. With fewer than five runs such an interval is too narrow.
"""

from __future__ import annotations

import contextlib
import glob
import json
import re
import sys
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn

import gymnasium as gym
import numpy as np
import tyro

# Names, places and extras of a run: two runs may differ in them and still be one group.
NO_SETTINGS = "seed", "runs_dir", "run_name", "resume", "evaluate", "capture_video", "track"
FIGURES = "global_step", "sps", "eval_mean", "last_eval_mean", "solved_at_step", "solved_at_s"  # of summary.json
HINTS = {
    "args.json": "this is no run folder, leave it out",
    "summary.json": "a run writes it at its first evaluation: wait for that, or leave the run out",
    "episodes.csv": "without it there is no curve, leave the run out",
}
HEAD = (
    "group", "runs", "seeds", "steps", "delivered: test mean", "last weights: test mean", "solved",
    "at step (median)", "after s (median)", "steps/s",
)  # fmt: skip


@dataclass
class Options:
    runs: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="RUN...")]
    """run folders, or globs of such"""
    out: Path = Path("compare.png")
    """the picture"""
    group: bool = True
    """take runs that differ only in the seed as one group"""
    ignore: tuple[str, ...] = ()
    """arguments in which the runs of a group may differ, too, such as num_workers or `commit`"""
    iqm: bool = False
    """the interquartile mean: without the best and the worst quarter of the runs"""


@dataclass
class Run:
    folder: Path
    settings: dict[str, Any]  # the arguments that count for a group, and the commit
    summary: dict[str, Any]
    steps: np.ndarray  # of the curve
    returns: np.ndarray


def fail(message: str) -> NoReturn:
    print(f"compare.py: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def find_folders(patterns: tuple[str, ...]) -> list[Path]:
    """Each folder once, in the order of the command line.

    Files are left out, as learning.py has logs beside its runs, and so is what --evaluate has made for one of them.
    """
    folders = {}
    for pattern in patterns:
        found = [pattern] if Path(pattern).exists() else sorted(glob.glob(pattern))
        if not found:
            fail(f"there is no run folder {pattern}; `ls runs` shows yours")
        paths = (path for path in map(Path, found) if path.is_dir() and "__evaluation__" not in path.name)
        folders |= {path.resolve(): path for path in paths}
    return list(folders.values()) or fail("no run folder is given; try: python benchmarks/compare.py runs/NAME")


def read_run(folder: Path, ignore: tuple[str, ...]) -> Run:
    """A run folder. One that cannot be read ends the program with one line."""
    name = "args.json"
    try:
        info = json.loads((folder / name).read_text())
        commit = re.sub("[0-9a-f]{40}", lambda sha: sha[0][:8], str(info["git_commit"]))
        more = {"commit": commit, "processes": info.get("processes", 1)}
        settings = {k: v for k, v in {**info["args"], **more}.items() if k not in {*NO_SETTINGS, *ignore}}
        name = "summary.json"
        found = json.loads((folder / name).read_text())
        figures = {k: np.inf if found[k] is None and k.startswith("solved") else float(found[k]) for k in FIGURES}
        summary = {**{k: found[k] for k in ("env_id", "seed", "finished")}, **figures}
        summary["has_goal"] = found.get("eval_frac_solved", 0.0) is not None  # an old run may not say it
        name = "episodes.csv"
        text = (folder / name).read_text()
        lines = text[: text.rfind("\n") + 1].splitlines()[1:]  # a run that goes on may have written half a line
        if not lines:
            raise ValueError("no episode has ended yet")
        steps, _, returns = np.array([line.split(",")[:3] for line in lines], float).T
    except OSError as error:
        fail(f"{folder / name}: {error.strerror}; {HINTS[name]}")
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        what = f"has no {error}" if isinstance(error, KeyError) else f"cannot be used: {error}"
        fail(f"{folder / name} {what}; leave the run out, or train it again")
    window = max(1, min(100, len(returns) // 10))  # as in learning_curve.png
    smoothed = np.lib.stride_tricks.sliding_window_view(returns, window).mean(1)
    return Run(folder, settings, summary, steps[window - 1 :], smoothed)


def average(table: np.ndarray, iqm: bool, axis: int = 0) -> np.ndarray:
    """The mean over the runs, or their interquartile mean."""
    cut = table.shape[axis] // 4 if iqm else 0
    return np.sort(table, axis).take(range(cut, table.shape[axis] - cut), axis).mean(axis)


def bootstrap(table: np.ndarray, iqm: bool) -> np.ndarray:
    """The 95 % interval of the average over the first axis, the runs: (2, ...)."""
    picks = np.random.default_rng(0).integers(len(table), size=(2000, len(table)))
    return np.percentile(average(table[picks], iqm, axis=1), (2.5, 97.5), axis=0)


def differences(groups: list[list[Run]]) -> dict[str, list[str]]:
    """The arguments that are not the same in all groups: name -> the value of each group."""
    names = dict.fromkeys(name for runs in groups for name in runs[0].settings)
    values = {name: [str(runs[0].settings.get(name, "absent")) for runs in groups] for name in names}
    return {name: texts for name, texts in values.items() if len(set(texts)) > 1}


def title(runs: list[Run]) -> str:
    return runs[0].folder.name + (f" and {len(runs) - 1} more" if len(runs) > 1 else "")


def row(runs: list[Run], iqm: bool) -> tuple[Any, ...]:
    """A group's cells under HEAD."""
    column = {name: np.array([run.summary[name] for run in runs]) for name in (*FIGURES, "finished")}

    def mean(name: str) -> str:
        if not column["finished"].all():  # a run has its test at its end, and a mean of the others would flatter
            return f"{column['finished'].sum()} of {len(runs)} finished"
        low, high = bootstrap(column[name], iqm)
        return f"{average(column[name], iqm):.1f}" + (f" ({low:.1f} to {high:.1f})" if len(runs) > 1 else "")

    def median(name: str) -> str:  # a run that has not solved the task counts as one that takes forever
        value = np.median(column[name])
        return f"{value:.0f}" if np.isfinite(value) else "-"

    has_goal = any(run.summary["has_goal"] for run in runs)
    steps = sorted({f"{step:.0f}" for step in column["global_step"]}, key=int)
    return (
        title(runs), len(runs), " ".join(str(seed) for seed in sorted({run.summary["seed"] for run in runs})),
        " to ".join(dict.fromkeys((steps[0], steps[-1]))), mean("eval_mean"), mean("last_eval_mean"),
        f"{np.isfinite(column['solved_at_step']).sum()} of {len(runs)}" if has_goal else "-", median("solved_at_step"),
        median("solved_at_s"), f"{column['sps'].mean():.0f}",
    )  # fmt: skip


def markdown(*rows: Iterable[Any]) -> str:
    """A table; its first row is the head."""
    lines = ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |" for cells in rows]
    return "\n".join([lines[0], "|---" * len(list(rows[0])) + "|", *lines[1:]])


def draw(groups: list[list[Run]], different: dict[str, list[str]], options: Options) -> None:
    """Training return against steps: every run, and each group's average with its interval."""
    from matplotlib.figure import Figure  # no pyplot: no display needed

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    for i, runs in enumerate(groups):
        start, end = max(run.steps[0] for run in runs), min(run.steps[-1] for run in runs)  # where all have a value
        grid = np.linspace(start, max(start, end), 200)
        table = np.array([np.interp(grid, run.steps, run.returns) for run in runs])
        values = "".join(f", {name}={texts[i]}" for name, texts in different.items())
        label = textwrap.shorten(title(runs) + values, 80, placeholder=" ...")
        axes.plot(grid, average(table, options.iqm), color=f"C{i}", lw=2, label=label)
        if len(runs) > 1:
            axes.fill_between(grid, *bootstrap(table, options.iqm), color=f"C{i}", alpha=0.2, lw=0)
            for run in runs:
                axes.plot(run.steps, run.returns, color=f"C{i}", lw=0.6, alpha=0.35)
    env_ids = {str(run.summary["env_id"]) for runs in groups for run in runs}
    if len(env_ids) == 1 and ":" not in min(env_ids):  # "module:Env-v0" would import code that a run folder names
        with contextlib.suppress(gym.error.Error):  # an environment that is not installed here
            if (goal := gym.spec(*env_ids).reward_threshold) is not None:
                axes.axhline(goal, color="0.4", lw=1, ls="--", label=f"goal {goal:g}")
    axes.set(xlabel="environment steps", ylabel="training return, smoothed", title=", ".join(sorted(env_ids)))
    axes.legend(loc="lower right", fontsize="small")
    axes.grid(alpha=0.3)
    try:
        figure.savefig(options.out, dpi=110)
    except (OSError, ValueError) as error:  # ValueError: a kind of picture that matplotlib does not know
        fail(f"cannot write --out {options.out}: {error}")


def main(options: Options) -> None:
    by_settings: dict[Any, list[Run]] = {}
    for run in [read_run(folder, options.ignore) for folder in find_folders(options.runs)]:
        key = json.dumps(run.settings, sort_keys=True) if options.group else run.folder
        by_settings.setdefault(key, []).append(run)
    groups = list(by_settings.values())
    different = differences(groups)
    draw(groups, different, options)
    print(markdown(HEAD, *(row(runs, options.iqm) for runs in groups)))
    if different:
        print()
        print(markdown(["argument", *map(title, groups)], *([name, *texts] for name, texts in different.items())))
    what = "interquartile mean" if options.iqm else "mean"
    print(f"\nTest means: {what} of the runs (in brackets its 95 % bootstrap interval). Picture: {options.out}")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
