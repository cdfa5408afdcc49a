"""A JupyterLab of its own on a free port, and a Chromium that looks at it: what the browser tests are written in.

The browser is the machine's own; nothing is downloaded.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nbformat
from playwright.sync_api import Browser, ConsoleMessage, Error, Locator, Page, TimeoutError, sync_playwright

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
NAMES = (os.environ.get("CHROMIUM") or "chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
FLAGS = ("--no-sandbox", "--disable-dev-shm-usage")
THEMES = {"light": "JupyterLab Light", "dark": "JupyterLab Dark"}
SETTINGS = {
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    "notebook-extension/tracker": {"windowingMode": "none"},
}
PLACES = {
    "JUPYTER_CONFIG_DIR": "config",
    "JUPYTER_RUNTIME_DIR": "runtime",
    "IPYTHONDIR": "ipython",
    "JUPYTERLAB_SETTINGS_DIR": "settings",
    "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
}
FAILED = Path(tempfile.gettempdir()) / "browser_failed.png"
SECONDS = 120
"""How long a page may take to show what is waited for, on a busy machine."""
RUN_SECONDS = 600
"""How long a notebook may run there."""

OF_OTHERS = ("favicon", "/api/contents/", "/lsp/", "attachment:")
"""Addresses whose failed requests the console reports, and with which this library has nothing to do.

JupyterLab asks for a cell's attachment by its name before it puts the picture there.
"""
SLOW = "[anywidget] Failed to initialize model"
"""What anywidget says of a busy page, and live figures do not mind."""

PANEL = "window.jupyterapp?.shell.currentWidget"
IDLE = f"{PANEL}?.sessionContext?.session?.kernel?.status === 'idle'"
ERRORS = f"""() => {PANEL}.content.model.toJSON().cells.flatMap(cell => cell.outputs ?? [])
  .filter(output => output.output_type === 'error').map(output => `${{output.ename}}: ${{output.evalue}}`)"""
STATE = f"""() => ({{
  kernel: {PANEL}?.sessionContext?.session?.kernel?.status,
  prompts: {PANEL}?.content.widgets.map(cell => cell.promptNode?.textContent),
  dialogs: [...document.querySelectorAll('.jp-Dialog')].map(dialog => dialog.textContent),
}})"""


@dataclass(frozen=True)
class Lab:
    """A JupyterLab that runs: where, with which token, on which folder."""

    port: int
    token: str
    folder: Path

    @property
    def address(self) -> str:
        """The address of its interface."""
        return f"http://127.0.0.1:{self.port}/lab?token={self.token}"

    def write(self, path: Path, *cells: str) -> str:
        """Write a notebook of code cells into a folder of the lab's; return its name there."""
        made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code) for code in cells])
        made.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
        nbformat.write(made, path)
        return path.relative_to(self.folder).as_posix()


@dataclass
class Notebook:
    """A notebook that is open in a page."""

    page: Page
    name: str
    console: list[str] = field(default_factory=list)

    def run_all(self) -> None:
        """Run all cells and wait until the last has ended."""
        self.do("window.jupyterapp.commands.execute('notebook:run-all-cells')", RUN_SECONDS)
        self.await_kernel()

    def reload(self) -> None:
        """Load the page again, as who closes and opens it does, and wait until the notebook has its kernel."""
        self.save()
        self.page.reload()
        self.await_kernel()

    def save(self) -> None:
        """Write the notebook's file."""
        self.do("window.jupyterapp.commands.execute('docmanager:save')")

    def shutdown(self) -> None:
        """End the kernel."""
        self.do(f"{PANEL}.sessionContext.shutdown()")

    def await_kernel(self) -> None:
        """Wait until there is a kernel that does nothing."""
        self._await(IDLE, SECONDS, "the kernel is not idle")

    def do(self, promise: str, seconds: float = SECONDS) -> None:
        """Have the page do something in JavaScript, and wait for it; raise AssertionError after so many seconds."""
        start = f"() => {{ window.done = false; Promise.resolve({promise}).finally(() => {{ window.done = true }}) }}"
        self.page.evaluate(start)
        self._await("window.done", seconds, f"not done after {seconds} s: {promise}")

    def _await(self, condition: str, seconds: float, what: str) -> None:
        try:
            self.page.wait_for_function(f"() => {condition}", timeout=1000 * seconds)
        except TimeoutError as error:
            self.page.screenshot(path=FAILED)
            raise AssertionError(f"{what} (see {FAILED}): {self.page.evaluate(STATE)}") from error

    def view(self, words: str) -> View:
        """Return what the cell shows whose code has these words."""
        code = self.page.locator(".jp-InputArea", has_text=words)
        return View(self.page, self.page.locator(".jp-CodeCell").filter(has=code).last)

    @property
    def errors(self) -> list[str]:
        """The error outputs of all cells."""
        return self.page.evaluate(ERRORS)


