from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import imageio_ffmpeg
import numpy as np
import pytest
from runs import ended_process

from harmodt.environments import METAWORLD, EnvironmentSpec, family, video
from harmodt.environments.simulation import Simulation
from harmodt.environments.video import find_backend, upright
from harmodt.errors import UserError


@pytest.fixture(scope="module")
def backend() -> str:
    try:
        return find_backend()
    except UserError as error:
        pytest.skip(str(error))


def play(steps: int, spec: str | EnvironmentSpec = METAWORLD, **options) -> np.ndarray:
    actions = np.random.default_rng(0).uniform(-1, 1, (steps, 2, 4))
    with Simulation(spec, ["reach-v3"] * 2, 1, 1, **options) as simulation:
        simulation.reset(np.array([0, 1]))
        return np.stack([simulation.step(action)[0] for action in actions])


def test_a_film_shows_the_episode_and_does_not_change_it(backend, tmp_path):
    imageio = pytest.importorskip("imageio.v2")
    path, short = tmp_path / "reach-v3.mp4", replace(family(METAWORLD).spec, episode_length=100)
    path.with_name(f".reach-v3.mp4.{ended_process()}.tmp").write_bytes(b"of a kill")
    filmed = play(100, short, videos={1: path}, variables={"MUJOCO_GL": backend})
    np.testing.assert_array_equal(filmed, play(100, short))
    assert [file.name for file in tmp_path.iterdir()] == ["reach-v3.mp4"]
    with imageio.get_reader(path) as reader:
        frames = list(reader.iter_data())
    assert len(frames) == 26  # the start and every fourth of 100 steps
    assert frames[0].shape == (480, 480, 3)
    first, last = frames[0].astype(float), frames[-1].astype(float)
    assert abs(last - first).mean() > 1  # the arm has moved
    # Upright, the wooden table is below and the grey background above.
    redness = first[:, :, 0] - first[:, :, 2]
    assert redness[:10].mean() < 10 < 20 < redness[-100:, 150:].mean()


def test_a_film_ends_with_an_episode_that_is_shorter_than_the_familys(backend, tmp_path):
    imageio = pytest.importorskip("imageio.v2")
    path, short = tmp_path / "reach-v3.mp4", replace(family(METAWORLD).spec, episode_length=8)
    play(8, short, videos={1: path}, variables={"MUJOCO_GL": backend})
    with imageio.get_reader(path) as reader:
        assert len(list(reader.iter_data())) == 3  # the start and every fourth step


def test_an_unfinished_film_is_thrown_away(backend, tmp_path):
    play(8, videos={0: tmp_path / "reach-v3.mp4"}, variables={"MUJOCO_GL": backend})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kilobytes", [0, 40])
def test_a_film_that_the_disk_does_not_hold_is_an_error(backend, tmp_path, kilobytes):
    """In the encoder, which says nothing of it."""
    encoder = tmp_path / "encoder"
    limit = f"trap '' XFSZ; ulimit -f {2 * kilobytes}"  # blocks of 512 bytes
    encoder.write_text(f'#!/bin/sh\n{limit}\nexec {imageio_ffmpeg.get_ffmpeg_exe()} "$@"\n')
    encoder.chmod(0o755)
    variables = {"MUJOCO_GL": backend, "IMAGEIO_FFMPEG_EXE": str(encoder)}
    with pytest.raises(UserError, match=r"film .*reach-v3.mp4 could not be written: free some"):
        play(500, videos={0: tmp_path / "reach-v3.mp4"}, variables=variables)
    assert list(tmp_path.iterdir()) == [encoder]


def test_upright_turns_by_180_degrees():
    image = np.arange(12).reshape(2, 2, 3)
    assert upright(image).tolist() == [[[9, 10, 11], [6, 7, 8]], [[3, 4, 5], [0, 1, 2]]]


def test_no_backend_is_said_before_anything_is_run(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "harmodt.evaluate", tmp_path / "nowhere", "--video"],
        env=os.environ | {"MUJOCO_GL": "disabled"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    assert result.stderr.startswith("error: videos need off-screen OpenGL")
    assert "MUJOCO_GL=disabled tried" in result.stderr and "libosmesa6" in result.stderr


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr("harmodt.environments.video.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"harmodt\[video\]"):
        find_backend()


def test_a_backend_that_hangs_does_not_work(monkeypatch):
    monkeypatch.setattr(video, "_PROBE", "import time; time.sleep(600)")
    monkeypatch.setattr(video, "_PROBE_SECONDS", 0.5)
    monkeypatch.setenv("MUJOCO_GL", "egl")
    with pytest.raises(UserError, match="none works here"):
        find_backend()


def test_both_backends_are_tried(monkeypatch):
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.setattr("harmodt.environments.video._works", lambda backend: backend == "osmesa")
    assert find_backend() == "osmesa"
    monkeypatch.setattr("harmodt.environments.video._works", lambda backend: False)
    with pytest.raises(UserError, match="MUJOCO_GL=egl and MUJOCO_GL=osmesa tried"):
        find_backend()
