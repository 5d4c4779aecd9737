"""The planner as its user meets it: ranked layouts, a reason for every other one, and calibration from real runs."""

import ast
import cProfile
import json
import math
import pstats
from collections import Counter

import pytest

from recipes.common.config.ds_config import load_ds_config
from recipes.common.config.placement import FOLDED, ONE_PASS, ZERO_BUBBLE, Placement
from recipes.common.pipeline.schedules import Costs, finish_times, order_passes
from recipes.common.recipe import ROOT, Layout
from tests.support.shelf import read_shelf
from tests.support.small_runs import call
from tools.common.devices import DEVICES, find_device
from tools.common.forked_ranks import run_ranks
from tools.common.recipe_io import load_recipe
from tools.plan import memory_model, time_model
from tools.plan.coefficients import SHIPPED, read_coefficients
from tools.plan.evaluate import candidates, judge
from tools.plan.model_cases import Candidate, read_model
from tools.plan.schedule_formulas import bubble_share

LLAMA = "recipes/llama_1b.py"
SHELF = [ROOT / "recipes" / f"{name}.py" for name in read_shelf() if name != "quickstart"]  # quickstart is for CPUs


OPTIONS = ("tensor", "pipeline", "data", "micro_seqs", "recompute", "recompute_every", "sequence_parallel")
OPTIONS += ("pipeline_schedule", "chunks")


def search(*flags):
    return call("plan", "search", LLAMA, *flags, "--json")


@pytest.fixture(scope="module")
def found():
    return search("--gpus", 64, "--gpu-type", "H100").json


def test_every_layout_is_ranked_or_turned_down(found):
    ranked, rejected = found["ranked"], found["rejected"]
    assert len(ranked) + len(rejected) == found["layouts"] > 300
    for plan in ranked:
        assert plan["tensor"] * plan["pipeline"] * plan["data"] == 64
        assert 512 % (plan["data"] * plan["micro_seqs"]) == 0
        assert sum(plan["parts"].values()) == pytest.approx(plan["seconds"])
        assert plan["memory"]["low"] < plan["memory"]["peak"] < plan["memory"]["high"]
        assert len(plan["memory"]["stages"]) == plan["pipeline"]
    safe = [plan["safe"] for plan in ranked]
    assert safe == sorted(safe, reverse=True)  # what may run out of memory comes last, however fast
    seconds = [plan["seconds"] for plan in ranked if plan["safe"]]
    assert seconds == sorted(seconds)
    assert all(entry["why"] for entry in rejected)
    assert {entry["why"] for entry in rejected if entry["pipeline"] == 32} == {
        "layout pipeline=32 exceeds the model's 16 layers; use 16 stages at most",
    }


def test_speed_cost_and_length_agree(found):
    plan = found["ranked"][0]
    tokens = 48_000 * 512 * 4096
    assert plan["tokens_per_second"] == pytest.approx(512 * 4096 / plan["seconds"])
    assert plan["days"] == pytest.approx(tokens / plan["tokens_per_second"] / 86400)
    assert plan["cost"] == pytest.approx(plan["days"] * 24 * 64 * find_device("H100").price)
    flops = call("throughput", "flops", LLAMA, "--json").json["conventions"]["ours"]["flops_per_token"]
    assert plan["mfu"] == pytest.approx(plan["tokens_per_second"] * flops / (64 * 989e12))


def test_options_do_what_they_are_for(found):
    """Sequence parallelism shares what lies between blocks; a zero bubble leaves a third of 1F1B's (arXiv 2401.10241),
    folded half of that."""
    plans = {tuple(plan[key] for key in OPTIONS): plan for plan in found["ranked"]}
    layout = (2, 2, 16, 2, "none", 1)
    plain, shared = plans[*layout, False, "1f1b", 1], plans[*layout, True, "1f1b", 1]
    stored = [plan["memory"]["stages"][0]["stored"] for plan in (plain, shared)]
    assert 0.5 < stored[1] / stored[0] < 0.9
    filled = plans[*layout, False, "zero_bubble", 1]
    # its tensor ranks' sums go beside nothing: a pass through all stages takes longer
    assert 1.0 < filled["parts"]["bubble"] / (plain["parts"]["bubble"] / 3) < 1.1
    first, last = zip(*(plan["memory"]["stages"] for plan in (plain, filled)), strict=True)
    assert first[0] == first[1]
    assert last[0]["stored"] < last[1]["stored"] < first[0]["stored"]  # the factors of weight gradients, less than activations
    kept, again = (plans[2, 2, 16, 2, how, 1, False, "1f1b", 1] for how in ("selective", "full"))
    by_memory = [plan["memory"]["stages"][0]["stored"] for plan in (again, kept, plain)]
    assert by_memory[0] < 0.6 * by_memory[1] < by_memory[1] < 0.9 * by_memory[2]
    assert plain["seconds"] < kept["seconds"] < again["seconds"]
    folded = plans[*layout, False, "zero_bubble_v", 1]
    assert folded["parts"]["bubble"] == pytest.approx(plain["parts"]["bubble"] / 6, rel=0.1)  # its partition may differ
    assert folded["parts"]["pipeline"] > 1.5 * plain["parts"]["pipeline"]
    around = [plans[*layout, False, "1f1b", chunks] for chunks in (2, 4, 8)]
    shares = [plan["parts"]["bubble"] / plain["parts"]["bubble"] for plan in around]
    assert shares == pytest.approx([1 / 2, 1 / 4, 1 / 8], rel=0.1)  # the partition may differ
    assert around[0]["parts"]["pipeline"] < plain["parts"]["pipeline"]  # messages travel under a pass in hand
    assert around[0]["memory"]["stages"][0]["in_flight"] == 2.5  # 2 stages x 2 chunks, and one chunk more
    assert {plan["pipeline_schedule"] for plan in found["ranked"] if plan["pipeline"] == 1} == {"1f1b"}


