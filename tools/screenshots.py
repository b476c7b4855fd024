"""Pictures of a report's token inspector, as docs/report.md shows them: on a desk in the dark, on a phone in light.

    pip install -r requirements/browser.txt                                # and a Chromium: apt-get install chromium
    python tools/screenshots.py runs/quickstart/report.html docs/images/inspector
    python tools/screenshots.py runs/smollm2_arithmetic/report.html docs/images/inspector_smollm2

Writes NAME.png and NAME_phone.png: the incorrect rollout with the most conflict, and the token on which both models
differ most.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

WAYS = {"": (1200, 860, "dark"), "_phone": (390, 860, "light")}  # width and height in pixels, colour scheme


def picture(browser: Browser, report: Path, target: Path, width: int, height: int, scheme: str) -> None:
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
    page.goto(report.resolve().as_uri())
    page.wait_for_selector("#inspector:not([hidden])")
    page.select_option("#kind", "incorrect")
    page.select_option("#order", "conflict")
    page.locator("#list .row:not([hidden])").first.click()
    tokens = page.locator("#tokens .token")
    shades = tokens.evaluate_all(
        "all => all.map(one => parseFloat(getComputedStyle(one).getPropertyValue('--shade')) || 0)"
    )
    tokens.nth(shades.index(max(shades))).hover()
    page.locator("#inspector").screenshot(path=target)
    page.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path)
    parser.add_argument("name", type=Path, help="of the pictures, without what is added to it")
    arguments = parser.parse_args()
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for added, way in WAYS.items():
            picture(browser, arguments.report, arguments.name.with_name(f"{arguments.name.name}{added}.png"), *way)
        browser.close()


if __name__ == "__main__":
    main()
