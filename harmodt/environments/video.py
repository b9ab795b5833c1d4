"""Films of episodes as MP4 files, drawn by MuJoCo without a screen."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from ..errors import UserError
from . import Environment

BACKENDS = ("egl", "osmesa")  # hardware first
SIZE = 480  # pixels, both ways
FRAMES_PER_SECOND = 20  # about, at most

_PROBE = """
import mujoco
renderer = mujoco.Renderer(mujoco.MjModel.from_xml_string("<mujoco/>"), 8, 8)
renderer.render()
"""


class RecordedEnvironment(Environment):
    """An environment whose first episode is filmed into an MP4 file, in real time.

    The file appears under its name when the episode is over.

    Args:
        environment: the environment to film; to be used through this object from now on.
        episode_length: steps of an episode.
        path: the MP4 file to write; its directory must be there.
    """

    def __init__(self, environment: Environment, episode_length: int, path: Path) -> None:
        import imageio.v2 as imageio  # an optional dependency
        import mujoco

        self._environment = environment
        self._episode_length = episode_length
        self._path = path
        self._partial = path.with_name(f".{path.stem}.partial.mp4")
        self._steps = 0
        scene = environment.scene
        scene.model.vis.quality.shadowsize = 0  # shadows cost several times the rest without a GPU
        self._steps_per_frame = max(1, scene.steps_per_second // FRAMES_PER_SECOND)
        self._renderer = mujoco.Renderer(scene.model, SIZE, SIZE)
        self._writer = imageio.get_writer(
            self._partial, fps=scene.steps_per_second / self._steps_per_frame
        )

    def reset(self, goal_index: int) -> np.ndarray:
        """As `Environment.reset`."""
        observation = self._environment.reset(goal_index)
        self._film()
        return observation

    def reset_random(self, seed: int) -> np.ndarray:
        """As `Environment.reset_random`."""
        observation = self._environment.reset_random(seed)
        self._film()
        return observation

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool]:
        """As `Environment.step`."""
        result = self._environment.step(action)
        self._steps += 1
        if self._steps % self._steps_per_frame == 0:
            self._film()
        if self._steps == self._episode_length:
            self._stop()
            os.replace(self._partial, self._path)
        return result

    def close(self) -> None:
        """Throw an unfinished film away."""
        self._stop()
        self._partial.unlink(missing_ok=True)

    def _film(self) -> None:
        if not self._writer.closed:
            scene = self._environment.scene
            self._renderer.update_scene(scene.data, camera=scene.camera)
            image = self._renderer.render()
            self._writer.append_data(upright(image) if scene.upside_down else image)

    def _stop(self) -> None:
        self._writer.close()
        self._renderer.close()


def upright(image: np.ndarray) -> np.ndarray:
    """Turn an image [height, width, 3] by 180 degrees, for a camera that hangs upside down."""
    return np.ascontiguousarray(image[::-1, ::-1])


def find_backend() -> str:
    """The value of MUJOCO_GL with which this machine can draw without a screen.

    A MUJOCO_GL that is set already is the only one tried. Each is tried in a process of its own,
    since MuJoCo chooses its backend once, when it is imported.

    Raises:
        UserError: no backend works, or the packages that write MP4 files are not installed.
    """
    if find_spec("imageio") is None or find_spec("imageio_ffmpeg") is None:
        raise UserError(
            "videos need the packages imageio and imageio-ffmpeg: pip install 'harmodt[video]'"
        )
    chosen = os.environ.get("MUJOCO_GL")
    candidates = (chosen,) if chosen else BACKENDS
    for backend in candidates:
        if _works(backend):
            return backend
    tried = " and ".join(f"MUJOCO_GL={backend}" for backend in candidates)
    raise UserError(
        f"videos need off-screen OpenGL, and none works here ({tried} tried): install one (on "
        "Debian or Ubuntu for example `apt-get install libosmesa6`, with MUJOCO_GL not set), or "
        "leave out --video"
    )


def _works(backend: str) -> bool:
    probe = subprocess.run(
        [sys.executable, "-c", _PROBE],
        env=os.environ | {"MUJOCO_GL": backend},
        capture_output=True,
        timeout=60,
    )
    return probe.returncode == 0
