"""A real browser, and a client that reads the local platform's web page without one."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import requests

__all__ = ["PageReader", "addresses", "launch"]


@contextlib.contextmanager
def launch() -> Iterator[Any]:
    """Run a headless Chromium, which reaches this machine only; skip where there is none.

    :returns: selenium's driver.
    """
    chromium, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not chromedriver:
        pytest.skip("there are no chromium and chromedriver on this machine")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in (
        "--headless=new",
        # Its sandbox needs namespaces, which root and many containers cannot give it.
        "--no-sandbox",
        # /dev/shm is small in a container.
        "--disable-dev-shm-usage",
        "--disable-gpu",
        "--window-size=1200,900",
        "--no-proxy-server",
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost",
    ):
        options.add_argument(argument)
    # Every request of a page, and what it writes on the console.
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    service = webdriver.ChromeService(chromedriver)
    driver = webdriver.Chrome(options, service)
    try:
        driver.set_page_load_timeout(30)
        yield driver
    finally:
        driver.quit()


def addresses(driver: Any) -> list[str]:
    """List what the browser has asked for since the last call."""
    found = []
    for entry in driver.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            found.append(str(message["params"]["request"]["url"]))
    return found


class PageReader:
    """Reads the local platform's web page as a browser does, with the session that a link gives.

    :param link: what ``platform.web_url`` gave.
    """

    def __init__(self, link: str) -> None:
        self.http = requests.Session()
        # No proxy that the environment may name.
        self.http.trust_env = False
        answer = self.http.get(link, timeout=10)
        assert answer.status_code == 200, answer.text
        (self.cookie,) = self.http.cookies
        #: The address that all pages are below.
        self.base = link.partition("/web/")[0] + self.cookie.path

    def get(self, path: str = "", **headers: str) -> requests.Response:
        """Ask for a page."""
        return self.http.get(f"{self.base}/{path}", headers=headers, timeout=10)

    def text(self, path: str = "") -> str:
        """Return a page that is there."""
        answer = self.get(path)
        assert answer.status_code == 200, answer.text
        return answer.text
