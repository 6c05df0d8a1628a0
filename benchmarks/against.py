"""Is this ppo_vec.py as fast as another one? Short trainings in turns (A B B A ...), on a quiet machine.

    git clone . ../old && git -C ../old checkout 680bfdd && python benchmarks/against.py --program ../old/ppo_vec.py

Prints, and writes to benchmarks/results/against.md, the median seconds of one rollout and of one update, with minimum
and maximum over the turns, and the ratio to the other program.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ppo_vec

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = {
    "default": "--num-envs 16 --total-timesteps 60000",
    "hardcore": "--env-id BipedalWalkerHardcore-v3 --total-timesteps 90000",
}
TAGS = {"rollout": "time/rollout_s", "update": "time/update_s"}


def measure(program: Path, flags: list[str], folder: str) -> dict[str, float]:
    """The median seconds of a rollout and of an update in one training, without its first iterations."""
    where = ["--runs-dir", folder, "--run-name", "run", "--eval-episodes", "1"]
    done = subprocess.run([sys.executable, str(program), *flags, *where], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"against.py: error: {program} failed:\n{done.stderr[-2000:]}")
    events = EventAccumulator(f"{folder}/run").Reload()
    scalars = {name: [event.value for event in events.Scalars(tag)][2:] for name, tag in TAGS.items()}
    both = [sum(pair) for pair in zip(*scalars.values())]
    return {name: statistics.median(values) for name, values in {**scalars, "both": both}.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", type=Path, required=True, help="the other trainer")
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--turns", type=int, default=6, help="trainings of each")
    options = parser.parse_args()
    programs, lines = {"here": ROOT / "ppo_vec.py", "other": options.program.resolve()}, []
    commits = {
        name: subprocess.run(
            ["git", "-C", str(path.parent), "describe", "--always", "--dirty"], capture_output=True, text=True
        ).stdout.strip()
        for name, path in programs.items()
    }
    for setting in options.settings:
        turns: dict[str, list[dict[str, float]]] = {name: [] for name in programs}
        for turn in range(options.turns):
            for name in list(programs)[:: 1 if turn % 2 else -1]:
                with tempfile.TemporaryDirectory() as folder:
                    turns[name].append(measure(programs[name], SETTINGS[setting].split(), folder))
        for what in ("rollout", "update", "both"):
            cells = {name: sorted(turn[what] for turn in turns[name]) for name in programs}
            texts = [f"{statistics.median(v):.4f} ({v[0]:.4f} to {v[-1]:.4f})" for v in cells.values()]
            ratio = statistics.median(cells["here"]) / statistics.median(cells["other"])
            lines.append(f"| {setting}, {what} | {' | '.join(texts)} | {ratio:.3f} |")
            print(lines[-1], flush=True)
    info = ppo_vec.describe_run(ppo_vec.Options())
    text = f"""# Seconds of one iteration, beside another version

`{info["command"]}`, {time.strftime("%Y-%m-%d")}, {info["cpu"]}, {info["cores"]} cores, torch
{info["versions"]["torch"]}, numpy {info["versions"]["numpy"]}; {options.turns} turns, medians (minimum to maximum).

| | {commits["here"]} | {commits["other"]} | ratio |
|---|---|---|---|
"""
    (ROOT / "benchmarks" / "results" / "against.md").write_text(text + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
