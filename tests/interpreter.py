"""Triton's interpreter, without what it does again and again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import triton
import triton.language as tl
from triton.runtime import interpreter


def refuse_numpy() -> None:
    """End the session where Triton's interpreter cannot work, before hundreds of tests fail.

    Until 3.7 it makes numbers of arrays with one element, which NumPy has refused since 2.4.
    """
    version = tuple(map(int, triton.__version__.split(".")[:2]))
    if version < (3, 7) and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        pytest.exit(
            f"Triton {triton.__version__} interprets no kernel under NumPy {np.__version__}; "
            "without a GPU, run: pip install 'numpy<2.4'",
            returncode=pytest.ExitCode.USAGE_ERROR,
        )


def replace_once() -> None:
    """Let what kernels call be replaced for the interpreter at most once a launch.

    Triton looks through all of its language each time that a function calls another, in which
    nothing is left to replace: a third to a half of the time of these tests. Another version of
    Triton, which may do it otherwise, is left as it is.
    """
    if not hasattr(interpreter, "_patch_lang") or not hasattr(interpreter, "_LangPatchScope"):
        return
    replace = interpreter._patch_lang

    def replace_what_is_left(function: Callable[..., Any]) -> Any:
        names = function.__globals__.values()
        modules = [module for module in (tl, tl.core) if any(module is value for value in names)]
        if not modules or any(tl.core.is_builtin(m.load) for m in modules):
            return replace(function)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = replace_what_is_left
