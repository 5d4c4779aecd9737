"""Every bench runs to its end at a tiny size, and reports what it promises. Nothing here is judged by the clock."""

import math
import re
import sys
from functools import partial

import pytest
from transformers import LlamaConfig

from recipes.common.recipe import ROOT
from tests.bench import checkpoint, data, rewind
from tests.bench.data import make_corpus, make_tokenizer
from tests.bench.spikes import monitor_overhead, planted_causes
from tests.support.browser import CHROMIUM
from tests.support.small_runs import call, call_bench
from tests.support.synthetic_logs import healthy_loss, write_log
from tools.plan.rehearsal import shim
from tools.spikes.evidence.causes import STALE_MOMENT

TINY_RECIPE = """
from transformers import LlamaConfig
from recipes.common.recipe import AdamW, Batch, Constant, Layout, Recipe

recipe = Recipe(
    name="tiny",
    model=LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                      vocab_size=131, tie_word_embeddings=False),
    num_params=0, tokenizer="", data="", layouts={1: Layout()},
    batch=Batch(seq_len=16, micro_seqs=2, global_seqs=8),
    optimizer=AdamW(lr=1e-2), schedule=Constant(warmup_steps=1), steps=1, deepspeed="zero1_fp32.json",
)
"""


def figures(called):
    """The JSON of a bench, with every number checked to be finite and not below 0."""
    assert called.code == 0, called.err
    assert all(math.isfinite(value) and value >= 0 for value in _numbers(called.json))
    return called.json


def _numbers(found):
    if isinstance(found, dict | list):
        return [number for item in (found.values() if isinstance(found, dict) else found) for number in _numbers(item)]
    return [found] if isinstance(found, int | float) else []


def test_checkpoint(tmp_path, monkeypatch, warm):
    monkeypatch.setattr(sys, "executable", str(warm))  # of the process whose memory is measured
    monkeypatch.setattr(checkpoint, "DEPTHS", (2,))
    monkeypatch.setattr(checkpoint, "DTYPES", ("bfloat16",))
    small = ("--layers", 1, "--hidden", 256, "--vocab", 4096, "--rounds", 1, "--folder", tmp_path)
    found = figures(call_bench("checkpoint", *small, "--json"))
    assert list(found) == ["save", "export", "memory at 2x, bfloat16"]
    assert round(found["save"]["megabytes"] / found["export"]["megabytes"]) == 3  # weights and Adam's two states
    assert found["memory at 2x, bfloat16"]["largest_tensor_megabytes"] == 4.2
    assert list(tmp_path.iterdir()) == []


def test_data(monkeypatch, warm):
    monkeypatch.setattr(sys, "executable", str(warm))  # of the command that prepares
    monkeypatch.setattr(data, "make_tokenizer", partial(make_tokenizer, vocab=1000))
    found = figures(call_bench("data", "--megabytes", 1, "--read-megabytes", 16, "--json"))  # exit 0: our ids are the loop's
    assert found["open_tokens"] == 10**12 and found["open_and_seek_mib"] < 100
    assert {"loop_seconds", "datasets_seconds", "ours_tokenizers_seconds", "ours_fastokens_seconds"} <= set(found)


def test_timers(tmp_path):
    recipe = tmp_path / "tiny_recipe.py"
    recipe.write_text(TINY_RECIPE)
    found = figures(call_bench("timers", recipe, "--layout", "tensor=2", "--rounds", 2, "--json"))
    assert [rank["steps_timed"] for rank in found["ranks"]] == [4, 4]  # of 4 warm ones every second, and the rounds


def test_rewind(tmp_path, monkeypatch):
    """The four runs are made and compared, of one layer; whether so short a run is worth a roll-back is not judged."""
    text = rewind.recipe_text
    monkeypatch.setattr(rewind, "SETTLED_STEP", 8)
    monkeypatch.setattr(rewind, "BAD_STEPS", 4)
    monkeypatch.setattr(rewind, "recipe_text", lambda *args, **options: _smaller(text(*args, **options)))
    texts = make_corpus(tmp_path / "corpus.jsonl", 1)
    make_tokenizer(tmp_path / "tokenizer", texts[:100], vocab=400)
    flags = ("--tokenizer", tmp_path / "tokenizer", "--validation-fraction", 0.1, "--workers", 1, "--out", tmp_path / "good")
    assert call("data", "prepare", tmp_path / "corpus.jsonl", *flags).code == 0
    tiny = ("--steps", 17, "--seq-len", 16, "--eval-seqs", 16)
    called = call_bench("rewind", *tiny, "--data", tmp_path / "good", "--out", tmp_path / "out", "--json")
    assert called.code in (0, 1), called.err
    runs = called.json["runs"]
    assert list(runs) == ["clean", "clean, another seed", "planted, logged", "planted, rewound"]
    assert runs["clean"]["val_loss"] != runs["clean, another seed"]["val_loss"]
    assert runs["planted, logged"]["worst_loss"] > runs["clean"]["worst_loss"] + 1.0
    assert (tmp_path / "out" / "planted_rewound" / "spikes.html").is_file()


