"""The numerics gate passes correct training, and fails faults that training alone would not show."""

import contextlib
import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from recipes.common.recipe import Layout, RecipeError
from tests.support.tiny import ROOT
from tools.common.forked_ranks import run_ranks
from tools.common.recipe_io import parse_layout
from tools.verify.__main__ import main
from tools.verify.gate import FACTOR, STEP_LIMITS, TENSOR_LIMITS

QUICKSTART = str(ROOT / "recipes" / "quickstart.py")
SHORT = ["--steps", "2", "--seq-len", "16"]


def call(*flags, fault=None):
    """Return (exit code, stdout, stderr) of the tool; `fault` is planted before it forks its ranks."""
    return run_ranks(_call, 1, [*SHORT, *flags], fault)[0]


def _call(flags, fault):
    if fault is not None:
        fault()
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main([*map(str, flags)])
        except SystemExit as leaving:
            code = leaving.code
    return code, out.getvalue(), err.getvalue()


@pytest.mark.parametrize(
    "layout",
    [
        "data=2,recompute=full",
        "tensor=2,pipeline=2,pipeline_schedule=zero_bubble_v,sequence_parallel=1,recompute=selective",
    ],
)
def test_the_quickstart_passes(layout):
    code, out, err = call(QUICKSTART, "--layout", layout, "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert (found["recipe"], found["layout"], found["passed"]) == ("quickstart", layout, True)
    assert [row["what"] for row in found["rows"]] == ["loss", "gradient norm", "parameter", "gradient, fp32"]
    assert all(0 <= row["difference"] <= row["bound"] for row in found["rows"])
    for row, (least, most) in zip(found["rows"], [STEP_LIMITS] * 2 + [TENSOR_LIMITS] * 2, strict=True):
        assert row["floor"] > 0
        assert row["bound"] == min(max(FACTOR * row["floor"], least), most)


def no_all_reduce():
    """Leave out the sum of a row's partial results."""
    import recipes.common.parallel.tensor_styles as module

    module.reduce_from = lambda x, group, own=False: x


def no_gradient_sum():
    """Leave out the sum of the gradient of a column's input: forward is right."""
    import recipes.common.parallel.summed_inputs as module

    module.start_all_reduce = lambda x, group, own=False: SimpleNamespace(result=lambda: x)


def doubled_loss():
    """Scale gradients by 1/accumulation, as DeepSpeed 0.18.3 did: clipping and Adam hide it.

    A stage that knows by what its loss is multiplied makes such gradients NaN: here none is told.
    """
    import recipes.common.pipeline.stage as module

    module.Stage.loss_share = property(lambda self: None, lambda self, share: None)
    loss = module.Stage.loss
    module.Stage.loss = lambda self, hidden, labels: loss(self, hidden, labels) * (0.5 if self.grid.pipeline > 1 else 1.0)


def untied():
    """Leave out the sum of a tied weight's gradients over stages: its copies drift apart."""
    import recipes.common.engine.trainer as module

    module.PipelineStages.get_tied_weights_and_groups = lambda self: []


def the_table_names_where(out):
    title, head, *rows = out.splitlines()
    assert title.startswith("quickstart: LlamaConfig at hidden size 64, tensor 1 x pipeline 2 x data 1, fp32, ZeRO 1, 2 steps")
    assert head.split() == ["largest", "difference", "allowed", "rounding", "where"]
    assert rows[0].split()[-2] == "step" and any("model." in row for row in rows)


@pytest.mark.parametrize(
    ("fault", "layout"),
    [(no_all_reduce, "tensor=2"), (no_gradient_sum, "tensor=2"), (doubled_loss, "pipeline=2"), (untied, "pipeline=2")],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_planted_bug_fails(fault, layout):
    code, out, err = call(QUICKSTART, "--layout", layout, fault=fault)
    assert code == 1
    if fault is doubled_loss:
        the_table_names_where(out)
        failed = [line.split()[0] for line in out.splitlines() if line.endswith("<-- FAILED")]
        assert "gradient," in failed
        assert "loss" not in failed  # the logged loss is right, and AdamW hides the scale: only the gate sees it
    else:
        assert "could not be trained: copies of model." in err and "on different ranks differ by" in err


def test_rounding_that_adam_adds_up_is_allowed_and_shown():
    """In this layout the third step's gradient norm is off by 1e-8 to 3e-6, as the processor sums, and for no other reason."""
    layout = "tensor=2,pipeline=2,data=1,sequence_parallel=1"
    code, out, _ = call(QUICKSTART, "--layout", layout, "--steps", "3", "--seq-len", "32", "--json")
    rows = {row["what"]: row for row in json.loads(out)["rows"]}
    assert code == 0
    assert 0 < rows["gradient norm"]["floor"] < rows["gradient norm"]["bound"] and rows["gradient, fp32"]["bound"] <= 1e-5


def test_a_model_that_sees_the_future_is_refused(tmp_path):
    text = Path(QUICKSTART).read_text().replace("LlamaConfig", "Gemma3TextConfig")
    text = text.replace("str(Path(__file__).resolve().parents[1])", repr(str(ROOT)))
    (tmp_path / "ahead.py").write_text(text.replace("vocab_size=", "use_bidirectional_attention=True, vocab_size=", 1))
    code, out, err = call(tmp_path / "ahead.py", "--layout", "tensor=2")
    assert (code, out) == (2, "")
    assert "model=Gemma3TextConfig sees the future: " in err and err.strip().endswith("set use_bidirectional_attention=None")


def test_products_in_fp8_are_compared_with_their_definition(tmp_path):
    text = Path(QUICKSTART).read_text().replace("str(Path(__file__).resolve().parents[1])", repr(str(ROOT)))
    (tmp_path / "lower.py").write_text(text.replace("deepspeed=", 'precision="fp8", deepspeed='))
    code, _, err = call(tmp_path / "lower.py", "--layout", "tensor=2")
    assert code == 2 and "precision='fp8' with ds_configs/zero1_fp32.json, which is fp32" in err
    (tmp_path / "lower.py").write_text(text.replace('deepspeed="zero1_fp32', 'precision="fp8", deepspeed="zero1_bf16'))
    code, out, err = call(tmp_path / "lower.py", "--layout", "tensor=2,sequence_parallel=1", "--json")
    assert out, err
    rows = {row["what"]: row for row in json.loads(out)["rows"]}
    assert code == 0 and list(rows) == ["loss", "gradient norm", "parameter", "gradient, fp32", "gradient, fp8"]
    # without a flipped rounding equal, with one near: a run that multiplies in fp32 is 0.08 from it
    assert rows["gradient, fp8"]["difference"] < 0.04 < rows["gradient, fp8"]["bound"] < 0.15


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("tensor=two", "'tensor=two' is not tensor=N"),
        ("tensr=2", "'tensr=2' is not tensor=N"),
        ("tensor=2,tensor=2", "'tensor=2' is not tensor=N"),
        ("tensor=0", "sizes start at 1"),
        ("", "'' is not tensor=N"),
        ("pipeline=2,layers_per_stage=5-3", "'layers_per_stage=5-3' is not tensor=N"),
        ("tensor=2,sequence_parallel=yes", "'sequence_parallel=yes' is not tensor=N"),
    ],
)
def test_a_bad_layout_is_refused(text, part):
    with pytest.raises(RecipeError, match="--layout") as caught:
        parse_layout(text)
    assert part in str(caught.value)


