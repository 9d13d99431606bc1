"""The demo page in headless Chromium (Debian's package `chromium`), on a large screen and on a phone's."""

import re
import shutil
from io import BytesIO

import numpy as np
import pytest
from PIL import Image
from small_models import small_model
from transformers import pipeline

from transformers_degmix import DeGMixImageProcessorPil
from transformers_degmix.data.rooms import render_room
from transformers_degmix.demo.page import LAUNCH_OPTIONS, build_demo
from transformers_degmix.demo.readings import read_point


CHROMIUM = shutil.which("chromium")
if CHROMIUM is None:
    pytest.skip("needs the browser `chromium`", allow_module_level=True)
sync_api = pytest.importorskip("playwright.sync_api", reason="needs the package `playwright`")

# As root, without a GPU, and without the browser's own connections
FLAGS = (
    "--no-sandbox --use-angle=swiftshader --enable-unsafe-swiftshader --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync"
).split()
SIZE = (120, 160)
# Milliseconds, of waiting for what appears within seconds if nothing else takes the cores
LIMIT = 900_000
sync_api.expect.set_options(timeout=LIMIT)


@pytest.fixture(scope="module")
def predictor():
    model = small_model()
    processor = DeGMixImageProcessorPil(tasks=model.config.tasks, size_divisor=32)
    return pipeline("multi-task-dense-prediction", model=model, image_processor=processor)


@pytest.fixture(scope="module")
def url(predictor):
    example = Image.fromarray(render_room("test", 1, SIZE)["image"])
    page = build_demo(predictor.model, predictor.image_processor, [example])
    _, url, _ = page.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, **LAUNCH_OPTIONS)
    yield url
    page.close(verbose=False)


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS, timeout=LIMIT)
        yield browser
        browser.close()


@pytest.mark.parametrize("width, height, is_phone", [(1280, 900, False), (390, 844, True)])
def test_every_panel_of_a_photo(browser, url, predictor, tmp_path, width, height, is_phone):
    Image.fromarray(render_room("test", 0, SIZE)["image"]).save(tmp_path / "room.png")
    predictions = predictor(str(tmp_path / "room.png"))
    (tmp_path / "text.png").write_text("no image")
    context = browser.new_context(viewport={"width": width, "height": height}, is_mobile=is_phone, has_touch=is_phone)
    page, errors, elsewhere = context.new_page(), [], []
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    own = (url, "data:", "blob:")
    page.on("request", lambda request: None if request.url.startswith(own) else elsewhere.append(request.url))
    page.set_default_timeout(LIMIT)
    page.goto(url)

    def upload(name: str):
        page.locator("input[type=file]").first.set_input_files(tmp_path / name)

    def open_tab(name: str):
        tab = page.get_by_role("tab", name=name)
        if not tab.is_visible():  # behind the button for what does not fit
            page.locator(".overflow-menu > button").click()
            tab = page.locator(".overflow-dropdown button", has_text=name)
        tab.click()

    page.get_by_text("Drop Image Here").wait_for()
    upload("text.png")
    page.get_by_text("not an image of a format that can be read").wait_for()
    page.get_by_text("Drop Image Here").wait_for()
    upload("room.png")
    page.get_by_text("Shown at 160 x 120 pixels.").wait_for()
    panels = page.locator(".panels").first.locator("img")
    sync_api.expect(panels).to_have_count(7)
    for index in range(7):
        panels.nth(index).scroll_into_view_if_needed()
        assert panels.nth(index).evaluate("image => image.decode().then(() => image.naturalWidth)") == 160

    box = panels.nth(2).bounding_box()
    panels.nth(2).click(position={"x": box["width"] / 4 + 0.1, "y": box["height"] / 2 + 0.1})
    reading = page.locator(".readings b")
    reading.wait_for()
    row, column = map(int, re.findall(r"\d+", reading.inner_text()))
    assert abs(row - 60) <= 1 and abs(column - 40) <= 1
    shown = page.locator(".readings").first.inner_text()
    for task, value in read_point(predictions, predictor.model.config.tasks, row, column).items():
        assert f"{task}: {value}" in shown
    if is_phone:  # it stays in sight
        assert reading.evaluate("e => e.getBoundingClientRect().bottom <= window.innerHeight")

    open_tab("Compare")
    page.get_by_label("normals").first.check()
    sync_api.expect(page.locator(".slider-wrap img:visible")).to_have_count(2)
    open_tab("3-D")
    canvas = page.locator("canvas")
    canvas.wait_for()
    page.wait_for_function("() => performance.getEntriesByType('resource').some(entry => entry.name.endsWith('.glb'))")
    for _ in range(LIMIT // 500):
        page.wait_for_timeout(500)
        pixels = np.array(Image.open(BytesIO(canvas.screenshot())).convert("RGB"))
        if len(np.unique(pixels.reshape(-1, 3), axis=0)) > 100:
            break
    else:
        pytest.fail("the surface does not appear")
    open_tab("Attention")
    sync_api.expect(page.locator(".shares td").first).to_be_visible()
    sync_api.expect(page.locator(".panels img:visible")).to_have_count(6)
    open_tab("Files")
    page.get_by_text("room.npz").or_(page.locator("a[href$='room.npz']")).first.wait_for()

    assert page.evaluate("document.documentElement.scrollWidth") <= width
    context.close()
    assert not errors and not elsewhere
