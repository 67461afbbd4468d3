"""A device that this machine does not have."""

from __future__ import annotations

import pytest
import torch

from yolokd import UserError
from yolokd.training.settings import check_device


@pytest.mark.parametrize("device", ["mps", "cuda:77", 77])
def test_a_device_that_is_not_there_is_refused_also_where_ultralytics_takes_the_cpu(device: object) -> None:
    if device == "mps" and torch.backends.mps.is_available():
        device = "mps:1"
    with pytest.raises(UserError, match=f"device={device}: .*device=cpu"):
        check_device(device)


def test_the_cpu_and_ultralytics_own_choice_are_accepted() -> None:
    assert [check_device(device) for device in ("cpu", torch.device("cpu"), None)] == ["cpu", "cpu", ""]
