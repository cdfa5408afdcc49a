"""Every control of every widget in a real browser: set as a person sets it, and what changed in the page."""

import json
import re
from contextlib import ExitStack

import pytest
from lab import opened
from run_folders import write

pytestmark = pytest.mark.slow

NETWORK = """import torch, obc_tools as obc
torch.set_num_threads(1)
torch.manual_seed(0)
data = obc.load_data("digits")
model = obc.load_model("resnet8", 10, in_channels=1)"""
EXPLORER = "explorer = obc.JTJExplorer(model, data, batches=2)\nexplorer"
PAIRS = "together = obc.InteractionExplorer(model, data, batches=2)\ntogether"
STUDIO = """studio = obc.PruningStudio(model, data, batches=2, held_out=1, source={'name': 'resnet8', 'in_channels': 1})
studio"""
CHANNELS = 224
MONITOR = "import obc_tools as obc\nmonitor = obc.RunMonitor('run', every=0.3)\nmonitor"


@pytest.fixture
def show(lab, browser, folder):
    """Runs cells in a notebook of their own; nothing may have gone wrong there at the end."""
    with ExitStack() as stack:
        made = []

        def run(*cells, **page):
            name = lab.write(folder / f"{len(made)}.ipynb", *cells)
            made.append(stack.enter_context(opened(browser, lab, name, **page)))
            made[-1].run_all()
            return made[-1]

        yield run
        assert [(notebook.errors, notebook.console) for notebook in made] == len(made) * [([], [])]


def follows(view):
    """Say whether code and figure are those of the share of channels to which the slider is set."""
    share = view.value("to")
    return f"ratio={share:g}" in view.code and view.kept() == CHANNELS - int(share * CHANNELS)


def planned(show):
    """Return a studio's view after its first plan."""
    view = show(NETWORK, STUDIO).view("obc.PruningStudio(")
    view.until(lambda: view.kept() == 157 and follows(view), "the first plan removes 30 % of 224 channels")
    return view


def test_the_explorer_of_single_filters(show, folder):
    view = show(NETWORK, EXPLORER).view("obc.JTJExplorer(")
    view.until(lambda: view.title.startswith("|JᵀJ| of conv1.out: 16 channels"), "the grid")
    assert view.figure("g.data.length") == 16
    view.choose("values", "correlation")
    view.until(lambda: view.title.startswith("Correlation of JᵀJ of conv1.out: 16"), "another scale")
    view.choose("view", "one channel")
    view.choose("channel", "3")
    view.until(lambda: "conv1.out, channel 3" in view.title, "one channel enlarged")
    view.choose("view", "filter")
    view.until(lambda: view.title == "Weights of conv1, channel 3", "the filter as an image")
    view.choose("view", "spectrum")
    view.until(lambda: view.figure("g.data[0].type") == "scatter", "the spectra")
    view.choose("view", "group")
    view.until(lambda: "group conv1.out, channel 3" in view.title, "the group")
    view.choose("view", "grid")
    view.enter("channels", "4")
    view.until(lambda: view.figure("g.data.length") == 4, "four channels")
    view.enter("first channel", "6")
    view.until(lambda: "range(6, 10)" in view.code and view.chosen("channel") == "6", "other channels")
    view.choose("layer", "layer1.0.conv1")
    view.until(lambda: "layer1.0.conv1.out" in view.title, "another layer")
    view.press("save")
    view.until(lambda: "wrote 'jtj.npz'" in view.words, "the matrices are saved")
    assert (folder / "jtj.npz").is_file()


def test_the_explorer_of_pairs(show):
    view = show(NETWORK, PAIRS).view("obc.InteractionExplorer(")
    view.until(lambda: view.title.startswith("Correlation of K of conv1.out"), "K")
    assert "duplicate most" in view.words
    view.choose("order", "score")
    view.until(lambda: "ordered by score" in view.figure("g._fullLayout.xaxis.title.text"), "another order")
    view.choose("values", "signed")
    view.until(lambda: view.title.startswith("K of conv1.out"), "other values")
    view.choose("layer", "layer2.0.conv1")
    view.until(lambda: "layer2.0.conv1" in view.title, "another layer")
    view.click(0.3, 0.7)
    view.until(lambda: view.title == "JᵀJ of layer2.0.conv1.out, two channels", "both filters of a cell")
    assert "removed together" in view.words and "obc.dense_jtj" in view.code
    view.press("back to K")
    view.until(lambda: view.title.startswith("K of layer2.0.conv1.out"), "K again")


