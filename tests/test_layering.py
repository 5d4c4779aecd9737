"""The rules of the house, read off the source: who may import whom, names that shadow nothing, sizes, annotations.

One test a rule: it lists every file, and line, that breaks it.
"""

import ast
import importlib.util
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

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


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


@cache
def imports(path: Path) -> frozenset[str]:
    """Dotted names of everything a file imports, at any depth: modules, and what is taken from them."""
    found = set()
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}:{node.lineno}: a relative import breaks a file that runs as a script"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(found)


def is_under(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def imports_beyond(paths: list[Path], *packages: str) -> list[str]:
    """Return what these files import of ours from elsewhere than `packages`."""
    return [
        f"{name_of(path)}: {name}"
        for path in paths
        for name in sorted(imports(path))
        if any(is_under(name, own) for own in OURS) and not any(is_under(name, package) for package in packages)
    ]


def test_common_imports_no_recipe_and_no_tool():
    assert imports_beyond(COMMON, "recipes.common") == []


def wing_of(name: str) -> str:
    """Return the wing, or the file at the top, of a dotted name under recipes.common."""
    return name.split(".")[2]


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def test_a_wing_imports_only_from_wings_below_it():
    higher = []
    for path in COMMON:
        if path.parent.name != "common" or path.stem != "__init__":
            own = wing_of(dotted(path))
            others = {wing_of(name) for name in imports(path) if is_under(name, "recipes.common")} - {own}
            higher += [f"{name_of(path)}: {wing}" for wing in sorted(others) if FLOOR_OF[wing] >= FLOOR_OF[own]]
    assert higher == []


def test_no_imports_go_in_a_circle():
    """Between modules of recipes/common, whatever the wing."""
    modules = {dotted(path) for path in COMMON}
    graph = {}
    for path in COMMON:
        taken = imports(path)
        graph[dotted(path)] = {m for name in taken for m in (name, name.rpartition(".")[0]) if m in modules} - {dotted(path)}
    assert list(TopologicalSorter(graph).static_order())  # raises CycleError with the circle


def test_a_recipe_imports_common_and_third_parties():
    assert imports_beyond(RECIPES, "recipes.common") == []


def test_a_tool_imports_tools_and_common():
    assert imports_beyond(TOOLS, "recipes.common", "tools") == []


def test_no_file_takes_the_name_of_another_module():
    """Run as a script, a file's folder may come first on the path: its name must not be one that anybody imports."""
    names = {path.stem: name_of(path) for path in (*SOURCE, *TESTS) if path.stem not in ("__init__", "__main__")}
    taken = [path for name, path in names.items() if name in sys.stdlib_module_names]
    for name, path in names.items():
        spec = importlib.util.find_spec(name)
        # found only where it is ours: pytest may put the folder of the tests on the path
        if spec is not None and not Path(spec.origin or "/").is_relative_to(ROOT / "tests"):
            taken.append(path)
    assert taken == []


def test_modules_and_functions_stay_short():
    long = [name_of(path) for path in SOURCE if len(path.read_text().splitlines()) > LONGEST_MODULE]
    for path in SOURCE:
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                bound = LONGEST_LOOP if (name_of(path), node.name) == LOOP else LONGEST_FUNCTION
                if node.end_lineno - node.lineno + 1 > bound:
                    long.append(f"{name_of(path)}:{node.lineno} {node.name}")
    assert long == []


def test_every_signature_is_annotated():
    problems = []
    for path in SOURCE:
        for function, kind in functions(parse(path)):
            arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
            arguments += filter(None, [function.args.vararg, function.args.kwarg])
            first = arguments[:1] if kind == "method" else []
            bare = [argument.arg for argument in arguments if argument.annotation is None and argument not in first]
            # torch.autograd.Function hands its static methods a context that has no public type
            missing = [name for name in bare if name != "ctx"]
            missing += ["what it returns"] if function.returns is None and "ctx" not in bare else []
            if missing:
                problems.append(f"{name_of(path)}:{function.lineno} {function.name}: {', '.join(missing)}")
    assert problems == []


def functions(tree: ast.AST, inside_class: bool = False):
    """(function, "method" when its first argument is the instance or class, else "function") at any depth."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            static = any(isinstance(d, ast.Name) and d.id == "staticmethod" for d in node.decorator_list)
            yield node, "method" if inside_class and not static else "function"
            yield from functions(node)
        else:
            yield from functions(node, isinstance(node, ast.ClassDef))


def test_a_module_says_what_it_is():
    silent = [name_of(path) for path in SOURCE if path.name != "__init__.py" and not ast.get_docstring(parse(path))]
    assert silent == []


def test_the_top_level_is_the_users():
    """Recipes and configs are what a user edits; no folder appears without a decision."""
    folders = {path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")}
    assert folders - {"runs"} == {"recipes", "ds_configs", "launch", "tools", "tests"}