def test_what_does_not_fit_says_which_stage_and_why():
    found = search("--gpus", 8, "--gpu-type", "V100-16")
    assert "no bf16 matrix units" in found.err and found.code == 2
    rejected = search("--gpus", 8, "--gpu-type", "A100-40").json["rejected"]
    why = next(entry["why"] for entry in rejected if entry["why"].startswith("memory"))
    assert "stage 0 needs" in why and "of 40 GiB" in why and "activations of" in why


def _whys(fields, gpus, chosen):
    recipe = load_recipe(LLAMA)
    recipe.model.update(fields)
    facts = read_model(recipe, load_ds_config(recipe.deepspeed))
    _, rejected = judge(facts, chosen, find_device("H100"), read_coefficients(None), 1.0)
    return [entry.why for entry in rejected]


def test_reasons_are_those_that_training_would_give():
    one = Candidate(layout=Layout(tensor=8), data=1, micro_seqs=1)
    assert (
        "num_attention_heads=12 is not a multiple of tensor=8"
        in run_ranks(_whys, 1, {"num_attention_heads": 12, "num_key_value_heads": 12, "head_dim": 128}, 8, [one])[0][0]
    )
    assert (
        "3 key/value heads"
        in run_ranks(_whys, 1, {"num_attention_heads": 24, "num_key_value_heads": 3, "head_dim": 64}, 8, [one])[0][0]
    )
    odd = Candidate(layout=Layout(), data=3, micro_seqs=1)
    assert "global_seqs=512 is not a multiple of micro_seqs=1 x 3 data ranks" in run_ranks(_whys, 1, {}, 3, [odd])[0][0]


