"""JupyterLab on a fresh workspace and a headless Chromium that looks at it. Screenshots go to artifacts/."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ..peers import peer

REPOSITORY = Path(__file__).resolve().parents[2]
ARTIFACTS = REPOSITORY / "artifacts"
START_LIMIT_S = 120
# The first five let Chromium run as root and without a screen; the rest keep it from looking for the network.
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SETTINGS = {
    "@jupyterlab/notebook-extension/tracker.jupyterlab-settings": {"windowingMode": "none"},
    "@jupyterlab/apputils-extension/notification.jupyterlab-settings": {
        "fetchNews": "false",
        "checkForUpdates": False,
    },
    # An editor that closes brackets would add to the code that the test types.
    "@jupyterlab/codemirror-extension/plugin.jupyterlab-settings": {
        "defaultConfig": {"autoClosingBrackets": False, "indentUnit": "4"}
    },
}


@dataclass(frozen=True)
class Lab:
    """A running JupyterLab: where it is reached, and its workspace."""

    address: str
    token: str
    work: Path

    def of(self, path: str) -> str:
        """Address of a notebook in the workspace."""
        return f"{self.address}/lab/tree/{path}?token={self.token}"


def missing(what: str, how: str) -> Any:
    """Skip for a tool that is not there; with LLMCOURSE_REQUIRE=all, fail."""
    message = f"needs {what}; {how}"
    if os.environ.get("LLMCOURSE_REQUIRE") == "all":
        pytest.fail(message)
    pytest.skip(message)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """A JupyterLab started by `llmcourse lab` on an empty workspace."""
    place = tmp_path_factory.mktemp("lab")
    settings = place / "settings"
    for name, content in SETTINGS.items():
        path = settings / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content), encoding="utf-8")
    port, token = free_port(), "browser-test"
    environment = os.environ | {
        "LLMCOURSE_WORKSPACE": str(place / "work"),
        "JUPYTERLAB_SETTINGS_DIR": str(settings),
        "JUPYTER_TOKEN": token,
        "JUPYTER_CONFIG_DIR": str(place / "config"),
        "JUPYTER_DATA_DIR": str(place / "data"),
        "JUPYTER_RUNTIME_DIR": str(place / "runtime"),
        "LLMCOURSE_SEED": "0",
    }
    command = [sys.executable, "-m", "llmcourse.cli", "lab", "--no-browser", "--port", str(port)]
    with (place / "server.log").open("w") as log:
        server = subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, cwd=REPOSITORY, start_new_session=True
        )
        address = f"http://127.0.0.1:{port}"
        try:
            wait_for(f"{address}/api?token={token}", server, place / "server.log")
            yield Lab(address, token, place / "work")
        finally:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait(timeout=20)


def wait_for(address: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(address, timeout=2):
                return
        except OSError:
            time.sleep(0.2)
    pytest.fail(f"JupyterLab did not start:\n{log.read_text()[-3000:]}")


@pytest.fixture(scope="session")
def page(lab: Lab) -> Iterator[Any]:
    """A page of headless Chromium."""
    playwright = peer("playwright.sync_api")
    browser_path = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser_path is None:
        missing("Chromium", "install it with: apt-get install chromium, or your system's package")
    ARTIFACTS.mkdir(exist_ok=True)
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=browser_path, args=list(FLAGS))
        opened = browser.new_page(viewport={"width": 1280, "height": 1000})
        opened.set_default_timeout(60_000)
        yield opened
        browser.close()


@pytest.fixture(autouse=True)
def screenshot_of_a_failure(request: pytest.FixtureRequest) -> Iterator[None]:
    """What the page showed when a test failed, kept as an artefact."""
    failed = request.session.testsfailed
    yield
    if request.session.testsfailed > failed and "page" in request.fixturenames:
        request.getfixturevalue("page").screenshot(path=ARTIFACTS / f"failed_{request.node.name}.png")
