"""The first tensor that differs: one-module faults planted in three layouts, named against one process and against their own."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from recipes.common.checkpoint.files import file_checksum
from recipes.common.model.main_grads import main_grad_of
from tests.support.small_runs import call
from tools.common.forked_ranks import run_ranks
from tools.replay.change import ReplayChange, changed_plan
from tools.replay.compute import build, load, take_steps, with_shapes
from tools.replay.enter import enter
from tools.replay.first_tensor import first_tensor, put_together

STEP = 4
LAYOUTS = {"one": None, "tensor": "tensor=2", "pipeline": "pipeline=2"}


class Louder(torch.autograd.Function):
    """The identity, whose gradient is a tenth too large."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 1.1


def wrapped(trainer, name, before=None, after=None):
    """ReplayChange what a module reads or returns, if this rank has it. Returns what undoes it."""
    try:
        module = trainer.stage.causal.get_submodule(name)
    except AttributeError:
        return []
    forward = module.forward

    def run(x, *args, **kwargs):
        y = forward(x if before is None else before(x), *args, **kwargs)
        return y if after is None else after(x, y)

    module.forward = run
    return [lambda: setattr(module, "forward", forward)]


def weight(trainer, name, change):
    """ReplayChange a weight that the model computes with; `load` undoes it."""
    parameters = dict(trainer.stage.hf_named_parameters())
    if name in parameters:
        with torch.no_grad():
            change(parameters[name])
    return []


def attribute(trainer, name, field, value):
    module = dict(trainer.stage.causal.named_modules()).get(name)
    if module is None or not hasattr(module, field):
        return []
    kept = getattr(module, field)
    setattr(module, field, value)
    return [lambda: setattr(module, field, kept)]


def scale_rope(trainer, factor):
    rotary = trainer.stage.causal.get_submodule("model.rotary_emb")
    kept = rotary.inv_freq.clone()
    rotary.inv_freq.mul_(factor)
    return [lambda: rotary.inv_freq.copy_(kept)]


