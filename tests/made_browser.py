"""A headless Chromium for tests of pages. chromedriver speaks plain JSON over HTTP (W3C WebDriver)."""

import contextlib
import json
import re
import shutil
import subprocess
import urllib.request

import pytest

KEYS = {"tab": "\ue004", "left": "\ue012", "up": "\ue013", "right": "\ue014", "down": "\ue015"}
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"     # the name under which the protocol gives an element's id


class Browser:
    """One window. `send` is the protocol, the rest is what tests ask of it."""

    def __init__(self, address, session):
        self.address = f"{address}/session/{session}"

    def send(self, path, **content):
        return ask(f"{self.address}/{path}", content)

    def get(self, path):
        return ask(f"{self.address}/{path}")

    def run(self, script, *arguments):
        """What a script returns."""
        return self.send("execute/sync", script=script, args=arguments)

    def find(self, selector):
        return self.send("element", using="css selector", value=selector)[ELEMENT]

    def click(self, selector):
        self.send(f"element/{self.find(selector)}/click")

    def text(self, selector):
        return self.run("return document.querySelector(arguments[0]).textContent", selector)

    def spoken(self, selector):
        """Role and name of an element, as a screen reader is told them."""
        element = self.find(selector)
        return tuple(self.get(f"element/{element}/computed{what}") for what in ("role", "label"))

    def press(self, *keys):
        """Keys for whatever has the focus, each a name in KEYS or a letter."""
        strokes = [{"type": kind, "value": KEYS.get(key, key)} for key in keys for kind in ("keyDown", "keyUp")]
        self.send("actions", actions=[{"type": "key", "id": "keyboard", "actions": strokes}])

    def point(self, selector, x, y, click=False):
        """Move the pointer to pixels from the centre of an element."""
        self.run("document.querySelector(arguments[0]).scrollIntoView({block: 'center'})", selector)
        moves = [{"type": "pointerMove", "duration": 0, "x": x, "y": y, "origin": {ELEMENT: self.find(selector)}}]
        if click:
            moves += [{"type": kind, "button": 0} for kind in ("pointerDown", "pointerUp")]
        self.send("actions", actions=[{"type": "pointer", "id": "mouse", "actions": moves}])

    @contextlib.contextmanager
    def telephone(self, width):
        """A telephone so wide, in its dark mode."""
        def emulate(command, **values):
            self.send("goog/cdp/execute", cmd=f"Emulation.{command}", params=values)
        emulate("setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=True)
        emulate("setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
        try:
            yield
        finally:
            emulate("clearDeviceMetricsOverride")
            emulate("setEmulatedMedia", features=[])


def ask(address, content=None, method=None):
    """The value that the driver answers with."""
    body = None if content is None else json.dumps(content).encode()
    request = urllib.request.Request(address, body, {"Content-Type": "application/json"}, method=method)
    with urllib.request.urlopen(request, timeout=60) as reply:
        return json.load(reply)["value"]


@contextlib.contextmanager
def open_browser(profile):
    """A browser with an empty profile folder; the test is skipped where there is none."""
    programs = shutil.which("chromium"), shutil.which("chromedriver")
    if not all(programs):
        pytest.skip("needs chromium and chromedriver")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
             f"--user-data-dir={profile}"]
    with subprocess.Popen([programs[1], "--port=0"], stdout=subprocess.PIPE, text=True) as driver:
        try:
            told = next(filter(None, (re.search(r"on port (\d+)\.", line) for line in driver.stdout)))
            address = f"http://127.0.0.1:{told[1]}"
            options = {"binary": programs[0], "args": flags}
            session = ask(f"{address}/session", {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options}}})
            browser = Browser(address, session["sessionId"])
            yield browser
            ask(browser.address, method="DELETE")
        finally:
            driver.terminate()
