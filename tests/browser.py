"""A headless Chromium for tests that drive a page as a reader would."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Page

__all__ = ["Visit", "visit"]

QUIET = (
    # Chromium refuses to sandbox as root, and otherwise calls home.
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    # Without a GPU plotly's surfaces are drawn by software.
    "--enable-unsafe-swiftshader",
)


@dataclass
class Visit:
    """A page, and everything it complained of."""

    page: Page
    problems: list[str] = field(default_factory=list)


@contextmanager
def visit(
    address: str | Path, *, width: int = 1280, height: int = 900, dark: bool = False, offline: bool = False
) -> Iterator[Visit]:
    """Open a file or an address; errors of scripts, and of the console, gather in ``problems``."""
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        reason = "no Chromium on PATH; on Debian: apt install chromium"
        if os.environ.get("OSP_DIAG_BROWSER") == "required":
            pytest.fail(reason)
        pytest.skip(reason)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=list(QUIET))
        try:
            context = browser.new_context(
                viewport={"width": width, "height": height},
                color_scheme="dark" if dark else "light",
                offline=offline,
                accept_downloads=True,
            )
            visited = Visit(context.new_page())
            visited.page.on("pageerror", lambda error: visited.problems.append(f"error: {error}"))
            visited.page.on(
                "console",
                lambda message: (
                    visited.problems.append(f"{message.type}: {message.text}")
                    if message.type in ("error", "warning")
                    else None
                ),
            )
            is_file = isinstance(address, Path)
            visited.page.goto(Path(address).resolve().as_uri() if is_file else str(address))
            yield visited
        finally:
            browser.close()
