"""The peers that benchmarks/throughput.py measures, set up as our training is. Needs pip install -e ".[bench]".

Each training gets our agent's actor and statistics, so that its walkers walk as ours do. Each function returns the
environments, to be closed, and what makes one iteration: a rollout and its update.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import ppo_vec as pv

# isort: split
import gymnasium as gym
import torch
from torch import nn

NAMES = "envpool", "stable_baselines3", "skrl"  # as they are imported
VALUE_WEIGHT = 0.25  # of the critic's mean squared error, as in ppo_vec.value_loss


def minibatch_size(args: pv.Options) -> int:
    """The rows of a minibatch."""
    return args.batch_size // args.num_minibatches


def stock(kind: Callable[[list[Callable]], Any], args: pv.Options) -> Any:
    """The published environments in a vector environment of that kind."""
    return kind([lambda: gym.make(args.env_id, disable_env_checker=True)] * args.num_envs)


def envpool(args: pv.Options) -> Any:
    import envpool

    threads = min(args.num_envs, pv.usable_cores())
    return envpool.make(args.env_id, env_type="gymnasium", num_envs=args.num_envs, num_threads=threads, seed=0)


def copy_layers(source: nn.Module, *targets: nn.Module) -> None:
    ours, theirs = (
        [m for net in nets for m in net.modules() if isinstance(m, nn.Linear)] for nets in ([source], targets)
    )
    for layer, copy in zip(ours, theirs, strict=True):
        copy.load_state_dict(layer.state_dict())


def sb3(agent: pv.Agent, args: pv.Options, kind: str) -> tuple[Any, Callable[[], Any]]:
    from stable_baselines3 import PPO
    from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize

    kinds = {"DummyVecEnv": DummyVecEnv, "SubprocVecEnv": partial(SubprocVecEnv, start_method=pv.Options.start_method)}
    venv = VecNormalize(stock(kinds[kind], args), gamma=args.gamma)
    model = PPO(
        "MlpPolicy", venv, learning_rate=args.learning_rate, n_steps=args.num_steps, batch_size=minibatch_size(args),
        n_epochs=args.update_epochs, gamma=args.gamma, gae_lambda=args.gae_lambda, clip_range=args.clip_coef,
        normalize_advantage=True, ent_coef=0.0, vf_coef=VALUE_WEIGHT, max_grad_norm=args.max_grad_norm, device="cpu",
        seed=0, policy_kwargs={
            "net_arch": {"pi": list(args.actor_hidden_sizes), "vf": list(args.critic_hidden_sizes)},
            "activation_fn": {"tanh": torch.nn.Tanh}[args.activation],  # as its users have
        },
    )  # fmt: skip
    policy, ours = model.policy, agent.normalizer
    copy_layers(agent.actor, policy.mlp_extractor.policy_net, policy.action_net)
    policy.log_std.data.copy_(agent.distribution.logstd.data)
    venv.obs_rms.mean, venv.obs_rms.var, venv.obs_rms.count = ours.mean.numpy(), ours.var.numpy(), 1e6
    return venv, lambda: model.learn(args.batch_size, reset_num_timesteps=False)


def skrl(agent: pv.Agent, args: pv.Options, kind: type[gym.vector.VectorEnv]) -> tuple[Any, Callable[[], Any]]:
    from skrl.agents.torch.ppo import PPO, PPO_CFG
    from skrl.envs.wrappers.torch import wrap_env
    from skrl.memories.torch import RandomMemory
    from skrl.models.torch import DeterministicMixin, GaussianMixin, Model
    from skrl.resources.preprocessors.torch import RunningStandardScaler
    from skrl.trainers.torch import SequentialTrainer

    logging.getLogger("skrl").setLevel(logging.ERROR)
    env = wrap_env(stock(kind, args), wrapper="gymnasium", verbose=False)
    spaces = {"observation_space": env.observation_space, "action_space": env.action_space, "device": "cpu"}

    class Net:
        def __init__(self, hidden: tuple[int, ...], outputs: int) -> None:
            Model.__init__(self, **spaces)
            super().__init__()  # of the mixin
            net = pv.mlp((len(agent.normalizer.mean), *hidden, outputs), args.activation, last_gain=1.0)
            self.net = nn.Sequential(*(nn.Tanh() if isinstance(m, pv.Tanh) else m for m in net))  # as its users have
            self.logstd = nn.Parameter(agent.distribution.logstd.data.clone()) if outputs > 1 else None

        def compute(self, inputs: dict, role: str) -> tuple[torch.Tensor, dict]:
            return self.net(inputs["observations"]), {"log_std": self.logstd}

    actor = type("Actor", (Net, GaussianMixin, Model), {})(args.actor_hidden_sizes, agent.distribution.outputs)
    critic = type("Critic", (Net, DeterministicMixin, Model), {})(args.critic_hidden_sizes, 1)
    copy_layers(agent.actor, actor.net)
    cfg = PPO_CFG(
        rollouts=args.num_steps, learning_epochs=args.update_epochs, mini_batches=args.num_minibatches,
        discount_factor=args.gamma, gae_lambda=args.gae_lambda, learning_rate=args.learning_rate,
        ratio_clip=args.clip_coef, grad_norm_clip=args.max_grad_norm, value_clip=0.0, value_loss_scale=VALUE_WEIGHT,
        entropy_loss_scale=0.0,
        observation_preprocessor=RunningStandardScaler, value_preprocessor=RunningStandardScaler,
        observation_preprocessor_kwargs={"size": env.observation_space}, value_preprocessor_kwargs={"size": 1},
    )  # fmt: skip
    cfg.experiment.write_interval = cfg.experiment.checkpoint_interval = 0
    memory = RandomMemory(memory_size=args.num_steps, num_envs=args.num_envs, device="cpu")
    ppo = PPO(models={"policy": actor, "value": critic}, memory=memory, cfg=cfg, **spaces)
    scaler, ours = ppo._observation_preprocessor, agent.normalizer
    scaler.running_mean, scaler.running_variance = ours.mean.clone(), ours.var.clone()
    silent = {"headless": True, "disable_progressbar": True, "close_environment_at_exit": False}
    return env, SequentialTrainer(env=env, agents=ppo, cfg={"timesteps": args.num_steps, **silent}).train