@dataclass(frozen=True)
class View:
    """A widget in a page: its controls by their labels, its figure, its words."""

    page: Page
    cell: Locator

    def control(self, label: str, kind: str = "*") -> Locator:
        """Return the element of a control."""
        return self.cell.locator(f".jupyter-widgets:has(> .widget-label:text-is('{label}')) {kind}")

    def choose(self, label: str, value: str) -> None:
        """Choose one among several."""
        self.control(label, "select").select_option(label=value)

    def chosen(self, label: str) -> str:
        """Return what is chosen."""
        return self.control(label, "select").evaluate("e => e.selectedOptions[0].textContent").replace("\xa0", " ")

    def enter(self, label: str, value: str) -> None:
        """Write into a field."""
        field = self.control(label, "input")
        field.fill(value)
        field.press("Enter")

    def drag(self, label: str, share: float, steps: int = 4) -> None:
        """Drag a slider's handle with the mouse to a share of its length."""
        handle, bar = self.control(label, ".noUi-handle"), self.control(label, ".noUi-base")
        handle.scroll_into_view_if_needed()
        self.until(lambda: self._grasped(handle), f"the mouse has the handle of {label!r}")
        length = bar.bounding_box()
        height = length["y"] + length["height"] / 2
        self.page.mouse.move(length["x"] + share * length["width"], height, steps=steps)
        self.page.mouse.up()

    def _grasped(self, handle: Locator) -> bool:
        """Press the mouse on a handle that stands still; let go, and say so, if the page moved it away meanwhile."""
        before = handle.bounding_box()
        self.page.wait_for_timeout(300)
        box = handle.bounding_box()
        if box != before:
            return False
        self.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        self.page.mouse.down()
        if handle.evaluate("e => e.classList.contains('noUi-active')"):
            return True
        self.page.mouse.up()
        return False

    def value(self, label: str) -> float:
        """Return the number beside a slider."""
        return float(self.control(label, ".widget-readout").inner_text().replace(",", ""))

    def press(self, label: str) -> None:
        """Press a button."""
        self.button(label).click()

    def button(self, label: str) -> Locator:
        """Return a button."""
        return self.cell.locator(f"button.jupyter-button:text-is('{label}')")

    @property
    def words(self) -> str:
        """All words of the view."""
        return self.cell.locator(".jp-OutputArea").first.inner_text()

    @property
    def code(self) -> str:
        """The Python that the view shows."""
        return self.control("Python", "textarea").input_value()

    def figure(self, expression: str) -> Any:
        """Return what a JavaScript expression says of the figure ``g`` that is visible."""
        return self.cell.locator(".js-plotly-plot:visible").first.evaluate(f"g => {expression}")

    @property
    def title(self) -> str:
        """The title of the figure that is visible."""
        return self.figure("g._fullLayout.title.text ?? ''")

    def kept(self) -> int:
        """Return how many channels the studio's upper bars show as kept."""
        return round(self.figure("g.calcdata[0].reduce((sum, bar) => sum + bar.s, 0)"))

    def click(self, share_x: float, share_y: float, axes: str = "xy") -> None:
        """Click into a panel of the figure, at shares of its width and height from the upper left.

        plotly takes for clicked what it has shown as being under the mouse.
        """
        panel = self.cell.locator(f".js-plotly-plot .draglayer .{axes} .nsewdrag")
        panel.scroll_into_view_if_needed()
        box = panel.bounding_box()
        self.figure("delete g._hoverdata")
        self.page.mouse.move(box["x"] + share_x * box["width"], box["y"] + share_y * box["height"], steps=3)
        self.until(lambda: self.figure("g._hoverdata?.length > 0"), "something is under the mouse")
        self.page.mouse.down()
        self.page.mouse.up()

    def until(self, met: Callable[[], bool], what: str, seconds: float = SECONDS) -> None:
        """Wait until something is so; raise AssertionError that tells what was awaited."""
        end = time.monotonic() + seconds
        while not met():
            if time.monotonic() > end:
                self.cell.screenshot(path=FAILED)
                raise AssertionError(f"{what} (see {FAILED}); the view says:\n{self.words}")
            self.page.wait_for_timeout(100)


