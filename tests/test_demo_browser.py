"""The demo in a real browser: Chromium, driven through chromedriver's WebDriver protocol with the standard library."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.test_demo import save_tiny

ROOT = Path(__file__).resolve().parent.parent
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
CHROMEDRIVER = shutil.which("chromedriver")
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the key that the WebDriver standard gives elements

pytest.importorskip("gradio", reason='the demo needs gradio: pip install "varkit[app]"')
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not (CHROMIUM and CHROMEDRIVER), reason="chromium or chromedriver is not installed"),
]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def wait(what: str, condition: Callable[[], Any], seconds: float = 60) -> Any:
    """The first true value of `condition`, asked again and again."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.2)
    raise AssertionError(f"waited {seconds:g} s in vain for: {what}")


@contextmanager
def process(command: list[str], log: Path, **env: str) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as file:
        child = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **env}, stdout=file, stderr=subprocess.STDOUT)
    try:
        yield child
    finally:
        child.terminate()
        try:
            child.wait(20)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:
            return reply.status == 200
    except OSError:
        return False


class Browser:
    """One WebDriver session: the dozen calls the test needs."""

    def __init__(self, driver: str, profile: Path) -> None:
        arguments = ["--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--hide-scrollbars"]
        arguments += [f"--user-data-dir={profile}", "--disable-background-networking", "--window-size=1280,900"]
        options = {"args": arguments, "binary": CHROMIUM}
        always = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        self.base = f"{driver}/session"
        self.base += "/" + self.call("POST", "", {"capabilities": {"alwaysMatch": always}})["sessionId"]

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.base + path, data, {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=120) as reply:
                return json.load(reply)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{method} {path}: {json.load(error)['value']['message']}") from None

    def open(self, url: str) -> None:
        self.call("POST", "/url", {"url": url})

    def run(self, script: str, *args: Any) -> Any:
        return self.call("POST", "/execute/sync", {"script": script, "args": list(args)})

    def find(self, selector: str) -> str:
        return self.call("POST", "/element", {"using": "css selector", "value": selector})[ELEMENT]

    def click(self, selector: str) -> None:
        element = self.find(selector)
        self.run("arguments[0].scrollIntoView({block: 'center'})", {ELEMENT: element})
        self.call("POST", f"/element/{element}/click", {})

    def drag(self, selector: str, start: tuple[float, float], end: tuple[float, float], pointer: str = "mouse") -> None:
        """Press at one place of an element, as shares of its sides, and let go at another.   pointer: mouse, touch."""
        script = "const e = document.querySelector(arguments[0]); e.scrollIntoView({block: 'center'}); "
        box = self.run(script + "const b = e.getBoundingClientRect(); return [b.x, b.y, b.width, b.height]", selector)
        a, b = ([round(box[i] + share * box[i + 2]) for i, share in enumerate(place)] for place in (start, end))
        actions: list[dict[str, Any]] = [{"type": "pointerMove", "x": a[0], "y": a[1], "duration": 0}]
        actions += [{"type": "pointerDown", "button": 0}]
        actions += [{"type": "pointerMove", "x": b[0], "y": b[1], "duration": 400}, {"type": "pointerUp", "button": 0}]
        source = {"type": "pointer", "id": pointer, "parameters": {"pointerType": pointer}, "actions": actions}
        self.call("POST", "/actions", {"actions": [source]})

    def press(self, keys: str) -> None:
        """Press keys one after another, where the focus is."""
        actions = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self.call("POST", "/actions", {"actions": [{"type": "key", "id": "keys", "actions": actions}]})

    def send_file(self, selector: str, path: Path) -> None:
        self.call("POST", f"/element/{self.find(selector)}/value", {"text": str(path)})

    def text(self, selector: str) -> str:
        return self.run("return document.querySelector(arguments[0])?.innerText ?? ''", selector)

    def pictures(self, selector: str) -> int:
        """How many images under `selector` have arrived and been decoded."""
        script = "return [...document.querySelectorAll(arguments[0] + ' img')].filter(i => i.naturalWidth > 0).length"
        return self.run(script, selector)

    def errors(self) -> list[str]:
        """Errors in the browser's console since last asked."""
        return [e["message"] for e in self.call("POST", "/se/log", {"type": "browser"}) if e["level"] == "SEVERE"]

    def width(self, width: int, height: int) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        command = {"cmd": "Emulation.setDeviceMetricsOverride", "params": metrics}
        self.call("POST", "/goog/cdp/execute", command)

    def screenshot(self, path: Path, whole: bool = False) -> None:
        command = {"cmd": "Page.captureScreenshot", "params": {"captureBeyondViewport": whole}}
        path.write_bytes(base64.b64decode(self.call("POST", "/goog/cdp/execute", command)["data"]))

    def quit(self) -> None:
        self.call("DELETE", "")