CUT = (
    """view => [...view.querySelectorAll('.widget-box')].filter(box => box.scrollWidth > box.clientWidth + 1).length"""
)


def test_a_narrow_page_cuts_nothing_but_what_scrolls_by_itself(show):
    """1000 pixels with the list of files: figures go below the controls, tables scroll inside themselves."""
    notebook = show(NETWORK, STUDIO, PAIRS, width=1000)
    studio, pairs = (notebook.view(f"obc.{name}(") for name in ("PruningStudio", "InteractionExplorer"))
    studio.until(lambda: follows(studio), "a plan")
    studio.press("measure")
    studio.until(lambda: "measured 2 plans" in studio.words, "a wide table")
    pairs.until(lambda: "cancel most" in pairs.words, "pairs")
    wide = studio.cell.locator(".widget-html:has(.obc-table)").first
    assert wide.evaluate("table => table.scrollWidth > table.clientWidth + 1"), "the table is too wide for the page"
    for view in (studio, pairs):
        assert view.cell.locator(".jp-OutputArea").first.evaluate(CUT) == 0
        assert view.figure("g.clientWidth") > 400


def test_the_studio_follows_its_sliders_and_choices(show):
    view = planned(show)
    view.drag("to", 0.5)
    view.until(lambda: view.kept() < 157 and follows(view), "another target")
    assert abs(view.value("to") - 0.5) < 0.06
    half = view.kept()
    view.choose("target", "speed-up (times fewer MACs)")
    view.until(lambda: "speedup=" in view.code, "another kind of target")
    view.press("undo")
    view.until(lambda: "ratio=" in view.code and view.chosen("target").startswith("share"), "that was one step")
    view.press("redo")
    view.until(lambda: "speedup=" in view.code, "another kind of target again")
    view.drag("to", 0.1)
    view.until(lambda: view.kept() > half, "a smaller speed-up")
    view.choose("scope", "local")
    view.until(lambda: "scope='local'" in view.code, "another scope")
    view.choose("criterion", "l1")
    view.until(lambda: "'l1'" in view.code and "removed; MACs" in view.words, "another criterion")
    for label, value in (("reduction", "max"), ("normalizer", "mean")):
        view.choose(label, value)
        view.until(lambda value=value: f"='{value}'" in view.code, label)
    view.enter("multiple of", "4")
    view.until(lambda: "round_to=4" in view.code, "multiples")
    view.choose("bars", "MACs")
    view.until(lambda: view.figure("g._fullLayout.yaxis.title.text") == "MACs (millions)", "costs of layers")
    assert view.figure("g.calcdata[0].length") > 7
    view.choose("bars", "channels")
    view.until(lambda: view.figure("g._fullLayout.yaxis.title.text") == "channels", "channels of groups")


def test_the_studio_treats_single_groups_and_channels(show):
    view = planned(show)
    view.choose("group", "layer3.0.conv1.out")
    view.until(lambda: "layer3.0.conv1.out by score" in view.words, "another group")
    view.drag("at most goes", 0.0)
    view.until(lambda: "max_ratio_of" in view.code, "a limit")
    view.press("lock this group")
    view.until(lambda: "fixed=" in view.code, "a lock")
    view.press("lock this group")
    view.click(0.02, 0.9, "x2y2")
    view.until(lambda: "by_hand={('layer3.0.conv1', 'out')" in view.code, "a channel by hand")
    view.press("undo")
    view.until(lambda: "by_hand" not in view.code, "the plan before")
    view.press("redo")
    view.until(lambda: "by_hand" in view.code, "the plan again")


def test_the_studio_opens_the_graph_of_coupled_layers(show):
    view = planned(show)
    view.cell.get_by_text("Coupled layers").click()
    graph = view.cell.locator(".js-plotly-plot").nth(1)
    view.until(lambda: graph.is_visible() and "layer3.0.conv2" in graph.inner_text(), "the graph")
    before = graph.evaluate("g => g.data.at(-1).text.join()")
    view.page.mouse.move(*middle(graph))
    for _ in range(4):
        view.page.mouse.wheel(0, -100)
    view.until(lambda: graph.evaluate("g => g._fullLayout.yaxis.range[0]") < 9, "the wheel zooms")
    view.drag("to", 0.5)
    view.until(lambda: graph.evaluate("g => g.data.at(-1).text.join()") != before, "another plan in the graph")
    assert graph.evaluate("g => g._fullLayout.yaxis.range[0]") < 9, "it stays where it was moved to"