def row(trainer, name):
    """ReplayChange the row of id 70, on the tensor rank that has it."""
    size = -(-131 // trainer.grid.tensor)
    if trainer.grid.tensor_rank != 70 // size or not trainer.grid.is_first_stage:
        return []
    return weight(trainer, name, lambda p: p[70 % size].mul_(1.5))


def on_last_tensor_rank(trainer, name):
    if trainer.grid.tensor_rank != trainer.grid.tensor - 1:
        return []
    return weight(trainer, name, lambda p: p[3].mul_(1.01))


def gradient(trainer, name):
    """Scale what a product adds to the weight's sum."""
    parameter = dict(trainer.stage.hf_named_parameters()).get(name)
    if parameter is None:
        return []
    main_grad = main_grad_of(parameter)
    add_product = main_grad.add_product
    main_grad.add_product = lambda left, right, product: add_product(left * 1.1, right, product)
    return [lambda: vars(main_grad).pop("add_product")]


def without_mask(trainer, name):
    """Let an attention see what lies before its document."""
    try:
        module = trainer.stage.causal.get_submodule(name)
    except AttributeError:
        return []
    forward = module.forward
    module.forward = lambda *args, **kwargs: forward(*args, **kwargs | {"attention_mask": None})
    return [lambda: setattr(module, "forward", forward)]


def rounded(x, y):
    return y.bfloat16().float()


def louder(x, y):
    return y * 1.001


NORM, ATTENTION, MLP = "model.layers.1.input_layernorm", "model.layers.2.self_attn", "model.layers.3.mlp"
WEIGHT = "weight before the step"
FAULTS = {  # what is planted: the module to be named, the kind of its tensor, and how
    "eps": (NORM, "output", lambda t: attribute(t, NORM, "variance_epsilon", 1e-2)),
    "mask": (ATTENTION, "input", lambda t: without_mask(t, ATTENTION)),
    "one rank's weight": (f"{MLP}.up_proj", WEIGHT, lambda t: on_last_tensor_rank(t, f"{MLP}.up_proj.weight")),
    "one rank's copy": ("model.norm", WEIGHT, lambda t: on_last_tensor_rank(t, "model.norm.weight")),
    "dtype": (f"{MLP}.down_proj", "output", lambda t: wrapped(t, f"{MLP}.down_proj", after=rounded)),
    "rope base": ("model.rotary_emb", "output", lambda t: scale_rope(t, 0.9)),
    "head scale": ("lm_head", "output", lambda t: wrapped(t, "lm_head", after=louder)),
    "embedding row": ("model.embed_tokens", WEIGHT, lambda t: row(t, "model.embed_tokens.weight")),
    "residual": ("model.layers.1", "output", lambda t: wrapped(t, "model.layers.1", after=lambda x, y: y - x)),
    "backward": (f"{MLP}.gate_proj", "gradient of its input", lambda t: wrapped(t, f"{MLP}.gate_proj", before=Louder.apply)),
    "weight gradient": (f"{ATTENTION}.v_proj", "gradient", lambda t: gradient(t, f"{ATTENTION}.v_proj.weight")),
}
# each once: between tensor ranks whatever is cut or summed there
PLANTED = {"one": ["eps", "head scale", "residual"], "pipeline": ["mask", "dtype", "rope base", "weight gradient"]}
PLANTED["tensor"] = [name for name in FAULTS if name not in PLANTED["one"] + PLANTED["pipeline"]]


def trace(plan, faults, stirs):
    """Trace the step without a fault, then with each, then with weights that are stirred, in one start."""
    rank, found = build(plan), {}
    for name in ("none", *faults, *stirs):
        load(replace(plan, stir=name) if name in stirs else plan, rank.trainer)
        undo = FAULTS[name][2](rank.trainer) if name in FAULTS else []
        found[name] = take_steps(plan, rank)
        for each in undo:
            each()
    return found


def traced(plan, faults=(), stirs=()):
    ranks = run_ranks(trace, plan.world_size, plan, tuple(faults), tuple(stirs), timeout_seconds=900.0)
    return {name: put_together([rank[name] for rank in ranks]) for name in ranks[0]}


def own_plan(folder, layout=None):
    plan, _ = enter(folder, STEP)
    return replace(changed_plan(plan, ReplayChange(layout=layout)), trace_step=STEP)


@pytest.fixture(scope="module")
def plans(plain):
    return dict(zip(LAYOUTS, with_shapes(*(own_plan(plain, layout) for layout in LAYOUTS.values())), strict=True))


@pytest.fixture(scope="module")
def reference(plans):
    """The step in one process, in one start: as it is, with each fault planted, and twice with other roundings."""
    return traced(plans["one"], PLANTED["one"], stirs=range(2))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_planted_fault_is_named_at_its_module(plans, reference, layout):
    faults = PLANTED[layout]
    whole, stirred = reference["none"], [reference[seed] for seed in range(2)]
    seen = reference
    if layout != "one":
        seen = traced(plans[layout], faults)
        same = first_tensor(STEP, whole, seen["none"], stirred, bitwise=False)
        assert same is None, f"nothing was planted: {same}"
    for name in faults:
        module, kind, _ = FAULTS[name]
        for how, found in (
            ("against one process", first_tensor(STEP, whole, seen[name], stirred, bitwise=False)),
            ("in its own layout", first_tensor(STEP, seen["none"], seen[name], stirred, bitwise=True)),
        ):
            assert found is not None, f"{name}, {how}: not found"
            assert (found.module, found.kind) == (module, kind), f"{name}, {how}: {found}"


def test_a_change_is_followed_down_to_the_module(plain):
    told = call("replay", plain, "--step", STEP, "--set", "model.rms_norm_eps=0.01", "--against")
    assert told.code == 1 and "step 4: model.layers.0.input_layernorm: forward output differs first (max " in told.out


def test_two_runs_in_two_layouts_are_equal_within_rounding(plain, on_tensor_ranks):
    found = call("replay", plain, "--against", on_tensor_ranks, "--json")
    assert found.code == 0 and found.json["first"] is None and not found.json["is_bitwise"]
    assert found.json["tensors"][0] > 600 and found.json["tensors"][1] == 0


def test_two_runs_whose_logs_differ_though_nothing_here_does(plain, tmp_path):
    copy = shutil.copytree(plain, tmp_path / "run")
    same = call("replay", plain, "--against", copy, "--json")
    assert same.code == 0 and same.json["step"] is None
    records = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().splitlines()]
    changed = [r | {"loss": r["loss"] * 1.5} if r["step"] == 5 else r for r in records]
    (copy / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in changed))
    found = call("replay", plain, "--against", copy)
    assert found.code == 1 and "first to differ in the logs: loss of step 5" in found.out
    assert "are equal bit for bit, as computed here" in found.out and f"{copy} logged loss" in found.out


def test_a_weight_that_changed_in_a_checkpoint_is_named(plain, tmp_path):
    """One run's state after step 3 is not what its steps gave: found before the step, though the logs part at step 4."""
    copy = shutil.copytree(plain, tmp_path / "run")
    name = "model.layers.2.mlp.up_proj.weight"
    change_weight(copy, name)
    found = call("replay", plain, "--step", STEP, "--against", copy, "--json").json
    assert found["first"]["module"] == "model.layers.2.mlp.up_proj" and found["first"]["kind"] == "weight before the step"
    assert found["quantity"].startswith("loss of step 4")


def change_weight(copy, name):
    """Change one element of a weight in a checkpoint, sealed as if it had been saved so, and log what follows from it."""
    folder = copy / "checkpoints" / "step_00000003"
    file, offset, *_ = json.loads((folder / "index.json").read_text())["tensors"][name]["kinds"]["master"]["parts"][0]
    content = bytearray((folder / file).read_bytes())
    content[offset : offset + 4] = np.float32(0.5).tobytes()
    (folder / file).write_bytes(content)
    seal = json.loads((folder / "checksums.json").read_text())
    seal["files"][file]["checksum"] = file_checksum(folder / file)
    (folder / "checksums.json").write_text(json.dumps(seal))
    records = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().splitlines()]
    changed = [r | {"loss": r["loss"] * 1.01} if r["step"] == STEP else r for r in records]
    (copy / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in changed))
