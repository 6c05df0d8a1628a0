"""Searches hyperparameters of ppo_vec.py with Optuna (pip install -e ".[sweep]").

    python benchmarks/sweep.py --name walker --trials 40 --seeds 1 2 --flags="--total-timesteps 300000" \\
        --space learning_rate=log:1e-4:1e-3 gae_lambda=0.8:0.98 num_minibatches=4,8,16 "actor_hidden_sizes=64 64,128"

A range is LOW:HIGH or log:LOW:HIGH, anything else is a list of values. Every run is a `python ppo_vec.py` of its own.
The study, the runs and their logs are in runs/sweep/NAME/. The same command goes on after an interruption, and with
more --trials it adds to the study.

The value of a trial is the mean return of its last weights in the run's last evaluation, averaged over the seeds. That
has no noise in its actions, as training has, and its episodes are not those of the final test, which must choose
nothing. A trial whose periodic evaluations stay below the median of the others is stopped early (pruned).
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import optuna
import tyro
from cores import Cores, pin
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import Trial, TrialState

import ppo_vec
from ppo_vec import UserError

PROGRAM = Path(ppo_vec.__file__)
TYPES = {field.name: str(field.type) for field in dataclasses.fields(ppo_vec.Options)}
OURS = "seed", "runs_dir", "run_name", "resume", "evaluate"  # flags that the sweep itself sets, or cannot use
POLL = 1.0  # seconds between two looks at a run


@dataclass
class Options:
    space: tuple[str, ...]
    """what to search: NAME=LOW:HIGH, NAME=log:LOW:HIGH or NAME=VALUE,VALUE,..."""
    name: str = "sweep"
    """the study's name"""
    trials: int = 20
    """trials of the study in all, those of earlier calls included (but not those that failed)"""
    jobs: int = max(1, ppo_vec.usable_cores())
    """trials at a time; with more than one, each has a core of its own (where the system can do that)"""
    seeds: tuple[int, ...] = (1,)
    """training seeds of each trial"""
    flags: str = ""
    """flags of ppo_vec.py for all trials; an equals sign is needed: '--flags=--env-id CartPole-v1'"""
    prune: bool = True
    """stop trials early that are worse than the median of the others"""
    runs_dir: Path = PROGRAM.parent / "runs" / "sweep"
    """the folder of the studies"""


# ---- The space -------------------------------------------------------------------------------------------------------


def parse_entry(text: str) -> tuple[str, BaseDistribution]:
    """'learning_rate=log:1e-4:1e-3' -> name and distribution. Raises UserError."""
    name, equals, values = text.partition("=")
    name = name.strip("- ").replace("-", "_")
    if not equals or name not in TYPES:
        close = difflib.get_close_matches(name, TYPES, 1)
        raise UserError(f"{name!r} is no argument of ppo_vec.py{f'; do you mean {close[0]}?' if close else ''}")
    if name in (*OURS, "total_timesteps"):
        raise UserError(f"{name} cannot be searched")
    number = {"int": int, "flo": float}.get(TYPES[name][:3])
    if number and ":" in values:
        with ppo_vec.refuse("a range is LOW:HIGH or log:LOW:HIGH"):
            *log, low, high = values.split(":")
            low, high = (number(float(bound)) for bound in (low, high))
            if log not in ([], ["log"]) or not low < high or (log and low <= 0):
                raise ValueError("LOW must be less than HIGH, and greater than 0 with log")
        return name, (IntDistribution if number is int else FloatDistribution)(low, high, log=bool(log))
    choices = [choice.strip() for choice in values.split(",")]
    if len(set(choices)) < max(2, len(choices)) or "" in choices:
        raise UserError("a list has two different values or more, with commas between them")
    if TYPES[name] == "bool" and {*choices} != {"True", "False"}:
        raise UserError("its values are True,False")
    return name, CategoricalDistribution(choices)


def words(params: dict[str, Any]) -> list[str]:
    """The values of a trial as flags of ppo_vec.py."""
    found = []
    for name, value in params.items():
        flag = ppo_vec.flag(name)
        if TYPES[name] == "bool":
            found.append(flag if value == "True" else flag.replace("--", "--no-", 1))
        elif TYPES[name].startswith("tuple"):
            found += [flag, *value.split()]
        else:
            found.append(f"{flag}={value}")
    return found


def parse_flags(flags: list[str]) -> ppo_vec.Options:
    """As ppo_vec.py would read them. Raises UserError; tyro alone would print a box and exit."""
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box), contextlib.redirect_stdout(box):
            return ppo_vec.parse_args(flags)[0]
    except SystemExit as error:
        text = re.findall(r"^│ (.*?) *│$", box.getvalue(), re.M) or ["it has no --help here"]
        raise UserError(text[0]) from error


