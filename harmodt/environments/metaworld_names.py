"""The Meta-World tasks and their names."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from ..errors import UserError

ALL_TASKS: tuple[str, ...] = (
    "assembly-v3",
    "basketball-v3",
    "bin-picking-v3",
    "box-close-v3",
    "button-press-topdown-v3",
    "button-press-topdown-wall-v3",
    "button-press-v3",
    "button-press-wall-v3",
    "coffee-button-v3",
    "coffee-pull-v3",
    "coffee-push-v3",
    "dial-turn-v3",
    "disassemble-v3",
    "door-close-v3",
    "door-lock-v3",
    "door-open-v3",
    "door-unlock-v3",
    "hand-insert-v3",
    "drawer-close-v3",
    "drawer-open-v3",
    "faucet-open-v3",
    "faucet-close-v3",
    "hammer-v3",
    "handle-press-side-v3",
    "handle-press-v3",
    "handle-pull-side-v3",
    "handle-pull-v3",
    "lever-pull-v3",
    "pick-place-wall-v3",
    "pick-out-of-hole-v3",
    "pick-place-v3",
    "plate-slide-v3",
    "plate-slide-side-v3",
    "plate-slide-back-v3",
    "plate-slide-back-side-v3",
    "peg-insert-side-v3",
    "peg-unplug-side-v3",
    "soccer-v3",
    "stick-push-v3",
    "stick-pull-v3",
    "push-v3",
    "push-wall-v3",
    "push-back-v3",
    "reach-v3",
    "reach-wall-v3",
    "shelf-place-v3",
    "sweep-into-v3",
    "sweep-v3",
    "window-open-v3",
    "window-close-v3",
)
"""All 50 tasks, in the order of Meta-World's MT50."""

_MT5 = (
    "basketball-v3",
    "bin-picking-v3",
    "button-press-topdown-v3",
    "button-press-v3",
    "button-press-wall-v3",
)

TASK_SETS: dict[str, tuple[str, ...]] = {
    "mt5": _MT5,
    "mt10": (
        "reach-v3",
        "push-v3",
        "pick-place-v3",
        "door-open-v3",
        "drawer-open-v3",
        "drawer-close-v3",
        "button-press-topdown-v3",
        "peg-insert-side-v3",
        "window-open-v3",
        "window-close-v3",
    ),
    "mt30": (
        *_MT5,
        "coffee-button-v3",
        "coffee-pull-v3",
        "coffee-push-v3",
        "dial-turn-v3",
        "disassemble-v3",
        "door-close-v3",
        "door-lock-v3",
        "door-open-v3",
        "door-unlock-v3",
        "hand-insert-v3",
        "drawer-close-v3",
        "drawer-open-v3",
        "faucet-open-v3",
        "faucet-close-v3",
        "handle-press-side-v3",
        "handle-press-v3",
        "handle-pull-side-v3",
        "handle-pull-v3",
        "lever-pull-v3",
        "peg-insert-side-v3",
        "pick-place-wall-v3",
        "pick-out-of-hole-v3",
        "reach-v3",
        "push-back-v3",
        "push-v3",
    ),
    "mt50": ALL_TASKS,
}
"""Sets of tasks. MT10 and MT50 are Meta-World's; the HarmoDT experiments use MT5 and MT30."""


def resolve_tasks(names: Sequence[str]) -> tuple[str, ...]:
    """Turn a person's names into v3 task names, in the given order and without repeats.

    Each name is a set ("mt5", "MT50"), a task ("reach-v3"), its Meta-World v2 name
    ("reach-v2"; all fifty tasks kept their names in v3) or its short name ("reach").

    Raises:
        UserError: there is no name, or a name does not exist; the error suggests the nearest name.
    """
    if not names:
        raise UserError("no task is named: name tasks such as reach-v3, or a set such as mt5")
    tasks = [task for name in names for task in _resolve(name)]
    return tuple(dict.fromkeys(tasks))


def _resolve(name: str) -> tuple[str, ...]:
    key = name.strip().lower()
    if key in TASK_SETS:
        return TASK_SETS[key]
    task = key.removesuffix("-v2").removesuffix("-v3") + "-v3"
    if task in ALL_TASKS:
        return (task,)
    known = [*TASK_SETS, *ALL_TASKS]
    nearest = difflib.get_close_matches(key, known, n=1) or difflib.get_close_matches(
        task, ALL_TASKS, n=1, cutoff=0
    )
    raise UserError(f"there is no task {name!r}: did you mean {nearest[0]!r}?")
