"""Writes the policy that a run delivers as one ONNX file, for programs that have neither torch nor ppo_vec.

    pip install -e ".[export]"
    python benchmarks/export.py runs/NAME policy.onnx

The normaliser and the action bounds are inside the file, as they are inside load_policy:

    session = onnxruntime.InferenceSession("policy.onnx")
    (actions,) = session.run(None, {"observation": obs.astype(np.float64).reshape(n, -1)})  # obs: n raw observations

`action` is float32 (n, action_dim) within the environment's bounds, or int64 (n,) for discrete actions.

`observation` is float64 because the first thing that happens to it is that a mean is subtracted: next to a large mean,
float32 has no digits left for what remains. Every other type of observation becomes float64 without a loss, and a
runtime that is given another type says so. After the normaliser all numbers are float32, as they are in training.

Before the file is written, onnxruntime runs it on random observations, and the actions are compared to load_policy's.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from torch import Tensor, nn

import ppo_vec
from ppo_vec import Policy, UserError

PACKAGES = "onnx", "onnxscript", "onnxruntime"
TOLERANCE = 1e-5  # two float32 computations of one action differ by about 1e-6


@dataclass
class Options:
    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """a run folder, or a checkpoint"""
    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT.onnx")]
    """the file to write"""


class Network(nn.Module):
    """ppo_vec.Policy in torch: raw observations (n, obs_dim) -> deterministic actions, ready for the environment."""

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        activation = nn.Tanh if policy.activation == "tanh" else ppo_vec.ACTIVATIONS[policy.activation][0]
        layers: list[nn.Module] = []
        for weight, bias in policy.layers:
            layers += [nn.Linear(*weight.shape), activation()]
            layers[-2].load_state_dict({"weight": torch.from_numpy(weight.T), "bias": torch.from_numpy(bias)})
        self.actor = nn.Sequential(*layers[:-1])
        self.discrete = policy.distribution is ppo_vec.Categorical
        self.mean, self.scale = torch.from_numpy(policy.obs_mean), torch.from_numpy(policy.obs_scale)
        self.low, self.high = torch.from_numpy(policy.low), torch.from_numpy(policy.high)
        self.middle, self.half_range = torch.from_numpy(policy.middle), torch.from_numpy(policy.half)

    def forward(self, obs: Tensor) -> Tensor:
        x = ((obs - self.mean) * self.scale).clamp(-ppo_vec.OBS_CLIP, ppo_vec.OBS_CLIP).float()
        out = self.actor(x)
        if self.discrete:
            return self.low[out.argmax(-1)]
        mean = out[:, : len(self.low)]  # a state-dependent deviation comes after it
        action = self.middle + self.half_range * mean.clamp(-1, 1)
        return torch.minimum(torch.maximum(action, self.low), self.high)  # rounding may have gone past the bounds


def metadata(path: Path, tree: dict[str, Any], policy: Policy) -> dict[str, str]:
    """What the file says of itself. `path` is the checkpoint that was read."""
    result, summary = "unknown", ppo_vec.read_json(path.parent / "summary.json")
    if path.name == "best.pt" and summary.get("finished") is True:  # else there is no test of unseen episodes
        with contextlib.suppress(LookupError, TypeError, ValueError):
            result = "{eval_mean:.1f} +/- {eval_std:.1f} over {eval_episodes} test episodes".format(**summary)
    action = f"(batch, {len(policy.low)}): flattened, clipped and mapped to the environment's bounds"
    if policy.distribution is ppo_vec.Categorical:
        action = f"(batch,): the likeliest of the actions {policy.low[0]} to {policy.low[-1]}"
    return {
        **{name: str(tree["args"][name]) for name in ("env_id", "env_kwargs", "wrappers") if name in tree["args"]},
        "test_result": result,
        "observation": f"(batch, {len(policy.obs_mean)}): raw and flattened; the normaliser is in this file",
        "action": action,
    }


def to_onnx(policy: Policy, about: dict[str, str]) -> bytes:
    """The bytes of the file. Raises UserError."""
    import onnx

    if policy.distribution not in (ppo_vec.Gaussian, ppo_vec.Categorical):
        raise UserError(f"{policy.distribution.__name__} is new: tell Network.forward its deterministic action")
    example = torch.zeros(2, len(policy.obs_mean), dtype=torch.float64)
    names = {"input_names": ["observation"], "output_names": ["action"], "dynamic_shapes": ({0: "batch"},)}
    with warnings.catch_warnings(action="ignore"), ppo_vec.refuse("torch.onnx.export failed"):
        model = torch.onnx.export(Network(policy).eval(), (example,), **names, verbose=False).model_proto
        onnx.helper.set_model_props(model, about)
        return model.SerializeToString()


def largest_difference(data: bytes, policy: Policy) -> float:
    """Between the file's actions and load_policy's, on random observations like those that the normaliser has seen.

    It is a share of the largest action that the bounds allow. Of discrete actions: how far the logit of the file's
    choice is below the best one, because rounding may decide a tie.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    largest, generator = 0.0, np.random.default_rng(0)
    bound = np.maximum(abs(policy.low), abs(policy.high))
    for n in (1, 7, 1000):
        obs = policy.obs_mean + generator.standard_normal((n, len(policy.obs_mean))) / policy.obs_scale
        (actions,), expected = session.run(None, {"observation": obs}), policy(obs)
        if (actions.shape, actions.dtype) != (expected.shape, expected.dtype):
            return np.inf
        if policy.distribution is ppo_vec.Categorical:
            logits = policy.forward(obs)
            difference = logits.max(-1) - logits[np.arange(n), actions - policy.low[0]]
        else:
            difference = abs(actions - expected) / np.where(bound > 0, bound, 1)
        largest = np.maximum(largest, difference.max())  # which keeps a NaN
    return float(largest)


def main(argv: list[str] | None = None) -> int:
    options = tyro.cli(Options, description=__doc__, args=argv)
    try:
        if options.out.suffix != ".onnx" or not options.out.parent.is_dir():
            raise UserError(f"{options.out} must end in .onnx and lie in a folder that exists")
        path, tree = ppo_vec.read_checkpoint(options.run, policy=True)  # as load_policy does
        policy = ppo_vec.policy_of(tree)
        if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
            raise UserError(f'not installed: {", ".join(missing)}; pip install -e ".[export]"')
        about = metadata(path, tree, policy)
        data = to_onnx(policy, about)
        with ppo_vec.refuse("onnxruntime cannot run what torch.onnx.export made"):
            difference = largest_difference(data, policy)
        if not difference <= TOLERANCE:
            print(f"export.py: error: the actions differ from load_policy's by {difference:.2g}", file=sys.stderr)
            return 1
        ppo_vec.write_file(options.out, data)
    except (UserError, ppo_vec.TrainingError) as error:
        print(f"export.py: error: {error}", file=sys.stderr)
        return 2
    print(f"{options.out}: {path}, the largest difference to load_policy's actions is {difference:.2g}")
    print("\n".join(f"{name}: {value}" for name, value in about.items()))
    return 0


if __name__ == "__main__":
    logging.disable(logging.WARNING)  # torch.onnx's, that torchvision is missing
    sys.exit(main())