@pytest.fixture(scope="module")
def shots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where screenshots go: the folder VARKIT_SCREENSHOTS, or a temporary one."""
    folder = os.environ.get("VARKIT_SCREENSHOTS")
    path = Path(folder) if folder else tmp_path_factory.mktemp("screenshots")
    path.mkdir(parents=True, exist_ok=True)
    return path


@contextmanager
def served(command: list[str], log: Path, **env: str) -> Iterator[str]:
    """The address of a demo that this command starts."""
    port = free_port()
    env |= {"GRADIO_SERVER_PORT": str(port), "GRADIO_SERVER_NAME": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *(word.format(port=port) for word in command)]
    with process(command, log, **env) as server:
        url = f"http://127.0.0.1:{port}/"

        def ready() -> bool:
            assert server.poll() is None, log.read_text()
            return answers(url)

        wait("the demo to start", ready, 180)
        yield url
        assert "Traceback" not in log.read_text(), log.read_text()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the demo, served by `python app.py` with a tiny pipeline (or VARKIT_MODEL's)."""
    folder = tmp_path_factory.mktemp("demo")
    model = os.environ.get("VARKIT_MODEL") or str(save_tiny(folder / "tiny-var"))
    with served(["app.py"], folder / "server.log", VARKIT_MODEL=model) as url:
        yield url


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of `varkit demo` with fashion-var and, as real images, those in the repository."""
    folder = tmp_path_factory.mktemp("shipped")
    with np.load(ROOT / "tests" / "data" / "fashion_slice.npz") as file:
        grey = file["arr_0"]
        np.savez(folder / "real.npz", arr_0=np.repeat(grey.reshape(*grey.shape[:3], 1), 3, 3), arr_1=file["arr_1"])
    command = ["-m", "varkit", "demo", "--port", "{port}", "--reference", str(folder / "real.npz")]
    with served(command, folder / "server.log", XDG_CACHE_HOME=str(folder / "cache")) as url:
        yield url


@pytest.fixture(scope="module")
def asking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of `varkit demo` with a tiny model of texts and one that control images steer."""
    from tests.test_demo_steer import save_steered, save_text
    from tests.test_text import save_encoder

    folder = tmp_path_factory.mktemp("asking")
    models = [
        save_steered(folder / "tiny-control"),
        save_text(folder / "tiny-text", save_encoder(folder / "t5"), control=None),
    ]
    command = ["-m", "varkit", "demo", "--port", "{port}", *(f"--model={model}" for model in models)]
    with served(command, folder / "server.log") as url:
        yield url


