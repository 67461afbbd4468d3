"""What all tests on a GPU share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ultralytics.engine import trainer as engine


@pytest.fixture(autouse=True)
def _on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail without a GPU; leave out Ultralytics' check of AMP, which downloads a model."""
    assert torch.cuda.is_available(), "pytest -m gpu needs an NVIDIA GPU"
    monkeypatch.setattr(engine, "check_amp", lambda _model: True)
    for name in ("PYTEST_XDIST_WORKER", "RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def on_gpu(tiny: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a training that takes seconds on the first GPU, under AMP, without data workers."""
    return tiny | {"device": "0", "amp": True, "workers": 0, "deterministic": True}
