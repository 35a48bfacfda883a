"""A Chromium, driven by playwright; where there is none, every test of this folder skips and says why.

The browser is the system's own (`apt-get install chromium`), or the one that TULU_CHROMIUM names.
"""

import os
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

TESTS = Path(__file__).parents[1]
sys.path.append(str(TESTS / "recipes"))  # `made_run`
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
WIDE, PHONE = 1280, 390


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.browser)


@pytest.fixture(scope="session")
def chromium():
    """The running browser."""
    library = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install '.[browser]'")
    path = os.environ.get("TULU_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip("there is no Chromium: apt-get install chromium, or name one in TULU_CHROMIUM")
    with library.sync_playwright() as playwright:
        # Its sandbox needs rights that containers lack; what it shows is made here.
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


class Heard(NamedTuple):
    """What a page said and asked for while it was open."""

    console: list[str]
    requests: list[str]


@pytest.fixture
def visit(chromium):
    """Opens a file or an address: `visit(where, width, scheme)` gives the page and what it said and asked for."""
    contexts = []

    def go(where: Path | str, width: int = WIDE, scheme: str = "light"):
        context = chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)
        heard = Heard([], [])
        page.on("console", lambda message: heard.console.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: heard.console.append(f"error: {error}"))
        page.on("dialog", lambda dialog: (heard.console.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda request: heard.requests.append(request.url))
        page.goto(where.as_uri() if isinstance(where, Path) else where)
        return page, heard

    yield go
    for context in contexts:
        context.close()