def parse_space(options: Options) -> tuple[dict[str, BaseDistribution], int]:
    """The space, and --total-timesteps. Tries the ends of each range and all values of each list. Raises UserError."""
    flags, space = shlex.split(options.flags), {}
    given = [word.split("=")[0].strip("-").replace("-", "_") for word in flags if word.startswith("--")]
    for text in options.space:
        with ppo_vec.refuse(f"--space {text}"):
            name, distribution = parse_entry(text)
            if name in space or name in given:
                raise UserError(f"{name} is given twice")
            space[name] = distribution
    if taken := [name for name in given if name in OURS]:
        raise UserError(f"--flags: {ppo_vec.flag(taken[0])} cannot be used in a sweep")
    with ppo_vec.refuse("--flags"):
        args = parse_flags(flags)
    ends = {k: getattr(d, "choices", None) or (d.low, d.high) for k, d in space.items()}
    first = {name: values[0] for name, values in ends.items()}
    for name, values in ends.items():
        for value in values:
            with ppo_vec.refuse(f"--space {name}, value {value}"):
                parse_flags([*flags, *words({**first, name: value})])
    for holds, message in (
        (options.space, "--space is empty"),
        (min(options.trials, options.jobs) >= 1, "--trials and --jobs must be at least 1"),
        (options.seeds and len(set(options.seeds)) == len(options.seeds), "--seeds must be different numbers"),
        (min(options.seeds, default=0) >= 0, "--seeds must not be negative"),
        (Path(options.name).name == options.name != "..", "--name must be a plain folder name"),
    ):
        if not holds:
            raise UserError(message)
    ppo_vec.make_task(args)  # whether there is such an environment
    return space, args.total_timesteps


# ---- Trials ----------------------------------------------------------------------------------------------------------


def last_evaluation(run: Path) -> float:
    """The mean return of a finished run's last weights, on the episodes that choose a policy."""
    return ppo_vec.read_checkpoint(run)[1]["evaluations"][-1]["mean"]


class Stopped(Exception):
    """By a signal. The trial stays unfinished in the study; the next call begins it anew."""


class Sweep:
    def __init__(self, options: Options) -> None:
        self.options, self.stopping = options, threading.Event()
        self.space, self.total_timesteps = parse_space(options)
        self.folder = options.runs_dir.absolute() / options.name
        self.cores = Cores(options.jobs)

    def open_study(self) -> None:
        """Makes or loads the study. Raises UserError if there is one for something else."""
        database = self.folder / "study.db"
        if not database.exists() and any(self.folder.glob("trial-*")):
            raise UserError(f"{self.folder} holds runs without their study; move it away or choose another --name")
        with ppo_vec.refuse(f"cannot open {database}"):
            self.study = optuna.create_study(
                storage=f"sqlite:///{database}", study_name="sweep", load_if_exists=True, direction="maximize",
                pruner=optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=5),
            )  # fmt: skip
        setting = {"space": sorted(self.options.space), "flags": self.options.flags, "seeds": list(self.options.seeds)}
        found = self.study.user_attrs.get("setting", setting)
        if different := [name for name in setting if found[name] != setting[name]]:
            name = different[0]
            raise UserError(f"{self.folder} was begun with --{name} {found[name]}; choose another --name")
        self.study.set_user_attr("setting", setting)
        # With the same seed again, it would begin with the same values again.
        self.study.sampler = optuna.samplers.TPESampler(seed=len(self.study.trials))
        for trial in self.study.get_trials(states=[TrialState.RUNNING]):  # the last call was interrupted
            self.study.tell(trial.number, state=TrialState.FAIL)
            self.study.enqueue_trial(trial.params)

    def finished(self) -> list[optuna.trial.FrozenTrial]:
        return self.study.get_trials(states=[TrialState.COMPLETE, TrialState.PRUNED])

    def one_trial(self, _: int) -> None:
        """Asks the study for values, trains with them, and tells it what came of it."""
        if self.stopping.is_set():
            return None
        trial = self.study.ask(self.space)
        text = f"trial {trial.number} ({shlex.join(words(trial.params))})"
        value = None
        try:
            with self.cores.share() as cores:
                value = statistics.fmean(self.train(trial, i, cores) for i in range(len(self.options.seeds)))
            state, result = TrialState.COMPLETE, f"{value:.1f}"
        except optuna.TrialPruned as error:
            state, result = TrialState.PRUNED, f"pruned, {error}"
        except (UserError, OSError) as error:
            state, result = TrialState.FAIL, f"failed, {error}"
        except Stopped:
            return print(f"{text}: stopped", flush=True)
        self.study.tell(trial, value, state)
        return print(f"{text}: {result}", flush=True)

    def train(self, trial: Trial, index: int, cores: list[int]) -> float:
        """One run of a trial. Raises TrialPruned, Stopped, or UserError if the run fails."""
        seed, told = self.options.seeds[index], -1
        run = self.folder / f"trial-{trial.number}-seed-{seed}"  # a trial's number is its own
        command = [sys.executable, str(PROGRAM), *shlex.split(self.options.flags), *words(trial.params)]
        command += [f"--seed={seed}", f"--runs-dir={self.folder}", f"--run-name={run.name}"]
        log = run.with_name(f"{run.name}.log")
        with open(log, "w") as file:  # a session of its own: Ctrl-C stops the sweep, and that stops its runs
            process = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
        try:
            pin(process.pid, cores)
            while process.poll() is None:
                time.sleep(POLL)
                if self.stopping.is_set():
                    raise Stopped
                summary = ppo_vec.read_json(run / "summary.json")
                step = 20 * summary.get("global_step", 0) // self.total_timesteps  # at most 20 evaluations a run
                if step <= told or summary.get("finished", True):  # a finished run's summary holds the test
                    continue
                told = step
                trial.report(summary["last_eval_mean"], 20 * index + step)
                if self.options.prune and trial.should_prune():
                    raise optuna.TrialPruned(f"{summary['last_eval_mean']:.1f} at step {summary['global_step']}")
        finally:
            process.terminate()  # if it has not ended: it saves, and ends within seconds
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(60)
            process.kill()
        if process.returncode:
            last = log.read_text(errors="replace").splitlines()[-1:] or ["no message"]
            raise UserError(f"exit code {process.returncode}: {last[0]} (see {log})")
        return last_evaluation(run)

    def run(self) -> None:
        """All trials that are missing."""
        if self.options.jobs > 1:
            os.environ.setdefault("OMP_NUM_THREADS", "1")
        with ThreadPoolExecutor(self.options.jobs) as pool:
            list(pool.map(self.one_trial, range(self.options.trials - len(self.finished()))))


