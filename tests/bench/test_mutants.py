"""Wrong lines are found in the source as they should be, and a planted one is judged: found, left over, or harmless."""

import json

from recipes.common.recipe import ROOT
from tests.bench.mutants import __main__ as mutants
from tests.bench.mutants.mutations import SCOPE, draw, find
from tests.support.small_runs import call_bench
from tools.common.forked_ranks import run_ranks

SOURCE = '''"""A docstring with 1 + 1."""

def work(x: int, group, *, deep: bool = True):
    """Say 2 < 3."""
    if x > 9:
        raise ValueError(f"x={x}: over {9}")
    with CLOCK.span(3):
        y = all_reduce(x * 4, group) if deep else -x
    layer.register_forward_hook(y)
    assert y < 5
    return y
'''
DOUBLED = "total = all_reduce(all_reduce(x, group, own=own), group, own=own)"
PLANTED = [
    ("collective", "y = (x * 4) if deep else -x"),
    ("collective", "y = all_reduce(all_reduce(x * 4, group), group) if deep else -x"),
    ("swapped branch", "y = (-x if deep else all_reduce(x * 4, group))"),
    ("scale", "y = all_reduce((x), group) if deep else -x"),
    ("scale", "y = all_reduce((4), group) if deep else -x"),
    ("bound", "y = all_reduce(x * 5, group) if deep else -x"),
    ("bound", "y = all_reduce(x * 3, group) if deep else -x"),
    ("sign", "y = all_reduce(x * 4, group) if deep else (x)"),
    ("hook or call left out", "pass"),
]


def test_what_is_planted_in_a_source(tmp_path):
    """Docstrings, annotations, defaults, refusals, assertions and the clock are left alone."""
    (tmp_path / "module.py").write_text(SOURCE)
    found = find(tmp_path, "module.py")
    assert sorted((mutation.kind, mutation.after) for mutation in found) == sorted(PLANTED)
    assert {mutation.function for mutation in found} == {"work"}
    assert {mutation.line for mutation in found} == {8, 9}
    for mutation in found:
        lines = mutation.planted(SOURCE.encode()).decode().splitlines()
        assert lines[mutation.line - 1].strip() == mutation.after


def test_a_draw_is_its_seed_and_harmless_lines_are_still_there():
    drawn = draw(ROOT, 20, 1)
    assert drawn == draw(ROOT, 20, 1) != draw(ROOT, 20, 2)
    assert len({mutation.kind for mutation in drawn}) > 5
    keys = {mutation.key for file in SCOPE for mutation in find(ROOT, file)}
    for entry in json.loads(mutants.HARMLESS.read_text()):
        assert tuple(entry["key"]) in keys, f"harmless.json: no such line any more: {entry['key']}"
        assert entry["why"]


def test_lines_are_planted_and_judged():
    called = call_bench("mutants", "--count", 2, "--seed", 3, "--gates", 1, "--tests", "--json")
    assert called.code in (0, 1), called.err
    found = called.json
    assert found["planted"] == 2 == found["found"] + found["harmless"] + len(found["survivors"])
    assert found["by_verify"] == found["found"]


def test_a_line_is_found_by_the_judge_that_calls_it():
    assert run_ranks(_fates, 1) == [{"found": "verify quickstart tensor=2 zero1", "survives": None}]


def test_tests_that_share_a_start_of_ranks_are_asked_too():
    """Of the tests of a file only the first that uses a fixture is seen to call what the fixture runs."""
    (mutation,) = [m for m in find(ROOT, "recipes/common/parallel/collectives.py") if m.after == DOUBLED]
    function = f"{mutation.file}:{mutation.function}"
    seconds = {"a.py::first": 3.0, "a.py::second": 0.1, "b.py::other": 0.1, "verify x": 5.0}
    calls = {name: {function} if name in ("a.py::first", "verify x") else set() for name in seconds}
    assert mutants.Baseline(seconds, calls).judges_of(mutation) == ["a.py::first", "verify x", "a.py::second"]


def _fates():
    """Plant a doubled sum over tensor ranks where a tensor layout is judged; or not: its function is called by no judge."""
    (mutation,) = [m for m in find(ROOT, "recipes/common/parallel/collectives.py") if m.after == DOUBLED]
    name = mutants.judges.GATES[0].name
    called = {"found": f"{mutation.file}:{mutation.function}", "survives": ""}
    with mutants._copy_of_the_tree() as copy:
        before, fates = (copy / mutation.file).read_bytes(), {}
        for fate, function in called.items():
            baseline = mutants.Baseline({name: 1.0}, {name: {function}})
            fates[fate] = mutants._judge(copy, baseline, 0, mutation, 0.0, {}).found_by
            assert (copy / mutation.file).read_bytes() == before
    return fates


def test_a_mistake_is_said_before_anything_runs():
    called = call_bench("mutants", "--count", 0)
    assert called.code == 2 and "--count=0: must be 1 or more" in called.err