def middle(graph):
    box = graph.bounding_box()
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


def test_the_studio_measures_compares_and_keeps(show, folder):
    view = planned(show)
    view.press("measure")
    view.until(lambda: "measured" in view.words, "a measurement")
    assert view.words.count("%") >= 2
    view.press("remember")
    view.until(lambda: view.chosen("compare with") == "plan 1", "a plan with a name")
    view.drag("to", 0.8)
    view.until(lambda: "Changed since plan 1" in view.words, "what differs from it")
    assert view.figure("g.data[3].visible !== false && g.calcdata[3].length") > 1
    view.enter("write to", "kept/plan")
    for label, path in {"plan (JSON)": "plan.json", "pruned model": "plan/manifest.json", "Python": "plan.py"}.items():
        view.press(label)
        written = folder / "kept" / path
        view.until(lambda written=written: written.is_file(), f"{path} is written")
    assert json.loads((folder / "kept" / "plan.json").read_text())["groups"]
    view.choose("criterion", "hessian")
    view.press("cancel")
    view.until(lambda: "cancelled" in view.words or "removed; MACs" in view.words, "it is left")


def test_the_monitor_follows_and_stops_a_run(show, folder):
    write(folder / "run")
    view = show(MONITOR).view("obc.RunMonitor(")
    view.until(lambda: "epoch 2 of 4, step 5 of 10" in view.words, "where the run is")
    write(folder / "run", done=2, epoch=3, step=8)
    view.until(lambda: "epoch 3 of 4, step 8 of 10" in view.words, "where the run is now")
    view.until(lambda: view.figure("g.calcdata[0].length") == 2, "a finished epoch more")
    assert "line 39" in view.words and view.button("resume").is_disabled()
    view.press("stop")
    view.until(lambda: (folder / "run" / "stop").is_file(), "the run is asked to stop")
    view.until(lambda: "it will stop at its next step" in view.words, "that is said")
    write(folder / "run", running=False)
    view.until(lambda: view.button("resume").is_enabled() and view.button("stop").is_disabled(), "it can be resumed")


MARKED = """import dataclasses, torch, obc_tools as obc
from collections import OrderedDict
from torch import nn
torch.set_num_threads(1)
data = obc.load_data("digits")
data = dataclasses.replace(data, classes=tuple(f"<b id=q>{i}</b>" for i in range(10)))
names = "<b id=q>x</b>0", "<img id=q alt=q>1", "<a id=q href='#'>2</a>", "<i id=q onclick='q()'>3"
parts = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8 * 16, 10)
model = nn.Sequential(OrderedDict(zip([*names, "last"], parts)))
history = obc.fit(model, data.batches("train", 512), data.batches("val", 512), obc.Recipe(epochs=1), progress=False)
history"""
MARKED_VIEWS = (
    "explorer = obc.JTJExplorer(model, data, batches=1)\nexplorer",
    "together = obc.InteractionExplorer(model, data, batches=1)\ntogether",
    "studio = obc.PruningStudio(model, data, batches=1, held_out=1)\nstudio",
    "studio.wait().folds.selected_index = 1\nhistory.plot('<b id=q>x</b>')",
    "obc.RunMonitor({'<b id=q>x</b>': '<b id=q>y'}, every=None)",
    "obc.find_groups(model, torch.zeros(1, 1, 8, 8))[0]",
    "obc.explain(obc.find_groups(model, torch.zeros(1, 1, 8, 8)))",
    "obc.Run.open('<b id=q>y')",
)
MADE = "img[alt=q]", "a[href='#']", "[id=q]", "text a", "text tspan[style*=bold]"
"""What a page made of the names of somebody's layers, classes and runs."""