# ---- Results ---------------------------------------------------------------------------------------------------------


def draw_importances(study: optuna.Study, path: Path) -> None:
    """How much each argument decides whether a trial is among the best (PED-ANOVA, arXiv:2304.10255)."""
    from matplotlib.figure import Figure  # no pyplot: no display needed

    evaluator = optuna.importance.PedAnovaImportanceEvaluator()  # fANOVA would need scikit-learn
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # all trials are alike; the picture shows it
        shares = optuna.importance.get_param_importances(study, evaluator=evaluator)
    trials = len(study.get_trials(states=[TrialState.COMPLETE]))
    figure = Figure(figsize=(7, 1 + 0.5 * len(shares)), layout="constrained")
    axes = figure.subplots()
    axes.barh(list(shares), list(shares.values()))
    axes.invert_yaxis()
    axes.set(xlabel="share of importance (PED-ANOVA)", title=f"{trials} complete trials")
    figure.savefig(path, dpi=110)


def report(sweep: Sweep) -> None:
    """Prints the five best trials and the best one's command; draws importance.png."""
    study, names = sweep.study, list(sweep.space)
    complete = sorted(study.get_trials(states=[TrialState.COMPLETE]), key=lambda trial: -trial.value)
    if not complete:
        return
    print("\n| trial | value | " + " | ".join(names) + " |\n" + "|---" * (2 + len(names)) + "|")
    for trial in complete[:5]:
        values = (f"{v:.4g}" if isinstance(v, float) else str(v) for v in (trial.params[name] for name in names))
        print(f"| {trial.number} | {trial.value:.1f} | " + " | ".join(values) + " |")
    best = shlex.join(["python", "ppo_vec.py", *shlex.split(sweep.options.flags), *words(complete[0].params)])
    print(f"\n{len(complete)} trials are complete, {len(sweep.finished()) - len(complete)} pruned. The best one:\n")
    print(f"    {best}\n\nThe best of many was also lucky: test it with seeds that the sweep has not used.")
    if len(complete) > 1:
        draw_importances(study, sweep.folder / "importance.png")
        print(f"Which arguments matter: {sweep.folder / 'importance.png'}")


def main(options: Options) -> int:
    """Returns the exit code: 0, 1 no trial is complete, 2 bad input, 130 stopped."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        sweep = Sweep(options)
        with ppo_vec.refuse(f"cannot use {sweep.folder}; does another sweep run there?"):
            sweep.folder.mkdir(parents=True, exist_ok=True)
            lock = filelock.FileLock(sweep.folder / "study.lock").acquire(timeout=0)
        with lock:
            sweep.open_study()
            signals = signal.SIGINT, signal.SIGTERM
            before = [signal.signal(number, lambda *_: sweep.stopping.set()) for number in signals]
            try:
                sweep.run()
            finally:
                for number, handler in zip(signals, before):
                    signal.signal(number, handler)
            report(sweep)
    except UserError as error:
        print(f"sweep.py: error: {error}", file=sys.stderr)
        return 2
    if sweep.stopping.is_set():
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    return 0 if sweep.study.get_trials(states=[TrialState.COMPLETE]) else 1


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, description=__doc__)))
