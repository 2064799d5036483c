"""What every test may use: the real networks and images beside the repository."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Other jobs run on the same machine: how long an example takes says nothing about the code.
settings.register_profile("shared machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared machine")

SHARED = Path(__file__).resolve().parents[1].parent / "shared"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "needs_shared: needs the real networks and images in ../shared")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("needs_shared") is not None:
        _require_shared()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of the real networks and images; the test is skipped without it, on CI it fails."""
    _require_shared()
    return SHARED


def _require_shared() -> None:
    if not SHARED.is_dir():
        why = "the real networks and images are missing: ../shared beside the repository"
        if os.environ.get("CI") == "true":
            pytest.fail(why, pytrace=False)
        pytest.skip(why)
