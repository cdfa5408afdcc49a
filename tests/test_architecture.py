"""The shape of the package: folders import downwards, no circles, small functions, views only where views belong."""

import ast
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from torch import nn

PACKAGE = Path(__file__).parents[1] / "obc_tools"
ORDER = (
    ("errors", "state", "files"),
    ("data",),
    ("plots",),
    ("structure",),
    ("measure",),
    ("scoring",),
    ("pruning",),
    ("training",),
    ("comparing",),
    ("models",),
    ("runs", "worker", "grid_worker"),
    ("studio",),
    ("widgets", "cli", "interop", "__main__"),
)
"""What stands earlier knows nothing of what stands later."""
PLACE = {name: place for place, names in enumerate(ORDER) for name in names}
VIEWS = ("plots", "widgets", "runs.report")
LONGEST_BODY = 40


def dotted(path: Path) -> str:
    """Return a module's name within the package: "pruning.plan", and "pruning" for the folder itself."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


PATHS = {dotted(path): path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"}
MODULES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in PATHS.items()}


def imports(name: str) -> set[str]:
    """Return the package's own modules that a module imports, those inside functions included."""
    folder = PATHS[name].parent.relative_to(PACKAGE).parts
    found = set()
    for node in ast.walk(MODULES[name]):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").split(".")[0] == "obc_tools"):
            start = (*folder[: len(folder) - node.level + 1],) if node.level else ()
            named = (node.module or "").removeprefix("obc_tools").strip(".") if not node.level else node.module or ""
            base = ".".join((*start, *named.split("."))).strip(".")
            whole = {f"{base}.{alias.name}".strip(".") for alias in node.names}
            found |= {module if module in PATHS else base for module in whole}
    return found & set(PATHS) - {name}


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_down(name):
    top = name.split(".")[0]
    assert top in PLACE, f"{top}: which room is this?"
    above = {other for other in imports(name) if PLACE[other.split(".")[0]] > PLACE[top]}
    assert not above, f"{name} imports {above}, which stands above it"


def test_nothing_forms_a_circle():
    edges = {name: imports(name) for name in MODULES}
    done: set[str] = set()
    while ready := {name for name in set(edges) - done if edges[name] <= done}:
        done |= ready
    assert done == set(edges), f"circle among {set(edges) - done}"


@pytest.mark.parametrize("name", [name for name in MODULES if not name.startswith(VIEWS)])
def test_only_views_import_plotly_and_widgets(name):
    tree = MODULES[name]
    roots = {alias.name.split(".")[0] for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    roots |= {node.module.split(".")[0] for node in tree.body if isinstance(node, ast.ImportFrom) and node.module}
    assert not roots & {"plotly", "ipywidgets", "anywidget"}


@pytest.mark.parametrize("name", MODULES)
def test_functions_stay_small(name):
    for node in ast.walk(MODULES[name]):
        if isinstance(node, ast.FunctionDef):
            first = node.body[1] if ast.get_docstring(node) and len(node.body) > 1 else node.body[0]
            assert node.end_lineno - first.lineno < LONGEST_BODY, f"{name}.{node.name}"


def test_only_the_command_line_prints():
    for name, tree in MODULES.items():
        calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
        prints = any(isinstance(call, ast.Name) and call.id == "print" for call in calls)
        assert name.startswith("cli") or not prints, name


def test_tests_import_helpers_not_each_other():
    for path in Path(__file__).parent.rglob("test_*.py"):
        froms = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        assert not [node.module for node in froms if (node.module or "").startswith(("test_", "tests."))], path.name


NAMING_TYPES = ("state", "scoring.sums")
"""Modules that name layer types themselves: state stands below the table, sums has fast formulas for a few of them."""


def layer_types_named(tree: ast.Module) -> set[str]:
    """Return the types of torch's layers that code names without making a layer or annotating one: what tests types."""
    nodes = list(ast.walk(tree))
    calls = {id(node.func) for node in nodes if isinstance(node, ast.Call)}
    annotations = [getattr(node, "annotation", None) or getattr(node, "returns", None) for node in nodes]
    free = {id(inner) for outer in annotations if outer is not None for inner in ast.walk(outer)} | calls
    named = [node for node in nodes if isinstance(node, ast.Attribute) and id(node) not in free]
    return {ast.unparse(node) for node in named if is_layer_type(ast.unparse(node))}


def is_layer_type(name: str) -> bool:
    if not name.startswith("nn."):
        return False
    found = nn
    for part in name.split(".")[1:]:
        found = getattr(found, part, None)
    return isinstance(found, type) and issubclass(found, nn.Module) and found is not nn.Module


@pytest.mark.parametrize("name", [name for name in MODULES if name != "structure.layers"])
def test_only_the_table_tests_layer_types(name):
    named = layer_types_named(MODULES[name])
    assert bool(named) == (name in NAMING_TYPES), f"{name} tests {named}: ask structure.layers"
    modules = {node.module or "" for node in ast.walk(MODULES[name]) if isinstance(node, ast.ImportFrom)}
    assert not [module for module in modules if module.startswith("timm.layers")]


def test_libraries_of_networks_are_installed_and_never_imported():
    for library in ("diffusers", "einops", "open_clip_torch", "segmentation_models_pytorch", "transformers"):
        assert version(library)
    theirs = {"diffusers", "einops", "open_clip", "segmentation_models_pytorch", "transformers", "ultralytics"}
    for name, tree in MODULES.items():
        named = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        named |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level}
        assert not {whole.split(".")[0] for whole in named} & theirs, f"{name} imports a library of networks"


def test_ultralytics_is_an_extra_of_its_own():
    extras = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    holders = [name for name, packages in extras["optional-dependencies"].items() if "ultralytics" in "".join(packages)]
    assert holders == ["ultralytics"] and "ultralytics" not in "".join(extras["dependencies"])
