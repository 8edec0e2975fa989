"""A page in a browser, which tells of every request and of every error."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait


@dataclass
class Browser:
    """A page in a browser."""

    driver: webdriver.Chrome

    def open(self, page: Path, *, dark: bool = False, width: int = 1300) -> None:
        """Opens a file, forgetting what was logged before."""
        phone = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
        self.prefer("dark" if dark else "light")
        self.driver.get_log("performance")
        self.driver.get_log("browser")
        self.run("window.isFormer = true")
        self.driver.get(page.as_uri())
        loaded = "return document.readyState === 'complete' && !window.isFormer"
        self.wait(lambda: self.run(loaded))

    def wait(self, holds: Callable[[], bool]) -> None:
        """Waits until something holds; what changes with the reader's preferences does so a moment later."""
        moving = [StaleElementReferenceException]
        WebDriverWait(self.driver, 30, poll_frequency=0.05, ignored_exceptions=moving).until(lambda _: holds())

    def prefer(self, scheme: str) -> None:
        """Lets the reader prefer `light` or `dark`."""
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})

    def find(self, selector: str) -> WebElement:
        """The first element."""
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> list[WebElement]:
        """All elements."""
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def run(self, script: str, *arguments: Any) -> Any:
        """Runs JavaScript."""
        return self.driver.execute_script(script, *arguments)

    def slide(self, value: int) -> None:
        """Moves the timeline's slider."""
        slider = self.find("[data-part=slider]")
        self.run("arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input'))", slider, value)

    def click(self, element: WebElement) -> None:
        """Clicks, wherever on the page the element is."""
        self.run("arguments[0].dispatchEvent(new MouseEvent('click', {bubbles: true}))", element)

    def hover(self, element: WebElement) -> str:
        """Points at an element, and gives the hint that appears."""
        self.run(
            "arguments[0].dispatchEvent(new PointerEvent('pointermove', {bubbles: true, clientX: 50, clientY: 50}))",
            element,
        )
        return self.find(".hint").text

    @property
    def errors(self) -> list[str]:
        """What the page complained of."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    @property
    def requests(self) -> list[str]:
        """Addresses that were asked for, but for those inside the page."""
        events = (json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance"))
        asked = (e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent")
        return [address for address in asked if not address.startswith(("data:", "blob:"))]
