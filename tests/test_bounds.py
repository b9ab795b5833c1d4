from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import pytest

from harmodt.bounds import Bounds, check_bounds
from harmodt.errors import UserError


@dataclass
class Settings:
    free: float = -1.0
    least_steps: Annotated[int, Bounds(1)] = 1
    share: Annotated[float | None, "a note", Bounds(0, 1)] = None


@pytest.mark.parametrize("values", [{}, {"share": 0}, {"share": 1}, {"least_steps": 10**9}])
def test_bounds_are_included(values):
    check_bounds(Settings(**values))


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"least_steps": 0}, "--least-steps is 0: give at least 1"),
        ({"share": 1.5}, "--share is 1.5: give 0 to 1"),
        ({"share": -0.5}, "--share is -0.5: give 0 to 1"),
        ({"share": float("nan")}, "--share is nan: give 0 to 1"),
    ],
)
def test_a_number_outside_is_named_with_what_it_may_be(values, says):
    with pytest.raises(UserError) as error:
        check_bounds(Settings(**values))
    assert str(error.value) == says
