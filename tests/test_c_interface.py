"""The C library of the CPU kernels: its functions, also on ARM64, and the name of its file."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest
import setuptools

from harmodt_kernels.native import library

ROOT = Path(__file__).parents[1]
COMPILER = os.environ.get("CXX", "g++")
ARM64_COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64-static"


def run(*command: object, **environment: str) -> str:
    """Run a command and return what it prints, which pytest shows if the command fails."""
    result = subprocess.run(
        [str(part) for part in command],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout
    return result.stdout


@pytest.mark.usefixtures("native")
def test_every_function_agrees_with_plain_loops(tmp_path: Path) -> None:
    if shutil.which(COMPILER) is None:
        pytest.skip("there is no C++ compiler")
    program = tmp_path / "c_interface"
    options = ["-std=c++17", "-O1", "-I", ROOT / "kernels", f"-Wl,-rpath,{library.PATH.parent}"]
    run(COMPILER, *options, ROOT / "tests/c_interface.cpp", library.PATH, "-fopenmp", "-o", program)
    printed = run(program)
    assert f"{library.isa()}: tested\n" in printed
    assert printed.endswith("portable: tested\n0 differences\n")


@pytest.mark.full
def test_every_function_agrees_with_plain_loops_on_arm64(tmp_path: Path) -> None:
    """Compile the library and the test for ARM64, and run them in an emulator."""
    if shutil.which(ARM64_COMPILER) is None or shutil.which(EMULATOR) is None:
        pytest.skip(f"needs {ARM64_COMPILER} and {EMULATOR}")
    sysroot = "/usr/aarch64-linux-gnu"  # where Debian's compiler has the libraries of ARM64
    run(
        "cmake", "-G", "Ninja", "-S", ROOT, "-B", tmp_path,
        "-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
        f"-DCMAKE_CXX_COMPILER={ARM64_COMPILER}",
        f"-DCMAKE_CROSSCOMPILING_EMULATOR={EMULATOR};-L;{sysroot}",
        f"-DHARMODT_LIBRARY_DIRECTORY={tmp_path}",
    )  # fmt: skip
    run("cmake", "--build", tmp_path)
    # The machine type of ELF: AArch64.
    assert (tmp_path / "libharmodt.so").read_bytes()[18:20] == b"\xb7\x00"
    printed = run("ctest", "--test-dir", tmp_path, "--verbose")
    assert "portable: tested" in printed and "0 differences" in printed
    assert "100% tests passed, 0 tests failed out of 1" in printed


@pytest.fixture
def build_library(monkeypatch: pytest.MonkeyPatch) -> type[setuptools.Command]:
    """The command of setup.py that builds the library."""
    given: dict = {}
    monkeypatch.setattr(setuptools, "setup", given.update)
    monkeypatch.chdir(ROOT)
    runpy.run_path("setup.py")
    return given["cmdclass"]["build_ext"]


@pytest.mark.parametrize(
    ("platform", "system", "name"),
    [("linux", "Linux", "libharmodt.so"), ("darwin", "Darwin", "libharmodt.dylib")],
)
def test_cmake_setup_and_loader_name_the_same_file(
    platform: str, system: str, name: str, build_library, tmp_path: Path, monkeypatch
) -> None:
    if shutil.which(COMPILER) is None:
        pytest.skip("there is no C++ compiler")
    assert library.file_name(platform) == name
    command = build_library(setuptools.Distribution())
    monkeypatch.setattr("sys.platform", platform)
    assert command.get_ext_filename("harmodt_kernels.native.libharmodt") == (
        f"harmodt_kernels/native/{name}"
    )
    monkeypatch.undo()
    # CMake plans a build for the system. Nothing is compiled.
    run(
        "cmake", "-G", "Ninja", "-S", ROOT, "-B", tmp_path,
        f"-DCMAKE_SYSTEM_NAME={system}", f"-DCMAKE_CXX_COMPILER={COMPILER}",
        "-DCMAKE_CXX_COMPILER_WORKS=ON", "-DBUILD_TESTING=OFF",
        f"-DHARMODT_LIBRARY_DIRECTORY={tmp_path / 'library'}",
    )  # fmt: skip
    targets = run("ninja", "-C", tmp_path, "-t", "targets", "all")
    assert f"library/{name}: CXX_SHARED_LIBRARY_LINKER" in targets
