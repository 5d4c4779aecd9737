"""The judges of a wrong line, run in a forked child on its copy of the tree: `verify` in layouts, and tests.

A judge that never calls the function of the wrong line cannot condemn it, so each judge is run once on the tree as it is, and
the functions that it calls are written down.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from transformers import AutoConfig

with redirect_stdout(sys.stderr):
    from recipes.quickstart import recipe as quickstart
    from tools.common.recipe_io import parse_layout
    from tools.verify.gate import make_trial, verify

ROOT = Path(__file__).resolve().parents[3]
Said = tuple[str, bool, str, float]  # judge, whether it found nothing wrong, what it says, seconds
Say = Callable[[Said], None]
PYTEST, NO_SUCH_TEST = "pytest", "no such test"


@dataclass(frozen=True)
class Gate:
    """One run of `verify`: a family (None: the quickstart's own model), fields of its config, a layout, a ds_config."""

    family: str | None
    layout: str
    deepspeed: str = "zero1_fp32.json"
    fields: tuple[tuple[str, Any], ...] = ()

    @property
    def name(self) -> str:
        words = [self.family or "quickstart", *(f"{k}={v}" for k, v in self.fields), self.layout, self.deepspeed.split("_")[0]]
        return "verify " + " ".join(words)


GATES = (
    Gate(None, "tensor=2"),
    Gate(None, "pipeline=2"),
    Gate("gpt2", "tensor=2,pipeline=2"),
    Gate("qwen3", "tensor=2,pipeline=2,sequence_parallel=1,recompute=full,recompute_every=2"),
    Gate("mixtral", "tensor=2"),
    Gate("minicpm3", "tensor=2"),
    Gate("gptj", "pipeline=2,pipeline_schedule=zero_bubble_v"),
    Gate(None, "pipeline=3,pipeline_schedule=zero_bubble,recompute=selective"),
    Gate("qwen3", "tensor=4,sequence_parallel=1", fields=(("num_attention_heads", 4), ("num_key_value_heads", 2))),
    Gate("olmo2", "tensor=2,data=2", "zero2_fp32.json"),
    Gate(None, "pipeline=2,data=2,pipeline_schedule=zero_bubble_v", "zero1_bf16.json"),
    Gate(None, "data=2", "zero3_fp32.json"),
    Gate(None, "context=2,mlp_chunk_tokens=4,recompute=full,offload_activations=1"),
    Gate("gpt_oss", "context=2,context_heads=1"),
    Gate("gemma2", "tensor=2,context=2,context_heads=2"),
)

TESTS = (
    "tests/common/parallel",
    "tests/common/pipeline",
    "tests/common/model",
    "tests/common/engine",
    "tests/common/monitor",
    "tests/common/data",
    "tests/common/checkpoint/test_resume.py",
    "tests/common/checkpoint/test_files.py",
    "tests/common/checkpoint/test_reorder.py",
)


class Calls:
    """Writes down, for the judge at work, which functions of recipes/common are called, in this process and its forks."""

    def __init__(self, file: Path) -> None:
        self._out = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._prefix, self._judge, self._seen = f"{ROOT}/recipes/common/", "", set()
        self._files: dict[str, str | None] = {}

    def begin(self, judge: str) -> None:
        self._judge, self._seen = judge, set()
        sys.settrace(self._trace)
        threading.settrace(self._trace)

    def _trace(self, frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if code in self._seen:
            return
        self._seen.add(code)
        if code.co_filename.startswith(self._prefix):
            file = code.co_filename.removeprefix(f"{ROOT}/")
            os.write(self._out, f"{self._judge}\t{file}:{code.co_qualname}\n".encode())


def run_gates(names: list[str], say: Say, calls: Path | None = None) -> None:
    """Run `verify` for gates by name, until one finds a difference."""
    record = Calls(calls) if calls else None
    gates = {gate.name: gate for gate in GATES}
    for gate in map(gates.__getitem__, names):
        started = time.perf_counter()
        if record:
            record.begin(gate.name)
        try:
            said = _differences(gate)
        except Exception as error:
            said = f"{type(error).__name__}: {str(error).strip().splitlines()[-1] if str(error).strip() else ''}"
        say((gate.name, not said, said, time.perf_counter() - started))
        if said and not record:
            return


def _differences(gate: Gate) -> str:
    recipe = replace(quickstart, deepspeed=gate.deepspeed, z_loss=1e-3)
    if gate.family:  # not all families have sdpa
        recipe = replace(recipe, model=AutoConfig.for_model(gate.family, **dict(gate.fields)), attention="eager")
    layout, data = parse_layout(gate.layout)
    rows = verify(make_trial(recipe, layout, data, steps=2, seq_len=16, device="cpu"))
    return "; ".join(f"{r.what} of {r.where} by {r.difference:.1e}" for r in rows if not r.passed)


def run_tests(names: list[str], say: Say, calls: Path | None = None) -> None:
    """Run tests by node id, or all under paths, until one fails (with `calls`: all)."""
    reporter = _Reporter(say, Calls(calls) if calls else None)
    first = () if calls else ("-x",)
    options = ("-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:timeout", "--tb=line", "-m", "not gpu")
    code = pytest.main([*options, *first, *names], plugins=[reporter])
    if code not in (0, 1):  # a module of tests that cannot even be imported
        say((PYTEST, False, NO_SUCH_TEST if code == pytest.ExitCode.USAGE_ERROR else f"exit {int(code)}", 0.0))


class _Reporter:
    """Says what each test found as soon as it has ended."""

    def __init__(self, say: Say, calls: Calls | None) -> None:
        self._say, self._calls = say, calls

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        if self._calls:
            self._calls.begin(item.nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped or (report.when != "call" and report.passed):
            return
        message = "" if report.passed else str(report.longrepr).strip().splitlines()[-1]
        self._say((report.nodeid, report.passed, message, report.duration))
