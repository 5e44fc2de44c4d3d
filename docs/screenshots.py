"""Make the pictures in `docs/screenshots`: the page of a run of the demo program, light and dark.

    python docs/screenshots.py

It runs the program under `isograd run`, writes its page with `isograd report` and photographs that in Chromium.
"""

from __future__ import annotations

import io
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

_HERE = Path(__file__).parent
_PROGRAM = _HERE.parent / "src" / "isograd" / "demo" / "deep_sigmoid.py"

_SECTIONS = {"verdict": ("verdict", "loss"), "heatmap": ("signal",), "depth": ("depth",)}
"""Name of a picture and the sections in it."""

_MOST = 150_000  # bytes of a picture


def main() -> None:
    """Run the program and write a picture of each part of its page in each theme."""
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        page = _report(Path(folder))
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        for theme in ("light", "dark"):
            for name, picture in _pictures(browser, page, theme):
                _write(_HERE / "screenshots" / f"{name}-{theme}.png", picture)
        browser.close()


def _report(folder: Path) -> Path:
    """The page of a run of the program in `folder`."""
    isograd = (sys.executable, "-m", "isograd")
    # Deep readings throughout: on a slow machine the default budget leaves the late steps out.
    often = ("--every", "10", "--budget", "1")
    subprocess.run([*isograd, "run", *often, str(_PROGRAM)], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    subprocess.run([*isograd, "report", "-o", "report.html"], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return folder / "report.html"


def _pictures(browser: Browser, file: Path, theme: str) -> Iterator[tuple[str, bytes]]:
    page = browser.new_page(viewport={"width": 1280, "height": 4000}, color_scheme=theme)  # type: ignore[arg-type]
    page.goto(file.as_uri())
    page.wait_for_selector("html[data-ready]")
    page.wait_for_selector("#plot-depth .main-svg")
    for name, sections in _SECTIONS.items():
        yield name, _picture(page, sections)
    page.close()


def _picture(page: Page, sections: tuple[str, ...]) -> bytes:
    """From the top of the first section to the end of the last, with a margin."""
    boxes = [page.locator(f"#{section}").bounding_box() for section in sections]
    top, bottom = boxes[0], boxes[-1]
    assert top is not None
    assert bottom is not None
    start = top["y"] + 12
    clip = {
        "x": top["x"] - 24,
        "y": start,
        "width": top["width"] + 48,
        "height": bottom["y"] + bottom["height"] + 24 - start,
    }
    return page.screenshot(clip=clip)  # type: ignore[arg-type]


def _write(path: Path, picture: bytes) -> None:
    """Keep a picture in as many colours as fit."""
    image = Image.open(io.BytesIO(picture)).convert("RGB")
    for colours in (256, 128, 64, 32):
        small = io.BytesIO()
        image.quantize(colours, dither=Image.Dither.NONE).save(small, "PNG", optimize=True)
        if small.tell() <= _MOST:
            break
    path.write_bytes(small.getvalue())
    print(path.relative_to(_HERE), f"{small.tell() / 1000:.0f} kB")


if __name__ == "__main__":
    main()
