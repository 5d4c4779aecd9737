"""Model types of the installed transformers: which are tried, what is told of the others, and what a verdict is worth."""

import contextlib
import io
import json

import pytest

from recipes.common.recipe import Layout
from tools.common.console import UsageError
from tools.common.forked_ranks import run_ranks
from tools.verify import families
from tools.verify.__main__ import main
from tools.verify.family_log import FamilyLog
from tools.verify.family_table import as_text, write_page
from tools.verify.family_verdict import FAILED_GATE, LEFT_OUT, PASSED, REFUSED, UNDECIDED, FamilyVerdict, failed
from tools.verify.gate import WorstDifference
from tools.verify.tiny_families import LeftOutError, family_names, tiny_family

SHORT = ["--steps", "2", "--seq-len", "16"]
BOTH = Layout(tensor=2, pipeline=2)


def call(*flags, fault=None):
    """Return (exit code, stdout, stderr) of the tool; `fault` is planted before it forks its ranks."""
    return run_ranks(_call, 1, [*map(str, flags), *SHORT], fault)[0]


def _call(flags, fault):
    if fault is not None:
        fault()
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(flags)
        except SystemExit as leaving:
            code = leaving.code
    return code, out.getvalue(), err.getvalue()


def no_all_reduce():
    import recipes.common.parallel.tensor_styles as module

    module.reduce_from = lambda x, group: x


def no_training():
    families.run_ranks = None


def test_a_family_passes_once_and_is_not_tried_again(tmp_path):
    flags = ("--family", "bloom,bert", "--layout", "tensor=2", "--log", tmp_path / "log", "--json")
    code, out, _ = call(*flags)  # a bar may be on stderr
    assert code == 0
    found = json.loads(out)
    bert, bloom = found["verdicts"]
    assert found["passed"] and (bert["family"], bert["outcome"]) == ("bert", "left out")
    assert bert["reason"] == "an encoder: its default configuration says is_decoder=False, and it sees the future"
    assert (bloom["outcome"], bloom["reason"], bloom["tied"], bloom["whole"]) == ("passed", "", True, 0.0) and bloom[
        "export"
    ] == "yes"
    assert [row["what"] for row in bloom["rows"]][-3:] == ["loss, SGD", "gradient norm, SGD", "gradient"]
    assert all(row["difference"] <= row["bound"] for row in bloom["rows"])
    assert call(*flags, fault=no_training)[:2] == (code, out)


def test_a_family_that_trains_wrongly_is_exit_1():
    code, out, _ = call("--family", "bloom", "--layout", "tensor=2", fault=no_all_reduce)
    assert code == 1
    assert out.splitlines()[1].split()[:2] == ["bloom", "failed"] and "could not be trained: " in out


def test_a_family_that_is_refused_by_name_is_exit_0():
    code, out, _ = call("--family", "modernbert-decoder", "--layout", "tensor=2")
    assert code == 0
    assert "refused" in out and "its _init_weights draws the vocabulary" in out


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("bart", "an encoder with a decoder"),
        ("roberta", "an encoder: its default configuration says is_decoder=False, and it sees the future"),
        ("llama4", "a multimodal type: its text model is of type llama4_text"),
        ("musicgen", "an encoder with a decoder"),
    ],
)
def test_what_is_no_decoder_of_text_is_left_out_with_the_reason(name, reason):
    assert run_ranks(_reason, 1, name)[0] == reason


def _reason(name):
    with pytest.raises(LeftOutError) as error:
        tiny_family(name, BOTH)
    return str(error.value)


# gpt_neox says that it is no decoder, and is one
@pytest.mark.parametrize("name", ["llama", "nemotron", "deepseek_v2", "gpt_neox", "cohere_compass_text", "dots3_note_text"])
def test_tiny_configurations_are_tiny_and_have_what_their_default_leaves_open(name):
    assert name in family_names()
    hidden, layers, dropouts = run_ranks(_tiny, 1, name)[0]
    assert hidden <= 128 and layers == 4 and not any(dropouts)


