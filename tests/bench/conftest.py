from __future__ import annotations

import functools

import pytest

from dscore_plugin import runs


@pytest.fixture(autouse=True)
def _quick_latency(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure latencies for a moment only."""
    monkeypatch.setattr(runs, "latency", functools.partial(runs.latency, min_run_time=0.005))
