"""A trained policy as an agent for Meta-World's `metaworld.evaluation.evaluation`.

    policy = load_policy(Path("runs/mine"))
    envs = gym.make_vec("Meta-World/MT50", vector_strategy="async", seed=1)
    agent = MetaWorldAgent(policy, envs)
    success, mean_return, success_per_task, returns = evaluation(agent, envs, num_episodes=50)

Meta-World's `evaluation` ends an episode at its first success and draws the goals at random. Its
returns therefore differ from those of `harmodt.evaluate`, and its success rates differ a little.
"""

from __future__ import annotations

import numpy as np
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv

from ..environments.metaworld import task_of_class
from ..errors import UserError
from . import Policy


class MetaWorldAgent:
    """Implements `metaworld.evaluation.Agent` for a vector of environments.

    `evaluation` passes no rewards to an agent, but a policy that is conditioned on the
    return-to-go needs them. Gymnasium's `RecordEpisodeStatistics` keeps a running
    `episode_returns` for Meta-World's environments. The agent takes the increase of a row's return
    as its reward. The environments must therefore not normalise rewards. They must not normalise
    observations either, because the policy does this. If a one-hot task id follows the observation,
    the agent ignores it.

    Args:
        policy: chooses the actions. The agent starts new episodes in all of its rows.
        envs: vector environment made by Meta-World. The policy must know each row's task.
        seed: seed of the prompts that the policy draws.
        target_returns: float [rows], unscaled, the return to aim at in each row; by default the
            policy's target return of the row's task.

    Raises:
        UserError: the policy does not know the task of an environment.
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
        self._rewards_due = False
        policy.start(_task_ids(policy, envs), seed, target_returns)

    def eval_action(self, observations: np.ndarray) -> np.ndarray:
        """Choose actions, float32 [rows, 4], after observations [rows, 39 or more]."""
        self._rewards_due = True
        return self._policy.act(observations[:, : self._policy.environment.observation_size])

    def reset(self, env_mask: np.ndarray) -> None:
        """Record the last rewards; begin new episodes where `env_mask`, bool [rows], is True.

        `evaluation` calls this before the first step and after each step.
        """
        returns = np.array(self._envs.get_attr("episode_returns"), np.float64)
        if self._rewards_due:
            # An episode that has ended needs no last reward.
            self._policy.record_rewards(np.where(env_mask, 0.0, returns - self._returns))
        self._policy.restart(env_mask)
        self._returns = returns
        self._rewards_due = False


def _task_ids(policy: Policy, envs: SyncVectorEnv | AsyncVectorEnv) -> np.ndarray:
    """The policy's task id of each environment, int [rows]."""
    tasks = [task_of_class(name) for name in envs.get_attr("task_name")]
    unknown = sorted(set(tasks) - set(policy.tasks))
    if unknown:
        raise UserError(
            f"the policy was not trained on {', '.join(unknown)}: "
            f"give it environments of {', '.join(policy.tasks)}"
        )
    return np.array([policy.tasks.index(task) for task in tasks])