def _tiny(name):
    config = tiny_family(name, BOTH).config
    return config.hidden_size, config.num_hidden_layers, [v for k, v in config.to_dict().items() if "dropout" in k]


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--family", "lama"], "--family lama: the installed transformers knows no causal model type of this name; did you mean"),
        (["--family", "llama", "--layout", "tensor=two"], "is not tensor=N"),
        (["--family", "llama", "--layout", "tensor=2", "--table", "page"], "--table: the page has all layouts"),
        (["--family", "llama", "--device", "cuda"], "--device and --any-release go with a RECIPE"),
        (["recipes/quickstart.py", "--family", "llama"], "give a RECIPE or --family, one of them"),
        (["recipes/quickstart.py", "--log", "log"], "--log and --table go with --family"),
        ([], "give a RECIPE or --family, one of them"),
    ],
)
def test_a_mistake_of_the_user_is_exit_2(flags, part):
    code, out, err = call(*flags)
    assert (code, out) == (2, "") and part in err and "Traceback" not in err


def row(what, difference, bound, floor=None):
    return WorstDifference(what, "step 1", difference, bound, floor)


@pytest.mark.parametrize(
    ("steps", "gradients", "outcome"),
    [
        ((1e-7, 1e-6, None), (1e-7, 1e-6, None), PASSED),
        ((1e-3, 1e-5, 2e-3), (1e-7, 1e-6, None), UNDECIDED),
        ((1e-3, 1e-5, 2e-4), (1e-7, 1e-6, None), FAILED_GATE),  # more than rounding makes
        ((1e-3, 1e-5, 2e-3), (1e-3, 1e-5, 2e-3), FAILED_GATE),  # its gradients do not pass
        ((1e-3, 1e-5, None), (1e-7, 1e-6, None), FAILED_GATE),
    ],
)
def test_rounding_that_adamw_makes_steps_of_is_no_verdict(steps, gradients, outcome):
    assert families._outcome([row("parameter", *steps), row("gradient", *gradients)]) == outcome


def test_a_log_of_a_killed_sweep_is_continued(tmp_path):
    path = tmp_path / "log"
    log = FamilyLog(path)
    for name in ("llama", "opt"):
        log.add(FamilyVerdict(family=name, layout="tensor=2", outcome=PASSED))
    log.add(FamilyVerdict(family="old", layout="tensor=2", outcome=PASSED, versions={"transformers": "1.0"}))
    path.write_bytes(path.read_bytes() + b'{"family": "gpt')
    log = FamilyLog(path)
    assert log.find("opt", "tensor=2").outcome == PASSED
    assert log.find("old", "tensor=2") is log.find("opt", "pipeline=2") is None
    log.add(FamilyVerdict(family="gptj", layout="tensor=2", outcome=REFUSED, reason="why"))
    assert FamilyLog(path).find("gptj", "tensor=2").reason == "why"
    path.write_text("no verdict\n")
    with pytest.raises(UsageError, match="line 1 is no verdict"):
        FamilyLog(path)


def test_the_page_has_a_row_for_each_type_and_the_reasons(tmp_path):
    verdicts = [
        FamilyVerdict(family="bert", layout="tensor=2", outcome=LEFT_OUT, reason="an encoder"),
        FamilyVerdict(
            family="llama", layout="tensor=2", outcome=PASSED, tied=True, export="yes", date="2026-01-02", versions={"torch": "9"}
        ),
        FamilyVerdict(family="mamba", layout="tensor=2", outcome=REFUSED, reason="a | b", whole=0.5, experts=4),
        FamilyVerdict(family="opt", layout="tensor=2", outcome=FAILED_GATE, reason="loss differs"),
        FamilyVerdict(family="zaya", layout="tensor=2", outcome=PASSED, export="its export: no"),
    ]
    write_page(tmp_path / "page.md", verdicts)
    page = (tmp_path / "page.md").read_text()
    assert "- tensor=2: 2 of 4 decoders train what plain transformers trains" in page
    assert "| llama | yes |  |  | yes | yes | 2026-01-02 | torch 9 |  |" in page
    assert "| mamba | refused | 50 % | 4 |" in page and "| a / b |" in page
    assert "| **no** | " in page and "| its export: no |" in page and [failed(verdict) for verdict in verdicts] == [0, 0, 0, 1, 1]
    assert "| opt | **no** |" in page and "| loss differs |" in page
    assert page.index("## Left out") < page.index("| bert | an encoder |")
    assert [path.name for path in tmp_path.iterdir()] == ["page.md"]
    assert "tensor=2: 2 of 4 decoders" in as_text(verdicts)
