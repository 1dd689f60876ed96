"""Chromium without a window, as Debian's packages `chromium` and `chromium-driver` install it."""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BINARIES = {name: shutil.which(name) for name in ("chromium", "chromedriver")}

_ARGUMENTS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)


class Browser:
    """One tab.

    Args:
        driver: Selenium's driver.
    """

    def __init__(self, driver: Any) -> None:
        self._driver = driver

    def open(self, page: Path | str, *, width: int, dark: bool = False) -> None:
        """Open a page, and wait until its figures are drawn.

        Args:
            page: A file, or a URL.
            width: Width of the window, in CSS pixels; a phone below 600.
            dark: Whether the user prefers dark colours.
        """
        self._driver.get("about:blank")
        self.log()
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self._driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.prefer(dark)
        self._driver.get(page.as_uri() if isinstance(page, Path) else page)
        self.run("return document.fonts.ready.then(() => null)")

    def prefer(self, dark: bool) -> None:
        """Set whether the user prefers dark colours, and wait until the page has changed."""
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self._driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        self.run("return new Promise((done) => requestAnimationFrame(() => setTimeout(() => done(null), 100)))")

    def run(self, script: str, *arguments: Any) -> Any:
        """Run a script in the page, with `arguments` as JavaScript's, and return its result."""
        return self._driver.execute_script(script, *arguments)

    def log(self) -> tuple[list[str], list[str]]:
        """Return the messages of the console and the URLs that were requested since the last call."""
        console = [entry["message"] for entry in self._driver.get_log("browser")]
        events = [json.loads(entry["message"])["message"] for entry in self._driver.get_log("performance")]
        sent = [event["params"] for event in events if event["method"] == "Network.requestWillBeSent"]
        return console, [params["request"]["url"] for params in sent]

    def screenshot(self, path: Path, *, width: int, height: int, top: int = 0) -> None:
        """Write a part of the page as PNG.

        Args:
            path: The file.
            width, height, top: The part, in CSS pixels.
        """
        clip = {"x": 0, "y": top, "width": width, "height": height, "scale": 1}
        options = {"format": "png", "captureBeyondViewport": True, "clip": clip}
        path.write_bytes(base64.b64decode(self._driver.execute_cdp_cmd("Page.captureScreenshot", options)["data"]))


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """Start Chromium, and stop it when the block ends."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(BINARIES["chromium"])
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        for argument in (*_ARGUMENTS, f"--user-data-dir={profile}"):
            options.add_argument(argument)
        service = webdriver.ChromeService(str(BINARIES["chromedriver"]))
        driver = webdriver.Chrome(options=options, service=service)
        try:
            yield Browser(driver)
        finally:
            driver.quit()
