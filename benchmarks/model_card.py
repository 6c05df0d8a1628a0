"""Makes a run folder ready for the Hugging Face Hub: writes its model card, RUN/README.md, and says how to upload it.

    python benchmarks/model_card.py runs/NAME --repo USER/NAME

It uploads nothing. A card that it has written is written anew; any other README.md is left as it is.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import tyro

import ppo_vec
from ppo_vec import UserError

MARKER = "<!-- Written by benchmarks/model_card.py, which writes it anew. To keep your changes, delete this line. -->"
FILES = "args.json", "summary.json"
ROWS = (  # of the card's table: what it is, the figure without which there is no such row, how it reads
    (
        "return over {eval_episodes} unseen episodes",
        "eval_mean",
        "{eval_mean:.1f} ± {eval_std:.1f} (min {eval_min:.1f})",
    ),
    ("of these, solved", "eval_frac_solved", "{eval_frac_solved:.0%}"),
    ("return of the last weights", "last_eval_mean", "{last_eval_mean:.1f} ± {last_eval_std:.1f}"),
    ("training", "global_step", "{global_step} steps, {train_time_s:.0f} s"),
    ("solved after", "solved_at_step", "{solved_at_step} steps, {solved_at_s:.0f} s"),
)
CARD = """---
library_name: ppo_vec
pipeline_tag: reinforcement-learning
tags: [reinforcement-learning, deep-reinforcement-learning, ppo, gymnasium, {quoted}]
model-index:
- name: {model}
  results:
  - task: {{type: reinforcement-learning, name: reinforcement-learning}}
    dataset: {{type: {quoted}, name: {quoted}}}
    metrics:
    - {{type: mean_reward, name: mean_reward, value: {eval_mean:.2f} +/- {eval_std:.2f}, verified: false}}
---
{marker}

# PPO on {env_id}

A policy for `{env_id}`{how}, trained with ppo_vec, PPO in one file. Its actions are deterministic.

| | |
|---|---|
{rows}

{pictures}

## Use

    hf download {repo} --local-dir {name}
    python ppo_vec.py --evaluate {name}{code}

The second line repeats the test. In Python:

```python
from ppo_vec import load_policy

act = load_policy("{name}")  # the folder, not the Hub's cache: load_policy follows no links
action = act(obs)  # raw observations ({obs_dim},) or (n, {obs_dim}) -> actions ready for env.step()
```

## Training

```
{commands}
```

{versions}; commit {git_commit}; {cpu}, {cores} cores. `args.json` has every argument.
"""


@dataclass
class Options:
    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """the folder of a finished run"""
    repo: str | None = None
    """where you will upload it: USER/NAME"""


def card(folder: Path, repo: str, obs_dim: int, info: dict[str, Any], result: dict[str, Any]) -> str:
    """The text. Raises LookupError, TypeError or ValueError where args.json or summary.json lacks something."""
    args, env_id = dict(info["args"]), result["env_id"]
    rows = [f"| {name} | {text} |".format(**result) for name, figure, text in ROWS if result[figure] is not None]
    kinds = ("env_kwargs", "{}"), ("wrappers", [])
    how = "".join(f", {name} `{args[name]}`" for name, default in kinds if args.get(name, default) != default)
    found = [folder / "learning_curve.png", *sorted(folder.glob("videos/*.gif")), *sorted(folder.glob("videos/*.mp4"))]
    links = [(path.name, quote(path.relative_to(folder).as_posix())) for path in found if path.is_file()]
    return CARD.format(
        **result,
        **{name: info[name] for name in ("git_commit", "cpu", "cores")},
        quoted=json.dumps(env_id),  # a JSON string is a YAML string, whatever is in it
        model=json.dumps(f"PPO-{env_id}"),
        code=ppo_vec.code_flags(ppo_vec.Options(env_id=env_id, wrappers=tuple(args.get("wrappers", ())))),
        marker=MARKER, how=how, repo=repo, name=repo.split("/")[1], obs_dim=obs_dim, rows="\n".join(rows),
        pictures="\n\n".join("!" * (not link.endswith(".mp4")) + f"[{name}]({link})" for name, link in links),
        commands="\n".join(session["command"] for session in [*info.get("earlier", []), info]),
        versions=", ".join(f"{name} {version}" for name, version in dict(info["versions"]).items()),
    )  # fmt: skip


def write_card(folder: Path, repo: str) -> None:
    """Raises UserError, or TrainingError where the disk is full."""
    readme = folder / "README.md"
    if not folder.is_dir():
        raise UserError(f"there is no run folder {folder}; `ls runs` shows yours")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise UserError(f"--repo must be USER/NAME, not {repo}")
    ours = readme.is_file() and not ppo_vec.is_odd(readme) and MARKER.encode() in readme.read_bytes()
    if os.path.lexists(readme) and not ours:
        raise UserError(f"{readme} was not written by this program; move it away to get a card")
    policy = ppo_vec.policy_of(ppo_vec.read_checkpoint(folder / "best.pt")[1])
    files = [ppo_vec.read_json(folder / name) for name in FILES]
    for name, content in zip(FILES, files):
        if not content:
            raise UserError(f"{folder / name} is missing or damaged; train the run again, or take another")
    if files[1].get("finished") is not True:
        raise UserError(f"{folder} is not finished, and has no test yet; --resume {folder} goes on")
    with ppo_vec.refuse(f"{folder}: {' or '.join(FILES)} lacks what a card needs"):
        text = card(folder, repo, len(policy.obs_mean), *files).encode()
    ppo_vec.write_file(readme, text)


def main(argv: list[str] | None = None) -> int:
    options = tyro.cli(Options, description=__doc__, args=argv)
    folder = options.run
    repo = options.repo or "USER/" + re.sub("[^A-Za-z0-9_]+", "-", folder.resolve().name).strip("-")  # the Hub's names
    try:
        write_card(folder, repo)
    except (UserError, ppo_vec.TrainingError) as error:
        print(f"model_card.py: error: {error}", file=sys.stderr)
        return 2
    print(f"{folder / 'README.md'} is written. To publish the run (pip install huggingface_hub, then hf auth login):\n")
    print(f"hf upload {repo} {shlex.quote(str(folder))} . --exclude 'checkpoint*'")
    for video in sorted(folder.glob("videos/*.mp4"))[:1]:
        print(f"hf upload {repo} {shlex.quote(str(video))} replay.mp4  # the Hub plays the file of this name")
    return 0


if __name__ == "__main__":
    sys.exit(main())
