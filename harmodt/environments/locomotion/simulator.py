"""MuJoCo simulations of Gymnasium's half-cheetah and ant on a plane."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path

import numpy as np

from .. import Environment, Scene

EPISODE_LENGTH = 200
FRAME_SKIP = 5
STEP_SECONDS = 0.05

_NOISE = 0.1  # size of the noise in the first state of an episode


class Walker(Environment):
    """A body whose reward is its progress towards a goal, minus the cost of its actions.

    An episode begins near the model's initial pose. Positions get uniform noise in ±0.1, velocities
    normal noise of deviation 0.1. Joints have positions in metres or radians, and velocities in
    these units per second.

    Args:
        task: the task's name, for errors.
        goal: the number that defines the task.
        start_seed: seed of the states in which `reset` begins an episode.

    Attributes:
        velocity: float64 [2], mean velocity of the first two coordinates in the last step, in m/s.
    """

    MODEL: str
    """The file of the body's MuJoCo model in Gymnasium."""

    def __init__(self, task: str, goal: float, start_seed: int = 0) -> None:
        import gymnasium
        import mujoco

        assets = Path(gymnasium.__file__).parent / "envs/mujoco/assets"
        self._mujoco = mujoco
        self.model = mujoco.MjModel.from_xml_path(str(assets / self.MODEL))
        self.data = mujoco.MjData(self.model)
        self.goal = goal
        self.velocity = np.zeros(2)
        self._task = task
        self._start_seed = start_seed
        self._steps = EPISODE_LENGTH  # `step` needs a reset first
        self._ended = False

    @staticmethod
    @abstractmethod
    def progress(velocity: np.ndarray, goal: np.ndarray) -> np.ndarray:
        """The reward for progress [...], from velocities, float64 [..., 2], and goals [...]."""

    @staticmethod
    @abstractmethod
    def features(observation: np.ndarray, goal: np.ndarray) -> np.ndarray:
        """The expert's inputs, [..., F], for observations [..., O] and goals [...]."""

    @abstractmethod
    def observe(self) -> np.ndarray:
        """The present observation, float64."""

    @abstractmethod
    def cost(self, action: np.ndarray) -> float:
        """The cost of a step with an action in [-1, 1]; it does not depend on the goal."""

    def fallen(self) -> bool:
        """Whether the body has fallen, which ends the episode."""
        return False

    def reset(self, goal_index: int) -> np.ndarray:
        """Begin an episode in one of the states that the seed draws; return the observation."""
        return self._begin(np.random.default_rng([self._start_seed, goal_index]))

    def reset_random(self, seed: int) -> np.ndarray:
        return self._begin(np.random.default_rng(seed))

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool]:
        """As `Environment.step`. The action, [6] or for an ant [8], is converted to float32."""
        action = np.asarray(action, np.float32)
        if not np.isfinite(action).all():
            raise ValueError(f"{self._task}: the action {action} is not finite")
        if self._steps >= EPISODE_LENGTH:
            raise ValueError(f"{self._task}: the episode is over")
        self._steps += 1
        if self._ended:
            return self.observe(), 0.0, False
        action = action.clip(-1, 1).astype(np.float64)
        before = self.data.qpos[:2].copy()
        self.data.ctrl[:] = action
        self._mujoco.mj_step(self.model, self.data, FRAME_SKIP)
        self._mujoco.mj_rnePostConstraint(self.model, self.data)  # computes contact forces
        self.velocity = (self.data.qpos[:2] - before) / STEP_SECONDS
        reward = self.progress(self.velocity, np.float64(self.goal)) - self.cost(action)
        self._ended = self.fallen()
        return self.observe(), float(reward), False

    @property
    def ended(self) -> bool:
        return self._ended

    @property
    def scene(self) -> Scene:
        """The view of the camera that follows the body."""
        rate = round(1 / STEP_SECONDS)
        return Scene(self.model, self.data, "track", upside_down=False, steps_per_second=rate)

    def _begin(self, generator: np.random.Generator) -> np.ndarray:
        self._mujoco.mj_resetData(self.model, self.data)
        self.data.qpos += generator.uniform(-_NOISE, _NOISE, self.model.nq)
        self.data.qvel += _NOISE * generator.standard_normal(self.model.nv)
        self._mujoco.mj_forward(self.model, self.data)
        self._steps = 0
        self._ended = False
        return self.observe()


