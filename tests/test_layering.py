"""The rules of the house, read off the source: who may import whom, names that shadow nothing, sizes, annotations."""

import ast
import importlib.util
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
COMMON = sorted(ROOT.glob("recipes/common/**/*.py"))
RECIPES = sorted(ROOT.glob("recipes/*.py"))
TOOLS = sorted(path for path in ROOT.glob("tools/**/*.py"))
TESTS = sorted(ROOT.glob("tests/**/*.py"))
SOURCE = [*COMMON, *RECIPES, *TOOLS]
OURS = ("recipes", "tools", "tests")

# the stair of recipes/common, from the ground up: a module imports from its own wing and from lower floors
FLOORS = (
    ("recipe",),
    ("config",),
    ("data", "runtime"),
    ("model", "run_dir"),
    ("parallel",),
    ("pipeline",),
    ("engine", "checks"),
    ("monitor", "checkpoint", "record"),
    ("anomalies",),
    ("train",),
)
FLOOR_OF = {wing: floor for floor, wings in enumerate(FLOORS) for wing in wings}

LONGEST_MODULE, LONGEST_FUNCTION, LONGEST_LOOP = 350, 60, 50
LOOP = ("recipes/common/train.py", "train")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


def imports(path: Path) -> set[str]:
    """Dotted names of everything a file imports, at any depth: modules, and what is taken from them."""
    found = set()
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}:{node.lineno}: a relative import breaks a file that runs as a script"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def is_under(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


@pytest.mark.parametrize("path", COMMON, ids=name_of)
def test_common_imports_no_recipe_and_no_tool(path):
    ours = [name for name in imports(path) if is_under(name, OURS[0]) or is_under(name, OURS[1]) or is_under(name, OURS[2])]
    assert all(is_under(name, "recipes.common") for name in ours)


def wing_of(name: str) -> str:
    """Return the wing, or the file at the top, of a dotted name under recipes.common."""
    return name.split(".")[2]


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


@pytest.mark.parametrize(
    "path", [path for path in COMMON if path.parent.name != "common" or path.stem != "__init__"], ids=name_of
)
def test_a_wing_imports_only_from_wings_below_it(path):
    own = wing_of(dotted(path))
    others = {wing_of(name) for name in imports(path) if is_under(name, "recipes.common")} - {own}
    assert {wing: FLOOR_OF[wing] for wing in others if FLOOR_OF[wing] >= FLOOR_OF[own]} == {}


def test_no_imports_go_in_a_circle():
    """Between modules of recipes/common, whatever the wing."""
    modules = {dotted(path) for path in COMMON}
    graph = {}
    for path in COMMON:
        taken = imports(path)
        graph[dotted(path)] = {m for name in taken for m in (name, name.rpartition(".")[0]) if m in modules} - {dotted(path)}
    assert list(TopologicalSorter(graph).static_order())  # raises CycleError with the circle


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_a_recipe_imports_common_and_third_parties(path):
    ours = [name for name in imports(path) if any(is_under(name, package) for package in OURS)]
    assert all(is_under(name, "recipes.common") for name in ours)


@pytest.mark.parametrize("path", TOOLS, ids=name_of)
def test_a_tool_imports_tools_and_common(path):
    ours = [name for name in imports(path) if any(is_under(name, package) for package in OURS)]
    assert all(is_under(name, "recipes.common") or is_under(name, "tools") for name in ours)


@pytest.mark.parametrize("path", [*SOURCE, *TESTS], ids=name_of)
def test_no_file_takes_the_name_of_another_module(path):
    """Run as a script, a file's folder may come first on the path: its name must not be one that anybody imports."""
    if path.stem in ("__init__", "__main__"):
        return
    assert path.stem not in sys.stdlib_module_names
    spec = importlib.util.find_spec(path.stem)
    # found only where it is ours: pytest may put the folder of the tests on the path
    assert spec is None or Path(spec.origin or "/").is_relative_to(ROOT / "tests")


@pytest.mark.parametrize("path", SOURCE, ids=name_of)
def test_modules_and_functions_stay_short(path):
    assert len(path.read_text().splitlines()) <= LONGEST_MODULE
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            bound = LONGEST_LOOP if (name_of(path), node.name) == LOOP else LONGEST_FUNCTION
            assert node.end_lineno - node.lineno + 1 <= bound, node.name


@pytest.mark.parametrize("path", SOURCE, ids=name_of)
def test_every_signature_is_annotated(path):
    for function, kind in functions(parse(path)):
        where = f"{name_of(path)}:{function.lineno} {function.name}"
        arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
        arguments += filter(None, [function.args.vararg, function.args.kwarg])
        first = arguments[:1] if kind == "method" else []
        bare = [argument.arg for argument in arguments if argument.annotation is None and argument not in first]
        # torch.autograd.Function hands its static methods a context that has no public type
        assert [name for name in bare if name != "ctx"] == [], where
        if "ctx" not in bare:
            assert function.returns is not None, f"{where} does not say what it returns"


def functions(tree: ast.AST, inside_class: bool = False):
    """(function, "method" when its first argument is the instance or class, else "function") at any depth."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            static = any(isinstance(d, ast.Name) and d.id == "staticmethod" for d in node.decorator_list)
            yield node, "method" if inside_class and not static else "function"
            yield from functions(node)
        else:
            yield from functions(node, isinstance(node, ast.ClassDef))


@pytest.mark.parametrize("path", [path for path in SOURCE if path.name != "__init__.py"], ids=name_of)
def test_a_module_says_what_it_is(path):
    assert ast.get_docstring(parse(path))


def test_the_top_level_is_the_users():
    """Recipes and configs are what a user edits; no folder appears without a decision."""
    folders = {path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")}
    assert folders - {"runs"} == {"recipes", "ds_configs", "launch", "tools", "tests"}
