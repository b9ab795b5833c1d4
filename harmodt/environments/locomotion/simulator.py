"""Half-cheetah and ant on a plane, as MuJoCo simulates gymnasium's models of them."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path

import numpy as np

from .. import Environment, Scene

EPISODE_LENGTH = 200
FRAME_SKIP = 5
STEP_SECONDS = 0.05

_NOISE = 0.1  # of the state in which an episode begins


class Walker(Environment):
    """A body that is rewarded for how it moves towards a goal, less what its actions cost.

    An episode begins near the model's first pose: uniform noise of 0.1 on positions, normal noise
    of deviation 0.1 on velocities. Position and velocity of a joint are in metres or radians, and
    per second.

    Args:
        task: its name, for errors.
        goal: the number that makes the task.
        start_seed: of the states in which `reset` begins an episode.

    Attributes:
        velocity: float64 [2], of the first two coordinates over the last step, in m/s.
    """

    MODEL: str
    """File of one of gymnasium's MuJoCo models."""

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
        self._steps = EPISODE_LENGTH  # an episode is to begin first
        self._ended = False

    @staticmethod
    @abstractmethod
    def progress(velocity: np.ndarray, goal: np.ndarray) -> np.ndarray:
        """What a velocity, float64 [..., 2], is worth for a goal, [...]; [...]."""

    @staticmethod
    @abstractmethod
    def features(observation: np.ndarray, goal: np.ndarray) -> np.ndarray:
        """What an expert sees, [..., F], of an observation, [..., O], with a goal, [...]."""

    @abstractmethod
    def observe(self) -> np.ndarray:
        """The observation now, float64."""

    @abstractmethod
    def cost(self, action: np.ndarray) -> float:
        """What a step with an action within [-1, 1] costs, wherever it went."""

    def fallen(self) -> bool:
        """Whether the episode ends here."""
        return False

    def reset(self, goal_index: int) -> np.ndarray:
        """Begin an episode in one of the states that the seed draws; returns the observation."""
        return self._begin(np.random.default_rng([self._start_seed, goal_index]))

    def reset_random(self, seed: int) -> np.ndarray:
        return self._begin(np.random.default_rng(seed))

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool]:
        """As `Environment.step`; the action [6], of an ant [8], is taken as float32."""
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
        self._mujoco.mj_rnePostConstraint(self.model, self.data)  # the forces of contacts
        self.velocity = (self.data.qpos[:2] - before) / STEP_SECONDS
        reward = self.progress(self.velocity, np.float64(self.goal)) - self.cost(action)
        self._ended = self.fallen()
        return self.observe(), float(reward), False

    @property
    def ended(self) -> bool:
        return self._ended

    @property
    def scene(self) -> Scene:
        """Seen by the camera that goes along."""
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
    """A half-cheetah, which moves along x alone and may fall without an end.

    The observation [20] is qpos without x (8), qvel (9), and where the torso is (3). An action
    costs 0.05 ‖a‖².
    """

    MODEL = "half_cheetah.xml"

    @staticmethod
    def features(observation: np.ndarray, goal: np.ndarray) -> np.ndarray:
        """Pose and velocities, wherever the cheetah is, and the goal: [..., 18]."""
        return np.concatenate([observation[..., :17], goal[..., None]], axis=-1)

    def observe(self) -> np.ndarray:
        qpos, height = self.data.qpos, self.model.body("torso").pos[2]
        torso = (qpos[0], 0.0, height + qpos[1])  # its joints count from where the model has it
        return np.concatenate([qpos[1:], self.data.qvel, torso])

    def cost(self, action: np.ndarray) -> float:
        return 0.05 * float(np.square(action).sum())


class DirectionCheetah(Cheetah):
    """Rewarded for its speed forwards, d = 1, or backwards, d = -1: d v."""

    @staticmethod
    def progress(velocity: np.ndarray, goal: np.ndarray) -> np.ndarray:
        return goal * velocity[..., 0]


class VelocityCheetah(Cheetah):
    """Rewarded for keeping a speed g, in m/s: -|v - g|."""

    @staticmethod
    def progress(velocity: np.ndarray, goal: np.ndarray) -> np.ndarray:
        return -np.abs(velocity[..., 0] - goal)


class DirectionAnt(Walker):
    """An ant, rewarded for its speed in a direction, θ in radians: v · (cos θ, sin θ).

    The observation [27] is qpos without x and y (13) and qvel (14). A step costs 0.5 ‖a‖² +
    0.0005 ‖contact forces, each within [-1, 1]‖² - 1: standing is worth 1. The episode ends where
    the torso's height leaves [0.2, 1].
    """

    MODEL = "ant.xml"

    @staticmethod
    def progress(velocity: np.ndarray, goal: np.ndarray) -> np.ndarray:
        return velocity[..., 0] * np.cos(goal) + velocity[..., 1] * np.sin(goal)

    @staticmethod
    def features(observation: np.ndarray, goal: np.ndarray) -> np.ndarray:
        """The observation of one who takes the goal's direction for x: [..., 27].

        The plane is the same in every direction, so running along x is all there is to learn.
        """
        turned = observation.copy()
        # The torso's orientation is a quaternion; a turn by -θ about z is (c, 0, 0, -s).
        c, s = np.cos(goal / 2), np.sin(goal / 2)
        w, x, y, z = np.moveaxis(observation[..., 1:5], -1, 0)
        parts = [c * w + s * z, c * x + s * y, c * y - s * x, c * z - s * w]
        turned[..., 1:5] = np.stack(parts, -1)
        # Its velocity is in the world's coordinates, its angular velocity in its own.
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
