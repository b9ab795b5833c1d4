from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from metaworld.env_dict import MT10_V3, MT50_V3

from harmodt.environments.metaworld_names import ALL_TASKS, TASK_SETS, resolve_tasks
from harmodt.errors import UserError


def test_the_sets_are_those_of_metaworld_and_of_the_experiments() -> None:
    assert tuple(MT50_V3) == ALL_TASKS
    assert TASK_SETS["mt50"] == tuple(MT50_V3)
    assert TASK_SETS["mt10"] == tuple(MT10_V3)
    assert {name: len(set(tasks)) for name, tasks in TASK_SETS.items()} == {
        "mt5": 5,
        "mt10": 10,
        "mt30": 30,
        "mt50": 50,
    }
    assert set(TASK_SETS["mt30"]) < set(MT50_V3)
    assert TASK_SETS["mt30"][:5] == TASK_SETS["mt5"]


@given(st.data())
def test_every_form_of_a_name_gives_the_task(data: st.DataObject) -> None:
    tasks = data.draw(st.lists(st.sampled_from(ALL_TASKS), min_size=1, max_size=6))
    forms = [
        task.removesuffix("-v3") + data.draw(st.sampled_from(["", "-v2", "-v3", "-V2"]))
        for task in tasks
    ]
    assert list(resolve_tasks(forms)) == sorted(set(tasks), key=tasks.index)


def test_sets_and_tasks_may_be_mixed_and_repeats_vanish() -> None:
    mixed = resolve_tasks(["reach", "MT5", "button-press-v2", "reach-v3"])
    assert mixed == ("reach-v3", *TASK_SETS["mt5"])


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("reech-v3", "reach-v3"),
        ("button-pres-wall", "button-press-wall-v3"),
        ("drawer_close-v2", "drawer-close-v3"),
        ("mt500", "mt50"),
        ("zzz", "v3"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(UserError, match=f"{name}.*did you mean '.*{nearest}'"):
        resolve_tasks(["reach", name])


def test_no_name_at_all_is_an_error() -> None:
    with pytest.raises(UserError, match="no task is named"):
        resolve_tasks([])