def _thousand():
    recipe = load_recipe(LLAMA)
    recipe.model.update({"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
                         "head_dim": 128, "tie_word_embeddings": False})  # fmt: skip
    facts = read_model(recipe, load_ds_config(recipe.deepspeed))
    device = find_device("H100")
    found = [candidate for gpus in (256, 512, 1024, 2048) for candidate in candidates(facts, gpus, device)]
    with cProfile.Profile() as counted:
        plans, rejected = judge(facts, found[:: len(found) // 1000][:1000], device, read_coefficients(None), 1.0)
    counts = pstats.Stats(counted)
    times = Counter()
    for (_, _, name), (_, calls, *_) in counts.stats.items():
        times[name] += calls
    return len(plans), len(rejected), counts.total_calls, times


def test_a_thousand_layouts_share_what_they_have_in_common():
    """So they take two seconds: the time model is evaluated once, the family tried once for each kind of layout, and each
    pipeline partitioned once; what is left for each layout is little."""
    plans, rejected, calls, times = run_ranks(_thousand, 1)[0]
    assert plans + rejected == 1000 and plans > 100
    assert times["step_parts"] == 1 and times["_partition"] <= 100
    assert times["post_init"] <= 8  # of four tiny models, each a decoder in a causal one
    assert calls < 12_000_000  # 9.5 million as this was written, 6.5 of them before the first layout


def test_explain_shows_where_memory_and_time_go():
    called = call("plan", "explain", "tensor=2,pipeline=4,data=8", LLAMA, "--gpu-type", "H100")
    assert called.code == 0
    for word in ("in flight", "gradients", "margin", "bubble", "tensor all-reduce", "tokens/s", "days"):
        assert word in called.out
    refused = call("plan", "explain", "tensor=2,pipeline=32", LLAMA, "--gpu-type", "H100")
    assert refused.code == 1 and "exceeds the model's 16 layers" in refused.out


@pytest.fixture(scope="module")
def shelf():
    """{recipe: what the planner says of the layouts it states}, and the exit code."""
    called = call("plan", "layouts", *SHELF, "--gpu-type", "H100", "--json")
    return {entry["recipe"]: entry for entry in called.json["recipes"]}, called.code


@pytest.mark.parametrize("path", SHELF, ids=lambda path: path.stem)
def test_a_docstring_says_what_the_planner_says_now(shelf, path):
    """Its sentence may be broken into lines. `python -m tools.plan layouts RECIPE --gpu-type H100` prints the new one."""
    said = " ".join(ast.get_docstring(ast.parse(path.read_text())).split())
    assert shelf[0][path.stem]["sentence"] in said
    assert said.count("Planned (") == 1 and "Measured: not yet" in said


def test_the_shelf_fits_its_gpus(shelf):
    """Nine of ten times at least, on 80 GB."""
    recipes, code = shelf
    layouts = [layout for entry in recipes.values() for layout in entry["layouts"]]
    assert code == 0 and len(layouts) == sum(len(load_recipe(str(path)).layouts) for path in SHELF)
    for layout in layouts:
        assert layout["memory"]["high"] < layout["memory"]["capacity"]


def test_a_layout_that_may_not_fit_is_exit_1():
    called = call("plan", "layouts", "recipes/gemma_2b.py", "--gpu-type", "A100-40")
    assert called.code == 1
    assert "8 GPUs cannot run it" in called.out and "stage 0 needs" in called.out


@pytest.mark.parametrize(
    "flags, part",
    [
        (["search", LLAMA, "--gpus", "8", "--gpu-type", "H1000"], "--gpu-type=H1000: not known; use one of V100-16"),
        (["search", LLAMA, "--gpus", "0", "--gpu-type", "H100"], "--gpus=0"),
        (["search", "none.py", "--gpus", "8", "--gpu-type", "H100"], "no such file"),
        (["explain", "tensor=1", LLAMA, "--gpu-type", "H100", "--micro-seqs", "0"], "--micro-seqs=0"),
        (["explain", "tensor=x", LLAMA, "--gpu-type", "H100"], "tensor=x"),
        (["explain", "tensor=1", LLAMA, "--gpu-type", "H100", "--calibration", "README.md"], "plan calibrate"),
        (["calibrate", LLAMA, "--gpu-type", "H100", "--out", "x.json", "--layers", "99"], "--layers=99"),
        (
            ["search", LLAMA, "--gpus", "8", "--gpu-type", "H100", "--price-per-hour", "nan"],
            "--price-per-hour=nan: must be",
        ),
        (
            ["search", LLAMA, "--gpus", "8", "--gpu-type", "H100", "--price-per-hour", "inf"],
            "--price-per-hour=inf: must be",
        ),
        (["search", LLAMA, "--gpus", "8", "--gpu-type", "H100", "--top", "-1"], "--top=-1: must be 0 or more"),
        (["explain", "tensor=²", LLAMA, "--gpu-type", "H100"], "'tensor=²' is not tensor=N"),
        (["explain", "tensor=2,sequence_parallel=7", LLAMA, "--gpu-type", "H100"], "'sequence_parallel=7' is not tensor=N"),
    ],
)
def test_a_mistake_is_exit_2(flags, part):
    called = call("plan", *flags)
    assert called.code == 2 and part in called.err and "Traceback" not in called.err


def test_layouts_that_do_not_divide_their_gpus_are_told(tmp_path):
    """Not planned on the GPUs that they do divide, and no traceback."""
    text = (ROOT / "recipes" / "quickstart.py").read_text()
    recipe = tmp_path / "uneven.py"
    recipe.write_text(
        text.replace("8: Layout(tensor=2, pipeline=2)", "6: Layout(tensor=2, pipeline=2), 3: Layout(tensor=4), 0: Layout()")
    )
    said = call("plan", "layouts", recipe, "--gpu-type", "H100", "--json")
    whys = {each["gpus"]: each["why"] for each in said.json["recipes"][0]["layouts"]}
    told = "layouts[{}]: tensor={} x pipeline={} = 4 does not divide {} GPUs; change the layout or the number of GPUs"
    none = "layouts[0]: a layout is for 1 GPU or more; correct the number, or take the layout out"
    assert (said.code, whys) == (1, {1: "", 2: "", 4: "", 6: told.format(6, 2, 2, 6), 3: told.format(3, 4, 1, 3), 0: none})
    recipe.write_text(text.replace("    layouts={", "    layouts={} and {"))
    none = call("plan", "layouts", recipe, "--gpu-type", "H100")
    message = "error: recipe 'quickstart':\n  - layouts={} has none to plan; add one, or use `plan search`\n"
    assert (none.code, none.err) == (2, message)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--layout", "tensor=5"],
            "--layout=tensor=5, micro_seqs=8: tensor=5: num_attention_heads=6 is not a multiple",
        ),
        (
            ["--layout", "pipeline=2", "--layers", 1],
            "--layout=pipeline=2, micro_seqs=8: layout pipeline=2 exceeds the model's 1",
        ),
        (
            ["--layout", "recompute=bad"],
            "--layout=recompute=bad, micro_seqs=8: layouts[1].recompute='bad' must be one of ",
        ),
        (["--out", "{folder}/there.json"], "--out={folder}/there.json exists; give another name, or remove it\n"),
        (["--out", "{folder}/none/x.json"], "--out={folder}/none/x.json: there is no folder {folder}/none\n"),
    ],
)
def test_a_calibration_that_could_not_run_or_be_kept_is_refused_before_it_runs(flags, message, tmp_path):
    (tmp_path / "there.json").write_text("precious")
    words = [str(flag).format(folder=tmp_path) for flag in ["--out", tmp_path / "new.json", *flags]]
    done = call("plan", "calibrate", "recipes/quickstart.py", "--gpu-type", "CPU", "--steps", 1, *words)
    wanted = f"error: {message.format(folder=tmp_path)}"
    assert (done.code, done.out, done.err[: len(wanted)]) == (2, "", wanted) and "Traceback" not in done.err
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("there.json", "precious")]