@pytest.fixture(scope="module")
def moving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of `varkit demo` with a tiny model of clips."""
    pytest.importorskip("av", reason="the extra video is not installed")
    from tests.test_demo_video import save_clips

    folder = tmp_path_factory.mktemp("moving")
    model = save_clips(folder / "tiny-clips")
    with served(["-m", "varkit", "demo", "--port", "{port}", f"--model={model}"], folder / "server.log") as url:
        yield url


@pytest.fixture(scope="module")
def browser(page: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    folder, port = tmp_path_factory.mktemp("chromium"), free_port()
    with process([str(CHROMEDRIVER), f"--port={port}"], folder / "chromedriver.log"):
        wait("chromedriver to start", lambda: answers(f"http://127.0.0.1:{port}/status"))
        session = Browser(f"http://127.0.0.1:{port}", folder / "profile")
        try:
            session.width(1280, 900)
            session.open(page)
            wait("the page to appear", lambda: session.text("#generate-button"))
            yield session
        finally:
            session.quit()


def tab(browser: Browser, name: str) -> None:
    """Open it; on a phone it may stand in the menu of those that have no room, whose buttons come last."""
    script = "[...document.querySelectorAll('.tab-wrapper button')].filter(b => b.textContent.trim() == arguments[0])"
    browser.run(script + ".pop().click()", name)


def test_generate_shows_images_scales_and_command(browser: Browser, shots: Path) -> None:
    tab(browser, "Generate")
    browser.click("#generate-button")
    wait("the run to end", lambda: "network passes" in browser.text("#status"))
    wait("the images", lambda: browser.pictures("#images") >= 4)
    wait("the scales", lambda: browser.pictures("#scales") >= 3)
    assert "varkit sample" in browser.text("#command") and "--seed 0" in browser.text("#command")
    browser.screenshot(shots / "generate-1280.png")
    browser.width(390, 844)
    time.sleep(1)
    assert browser.run("return document.documentElement.scrollWidth") <= 390  # nothing sticks out on a phone
    browser.screenshot(shots / "generate-390.png", whole=True)
    browser.width(1280, 900)
    assert browser.errors() == []


def test_edit_redraws_an_example_and_an_upload(browser: Browser, shots: Path, tmp_path: Path) -> None:
    tab(browser, "Edit")
    wait("the examples", lambda: browser.pictures("#edit-examples") >= 4)
    wait("the preview", lambda: browser.pictures("#painter") == 1)
    first = browser.run("return document.querySelector('#painter img').src")
    browser.run("document.querySelectorAll('#edit-examples img')[1].click()")
    wait("its preview", lambda: browser.run("return document.querySelector('#painter img').src") != first)
    browser.run("document.querySelector('#painter [data-tool=clear]').click()")
    browser.drag("#painter canvas", (0.1, 0.1), (0.9, 0.1))  # the upper row of cells, by hand
    browser.click("#edit-button")
    wait("the edit of the example", lambda: "Redrawn" in browser.text("#edit-status"))
    wait("before and after", lambda: browser.pictures("#result") >= 2)
    assert "Image.Resampling.NEAREST" in browser.text("#snippet")
    marks = re.search(r'"([01/]+)"', browser.text("#snippet"))
    assert marks is not None and set(marks[1].split("/")[0]) == {"1"} and set(marks[1].split("/")[-1]) == {"0"}
    browser.screenshot(shots / "edit-1280.png")
    browser.width(390, 844)
    time.sleep(1)
    assert browser.run("return document.documentElement.scrollWidth") <= 390
    browser.screenshot(shots / "edit-390.png", whole=True)
    browser.width(1280, 900)

    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.jpg")
    empty_upload(browser)
    wait("the file box", lambda: browser.run("return !!document.querySelector('#edit-upload input[type=file]')"))
    browser.send_file("#edit-upload input[type=file]", tmp_path / "photo.jpg")
    wait("the upload", lambda: browser.pictures("#edit-upload") >= 1)
    browser.click("#edit-button")
    wait("the edit of the upload", lambda: "LANCZOS" not in browser.text("#snippet") and ran(browser))
    assert browser.errors() == []


def empty_upload(browser: Browser) -> None:
    box = "#edit-upload button"
    clear = f"{box}[aria-label*=Clear], {box}[title*=Clear], {box}[aria-label*=Remove]"
    browser.run("document.querySelector(arguments[0])?.click()", clear)


def ran(browser: Browser) -> bool:
    return "NEAREST" not in browser.text("#snippet") and "Redrawn" in browser.text("#edit-status")


def test_reconstruct_and_compare_show_what_they_did(browser: Browser, shots: Path) -> None:
    tab(browser, "Reconstruct")
    wait("an example in the box", lambda: browser.pictures("#reconstruct-upload") >= 1)
    browser.click("#reconstruct-button")
    wait("the reconstruction", lambda: "PSNR" in browser.text("#reconstruct-status"))
    wait("its scales", lambda: browser.pictures("#reconstruct-scales") >= 3)
    browser.screenshot(shots / "reconstruct-1280.png")
    tab(browser, "Compare")
    browser.click("#compare-button")
    wait("both sides", lambda: "images are the same" in browser.text("#compare-status"))
    wait("their images", lambda: browser.pictures("#compare-images-B") >= 3)
    browser.screenshot(shots / "compare-1280.png")
    tab(browser, "Evaluate")
    assert "fashion" not in browser.text("#evaluate-scores")
    for name in ("Reconstruct", "Compare", "Evaluate"):
        tab(browser, name)
        browser.width(390, 844)
        time.sleep(1)
        assert browser.run("return document.documentElement.scrollWidth") <= 390
        browser.screenshot(shots / f"{name.lower()}-390.png", whole=True)
        browser.width(1280, 900)
    assert browser.errors() == []


def test_a_too_large_image_is_refused_in_words(browser: Browser, tmp_path: Path) -> None:
    tab(browser, "Edit")
    Image.new("1", (5000, 10)).save(tmp_path / "wide.png")
    empty_upload(browser)
    wait("the file box", lambda: browser.run("return !!document.querySelector('#edit-upload input[type=file]')"))
    browser.send_file("#edit-upload input[type=file]", tmp_path / "wide.png")
    wait("the refusal", lambda: "5000 x 10 pixels" in browser.text("body"))
    assert "Traceback" not in browser.text("body")


def test_nothing_is_loaded_from_elsewhere(browser: Browser, page: str) -> None:
    loaded = browser.run("return performance.getEntriesByType('resource').map(e => e.name)")
    assert [u for u in loaded if not u.startswith((page, "data:", "blob:"))] == []


# ---- control and text --------------------------------------------------------------------------------------------


def on_a_phone(browser: Browser, path: Path) -> None:
    browser.width(390, 844)
    time.sleep(1)
    assert browser.run("return document.documentElement.scrollWidth") <= 390
    browser.screenshot(path, whole=True)
    browser.width(1280, 900)
    time.sleep(0.5)


def test_a_photo_and_a_drawing_steer(browser: Browser, asking: str, shots: Path, tmp_path: Path) -> None:
    browser.open(asking)
    wait("the tab of the first model", lambda: browser.text("#control-button"))  # it is shown first
    pixels = np.zeros((60, 90, 3), np.uint8)
    pixels[15:45, 20:70] = (220, 60, 40)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    browser.send_file("#control-upload input[type=file]", tmp_path / "photo.png")
    wait("the map", lambda: browser.pictures("#control-map") == 1)
    browser.click("#control-button")
    wait("the images", lambda: "images of 24 x 16" in browser.text("#control-status"))
    wait(
        "their pictures", lambda: browser.pictures("#control-images") >= 3 and browser.pictures("#control-scales") >= 4
    )
    assert "--control image.png --extract canny" in browser.text("#control-command").replace("\n", " ")
    browser.screenshot(shots / "control-1280.png")
    on_a_phone(browser, shots / "control-390.png")

    browser.click("#control-source input")
    wait("the choices", lambda: browser.run("return document.querySelectorAll('[role=option]').length") >= 3)
    browser.click("[role=option]:last-of-type")
    wait("the board", lambda: browser.run("return !!document.querySelector('#control-board canvas')"))
    browser.drag("#control-board canvas", (0.2, 0.3), (0.8, 0.3))
    browser.drag("#control-board canvas", (0.5, 0.9), (0.5, 0.4))
    browser.click("#control-button")
    wait("the drawn map", lambda: "--control map.png" in browser.text("#control-command").replace("\n", " "))
    wait("its images", lambda: "images of 24 x 16" in browser.text("#control-status"))
    browser.screenshot(shots / "drawing-1280.png")
    on_a_phone(browser, shots / "drawing-390.png")
    browser.click("#control-board [data-tool=clear]")
    browser.click("#control-button")
    wait("the refusal", lambda: "Nothing is drawn yet" in browser.text("body"))
    assert browser.errors() == []


def test_a_prompt_of_any_script_is_drawn(browser: Browser, asking: str, shots: Path) -> None:
    browser.open(asking)
    wait("the page to appear", lambda: browser.text("#control-button"))
    tab(browser, "Text")
    wait("the tab", lambda: browser.text("#text-button"))
    browser.click("#text-button")
    wait("the refusal", lambda: "the prompt is empty" in browser.text("body"))
    prompt = "قطة حمراء and a dog"
    browser.call("POST", f"/element/{browser.find('#text-prompt textarea')}/value", {"text": prompt})
    browser.click("#text-button")
    wait("the images", lambda: "4 images of 8 x 6" in browser.text("#text-status"))
    wait("their pictures", lambda: browser.pictures("#text-images") == 4)
    assert prompt in browser.text("#text-command").replace("\n", " ")
    browser.screenshot(shots / "text-1280.png")
    on_a_phone(browser, shots / "text-390.png")
    assert browser.errors() == []


# ---- clips ---------------------------------------------------------------------------------------------------------


def test_a_clip_plays_stops_and_goes_on(browser: Browser, moving: str, shots: Path, tmp_path: Path) -> None:
    from varkit.data.video_writing import write_video

    browser.open(moving)
    wait("the tab of the first model", lambda: browser.text("#video-button"))
    video = "const v = document.querySelector('#video-clip video'); return "
    source = "document.querySelector('#video-clip video')?.src ?? ''"
    assert " at once, in " in browser.text("#video-facts")
    browser.click("#video-button")
    wait("the run to end", lambda: "network passes" in browser.text("#video-status"))
    wait("the clip to play", lambda: browser.run(video + "!!v && !v.paused && v.readyState >= 2 && v.currentTime > 0"))
    side = browser.run(video + "[v.videoWidth, v.videoHeight, getComputedStyle(v).imageRendering]")
    assert side[0] == side[1] >= 128 and side[2] == "pixelated"
    assert "varkit sample" in browser.text("#video-command") and "write_video" in browser.text("#video-snippet")
    ready = "return [...document.querySelectorAll('button[id^=video-download]')].filter(e => !e.disabled).length"
    wait("the downloads", lambda: browser.run(ready) == 2)
    browser.screenshot(shots / "video-1280.png")
    on_a_phone(browser, shots / "video-390.png")

    stops = 0
    for _ in range(6):
        set_number(browser, "#video-frames input[type=number]", 125)
        browser.click("#video-button")
        wait("the first block", lambda: "Block" in browser.text("#video-status"))
        browser.click("#video-stop")
        wait("an end", lambda: any(word in browser.text("#video-status") for word in ("Stopped.", "passes")))
        stops += "Stopped." in browser.text("#video-status")
        if stops:
            break
    assert stops
    set_number(browser, "#video-frames input[type=number]", 5)

    clip = np.full((7, 48, 64, 3), 30, np.uint8)
    for number, frame in enumerate(clip):
        frame[10:30, 5 + 5 * number : 25 + 5 * number] = (230, 120, 40)
    write_video(clip, tmp_path / "moving square.gif")
    browser.click("#video-box button")
    wait("the file box", lambda: browser.run("return !!document.querySelector('#video-upload input[type=file]')"))
    browser.send_file("#video-upload input[type=file]", tmp_path / "moving square.gif")
    wait("the frame that is read", lambda: browser.pictures("#video-read") == 1)
    browser.click("#video-count input")
    wait("the choices", lambda: browser.run("return document.querySelectorAll('[role=option]').length") >= 2)
    browser.click("[role=option]:last-of-type")
    wait("the frames that are read", lambda: browser.pictures("#video-read") == 3)
    last = browser.run("return " + source)
    browser.click("#video-button")
    wait("the command", lambda: "--continue clip.gif --given 3" in browser.text("#video-command").replace("\n", " "))
    wait("another clip", lambda: browser.run("return " + source) not in ("", last))
    wait("it to play", lambda: browser.run(video + "!!v && !v.paused && v.currentTime > 0"))
    browser.screenshot(shots / "video-continued-1280.png", whole=True)
    on_a_phone(browser, shots / "video-continued-390.png")

    (tmp_path / "broken.mp4").write_bytes(b"no clip")
    remove = (
        "document.querySelector('#video-upload button[aria-label*=Clear], #video-upload button[aria-label*=emove]')"
    )
    browser.run(remove + "?.click()")
    wait("the file box", lambda: browser.run("return !!document.querySelector('#video-upload input[type=file]')"))
    browser.send_file("#video-upload input[type=file]", tmp_path / "broken.mp4")
    wait("the refusal", lambda: "not a clip that can be read" in browser.text("body"))
    assert browser.errors() == []


# ---- fashion-var, on a phone in the dark --------------------------------------------------------------------------


@pytest.fixture
def phone(browser: Browser, shipped: str) -> Iterator[Browser]:
    browser.width(390, 844)
    browser.open(shipped + "?__theme=dark")
    wait("the page to appear", lambda: browser.text("#generate-button"))
    yield browser
    assert browser.run("return document.documentElement.scrollWidth") <= 390
    assert browser.errors() == []
    browser.width(1280, 900)


def set_number(browser: Browser, selector: str, value: int) -> None:
    script = (
        "const box = document.querySelector(arguments[0]); "
        "Object.getOwnPropertyDescriptor(HTMLInputElement.prototype, 'value').set.call(box, arguments[1]); "
        "for (const kind of ['input', 'change', 'blur']) box.dispatchEvent(new Event(kind, {bubbles: true}))"
    )
    browser.run(script, selector, value)


def test_an_evaluation_shows_scores_contact_sheet_and_report(phone: Browser, shots: Path) -> None:
    tab(phone, "Evaluate")
    wait("the tab", lambda: phone.text("#evaluate-button"))
    set_number(phone, "#evaluate-num input[type=number]", 16)
    phone.click("#evaluate-button")
    wait("the scores", lambda: "16 images drawn and scored" in phone.text("#evaluate-status"), 300)
    scores = phone.text("#evaluate-scores")
    assert all(word in scores for word in ("FD(classifier)", "accuracy", "precision", "nearest neighbour"))
    assert "--num 16" in phone.text("#evaluate-command").replace("\n", " ")
    wait("contact sheet and nearest images", lambda: phone.pictures("#evaluate-pictures") == 2)
    sides = "return [...document.querySelectorAll('#evaluate-scores td')].map(e => e.getBoundingClientRect().width)"
    assert min(phone.run(sides)) > 200  # no column of single letters
    phone.screenshot(shots / "evaluate-390-dark.png", whole=True)


def test_a_finger_and_keys_mark_what_is_redrawn(phone: Browser, shots: Path) -> None:
    tab(phone, "Edit")
    wait("the preview", lambda: phone.pictures("#painter") == 1, 120)
    phone.run("document.querySelector('#painter [data-tool=clear]').click()")
    phone.drag("#painter canvas", (0.6, 0.94), (0.95, 0.94), "touch")
    phone.run("document.querySelector('#painter canvas').focus()")
    phone.press("\ue015\ue014 ")  # down, which only shows the place; right; space
    phone.click("#edit-button")
    wait("the edit", lambda: "Redrawn" in phone.text("#edit-status"))
    marks = re.search(r'"([01/]+)"', phone.text("#snippet").replace("\n", ""))
    assert marks is not None
    assert marks[1].split("/") == ["01000000", *["00000000"] * 6, "00001111"]
    phone.screenshot(shots / "edit-390-dark.png", whole=True)


def test_a_stopped_run_is_left_and_the_next_one_ends(phone: Browser) -> None:
    """Three times, for a click right after Stop was lost now and then. A run may end before Stop is reached; that is
    no stop, and is tried again."""
    stops = 0
    for _ in range(12):
        set_number(phone, "#num input[type=number]", 16)
        phone.click("#generate-button")
        wait("the first step", lambda: "Step" in phone.text("#status"))
        phone.click("#generate-stop")
        wait("an end", lambda: any(word in phone.text("#status") for word in ("Stopped.", "16 images")))
        stops += "Stopped." in phone.text("#status")
        set_number(phone, "#num input[type=number]", 2)
        phone.click("#generate-button")
        wait("the next run", lambda: "2 images" in phone.text("#status"))
        if stops == 3:
            break
    assert stops == 3
