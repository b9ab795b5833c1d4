"""Films episodes into MP4 files; MuJoCo draws the images without a screen."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from ..errors import UserError
from ..files import clear_temporaries, publish, temporary_path
from . import Environment

BACKENDS = ("egl", "osmesa")  # hardware first
SIZE = 480  # pixels, both ways
FRAMES_PER_SECOND = 20  # a film has at most about this many

_PROBE_SECONDS = 60

_PROBE = """
import mujoco
renderer = mujoco.Renderer(mujoco.MjModel.from_xml_string("<mujoco/>"), 8, 8)
renderer.render()
"""


class RecordedEnvironment(Environment):
    """An environment that films its first episode into an MP4 file, which plays in real time.

    The complete file appears under its name when the episode is over.

    Args:
        environment: the environment to film. From now on, use it only through this object.
        episode_length: steps of an episode.
        path: the MP4 file to write; its directory must exist.

    Raises:
        UserError: the film could not be written, for example because the disk is full. `reset` and
            `step` raise it.
    """

    def __init__(self, environment: Environment, episode_length: int, path: Path) -> None:
        import imageio_ffmpeg  # an optional dependency
        import mujoco

        self._environment = environment
        self._episode_length = episode_length
        self._path = path
        self._partial = temporary_path(path)
        self._steps = self._frames = 0
        self._filming = True
        scene = environment.scene
        scene.model.vis.quality.shadowsize = 0  # without a GPU, shadows take most of the time
        self._steps_per_frame = max(1, scene.steps_per_second // FRAMES_PER_SECOND)
        self._renderer = mujoco.Renderer(scene.model, SIZE, SIZE)
        clear_temporaries(path)
        self._encoder = imageio_ffmpeg.write_frames(
            self._partial,
            (SIZE, SIZE),
            fps=scene.steps_per_second / self._steps_per_frame,
            ffmpeg_log_level="quiet",
            output_params=["-f", "mp4"],  # the temporary name does not end in .mp4
        )
        self._encoder.send(None)

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
            self._publish()
        return result

    def close(self) -> None:
        """Delete the film if it is unfinished."""
        self._stop()
        self._partial.unlink(missing_ok=True)

    def _film(self) -> None:
        if not self._filming:
            return
        scene = self._environment.scene
        self._renderer.update_scene(scene.data, camera=scene.camera)
        image = self._renderer.render()
        try:
            self._encoder.send(upright(image) if scene.upside_down else image)
        except OSError:
            raise self._failure() from None
        self._frames += 1

    def _publish(self) -> None:
        self._stop()
        if count_frames(self._partial) != self._frames:
            raise self._failure()
        publish(self._partial, self._path)

    def _failure(self) -> UserError:
        return UserError(
            f"the film {self._path} could not be written: free some space there, or leave out "
            "--video"
        )

    def _stop(self) -> None:
        self._filming = False
        self._encoder.close()
        self._renderer.close()


def upright(image: np.ndarray) -> np.ndarray:
    """Turn an image [height, width, 3] by 180 degrees, for a camera that hangs upside down."""
    return np.ascontiguousarray(image[::-1, ::-1])


def count_frames(path: Path) -> int:
    """Count the frames of an MP4 file; 0 if the file is not a film.

    The count shows whether a film is complete: on a full disk the encoder ends without an error.
    """
    import imageio_ffmpeg  # an optional dependency

    try:
        return imageio_ffmpeg.count_frames_and_secs(path)[0]
    except RuntimeError:
        return 0


def find_backend() -> str:
    """Find the value of MUJOCO_GL with which this machine can draw without a screen.

    If MUJOCO_GL is set already, only its value is tried. Each value is tried in its own process,
    because MuJoCo chooses its backend once, when it is imported.

    Raises:
        UserError: no backend works, or the packages that write MP4 files are not installed.
    """
    if find_spec("imageio_ffmpeg") is None:
        raise UserError("videos need the package imageio-ffmpeg: pip install 'harmodt[video]'")
    chosen = os.environ.get("MUJOCO_GL")
    candidates = (chosen,) if chosen else BACKENDS
    for backend in candidates:
        if _works(backend):
            return backend
    tried = " and ".join(f"MUJOCO_GL={backend}" for backend in candidates)
    raise UserError(
        f"videos need off-screen OpenGL, and none works here ({tried} tried): install one (for "
        "example `apt-get install libosmesa6` on Debian or Ubuntu, and unset MUJOCO_GL), or leave "
        "out --video"
    )


def _works(backend: str) -> bool:
    try:
        probe = subprocess.run(
            [sys.executable, "-c", _PROBE],
            env=os.environ | {"MUJOCO_GL": backend},
            capture_output=True,
            timeout=_PROBE_SECONDS,
        )
    except subprocess.TimeoutExpired:  # a driver that hangs
        return False
    return probe.returncode == 0
