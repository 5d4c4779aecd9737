"""Whatever a JSON file of a run, a recipe or a tokenizer holds, its reader ends, and says in one message what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models

from recipes.common.anomalies.rewinds import read_history
from recipes.common.checkpoint.changes import accepted_before, written_recipe
from recipes.common.config.ds_config import load_ds_config
from recipes.common.run_dir.attempts import has_begun, read_attempts
from recipes.common.run_dir.black_box import read_boxes
from recipes.common.run_dir.heartbeat import read_beats
from recipes.common.run_dir.metrics import read_metrics
from recipes.common.run_dir.run_files import recipe_to_dict
from tests.support.hostile_json import one_message, variants
from tests.support.tiny import tiny_recipe
from tools.common.console import UsageError
from tools.common.logs.run_numbers import _resumes
from tools.common.recipe_io import read_recipe
from tools.data.lookup import read_files, read_run, read_step
from tools.data.tokenizer import end_token
from tools.data.tokenizer_file import find_tokenizer
from tools.plan.coefficients import SHIPPED, read_coefficients
from tools.spikes.report_page.events import describe_source

START = {
    "time": "2026-01-02T03:04:05+00:00",
    "resumed_step": None,
    "command": ["python", "recipes/x.py"],
    "world_size": 1,
    "layout": {"tensor": 1, "pipeline": 1},
    "sizes": {"tensor": 1, "pipeline": 1, "data": 1, "world": 1},
    "skips": [[8, 12]],
    "data": {"d": "sha256:0"},
}
REWIND = {
    "kind": "spike",
    "onset_step": 5,
    "from_step": 6,
    "to_step": 2,
    "skipped": [8, 12],
    "lr_factor": 0.5,
    "lr_until_step": 9,
}
RUN = {"run_id": "0123", "name": "x", "starts": [START, START | {"resumed_step": 2}], "history": [REWIND]}
STEP = {"step": 1, "tokens": 64, "consumed_seqs": 4, "loss": 2.5}
BEAT = {"rank": 0, "host": "a", "pid": 5, "step": 3, "phase": "step", "time": 1.0, "step_seconds": 1.0, "phase_seconds": {}}
FILE_LINE = {"path": "a.txt", "source": 0, "kind": "text", "bytes": 3, "changed_ns": 0, "parts": 0}
EVENT = {"onset_step": 3, "written_step": 5, "class": "spike", "reaction": None}

# file in a run directory -> (its content, what reads it)
READERS: dict[str, tuple[Any, tuple[Callable[[Path], Any], ...]]] = {
    "run.json": (
        RUN,
        (
            read_history,
            accepted_before,
            has_begun,
            _resumes,
            describe_source,
            read_run,
            lambda run: read_step(run, 1),
        ),
    ),
    "recipe.json": (None, (read_recipe, written_recipe, describe_source, read_run, lambda run: read_step(run, 1))),
    "metrics.jsonl": (STEP, (lambda run: list(read_metrics(run)), lambda run: read_step(run, 1))),
    "logs/attempts.jsonl": ({"event": "start", "cause": "first", "time": 1.0}, (read_attempts,)),
    "logs/heartbeat/rank_00000.json": (BEAT, (read_beats,)),
    "events/step_00000003/event.json": (EVENT, (read_boxes,)),
    "files.jsonl": (FILE_LINE, (lambda run: read_files(run, {0}),)),
    "ds.json": (
        {"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}, "communication_data_type": "fp32"},
        (lambda run: load_ds_config(str(run / "ds.json")),),
    ),
    "coefficients.json": (json.loads(SHIPPED.read_text()), (lambda run: read_coefficients(run / "coefficients.json"),)),
}


@pytest.fixture
def run_dir(tmp_path):
    for name, (content, _) in READERS.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(recipe_to_dict(tiny_recipe(tmp_path)) if content is None else content)
        path.write_text(text + "\n" * name.endswith("jsonl"))
    return tmp_path


@pytest.mark.parametrize("name", READERS)
def test_every_file_of_a_run(run_dir, name):
    path = run_dir / name
    whole = path.read_text()
    _, readers = READERS[name]
    for read in readers:
        read(run_dir)  # as it is, it can be read
    for raw in variants(json.loads(whole), 120):
        path.write_bytes(raw + b"\n" * name.endswith("jsonl"))
        for read in readers:
            try:
                read(run_dir)
            except (ValueError, OSError) as error:  # UsageError, RecipeError and JsonError are ValueErrors
                one_message(error)


def test_a_tokenizers_files(tmp_path):
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "</s>": 1}, unk_token="[UNK]"))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    whole = (tmp_path / "tokenizer.json").read_text()
    for raw in variants(json.loads(whole), 100):
        (tmp_path / "tokenizer.json").write_bytes(raw)
        try:
            find_tokenizer(str(tmp_path))
        except UsageError as error:
            assert str(tmp_path) in one_message(error)
    for raw in variants({"eos_token": {"content": "</s>"}, "unk_token": "[UNK]"}, 100):
        (tmp_path / "tokenizer_config.json").write_bytes(raw)
        try:
            assert end_token(tmp_path, tokenizer) in (0, 1)
        except ValueError as error:
            one_message(error)
