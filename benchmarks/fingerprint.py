"""Fingerprints of short trainings: whether a change, another machine or another BLAS kernel gives other bits.

    python benchmarks/fingerprint.py                                        # this checkout
    python benchmarks/fingerprint.py --program OTHER/ppo_vec.py             # another one: the same lines?
    OPENBLAS_CORETYPE=Haswell python benchmarks/fingerprint.py              # the same lines on any machine with AVX2?

Each training runs twice: undisturbed, and killed once with `kill -9` and resumed. Both must end with the same bits;
their SHA-256 (of the weights and normalizers, and of the training episodes) is printed.

`parts` has those of a program's text: whether two versions do the same work. benchmarks/throughput.py records it.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
SHORT = "--total-timesteps 60000 --eval-episodes 2"
SETTINGS = {
    "default": "--num-envs 16",
    "hardcore": "--env-id BipedalWalkerHardcore-v3",
    "lander": "--env-id LunarLanderContinuous-v3",
    "notebook": "--env-id LunarLanderContinuous-v3 --activation relu --state-dependent-std --learning-rate 3e-4 "
    "--critic-learning-rate 1e-3 --value-lambda 1 --no-anneal-lr --num-steps 320 --num-minibatches 40 "
    "--update-epochs 10 --gamma 0.99 --gae-lambda 0.95 --ent-coef 0.001 --initial-std 1",
    "tutorial": "--actor-hidden-sizes 64 64 64 --critic-hidden-sizes 128 128 --activation relu --clip-vloss "
    "--initial-std 1 --learning-rate 3.5e-4",
}


def fingerprint(run: Path) -> str:
    """The SHA-256 of what a run has learned, and of the episodes that it has seen, 16 digits each."""
    agent = torch.load(run / "checkpoint.pt", weights_only=True)["agent"]
    weights, episodes = hashlib.sha256(), hashlib.sha256()
    agent = {name.replace("distribution.", "actor."): tensor for name, tensor in agent.items()}  # as in older files
    for name in sorted(agent):
        if name.startswith(("actor.", "critic.", "normalizer.")):
            weights.update(name.encode() + agent[name].contiguous().numpy().tobytes())
    for line in (run / "episodes.csv").read_text().splitlines()[1:]:
        step, _, *rest = line.split(",")  # without the time
        episodes.update(",".join((step, *rest)).encode())
    return f"{weights.hexdigest()[:16]} {episodes.hexdigest()[:16]}"


class WithoutHints(ast.NodeTransformer):
    """`x: int = 1` is as `x = 1`, and a bare `x: int` as nothing."""

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST | None:
        return ast.copy_location(ast.Assign([node.target], node.value), node) if node.value else None


def parts(source: str, names: Iterable[str]) -> dict[str, str]:
    """8 digits of a SHA-256 of each of these functions, classes (or Class.method) and constants, and of all they use.

    Comments, docstrings, messages (f-strings, and strings with a space) and type hints do not count.
    """
    tree, defined = WithoutHints().visit(ast.parse(source)), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node):
            node.body = node.body[1:] or [ast.Pass()]
        if isinstance(node, ast.FunctionDef):
            node.returns = None
        elif isinstance(node, ast.arg):
            node.annotation = None
        elif isinstance(node, ast.JoinedStr):
            node.values = []
        elif isinstance(node, ast.Constant) and " " in str(node.value):
            node.value = ""
    for node in tree.body:
        targets = getattr(node, "targets", ())
        found = [name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]
        defined |= dict.fromkeys([node.name] if hasattr(node, "name") else found, node)
        if isinstance(node, ast.ClassDef):
            defined |= {f"{node.name}.{method.name}": method for method in node.body if hasattr(method, "name")}
    todo = list(names)
    for name in todo:
        found = [other for other in ast.walk(defined[name]) if isinstance(other, ast.Name)]
        own = {other.id for other in found if isinstance(other.ctx, ast.Store)}
        todo += sorted(({other.id for other in found} & defined.keys()) - own - set(todo))
    return {name: hashlib.sha256(ast.unparse(defined[name]).encode()).hexdigest()[:8] for name in sorted(todo)}


def train(program: Path, run: Path, flags: list[str], kill_after: float | None) -> float | None:
    """One training, killed that many seconds after its first checkpoint, and resumed.

    Returns the seconds from the first checkpoint to its end, or None if it ended before it could be killed.
    """
    command = [sys.executable, str(program)]
    where = ["--runs-dir", str(run.parent), "--run-name", run.name]
    with open(run.with_suffix(".log"), "a") as log:
        process = subprocess.Popen([*command, *flags, *where], stdout=log, stderr=log)
        while not (run / "checkpoint.pt").exists() and process.poll() is None:
            time.sleep(0.01)
        started = time.monotonic()
        if kill_after is not None:
            time.sleep(kill_after)
            process.send_signal(signal.SIGKILL)
            if process.wait() == 0:
                return None
            process = subprocess.Popen([*command, "--resume", str(run)], stdout=log, stderr=log)
        if process.wait() != 0:
            sys.exit(f"fingerprint.py: error: {run.name} failed:\n{run.with_suffix('.log').read_text()[-2000:]}")
    return time.monotonic() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", type=Path, default=ROOT / "ppo_vec.py", help="the trainer")
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--flags", default="", help="more flags of the trainer: '--flags=--seed 2'")
    options = parser.parse_args()
    for name in options.settings:
        flags = shlex.split(f"{SETTINGS[name]} {SHORT} {options.flags}")
        with tempfile.TemporaryDirectory() as folder:
            runs = Path(folder)
            kill_after = 0.4 * train(options.program, runs / "whole", flags, None)
            while train(options.program, runs / "killed", flags, kill_after) is None:
                shutil.rmtree(runs / "killed")
                kill_after /= 2
            whole, killed = fingerprint(runs / "whole"), fingerprint(runs / "killed")
        print(
            f"{name:10}{whole}" + ("" if whole == killed else f"  differs when killed and resumed: {killed}"),
            flush=True,
        )
        if whole != killed:
            sys.exit(1)


if __name__ == "__main__":
    main()
