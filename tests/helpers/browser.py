"""A web page in a headless Chromium, driven by Playwright."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--no-sandbox", "--disable-3d-apis"]
"""Without 3D charts are SVG, which can be found on the page."""


@pytest.fixture
def page():
    """An empty page (playwright.sync_api.Page); the test is skipped where Playwright or Chromium is missing."""
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        made = browser.new_page(viewport={"width": 1500, "height": 1600})
        made.set_default_timeout(180_000)
        yield made
        browser.close()


def until(look: Callable[[], Any], seconds: float = 60) -> Any:
    """The first value of a function that is not empty.

    Raises:
        TimeoutError: There is none in time.
    """
    end = time.monotonic() + seconds
    while not (value := look()):
        if time.monotonic() > end:
            raise TimeoutError(f"not on the page after {seconds} s")
        time.sleep(0.2)
    return value
