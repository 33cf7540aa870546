"""Where the real data lies, and what to do without it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require-shared",
        action="store_true",
        help="fail, instead of skipping, the tests on the real CIFAR-10 where its folder is missing",
    )


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("PYTEST_XDIST_WORKER"):
        torch.set_num_threads(1)  # two workers on two cores: more threads only get in each other's way


def shared_folder() -> Path:
    """The folder with ``data/`` and ``weights/``: $DSCORE_SHARED, or ``shared`` beside the checkout."""
    given = os.environ.get("DSCORE_SHARED")
    return Path(given) if given else Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared(request: pytest.FixtureRequest) -> Path:
    folder = shared_folder()
    if (folder / "data" / "cifar10").is_dir() and (folder / "weights" / "cifar10").is_dir():
        return folder
    reason = f"no data/cifar10 and weights/cifar10 under {folder}; set DSCORE_SHARED (see CONTRIBUTING.md)"
    if request.config.getoption("--require-shared"):
        pytest.fail(reason)
    pytest.skip(reason)
