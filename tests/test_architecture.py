"""The shape of the package: imports point one way, modules and functions stay small, views stay out of the library."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "obc_tools"


def dotted(path: Path) -> str:
    """Return a module's name within the package: "plan", "widgets.studio", and "widgets" for the folder itself."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


PATHS = {dotted(path): path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"}
MODULES = {name: ast.parse(path.read_text()) for name, path in PATHS.items()}

TIERS = (
    ("state", "layers", "sizes", "shrinking", "files", "logs", "environment"),
    ("flow", "calls", "rearranging", "computing", "backtrack", "queries", "tracing", "coupling"),
    ("groups", "weights", "models", "batches", "augment", "images", "cifar", "data"),
    ("costs", "cost_terms", "cost_prediction", "measure"),
    ("objectives", "gate_sums", "functional_gates", "gates", "rows"),
    ("layer_gradients", "row_gradients", "jacobian", "dense", "interactions"),
    ("criteria", "evidence", "scores", "interop"),
    ("plan", "order"),
    ("pruning", "one_shot", "studio_state"),
    ("equivalent",),
    ("explain", "masking", "check", "export"),
    ("comparison", "curves", "compare"),
    ("background",),
    ("recipe", "schedule", "optimizer", "history", "guard", "loss", "average", "processes"),
    ("training_folder", "training_checks", "stepper", "training", "sparse"),
    ("store",),
    ("job", "job_result", "pipeline", "experiments"),
    ("runs", "worker", "launching", "grid", "grid_worker", "slurm", "tables"),
    ("looks", "plots", "compare_plots", "studio_plots", "explorer_plots", "equivalent_plots", "group_plots"),
    ("report", "job_report", "cli_types", "cli_compare", "cli_runs", "cli", "__main__"),
    ("studio_session", "run_watch"),
    ("widgets.tasks", "widgets.controls", "widgets.live", "widgets.explorer", "widgets.studio_controls"),
    ("widgets.studio", "widgets.monitor", "widgets.jtj", "widgets.interactions", "widgets"),
)  # fmt: skip
TIER = {name: number for number, names in enumerate(TIERS) for name in names}
VIEWS = {
    "looks",
    "plots",
    "compare_plots",
    "studio_plots",
    "explorer_plots",
    "equivalent_plots",
    "group_plots",
    "run_watch",
    "report",
    "job_report",
}
VIEWS |= {name for name in MODULES if name.startswith("widgets")}


def imports(name: str, *, top_level: bool) -> set[str]:
    """Return the names of the package's own modules that a module imports, at top level or anywhere."""
    folder = PATHS[name].parent.relative_to(PACKAGE).parts
    found = set()
    for node in MODULES[name].body if top_level else ast.walk(MODULES[name]):
        if isinstance(node, ast.ImportFrom) and node.level:
            start = folder[: len(folder) - node.level + 1]
            ends = [node.module] if node.module else [alias.name for alias in node.names]
            found |= {".".join((*start, end)) for end in ends}
    return found


def test_every_module_has_a_place():
    assert set(MODULES) == set(TIER)


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_one_way(name):
    later = {other for other in imports(name, top_level=True) if TIER[other] > TIER[name]}
    assert not later, f"{name} imports {later} of a later tier"
    reached = {other for other in imports(name, top_level=False) if TIER[other] > TIER[name]}
    assert reached <= VIEWS | {"report", "job_report", "runs", "experiments"}, f"{name} reaches up to {reached}"


def test_modules_of_a_tier_have_no_cycles():
    edges = {name: imports(name, top_level=True) for name in MODULES}
    done: set[str] = set()
    while ready := {name for name in set(edges) - done if edges[name] <= done}:
        done |= ready
    assert done == set(edges), f"cycle among {set(edges) - done}"


@pytest.mark.parametrize("name", [name for name in MODULES if name not in VIEWS])
def test_only_views_import_plotly_and_widgets(name):
    tree = MODULES[name]
    roots = {alias.name.split(".")[0] for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    roots |= {node.module.split(".")[0] for node in tree.body if isinstance(node, ast.ImportFrom) and node.module}
    assert not roots & {"plotly", "ipywidgets", "anywidget"}


@pytest.mark.parametrize("name", MODULES)
def test_modules_and_functions_stay_small(name):
    assert len(PATHS[name].read_text().splitlines()) <= 400
    for node in ast.walk(MODULES[name]):
        if isinstance(node, ast.FunctionDef):
            first = node.body[1] if ast.get_docstring(node) and len(node.body) > 1 else node.body[0]
            assert node.end_lineno - first.lineno < 60, f"{name}.{node.name}"


def test_only_the_command_line_prints():
    for name, tree in MODULES.items():
        calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
        assert name.startswith("cli") or not any(isinstance(call, ast.Name) and call.id == "print" for call in calls), (
            name
        )
