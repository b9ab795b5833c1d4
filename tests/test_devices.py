from __future__ import annotations

import pytest

from harmodt.devices import find_device
from harmodt.errors import UserError


@pytest.mark.parametrize(
    "name",
    ["meta", "hpu", "privateuseone", "mtia", "xla", "vulkan", "mkldnn", "cuda:99", "gpu", ""],
)
@pytest.mark.filterwarnings("ignore:'mkldnn' is no longer used")
def test_a_device_that_cannot_compute_here_is_refused(name):
    with pytest.raises(UserError, match=f"device '{name}' is not there: this machine has cpu"):
        find_device(name)


def test_the_devices_that_are_there_are_found():
    assert find_device("cpu").type == "cpu"
    assert find_device("auto").type in ("cpu", "cuda")