class Cheetah(Walker):
    """A half-cheetah. It moves only along x, and an episode goes on if it falls.

    The observation [20] is qpos without x (8), qvel (9), and the torso's position (3). An action
    costs 0.05 ‖a‖².
    """

    MODEL = "half_cheetah.xml"

    @staticmethod
    def features(observation: np.ndarray, goal: np.ndarray) -> np.ndarray:
        """Pose, velocities and goal, without the torso's position: [..., 18]."""
        return np.concatenate([observation[..., :17], goal[..., None]], axis=-1)

    def observe(self) -> np.ndarray:
        qpos, height = self.data.qpos, self.model.body("torso").pos[2]
        torso = (qpos[0], 0.0, height + qpos[1])  # joints are relative to the model's pose
        return np.concatenate([qpos[1:], self.data.qvel, torso])

    def cost(self, action: np.ndarray) -> float:
        return 0.05 * float(np.square(action).sum())


class DirectionCheetah(Cheetah):
    """A cheetah with the reward d v: d = 1 is forwards, d = -1 is backwards."""

    @staticmethod
    def progress(velocity: np.ndarray, goal: np.ndarray) -> np.ndarray:
        return goal * velocity[..., 0]


class VelocityCheetah(Cheetah):
    """A cheetah with the reward -|v - g| for a speed g in m/s."""

    @staticmethod
    def progress(velocity: np.ndarray, goal: np.ndarray) -> np.ndarray:
        return -np.abs(velocity[..., 0] - goal)


class DirectionAnt(Walker):
    """An ant with the reward v · (cos θ, sin θ) for a direction θ in radians.

    The observation [27] is qpos without x and y (13) and qvel (14). A step costs 0.5 ‖a‖² +
    0.0005 ‖contact forces, each clipped to [-1, 1]‖² - 1, so an ant that stands earns 1. The
    episode ends when the torso's height leaves [0.2, 1].
    """

    MODEL = "ant.xml"

    @staticmethod
    def progress(velocity: np.ndarray, goal: np.ndarray) -> np.ndarray:
        return velocity[..., 0] * np.cos(goal) + velocity[..., 1] * np.sin(goal)

    @staticmethod
    def features(observation: np.ndarray, goal: np.ndarray) -> np.ndarray:
        """The observation in coordinates whose x axis is the goal's direction: [..., 27].

        All directions of the plane are alike, so the expert needs to learn only how to run along x.
        """
        turned = observation.copy()
        # The torso's orientation is a quaternion. A turn by -θ about z is the quaternion
        # (c, 0, 0, -s). The product of the two is the orientation after the turn.
        c, s = np.cos(goal / 2), np.sin(goal / 2)
        w, x, y, z = np.moveaxis(observation[..., 1:5], -1, 0)
        parts = [c * w + s * z, c * x + s * y, c * y - s * x, c * z - s * w]
        turned[..., 1:5] = np.stack(parts, -1)
        # The torso's velocity is in world coordinates, its angular velocity in body coordinates.
        cos, sin = np.cos(goal), np.sin(goal)
        x, y = np.moveaxis(observation[..., 13:15], -1, 0)
        turned[..., 13:15] = np.stack([cos * x + sin * y, cos * y - sin * x], -1)
        return turned

    def observe(self) -> np.ndarray:
        return np.concatenate([self.data.qpos[2:], self.data.qvel])

    def cost(self, action: np.ndarray) -> float:
        contact = np.square(self.data.cfrc_ext.clip(-1, 1)).sum()
        return float(0.5 * np.square(action).sum() + 0.0005 * contact - 1)

    def fallen(self) -> bool:
        return not 0.2 <= self.data.qpos[2] <= 1
