"""A headless Chromium that opens pages of this machine."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
DECODE = """async () => {
    const images = [...document.querySelectorAll('image, img')];
    const results = await Promise.allSettled(images.map(image => image.decode()));
    return [images.length, results.filter(result => result.status == 'rejected').length];
}"""


@dataclass
class Visit:
    """An open page, and what it has asked for and complained about since."""

    page: Any
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def undecoded(self) -> tuple[int, int]:
        """Return how many images the page has, and how many of them cannot be decoded."""
        count, undecoded = self.page.evaluate(DECODE)
        return count, undecoded

    def overflow(self) -> int:
        """Return by how many pixels the page is wider than the window."""
        wider: int = self.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        return wider


def chromium() -> str:
    """Return the path of the browser; fail where there is none: a check that is left out is no check."""
    found = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if found is None:
        pytest.fail("needs Chromium, to open pages: apt install chromium, or put another Chrome on the PATH")
    return found


@contextmanager
def opened(place: Path | str, width: int, scheme: Literal["light", "dark"] = "light") -> Iterator[Visit]:
    """Open a file, or an address, in a window of `width` pixels; its camera shows a test picture."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
        arguments += ["--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream"]
        browser = playwright.chromium.launch(executable_path=chromium(), args=arguments)
        page = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme).new_page()
        visit = Visit(page)
        page.on("request", lambda request: visit.requests.append(request.url))
        page.on("console", lambda message: visit.complaints.append(message.text))
        page.on("pageerror", lambda error: visit.complaints.append(str(error)))
        page.goto(place.as_uri() if isinstance(place, Path) else place)
        yield visit
        browser.close()