def _smaller(text):
    smaller = {"num_hidden_layers=4": "num_hidden_layers=1", "num_params=2_361_024": "num_params=1_180_224"}
    for old, new in (smaller | {"warmup_steps=20": "warmup_steps=4"}).items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


def test_monitor(monkeypatch):
    tiny = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=131
    )
    monkeypatch.setattr(monitor_overhead, "QUICKSTART", tiny)
    monkeypatch.setattr(monitor_overhead, "EIGHT", {"tensor": 2})  # called eight
    monkeypatch.setattr(monitor_overhead, "TRIAL", {"seq_len": 8, "micro_seqs": 1, "global_seqs": 4, "chunk_tokens": 8})
    called = call_bench("spikes", "--only", "monitor", "--pairs", 2, "--json")
    assert called.code in (0, 1), called.err
    scores = called.json["scores"]["monitor"]
    assert [score["name"].rpartition(", ")[2] for score in scores] == ["1 process", "8 processes"]
    assert all(re.fullmatch(r"-?[\d.]+% of [\d.]+ s \(-?[\d.]+% by the wall clock\)", score["value"]) for score in scores)


def test_speed(tmp_path):
    write_log(tmp_path / "log.csv", healthy_loss(points=2000))
    (tmp_path / "labels.csv").touch()
    called = call_bench("spikes", tmp_path, "--only", "speed", "--points", 4000, "--json")
    assert called.code in (0, 1), called.err
    assert [score["name"] for score in called.json["scores"]["speed"]] == ["3.5 million points scanned"]


def test_a_planted_cause(monkeypatch):
    """The command makes a run, explains and counts it; `tests/tools/spikes/test_explain.py` tries each cause."""
    monkeypatch.setattr(planted_causes, "HELD_OUT", [p for p in planted_causes.trimmed() if p.cause == STALE_MOMENT])
    found = figures(call_bench("spikes", "--only", "causes", "--runs", 1, "--json"))
    assert "1 of 1" in found["scores"]["causes"][0]["value"]


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the path: apt-get install chromium")
def test_report():
    found = figures(call_bench("report", "--steps", 3000, "--rounds", 1, "--json"))
    assert 0 < found["pages"]["report"]["megabytes"] < 2


@pytest.mark.skipif(shim.missing() is not None, reason=f"the stand-in for CUDA cannot be compiled: {shim.missing()}")
def test_rehearsal():
    called = call_bench("rehearsal", "gpt2_124m", "--layers", 1, "--json")
    assert called.code in (0, 1), called.err
    (row,) = called.json["rows"]
    assert (row["recipe"], row["stage"], row["broken"], row["waits"][1]) == ("gpt2_124m", 0, {}, 0)
    assert row["peak"] == pytest.approx(row["planned"], rel=0.2)


def test_planted_plans():
    called = call_bench("planted_plans", "bloom")
    assert called.code == 0, called.err
    assert re.search(r"bloom +(\d+) of \1 found", called.out)


@pytest.mark.parametrize(
    ("bench", "flags", "message"),
    [
        ("rehearsal", ("nanogpt",), "nanogpt: not on the shelf"),
        ("planted_plans", ("nanogpt",), "nanogpt: no tensor plan of our own"),
        ("spikes", (), "has no labels.csv"),
        ("spikes", ("--only", "causes", "--runs", 0), "--runs=0: must be 1 or more"),
        ("checkpoint", ("--folder", "/nowhere"), "there is no such folder"),
        ("timers", ("--layout", "tensors=2"), "--layout"),
        ("report", ("--steps", 10), "--steps=10: must be 1000 or more"),
        ("rewind", ("--steps", 10), "--steps=10: must be over 28"),
        ("rewind", ("--data", "/nowhere"), "holds no prepared data"),
    ],
)
def test_a_mistake_is_said_before_anything_runs(bench, flags, message):
    called = call_bench(bench, *flags)
    assert called.code == 2 and message in called.err and "Traceback" not in called.err


def test_every_bench_is_in_the_readme_and_started_here():
    text = (ROOT / "tests/README.md").read_text()
    names = {path.stem for path in ROOT.glob("tests/bench/*.py")} | {
        p.parent.name for p in ROOT.glob("tests/bench/*/__main__.py")
    }
    tests = "".join(path.read_text() for path in ROOT.glob("tests/bench/test_*.py"))
    for name in {name for name in names if not name.startswith("test_")} - {"export_memory"}:  # which checkpoint starts
        assert f"python -m tests.bench.{name}" in text, f"tests/README.md: no line on {name}"
        assert f'call_bench("{name}"' in tests, f"no test starts {name}"
