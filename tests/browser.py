"""A headless Chromium, driven over the WebDriver protocol; nothing to install beside the browser and its driver."""

import json
import re
import shutil
import subprocess
import tempfile
from contextlib import contextmanager
from urllib.request import Request, urlopen

FLAGS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")


class Browser:
    """One window."""

    def __init__(self, address, profile):
        self.address = address
        options = {"binary": BROWSER, "args": [*FLAGS, f"--user-data-dir={profile}"]}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"}}
        self.session = self.ask("POST", "", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]

    def ask(self, method, path, body=None):
        session = f"/{self.session}" if hasattr(self, "session") else ""
        data = None if body is None else json.dumps(body).encode()
        request = Request(f"{self.address}/session{session}{path}", data, {"Content-Type": "application/json"})
        request.get_method = lambda: method
        with urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def open(self, path, width, height=900):
        """Show a file in a window of so many pixels; narrower than a desktop's window can be."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.ask("POST", "/goog/cdp/execute", {"cmd": "Emulation.setDeviceMetricsOverride", "params": size})
        self.ask("POST", "/url", {"url": path.as_uri()})

    def run(self, script, *args):
        return self.ask("POST", "/execute/sync", {"script": script, "args": args})

    def press(self, keys):
        """Type into whatever has the focus."""
        actions = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self.ask("POST", "/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": actions}]})

    def log(self, kind):
        return self.ask("POST", "/se/log", {"type": kind})

    def requests(self, page):
        """List the addresses that a page asked for; the browser's first page asks for its own."""
        messages = [json.loads(entry["message"])["message"] for entry in self.log("performance")]
        sent = [message for message in messages if message["method"] == "Network.requestWillBeSent"]
        return [m["params"]["request"]["url"] for m in sent if m["params"]["documentURL"] == page.as_uri()]


@contextmanager
def browser():
    """Start a browser and end it."""
    driver = subprocess.Popen([DRIVER, "--port=0"], stdout=subprocess.PIPE, text=True)
    try:
        port = next(
            found[1] for line in driver.stdout if (found := re.search(r"started successfully on port (\d+)", line))
        )
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
            window = Browser(f"http://127.0.0.1:{port}", profile)
            try:
                yield window
            finally:
                window.ask("DELETE", "")
    finally:
        driver.terminate()
        driver.wait(10)
        driver.stdout.close()
