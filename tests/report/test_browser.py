"""Pages in a browser: Chromium without a screen, WebGL by SwiftShader.

Where Chromium, Playwright or the viewer's wheel is missing these tests fail: they are slow, and
whoever asks for slow tests wants to know.
"""

import contextlib
import importlib
import io
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from pages import RESULT, SPACING, chest
from PIL import Image
from test_evaluation_page import ROWS, metrics

from deepsc_jax.report.evaluation_page import evaluation_page
from deepsc_jax.report.pictures import scan_picture
from deepsc_jax.report.scan_page import scan_page
from deepsc_jax.report.viewer import installed

pytestmark = pytest.mark.slow
WEBGL = ["--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
NO_WEBGL = ["--disable-gpu", "--disable-3d-apis"]
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
PATIENCE_MS = 120_000  # SwiftShader draws on the processor, which others may use


@contextlib.contextmanager
def opened(
    path: pathlib.Path, *, arguments: list[str] = WEBGL, size: dict[str, int] = DESKTOP
) -> Iterator[Any]:
    """The page at `path`; at the end it must have said nothing and asked nobody."""
    sync_api = importlib.import_module("playwright.sync_api")
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or "chromium"
    said: list[str] = []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium, args=[*arguments, "--no-sandbox"], timeout=PATIENCE_MS
        )
        page = browser.new_page(viewport=size)
        page.set_default_timeout(PATIENCE_MS)
        page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: said.append(f"dialog: {dialog.message}"))
        page.on("request", lambda request: said.append(request.url))
        page.goto(path.as_uri())
        yield page
        browser.close()
    asked = [line for line in said if line != path.as_uri() and not line.startswith("data:")]
    assert asked == []


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("page")
    values, lung, found = chest()
    scan_picture(
        folder / "picture.png",
        values,
        found.lesion_probability,
        found.lesion_mask,
        found.evidence,
        RESULT["probabilities"],
        spacing_mm=SPACING,
        title="a scan",
        lung_mask=lung,
    )
    viewer = installed()
    assert viewer is not None, "the extra `report` is not installed: pip install ipyniivue==2.4.*"
    scan_page(
        folder / "report.html",
        viewer,
        values,
        lung,
        found,
        RESULT,
        spacing_mm=SPACING,
        title="<script>alert(1)</script>",
        picture=folder / "picture.png",
    )
    return folder / "report.html"


def drawn(page: Any, canvas: str = "slices") -> np.ndarray:
    """What a canvas shows, (height, width, RGB)."""
    page.wait_for_timeout(300)  # a frame
    return np.asarray(
        Image.open(io.BytesIO(page.locator(f"#{canvas}").screenshot())).convert("RGB")
    )


def wait(page: Any) -> None:
    page.wait_for_selector("html[data-viewer]", state="attached")
    assert page.evaluate("document.documentElement.dataset.viewer") == "drawn"


def set_slider(page: Any, name: str, value: int) -> None:
    page.locator(f"#{name}").fill(str(value))


def orange(image: np.ndarray) -> int:
    """How many pixels are of the lesions' colour: much red, less green, little blue."""
    red, green, blue = image.astype(int).transpose(2, 0, 1)
    return int(((red - blue > 60) & (red - green > 15)).sum())


def test_the_controls_of_a_scans_page_do_what_they_say(scan: pathlib.Path) -> None:
    with opened(scan) as page:
        wait(page)
        assert page.locator("#fallback").is_hidden()
        assert page.locator("h1").text_content() == "<script>alert(1)</script>"
        first = drawn(page)
        assert first.std() > 20

        # it begins in the largest lesion, and the place says what is there
        assert "lesion yes" in (page.locator("#place").text_content() or "")
        shown = orange(first)
        assert shown > 500

        # the axial slider moves the slice
        set_slider(page, "axial", 5)
        assert page.locator("#axial-at").text_content() == "5 of 24"
        assert "axial 5;" in (page.locator("#place").text_content() or "")
        assert "lesion no" in (page.locator("#place").text_content() or "")
        moved = drawn(page)
        assert np.abs(moved.astype(int) - first).mean() > 1

        # a press on a lesion jumps there
        page.locator("[data-at]").first.click()
        assert "lesion yes" in (page.locator("#place").text_content() or "")
        assert "value −2" in (page.locator("#place").text_content() or "")  # −300 and its column
        np.testing.assert_array_equal(drawn(page), first)

        # opacity changes pixels, and the switch takes the lesions away
        set_slider(page, "fade-1", 100)
        assert page.locator("#fade-1-at").text_content() == "100 %"
        full = drawn(page)
        assert orange(full) > shown
        page.locator("#show-1").uncheck()
        without = drawn(page)
        assert orange(without) < shown / 4  # letters are left
        space = drawn(page, "space")
        page.locator("#show-1").check()
        assert orange(drawn(page, "space")) > orange(space) + 100

        # evidence is drawn once it is switched on
        page.locator("#show-1").uncheck()
        page.locator("#show-2").check()
        assert np.abs(drawn(page).astype(int) - without).mean() > 1
        page.locator("#show-2").uncheck()

        # a window changes the grey values
        page.get_by_role("button", name="Mediastinum").click()
        assert drawn(page).mean() < without.mean() - 1

        # a plane alone, and 3D alone
        page.get_by_role("button", name="Coronal", exact=True).click()
        assert page.locator("#space").is_hidden()
        assert np.shape(drawn(page)) != np.shape(without)
        page.get_by_role("button", name="3D", exact=True).click()
        assert page.locator("#slices").is_hidden()
        assert drawn(page, "space").std() > 1


