"""A family that is nothing like Meta-World: a point on a line, a return alone, seven steps."""

from __future__ import annotations

import errno
import os
import signal
import sys
from dataclasses import dataclass

import numpy as np

from harmodt.environments import Environment, EnvironmentFamily, EnvironmentSpec
from harmodt.errors import UserError

TASKS = ("slow", "quick")


@dataclass(frozen=True)
class Toy(EnvironmentFamily):
    """`FAMILIES["toy"] = "toy_family:Toy"` makes it known."""

    spec = EnvironmentSpec("toy", 3, 2, 7, success=False)
    goals = 4
    packages = ("numpy",)
    task_sets = {"both": TASKS}  # noqa: RUF012

    def resolve_tasks(self, names):
        tasks = [task for name in names for task in self.task_sets.get(name, (name,))]
        if set(tasks) - set(TASKS):
            raise UserError(f"there is no task {tasks!r}")
        return tuple(dict.fromkeys(tasks))

    def make(self, task, goal_seed=0):
        return Point({"slow": 0.5, "quick": 2.0}[task], goal_seed)

    def expert(self, task):
        if task == "slow":
            return lambda observation: np.array([0.5, 0.0])
        return lambda observation: np.array([1.0, 0.0])


class Mute(Toy):
    """The same without an expert."""

    def expert(self, task):
        raise UserError(f"there is no expert for {task}: import data")


class Full(Toy):
    """The same on a disk that is full."""

    def make(self, task, goal_seed=0):
        raise OSError(errno.ENOSPC, "No space left on device", "film.mp4")


class Lost(Toy):
    """The same, but it only says where modules are looked for."""

    def make(self, task, goal_seed=0):
        raise UserError(repr(sys.path))


class Modules(Toy):
    """The same, but it only says which modules were imported."""

    def make(self, task, goal_seed=0):
        raise UserError(" ".join(sys.modules))


class Killed(Toy):
    """The same, but whoever makes an environment is killed."""

    def make(self, task, goal_seed=0):
        os.kill(os.getpid(), signal.SIGKILL)


class Point(Environment):
    """Moves by its speed times the first action; the reward is the way."""

    def __init__(self, speed, goal_seed):
        self.speed = speed
        self.goal_seed = goal_seed
        self.state = np.zeros(3)

    def reset(self, goal_index):
        self.state = np.array([goal_index, self.goal_seed, 0.0])
        return self.state.copy()

    def reset_random(self, seed):
        return self.reset(np.random.default_rng(seed).integers(4))

    def step(self, action):
        way = self.speed * float(np.clip(action[0], -1, 1))
        self.state += [way, 0.0, 1.0]
        return self.state.copy(), way, False


class Falling(Toy):
    """The same, but a point that has gone farther than 3 has fallen."""

    spec = EnvironmentSpec("falling", 3, 2, 7, success=False)
    ends_early = True

    def make(self, task, goal_seed=0):
        return FallingPoint({"slow": 0.5, "quick": 2.0}[task], goal_seed)


class FallingPoint(Point):
    """Ends where it has gone too far."""

    @property
    def ended(self):
        return self.state[0] > 3
