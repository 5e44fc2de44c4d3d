"""What every test stands on: one thread, no settings from outside, no deadline on a shared machine."""

import os
import shutil
from pathlib import Path

import pytest
from hypothesis import settings

# Before anything imports torch, and for the programs that tests start: two cores are no place for thread pools.
os.environ["OMP_NUM_THREADS"] = "1"

settings.register_profile("isograd", deadline=None, derandomize="CI" in os.environ, print_blob=True)
settings.load_profile("isograd")


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch):
    """Tests see no `ISOGRAD_*` and no terminal preferences of whoever runs them."""
    for name in [name for name in os.environ if name.startswith("ISOGRAD")]:
        monkeypatch.delenv(name)
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def repository():
    """The folder that holds pyproject.toml."""
    return Path(__file__).parents[1]


@pytest.fixture(scope="module")
def browser():
    """Chromium without a window. Where it is not installed the test is skipped, or fails if REQUIRE_BROWSER is set."""
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        (pytest.fail if "REQUIRE_BROWSER" in os.environ else pytest.skip)("Chromium is not installed")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()
