"""`python -m tools.replay` on small runs: bit for bit in their own layout, to rounding in others, and one thing changed."""

import hashlib
import json
import shutil
from importlib import metadata

import pytest

from recipes.common.config.ds_checks import fp16_supported
from recipes.common.run_dir.metrics import read_metrics
from tests.support.small_runs import call, call_each
from tools.common.forked_ranks import run_ranks
from tools.replay.compare import BITWISE, DIFFERS, WITHIN_ROUNDING, judge
from tools.replay.enter import enter


def replay(*arguments):
    return call("replay", *arguments)


def content(folder):
    return {p.relative_to(folder): hashlib.sha256(p.read_bytes()).digest() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("plain", 2),  # from the initial weights; documents masked, two micro batches a step
        ("plain", 8),  # with a checkpoint at its end, whose weights and optimizer states are compared too
        ("with_dropout", 4),  # bf16, four ranks, two stages
        ("rewound", 5),  # after a rewind: sequences left out, a lower learning rate
    ],
)
def test_a_step_is_bit_for_bit_what_was_logged_and_the_run_stays_as_it_is(request, name, step):
    folder = request.getfixturevalue(name)
    before = content(folder)
    found = replay(folder, "--step", step, "--json").json
    assert found["verdict"] == BITWISE and found["first"] is None, found["first"]
    logged = {r["step"]: r for r in read_metrics(folder) if "loss" in r}[step]
    assert found["replayed"] == {field: logged[field] for field in ("loss", "grad_norm", "lr")}
    assert found["compared"] > 300  # every parameter's statistics, not the loss alone
    assert content(folder) == before


def test_the_rewound_run_did_rewind(rewound):
    history = json.loads((rewound / "run.json").read_text())["history"]
    assert [(entry["to_step"], entry["lr_factor"]) for entry in history] == [(3, 0.5)]


def test_fp16_replays_where_it_runs(plain):
    if not run_ranks(fp16_supported, 1)[0]:
        told = replay(plain, "--step", 2, "--precision", "fp16")
        assert told.code == 2 and "DeepSpeed refuses fp16 on this device" in told.err
        pytest.skip("DeepSpeed refuses fp16 on this machine's CPU")
    assert replay(plain, "--step", 2, "--precision", "fp16", "--json").json["verdict"] == WITHIN_ROUNDING


@pytest.mark.parametrize("layout", ["pipeline=2,pipeline_schedule=zero_bubble", "data=2,context=2"])
def test_another_layout_agrees_within_rounding(plain, layout):
    found = replay(plain, "--step", 4, "--layout", layout, "--json").json
    assert found["verdict"] in (BITWISE, WITHIN_ROUNDING), found["first"]
    for name in ("loss", "grad_norm"):
        assert found["replayed"][name] == pytest.approx(found["logged"][name], rel=1e-6)
    assert found["verdict"] == BITWISE or "another layout" in found["notes"][0]


@pytest.mark.parametrize(
    ("change", "quantity"),
    [
        (("--set", "optimizer.clip=0.1"), "adam_rms of model.embed_tokens.weight"),
        (("--set", "optimizer.lr=0.002"), "lr"),
        (("--set", "mask_documents=False"), "loss"),
        (("--set", "batch.global_seqs=8"), "tokens"),
        (("--without", "12:14"), "loss"),
    ],
)
def test_a_change_is_told_by_the_first_quantity_that_differs(plain, change, quantity):
    found = replay(plain, "--step", 4, *change, "--json")
    assert found.code == 1 and found.json["verdict"] == DIFFERS
    assert (found.json["first"]["step"], found.json["first"]["quantity"]) == (4, quantity)
    assert found.json["change"]


def test_another_precision_rounds_otherwise_and_no_more(plain):
    found = replay(plain, "--step", 4, "--precision", "bf16", "--json").json
    assert found["verdict"] == WITHIN_ROUNDING and found["precision"] == "bf16"
    assert found["replayed"]["loss"] != found["logged"]["loss"]
    assert found["largest"]["rounding"] > 1e-5  # measured in bf16, not in fp32


def test_a_change_of_what_is_not_trained_changes_no_bit(plain):
    changes = ("--set", "checkpoints.every_steps=7", "--set", "zero_optimization.reduce_bucket_size=40000000")
    found = replay(plain, "--step", 4, *changes, "--json")
    assert found.code == 0 and found.json["verdict"] == BITWISE


def test_a_log_that_nobody_can_compute_is_told_by_its_step_and_quantity(plain, tmp_path):
    copy = shutil.copytree(plain, tmp_path / "run")
    records = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().splitlines()]
    changed = [r | {"grad_norm": r["grad_norm"] * 1.001} if r["step"] == 5 else r for r in records]
    (copy / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in changed))
    found = replay(copy, "--step", 6, "--json")
    assert found.code == 1 and (found.json["first"]["step"], found.json["first"]["quantity"]) == (5, "grad_norm")
    assert found.json["first"]["rounding"] < 1e-6 < found.json["first"]["difference"]
    text = replay(copy, "--step", 6)
    assert text.code == 1 and "first to differ: grad_norm of step 5" in text.out and "rounding" in text.out