def test_the_shipped_terms_say_where_they_come_from():
    content = json.loads(SHIPPED.read_text())
    assert list(content["time"]) == list(time_model.TERMS) and list(content["memory"]) == list(memory_model.TERMS)
    assert {"fitted on", "rows", "date", "command"} <= set(content["provenance"])
    assert set(content["device_factor"]) <= {device.name for device in DEVICES}


def test_calibration_moves_the_terms_to_this_machine(tmp_path):
    """Two real runs; the calibrated terms give their times, the shipped ones for a guessed CPU do not."""
    out = tmp_path / "cpu.json"
    called = call("plan", "calibrate", "recipes/quickstart.py", "--gpu-type", "CPU", "--layers", 1, "--steps", 1,
                  "--out", out, "--json")  # fmt: skip
    assert called.code == 0, called.err
    runs = called.json["runs"]

    def off(kind):
        return sum(abs(math.log(run[kind] / run["seconds"])) for run in runs)

    assert len(runs) == 2 and off("after") < off("before")
    used = call("plan", "explain", "tensor=1", "recipes/quickstart.py", "--gpu-type", "CPU", "--calibration", out, "--json")
    assert used.code == 0 and used.json["ranked"][0]["seconds"] > 0
    assert read_coefficients(out).provenance["calibrated on"] == "CPU" and not used.err
    other = call("plan", "explain", "tensor=1", "recipes/quickstart.py", "--gpu-type", "H100", "--calibration", out, "--json")
    assert other.err == f"note: {out} was calibrated on CPU: it says little of --gpu-type=H100\n"


def test_the_bubble_is_told_by_formula_and_as_played():
    """16 micro batches on 4 stages; with rounds, passes played show what the formula cannot: the head makes one chunk longer."""
    shares = []
    for options in ("", ",chunks=2"):
        layout = f"pipeline=4,data=16{options}"
        said = call("plan", "explain", layout, LLAMA, "--gpu-type", "H100", "--micro-seqs", 2, "--json")
        shares.append(said.json["bubble"])
    assert shares[0][0] == pytest.approx(3 / 19, rel=0.15) and shares[0][1] == pytest.approx(shares[0][0], rel=0.25)
    assert shares[1][0] == pytest.approx(3 / 35, rel=0.15) and shares[1][1] > shares[1][0]


@pytest.mark.parametrize("passes", [3.0, 4.0])  # the last: recomputation makes the input's gradient twice as long
def test_formulas_are_what_equal_passes_lose(passes):
    """And a folded schedule has no formula for unequal passes: it loses more than a half of a zero bubble's."""
    for name, chunks in ((ONE_PASS, 1), (ONE_PASS, 3), (ZERO_BUBBLE, 1), (ZERO_BUBBLE, 4), (FOLDED, 2)):
        placement = Placement(name, 4, chunks)
        later = 0.0 if name == ONE_PASS else 1.0
        costs = (Costs(*(each / chunks for each in (1.0, passes - 1.0 - later, later))),) * placement.count
        lost = max(finish_times(order_passes(placement, 12, costs), costs)) - 12 * passes
        assert lost == pytest.approx(bubble_share(placement, 12, passes) * 3 * passes)
    assert bubble_share(Placement(FOLDED, 8, 2), 24, 4.0) > 0.3