@contextmanager
def jupyterlab(folder: Path, look: str = "light") -> Iterator[Lab]:
    """Start a JupyterLab on a copy of the notebooks, with settings of its own; stop it and its kernels at the end."""
    shutil.copytree(NOTEBOOKS, folder / "notebooks", ignore=shutil.ignore_patterns(".*"))
    (folder / "results").symlink_to(NOTEBOOKS.with_name("results"))
    settings = SETTINGS | {"apputils-extension/themes": {"theme": THEMES[look]}}
    for name, values in settings.items():
        path = folder / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    lab = Lab(_free_port(), secrets.token_hex(16), folder / "notebooks")
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--expose-app-in-browser"]
    command += [f"--port={lab.port}", "--ServerApp.port_retries=0", f"--IdentityProvider.token={lab.token}"]
    command += [f"--ServerApp.root_dir={lab.folder}"]
    own = {name: str(folder / place) for name, place in PLACES.items()} | {"OMP_NUM_THREADS": "1"}
    with (folder / "lab.log").open("w") as log:
        process = subprocess.Popen(command, env=os.environ | own, stdout=log, stderr=subprocess.STDOUT)
    try:
        _await_answer(lab, process, folder / "lab.log")
        yield lab
    finally:
        process.terminate()
        process.wait(60)


@contextmanager
def chromium() -> Iterator[Browser]:
    """Start the machine's Chromium without a window; raise ValueError where there is none."""
    if CHROMIUM is None:
        raise ValueError("no Chromium on this machine: install the package 'chromium', or say in CHROMIUM where it is")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield browser
        browser.close()


@contextmanager
def opened(
    browser: Browser, lab: Lab, name: str, *, width: int = 1500, height: int = 1400, scale: float = 1.0
) -> Iterator[Notebook]:
    """Open a notebook in a page of its own; shut its kernel down at the end."""
    context = browser.new_context(viewport={"width": width, "height": height}, device_scale_factor=scale)
    page = context.new_page()
    page.set_default_timeout(1000 * SECONDS)
    notebook = Notebook(page, name)
    page.on("console", lambda message: _note(notebook.console, message))
    page.on("pageerror", lambda error: SLOW in str(error) or notebook.console.append(f"{error}\n{error.stack}"))
    address, token = lab.address.split("?")
    page.goto(f"{address}/workspaces/{name.removesuffix('.ipynb').replace('/', '-')}/tree/{name}?{token}&reset")
    try:
        notebook.await_kernel()
        yield notebook
        notebook.shutdown()
    except Exception as error:
        with suppress(Error):
            error.add_note(f"errors of cells: {notebook.errors}\nof the page: {notebook.console}")
        raise
    finally:
        context.close()


def _note(console: list[str], message: ConsoleMessage) -> None:
    where = message.location.get("url", "")
    if message.type == "error" and not any(part in where for part in OF_OTHERS):
        console.append(f"{message.text} ({where})")


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def _await_answer(lab: Lab, process: subprocess.Popen, log: Path) -> None:
    end = time.monotonic() + RUN_SECONDS
    while time.monotonic() < end and process.poll() is None:
        try:
            urllib.request.urlopen(lab.address.replace("/lab", "/api/status"), timeout=5).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise RuntimeError(f"JupyterLab does not answer:\n{log.read_text()[-4000:]}")