def test_names_are_words_in_every_view(show, folder):
    """Layers, classes and runs that are called like tags: shown as they are called, and nothing is made of them."""
    write(folder / "<b id=q>y")
    notebook = show(MARKED, *MARKED_VIEWS)
    studio, pairs = notebook.view("obc.PruningStudio("), notebook.view("obc.InteractionExplorer(")
    studio.until(lambda: studio.figure("g.calcdata?.length > 0"), "the first plan")
    pairs.until(lambda: "duplicate most" in pairs.words, "pairs")
    notebook.view("obc.JTJExplorer(").choose("view", "group")
    studio.enter("name", "<b id=q>plan</b>")
    studio.press("remember")
    studio.choose("compare with", "<b id=q>plan</b>")
    studio.until(lambda: "<b id=q>plan</b>" in studio.words, "a plan of such a name in the table")
    graph = "[...view.querySelectorAll('.ytick text')].map(e => e.textContent).join()"
    drawn = studio.cell.locator(".js-plotly-plot:visible")
    studio.until(lambda: "<a id=q href='#'>2</a>" in drawn.nth(1).evaluate(f"view => {graph}"), "the graph's layers")
    for kind in MADE:
        assert notebook.page.locator(f".jp-OutputArea {kind}").count() == 0, kind


def test_everything_is_there_again_after_a_reload(show, folder):
    write(folder / "run")
    notebook = show(NETWORK, EXPLORER, PAIRS, STUDIO, MONITOR)
    studio, monitor = notebook.view("obc.PruningStudio("), notebook.view("obc.RunMonitor(")
    studio.until(lambda: studio.kept() == 157, "the first plan")
    studio.drag("to", 0.6)
    studio.until(lambda: studio.kept() < 157 and follows(studio), "another target")
    before = studio.kept(), studio.value("to"), studio.code
    notebook.reload()
    studio.cell.locator(".js-plotly-plot .bars").first.wait_for()
    assert (studio.kept(), studio.value("to"), studio.code) == before
    studio.drag("to", 0.2)
    studio.until(lambda: studio.kept() > before[0], "the slider still plans")
    write(folder / "run", done=3, epoch=4, step=9)
    monitor.until(lambda: "epoch 4 of 4, step 9 of 10" in monitor.words, "the monitor still looks")
    for words in ("obc.JTJExplorer(", "obc.InteractionExplorer("):
        assert notebook.view(words).figure("g.data.length") > 0


DARK = """window.jupyterapp.commands.execute('apputils:change-theme', {theme: 'JupyterLab Dark'}).then(async () => {
  while (document.getElementById('jupyterlab-splash')) await new Promise(soon => setTimeout(soon, 50));
})"""
"""Another theme, until JupyterLab's splash is gone: it takes it away twice, an error, if another follows too soon."""
LIGHT = DARK.replace("Dark", "Light")
PAPER = "getComputedStyle(g.querySelector('.main-svg')).backgroundColor"


def test_figures_follow_the_page_and_say_since_when_they_lost_their_kernel(show, folder):
    write(folder / "run")
    notebook = show(MONITOR, "fixed = obc.RunMonitor('run', every=None, look='light')\nfixed")
    view, fixed = notebook.view("monitor = obc"), notebook.view("fixed = obc")
    white, ink = "rgb(255, 255, 255)", "g._fullLayout.font.color"
    assert (view.figure(PAPER), view.figure(ink)) == (white, "#24292F")
    notebook.do(DARK)
    view.until(lambda: view.figure(PAPER) == "rgb(22, 25, 29)", "a dark figure on a dark page")
    assert view.figure(ink) == "#D7DCE2" and fixed.figure(PAPER) == white
    notebook.do(LIGHT)
    view.until(lambda: view.figure(PAPER) == white, "a light figure again")
    assert "no kernel" not in view.words
    notebook.shutdown()
    view.until(lambda: re.search(r"no kernel since \d+:\d\d:\d\d", view.words), "since when there is none")


def test_another_notebook_attaches_to_the_same_run(show, folder):
    write(folder / "run")
    first = show(MONITOR).view("obc.RunMonitor(")
    cell = "import obc_tools as obc\nrun = obc.Run.open('run')\nobc.RunMonitor({'a run': run}, every=0.3, look='dark')"
    second = show(cell).view("obc.RunMonitor(")
    write(folder / "run", done=3, epoch=4, step=9)
    for view in (first, second):
        view.until(lambda view=view: "epoch 4 of 4, step 9 of 10" in view.words, "where the run is")
        view.until(lambda view=view: view.figure("g.calcdata[0].length") == 3, "its finished epochs")
