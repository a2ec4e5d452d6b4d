"""A page of a headless browser."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest


@contextmanager
def browser_page() -> Iterator[tuple[Any, list[str]]]:
    """A page of a headless browser that reaches nothing but this machine, and what went wrong in it."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("there is no Chromium here")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-dev-shm-usage"])
        page, faults = browser.new_page(), []
        page.on("console", lambda m: faults.append(f"console: {m.text}") if m.type == "error" else None)
        page.on("pageerror", lambda e: faults.append(f"error: {e}"))
        page.on("requestfailed", lambda r: faults.append(f"not to be had: {r.url}"))
        yield page, faults
        browser.close()