def test_a_layout_in_words_is_the_layout():
    words = "pipeline=2,data=4,pipeline_schedule=zero_bubble_v,recompute=selective,layers_per_stage=1+2+3+2"
    wanted = Layout(pipeline=2, pipeline_schedule="zero_bubble_v", recompute="selective", layers_per_stage=(1, 2, 3, 2))
    assert parse_layout(words) == (wanted, 4)


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        ([QUICKSTART, "--layout", "tensor=two"], "is not tensor=N"),
        ([QUICKSTART, "--layout", "pipeline_schedule=zero_bubble"], "--layout: pipeline_schedule='zero_bubble' with pipeline=1"),
        ([QUICKSTART, "--layout", "data=1000"], "--layout: 1000 ranks are more processes than a trial starts here, 256"),
        ([QUICKSTART, "--steps", "0"], "--steps=0 must be a whole number from 1 to 1000"),
        (["recipes/none.py"], "recipes/none.py: there is no such file"),
        ([str(ROOT / "recipes/common/parallel/cross_entropy.py")], "defines no `recipe = Recipe(...)`"),
    ],
    ids=["layout", "layout's options", "ranks", "steps", "no file", "no recipe"],
)
def test_a_mistake_of_the_user_is_exit_2_and_one_message(flags, part):
    code, out, err = call(*flags)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and part in err
    assert "Traceback" not in err
