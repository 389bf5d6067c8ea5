"""A headless Chromium on Dagster's UI, as a person uses it; every look leaves a picture."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urljoin

from PIL import Image
from playwright.sync_api import Locator, Page, expect, sync_playwright

from containers.engine.engine import install_packages

JOB = "/locations/pipeline.definitions/jobs/release_model"
_WAIT_MS = 180_000
# The folder of the documentation's pictures, where they are to be made anew.
PICTURES = "SLIPWAY_PICTURES"


class Browser:
    """A page of the UI at ``address``; pictures go to ``folder``."""

    def __init__(self, page: Page, address: str, folder: Path) -> None:
        self.page = page
        self.address = address
        self.folder = folder

    def open(self, path: str) -> None:
        self.page.goto(f"{self.address}{path}")

    def sees(self, *texts: str) -> None:
        """Wait until each text is on the page."""
        for text in texts:
            expect(self.page.get_by_text(text).first).to_be_visible()

    def filters_log(self, text: str) -> None:
        """Leave of a run's log what has the text."""
        self.page.get_by_placeholder("Filter…").fill(text)

    def shows_pictures(self) -> None:
        """Open an asset's pictures, which Dagster folds up, and wait until one is drawn."""
        self.page.get_by_text("[Show Markdown]").click()
        drawn = self.page.get_by_role("dialog").locator("img").first
        expect(drawn).to_be_visible()
        assert drawn.evaluate("image => image.naturalWidth") > 0
        self.page.wait_for_timeout(500)  # it fades in

    def follows(self, link: str) -> None:
        """Go where the link that has these words leads."""
        path = self.page.get_by_role("link", name=link).first.get_attribute("href")
        assert path is not None
        self.page.goto(urljoin(self.page.url, path))

    def reads(self, text: str) -> None:
        """Wait until the page that is shown within the page has the text."""
        expect(self.page.frame_locator("iframe").get_by_text(text).first).to_be_visible()

    def picture(self, name: str, *, documented: str | None = None, part: str | None = None) -> None:
        """Keep what is shown, or a part of it; where `make docs-pictures` asks for it, for the documentation too."""
        path = self.folder / f"{name}.png"
        if part is None:
            self.page.screenshot(path=path)
        else:
            self.page.locator(part).first.screenshot(path=path)
        assert path.stat().st_size > 10_000  # nothing is this small but an empty page
        if documented is not None and PICTURES in os.environ:
            Image.open(path).quantize(128).save(Path(os.environ[PICTURES]) / f"{documented}.png", optimize=True)

    def launch(self, scheme: str | None) -> str:
        """Release the demo in one scheme, or in all of them as a backfill; return the path of the run or backfill."""
        self.open(JOB)
        self.page.get_by_role("button", name="Materialize all").click()
        dialog = self.page.get_by_role("dialog")
        model, schemes = (dialog.get_by_role("button", name="All", exact=True).nth(number) for number in (0, 1))
        unchosen = dialog.get_by_text("Select a partition or create one")
        _click_until(model, unchosen, 1)
        if scheme is None:
            _click_until(schemes, unchosen, 0)
            dialog.get_by_role("button", name="Launch").last.click()
        else:
            unchosen.click()
            self.page.get_by_role("menuitem", name=scheme).click()
            dialog.get_by_role("button", name="Launch 1 run").click()
        view = self.page.get_by_role("link", name="View", exact=True).last
        path = view.get_attribute("href")
        assert path is not None
        return path


def _click_until(button: Locator, counted: Locator, wanted: int) -> None:
    """Click until so many are left: before Dagster has loaded the partitions, a click chooses none."""
    for _ in range(20):
        button.click()
        button.page.wait_for_timeout(500)
        if counted.count() == wanted:
            return
    expect(counted).to_have_count(wanted)


@contextmanager
def chromium(address: str, folder: Path) -> Iterator[Browser]:
    """Open Debian's Chromium, installed where it is not, on the UI at ``address``."""
    if shutil.which("chromium") is None:
        install_packages(["chromium"], print)
    folder.mkdir(parents=True, exist_ok=True)
    alone = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=shutil.which("chromium"), args=alone)
        page = started.new_page(viewport={"width": 1600, "height": 1000})
        page.set_default_timeout(_WAIT_MS)
        expect.set_options(timeout=_WAIT_MS)
        try:
            yield Browser(page, address, folder)
        finally:
            started.close()