MISTAKES = (
    (("--step", 99), "has no step 99; it has 1 to 8"),
    (("--step", 0), "steps count from 1"),
    ((), "--step N is missing"),
    (("--step", 4, "--layout", "tensors=2"), "is not tensor=N"),
    (("--step", 4, "--layout", "data=3"), "is not a multiple of micro_seqs"),
    (("--step", 4, "--layout", "pipeline=8"), "use 4 stages at most"),
    (("--step", 4, "--set", "optimizer.clip"), "expected FIELD=VALUE"),
    (("--step", 4, "--set", "optimizer.clips=1"), "there is no field 'clips' (did you mean 'clip'?)"),
    (("--step", 4, "--set", "optimizer.clip=high"), "optimizer.clip='high' must be a number"),
    (("--step", 4, "--set", "optimizer.clip=-1"), "optimizer.clip=-1 must lie between"),
    (("--step", 4, "--set", "optimizer.clip=0.5"), "the run had that value"),
    (("--step", 4, "--set", "model.hidden_size=32"), "mean nothing then"),
    (("--step", 4, "--set", "model.rms_norm_epsilon=1"), "there is no field 'rms_norm_epsilon'"),
    (("--step", 4, "--set", "model.model_type=gpt2"), "LlamaConfig takes no other value there"),
    (("--step", 4, "--set", "zero_optimization.stages=1"), "unknown key 'zero_optimization.stages'"),
    (("--step", 4, "--set", "gradient_clipping=1"), "it is optimizer.clip of the recipe"),
    (("--step", 4, "--without", "5:3"), "expected START:STOP"),
    (("--step", 4, "--without", "90:99"), "read sequences 12 to 15, and none of those"),
    (("--step", 4, "--precision", "fp32"), "was trained in fp32"),
    (("--step", 4, "--versions", "deepspeed"), "expected PACKAGE=VERSION"),
    (("--step", 4, "--against"), "--against alone compares with nothing"),
    (("--against", "NONE"), "NONE"),
)


@pytest.fixture(scope="module")
def told_of_mistakes(plain, tmp_path_factory):
    none = tmp_path_factory.mktemp("none") / "NONE"
    calls = [[plain, *(none if word == "NONE" else word for word in arguments)] for arguments, _ in MISTAKES]
    return dict(zip([arguments for arguments, _ in MISTAKES], call_each("replay", calls), strict=True))


@pytest.mark.parametrize(("arguments", "words"), MISTAKES)
def test_mistakes_are_said_in_one_message_before_any_work(told_of_mistakes, arguments, words):
    told = told_of_mistakes[arguments]
    assert told.code == 2 and told.out == "" and "Traceback" not in told.err
    assert told.err.startswith("error: ") and words in told.err


def test_a_damaged_checkpoint_is_named_and_nothing_is_computed_from_it(plain, tmp_path):
    copy = shutil.copytree(plain, tmp_path / "run")
    path = copy / "checkpoints" / "step_00000003" / "rank_00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    told = replay(copy, "--step", 4)
    assert told.code == 1 and told.out == "" and "Traceback" not in told.err
    assert "rank_00000.safetensors: its content changed since it was written (checksum)" in told.err


def test_what_a_run_was_computed_with_is_read_from_its_record(plain, tmp_path):
    logged = enter(plain, 4)[1]
    assert logged.versions["torch"] == metadata.version("torch") and "deepspeed" in logged.versions
    assert "tqdm" not in logged.versions and logged.device  # that changes no number
    copy = shutil.copytree(plain, tmp_path / "run")
    (entry,) = (copy / "segments").glob("*.json")
    content = json.loads(entry.read_text())
    content["facts"] |= {"package.torch.version": "1.0", "threads.torch": 3, "host.0.gpus": ["NVIDIA H200"]}
    entry.write_text(json.dumps(content))
    plan, logged = enter(copy, 4)
    assert (logged.versions["torch"], logged.device, plan.threads) == ("1.0", "NVIDIA H200", 3)
    entry.write_text("{")  # damaged: the step can be computed all the same
    plan, logged = enter(copy, 4)
    assert logged.versions == {} and plan.threads == 1


def test_a_folder_that_is_no_run_is_said(tmp_path):
    told = replay(tmp_path, "--step", 1)
    assert told.code == 2 and "is no run directory" in told.err


def test_what_rounding_makes_of_a_quantity_is_measured_and_what_is_beyond_it_differs():
    before = [(1, "loss", "rounded", 2.0), (1, "lr", "exact", 1.0)]
    stirred = [[(1, "loss", "rounded", 2.0 * (1 + 1e-6)), (1, "lr", "exact", 1.0)]]
    for apart, verdict in ((0.0, BITWISE), (1e-5, WITHIN_ROUNDING), (1e-4, DIFFERS)):
        after = [(1, "loss", "rounded", 2.0 * (1 + apart)), (1, "lr", "exact", 1.0)]
        trials = [[(s, n, k, v * (1 + apart) if n == "loss" else v) for s, n, k, v in stirred[0]]]
        assert judge(before, after, trials, alike=False).verdict == verdict
    found = judge(before, [(1, "loss", "rounded", float("nan")), before[1]], stirred, alike=False)
    assert found.verdict == DIFFERS and found.first.quantity == "loss"
    assert judge(before, [before[0], (1, "lr", "exact", 1.0 + 2**-52)], stirred, alike=True).first.quantity == "lr"
