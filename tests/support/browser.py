"""Headless Chromium, for the page that ``inspect --html`` writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tools_needed import missing, program

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--window-size=1280,900",
)


def start_chromium(folder: Path) -> Any:
    """A driver of Selenium that notes what the page asks of the network and of the console."""
    names = "chromium", "chromium-browser", "google-chrome"
    binary = program(*names, package="chromium")
    driver = program("chromedriver", package="chromium-driver")
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
