"""The reference policy of BipedalWalkerHardcore-v3: what `learning.py --setting hardcore` has at 10M steps, continued.

python benchmarks/hardcore.py [RUN FOLDER]

Its last 4M steps take four times as much data for an update; discount and price of a fall stay where they were. What
a run is resumed with cannot change these, so they are written into a copy of its checkpoint (default folder:
runs/hardcore). Called again, it goes on where it was. One and a half hours on one core of the reference's machine.
"""

from __future__ import annotations

import sys
from pathlib import Path

import ppo_vec

START = Path(__file__).parent / "results" / "hardcore-10M" / "checkpoint.pt"
CHANGED = {"num_steps": 512, "gamma": 0.998, "final_gamma": None, "fall_reward": -20.0, "final_fall_reward": None}


def main(folder: Path) -> int:
    checkpoint = folder / "checkpoint.pt"
    if not checkpoint.exists():
        tree = ppo_vec.decode(START.read_bytes())
        tree["args"].update(CHANGED)
        folder.mkdir(parents=True, exist_ok=True)
        ppo_vec.write_file(checkpoint, ppo_vec.encode(tree))
    return ppo_vec.main(["--resume", str(folder), "--total-timesteps", "14000000"])


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/hardcore")))
