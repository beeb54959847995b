"""An installed chromium, driven by selenium: what the page does is seen where it is read."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import pytest

_CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def missing(reason: str) -> NoReturn:
    """A skip on a user's machine, a failure in CI, which would otherwise pass without a browser for ever."""
    if os.environ.get("CI", "").lower() in {"1", "true"}:
        pytest.fail(f"CI must test the page in a browser: {reason}", pytrace=False)
    pytest.skip(reason)


def installed(names: tuple[str, ...]) -> str:
    for name in names:
        if path := shutil.which(name):
            return path
    missing(f"there is no {names[0]} on this machine: `make setup-browser` installs one where it may.")


@contextmanager
def open_browser() -> Iterator[Any]:
    """A driver whose logs keep the console and every request."""
    chromium, chromedriver = installed(_CHROMIUM), installed(("chromedriver",))
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    # Containers lack what the sandbox and the shared memory need; only files of these tests are opened
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,900"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(chromedriver))
    try:
        yield driver
    finally:
        driver.quit()


def visit(driver: Any, path: Path) -> None:
    """Open a file; logs then begin with it."""
    driver.get("about:blank")
    driver.get_log("browser")
    driver.get_log("performance")
    driver.get(path.as_uri())


def console(driver: Any) -> list[str]:
    return [entry["message"] for entry in driver.get_log("browser")]


def requests(driver: Any) -> list[str]:
    """Addresses asked for since the last call, without what the page carries itself."""
    messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    found = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    return [url for url in found if not url.startswith("data:")]
