"""The pictures of the page: docs/page-light.png and docs/page-phone.png, from a chat with SmolLM2.

    python benchmarks/screenshots.py

It starts `mlx-lqr serve demo --concept ocean`, asks a question in Chromium, and moves the slider while the answer is
written. Look at both before you commit them.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
from playwright.sync_api import Browser, Page, ViewportSize, sync_playwright

DOCS = Path(__file__).resolve().parents[1] / "docs"
QUESTION = "What did you do this morning?"
SEED, TOKENS = "3", "95"
MOVED_AT = 15
"""Words of the steered answer after which the slider moves from 0."""
PATIENCE = 300_000
"""Milliseconds, for a fit on a busy machine."""


@contextmanager
def served(port: int, *options: str) -> Iterator[str]:
    """The address of a server that has loaded its model."""
    command = [sys.executable, "-m", "mlx_lqr", "serve", "demo", "--concept", "ocean", "--port", str(port), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            for line in server.stdout:
                if found := re.search(r"http://[\d.]+:\d+", line):
                    yield found[0]
                    return
            raise click.ClickException("the server ended before it was ready")
        finally:
            server.terminate()


def ask(page: Page, strength: str) -> None:
    """Ask with the concept off, and steer at `strength` once a few words are there."""
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Seed").fill(SEED)
    page.get_by_label("Most tokens").fill(TOKENS)
    page.keyboard.press("Escape")
    page.get_by_role("button", name="ocean: Off").click()
    page.get_by_label("Your question").fill(QUESTION)
    page.get_by_label("Your question").press("Enter")
    words = f"() => (document.querySelector('.answer.steered .prose')?.innerText ?? '').split(' ').length > {MOVED_AT}"
    page.wait_for_function(words)
    page.get_by_role("button", name=f"ocean: {strength}").click()
    page.get_by_role("button", name="Send").wait_for()


def opened(browser: Browser, address: str, size: ViewportSize, scale: float, scheme: str) -> Page:
    context = browser.new_context(
        viewport=size, device_scale_factor=scale, color_scheme="dark" if scheme == "dark" else "light"
    )
    context.set_default_timeout(PATIENCE)
    page = context.new_page()
    page.goto(address)
    return page


@click.command()
@click.option("--port", default=8093)
@click.option("--strength", default="Normal", help="The button that is pressed.")
@click.option("-o", "--output", default=DOCS, type=click.Path(path_type=Path, file_okay=False))
def main(port: int, strength: str, output: Path) -> None:
    executable = shutil.which("chromium") or shutil.which("google-chrome")
    with (
        served(port) as address,
        sync_playwright() as playwright,
        playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"]) as browser,
    ):
        for name, size, scale, scheme in (
            ("page-light", ViewportSize(width=1180, height=640), 1.5, "light"),
            ("page-phone", ViewportSize(width=390, height=844), 1.5, "dark"),
        ):
            page = opened(browser, address, size, scale, scheme)
            ask(page, strength)
            page.screenshot(path=output / f"{name}.png")
            print(f"Wrote {output / name}.png")


if __name__ == "__main__":
    main()