def test_the_keyboard_alone_moves_the_slices(scan: pathlib.Path) -> None:
    with opened(scan) as page:
        wait(page)
        page.locator("#slices").focus()
        at = page.evaluate("page.at")
        for key in ("PageUp", "ArrowDown", "ArrowDown", "ArrowRight"):
            page.keyboard.press(key)
        depth, height, width = at
        assert page.evaluate("page.at") == [depth + 1, height + 2, width + 1]
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.id") == "space"


def test_a_click_in_the_slices_moves_the_cross_hair_to_what_is_there(scan: pathlib.Path) -> None:
    with opened(scan) as page:
        wait(page)
        page.get_by_role("button", name="Axial", exact=True).click()
        set_slider(page, "axial", 8)  # the small lesion's, on the patient's right and in front
        box = page.locator("#slices").bounding_box()
        image = drawn(page)
        red, green, blue = image.astype(int).transpose(2, 0, 1)
        rows, columns = np.nonzero((red - blue > 60) & (red - green > 15) & (red - green < 120))
        assert columns.size
        row, column = np.median(rows), np.median(columns)
        assert column < image.shape[1] / 2
        page.mouse.click(box["x"] + column, box["y"] + row)
        depth, height, width = page.evaluate("page.at")
        assert depth == 7
        assert 12 <= height < 16
        assert 12 <= width < 16
        assert "lesion yes" in (page.locator("#place").text_content() or "")


@pytest.mark.parametrize("arguments", [NO_WEBGL])
def test_without_webgl_the_picture_is_shown_and_the_reason(
    scan: pathlib.Path, arguments: list[str]
) -> None:
    with opened(scan, arguments=arguments) as page:
        page.wait_for_selector("html[data-viewer]", state="attached")
        assert page.locator("#stage").is_hidden()
        assert "WebGL 2" in (page.locator("#why").text_content() or "")
        assert page.locator("#fallback img").is_visible()
        assert page.evaluate("document.querySelector('#fallback img').naturalWidth") > 100
        assert page.locator("[data-at]").count() == 2


def test_a_phone_shows_all_of_a_page_in_its_width(scan: pathlib.Path) -> None:
    with opened(scan, size=PHONE) as page:
        wait(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
        assert drawn(page).std() > 20


@pytest.mark.parametrize("size", [DESKTOP, PHONE])
def test_the_table_of_scans_sorts_and_figures_that_are_undefined_stay_last(
    tmp_path: pathlib.Path, size: dict[str, int]
) -> None:
    path = tmp_path / "report.html"
    evaluation_page(path, metrics(ROWS), ROWS, {}, title="Test")

    def order(page: Any) -> list[str]:
        return page.locator("#scans tbody tr td:first-child").all_text_contents()

    with opened(path, size=size) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
        assert order(page)[0] == "wrong"
        head = page.locator("#scans th", has_text="DSC")
        head.locator("button").click()
        assert order(page)[:3] == ["poor", "good", "wrong"]
        assert head.get_attribute("aria-sort") == "ascending"
        head.locator("button").click()
        assert order(page)[:3] == ["wrong", "good", "poor"]
        assert sorted(order(page)[3:]) == ["clean", "marked"]
        page.locator("#scans th", has_text="Scan").locator("button").press("Enter")
        assert order(page) == ["clean", "good", "marked", "poor", "wrong"]
        sizes = page.evaluate("[...document.images].map((image) => image.naturalWidth)")
        assert min(sizes) > 100
