"""A trained policy as an agent for Meta-World's own `metaworld.evaluation.evaluation`.

    policy = load_policy(Path("runs/mine"))
    envs = gym.make_vec("Meta-World/MT50", vector_strategy="async", seed=1)
    agent = MetaWorldAgent(policy, envs)
    success, mean_return, success_per_task, returns = evaluation(agent, envs, num_episodes=50)

That protocol ends an episode at its first success and draws its goals at random, so its returns,
and to a lesser degree its success rates, are not those of `harmodt.evaluate`.
"""

from __future__ import annotations

import numpy as np
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv

from ..environments.metaworld import task_of_class
from ..errors import UserError
from . import Policy


class MetaWorldAgent:
    """Implements `metaworld.evaluation.Agent` for the environments it is given.

    `evaluation` passes no rewards on, but a policy that is conditioned on the return-to-go needs
    them. They are read exactly, as the growth of the running `episode_returns` that Meta-World's
    environments keep in gymnasium's `RecordEpisodeStatistics`. The environments must therefore
    neither normalise rewards nor observations; a one-hot task id after the observation is ignored.

    Args:
        policy: its histories are cleared.
        envs: vector environment made by Meta-World; each row's task must be one of the policy's.
        seed: of the prompts that the policy draws.
        target_returns: float [rows], what to ask for at the start of an episode, unscaled; by
            default the policy's own for each task.

    Raises:
        UserError: an environment's task is not among the policy's.
    """

    def __init__(
        self,
        policy: Policy,
        envs: SyncVectorEnv | AsyncVectorEnv,
        seed: int = 0,
        target_returns: np.ndarray | None = None,
    ) -> None:
        self._policy = policy
        self._envs = envs
        self._returns = np.zeros(envs.num_envs)
        policy.start(_task_ids(policy, envs), seed, target_returns)

    def eval_action(self, observations: np.ndarray) -> np.ndarray:
        """Actions, float32 [rows, 4], after observations [rows, 39 or more]."""
        return self._policy.act(observations[:, : self._policy.environment.observation_size])

    def reset(self, env_mask: np.ndarray) -> None:
        """Take in the last step's rewards; begin new episodes where `env_mask`, bool [rows].

        `evaluation` calls this before the first step and after each one.
        """
        returns = np.array(self._envs.get_attr("episode_returns"), np.float64)
        rewards = np.where(env_mask, 0.0, returns - self._returns)
        self._policy.record_rewards(rewards)
        self._policy.restart(env_mask)
        self._returns = returns


def _task_ids(policy: Policy, envs: SyncVectorEnv | AsyncVectorEnv) -> np.ndarray:
    tasks = [task_of_class(name) for name in envs.get_attr("task_name")]
    unknown = sorted(set(tasks) - set(policy.tasks))
    if unknown:
        raise UserError(
            f"the policy was not trained on {', '.join(unknown)}: "
            f"give it environments of {', '.join(policy.tasks)}"
        )
    return np.array([policy.tasks.index(task) for task in tasks])
