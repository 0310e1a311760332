"""Headless Chromium, for the page that ``inspect --html`` writes."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

REQUIRED = "SEPLLM_REQUIRE_BROWSER"
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--window-size=1280,900",
)


def missing(reason: str) -> None:
    """Skip, or fail where a browser has to be there."""
    if os.environ.get(REQUIRED) == "1":
        pytest.fail(f"{REQUIRED}=1 is set, and {reason}")
    pytest.skip(reason)


def start_chromium(folder: Path) -> Any:
    """A driver of Selenium that notes what the page asks of the network and of the console."""
    names = "chromium", "chromium-browser", "google-chrome"
    binary = next((path for path in map(shutil.which, names) if path), None)
    driver = shutil.which("chromedriver")
    if binary is None or driver is None:
        missing("needs Chromium and chromedriver (Debian: apt install chromium chromium-driver)")
    try:
        from selenium import webdriver
    except ImportError:
        missing("needs selenium: pip install selenium")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in (*FLAGS, f"--user-data-dir={folder}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.ChromeService(executable_path=driver)
    return webdriver.Chrome(options=options, service=service)


def addresses_asked(browser: Any) -> set[str]:
    """What the browser was asked to load since this was last called, its own pages left out."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [event for event in events if event["method"] == "Network.requestWillBeSent"]
    asked = [event["params"] for event in sent]
    return {one["request"]["url"] for one in asked if not one["documentURL"].startswith("chrome")}
