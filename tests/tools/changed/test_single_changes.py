"""One thing is changed in a run and its record gathered anew: the change is found, once, in its class, and nothing else is."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from recipes.common.config.ds_config import merge_ds_config
from recipes.common.config.fact_effects import DEEPSPEED_EFFECTS, effect_of_fact
from recipes.common.config.field_effects import Effect
from recipes.common.recipe import (
    SGD,
    AdamW,
    Batch,
    Checkpoints,
    Constant,
    Cosine,
    Evaluation,
    Layout,
    Monitor,
    Reaction,
    Recipe,
    derive_sizes,
)
from recipes.common.record import recipe_facts as recording
from recipes.common.record.data_content import data_facts
from recipes.common.record.environment import environment_facts
from recipes.common.record.packages import package_facts
from recipes.common.record.recording import facts_of_hosts, facts_of_ranks
from recipes.common.record.source_code import code_facts
from recipes.common.run_dir.differences import counted, find_differences, verdict
from recipes.common.run_dir.segments import append_segment, changed_facts, read_segments
from tests.support.small_runs import run
from tests.support.tiny import ds_config, tiny_config, tiny_recipe, write_shards
from tools.common.run_record import open_record, segment_changes

STATE, MATHEMATICS, ORDER, COURSE, ROUNDING, SPEED, NOTHING = Effect
OPTIMIZER = AdamW(lr=1e-3, eps=1e-6, clip=0.5)
BATCH = Batch(seq_len=16, micro_seqs=1, global_seqs=4)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with a real run of two steps, its data, a checkout and installed packages."""
    folder = tmp_path_factory.mktemp("single")
    write_shards(folder / "tokens", tokens=8_000)
    recipe = tiny_recipe(folder / "tokens", evaluation=Evaluation(), checkpoints=Checkpoints())
    run(recipe, 1, folder / "run", max_steps=2)
    checkout(folder / "checkout")
    for name, version in (("torch", "2.9.0"), ("deepspeed", "0.19.8"), ("pytest", "9.0"), ("nvidia_nccl_cu12", "2.27")):
        install(folder / "site", name, version)
    return folder


@pytest.fixture(scope="module")
def real(root):
    """The facts that the run recorded."""
    (segment,) = read_segments(root / "run")
    return segment.facts


def checkout(folder: Path) -> None:
    files = {
        "recipes/common/loss.py": "a = 1\nb = 2\n",
        "tests/test_loss.py": "c = 3\n",
        "README.md": "text\n",
        "tools/x.py": "d = 4\n",
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    git(folder, "init", "-q")
    commit(folder)


def git(folder: Path, *words: str) -> None:
    subprocess.run(
        ["git", "-C", str(folder), "-c", "user.name=n", "-c", "user.email=e@x", *words], check=True, capture_output=True
    )


def commit(folder: Path) -> None:
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "m")


def install(site: Path, name: str, version: str, content: bytes = b"VERSION = 1\n") -> None:
    info = site / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
    (info / "RECORD").write_text(f"{name}/__init__.py,sha256={digest},{len(content)}\n{info.name}/RECORD,,\n")


def overlay(facts: Mapping[str, Any], before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """Return the facts with what gathering anew made different."""
    changed = changed_facts(before, after)
    new = {name: after[name] for name in changed if name in after}
    return json.loads(json.dumps({name: value for name, value in facts.items() if name not in changed or name in after} | new))


def told(recipe: Recipe, layout: Layout | None = None, world: int = 1, config: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Gather what a recipe, a ds_config and a layout give."""
    layout = layout or Layout()
    sizes = derive_sizes(recipe, layout, world)
    merged = merge_ds_config(dict(config or ds_config(recipe.deepspeed)), recipe, sizes, sizes.accumulation)
    return recording.recipe_facts(recipe)[0] | recording.deepspeed_facts(merged)[0] | recording.plan_facts(recipe, layout, sizes)


def recipe_with(**fields: Any):
    def change(facts, root, _):
        recipe = tiny_recipe(root / "tokens", evaluation=Evaluation(), checkpoints=Checkpoints())
        return overlay(facts, told(recipe), told(replace(recipe, **fields)))

    return change


def model_with(**fields: Any):
    return recipe_with(model=tiny_config("llama", **fields))


def ds_with(path: str, value: Any):
    def change(facts, root, _):
        recipe = tiny_recipe(root / "tokens")
        config = ds_config(recipe.deepspeed)
        *blocks, last = path.split(".")
        inner = config
        for block in blocks:
            inner = inner.setdefault(block, {})
        inner[last] = value
        return overlay(facts, told(recipe), told(recipe, config=config))

    return change


def laid_out(world: int = 1, **fields: Any):
    def change(facts, root, _):
        recipe = tiny_recipe(root / "tokens")
        return overlay(facts, told(recipe), told(recipe, Layout(**fields), world))

    return change


def data_with(edit):
    """edit: what is done to a copy of the prepared folder."""

    def change(facts, root, scratch):
        copy = scratch / "tokens"
        shutil.copytree(root / "tokens", copy)
        before, _ = data_facts({"tokens": copy}, copy / "tokenizer")
        edit(copy)
        return overlay(facts, before, data_facts({"tokens": copy}, copy / "tokenizer")[0])

    return change


def one_byte(folder: Path) -> None:
    path = folder / "train_00000.bin"
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)


def other_manifest(**fields: Any):
    def edit(folder: Path) -> None:
        path = folder / "dataset.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return edit


def other_tokenizer(folder: Path) -> None:
    (folder / "tokenizer" / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 1}}}))


def moved(facts, root, scratch):
    """The same data in a folder of another name, which the recipe names."""
    shutil.copytree(root / "tokens", scratch / "elsewhere")
    old, _ = data_facts({"tokens": root / "tokens"}, root / "tokens" / "tokenizer")
    new, _ = data_facts({"elsewhere": scratch / "elsewhere"}, root / "tokens" / "tokenizer")
    return overlay(facts, old | {"recipe.data": "x"}, new | {"recipe.data": str(scratch / "elsewhere")})


def site_with(edit):
    def change(facts, root, scratch):
        shutil.copytree(root / "site", scratch / "site")
        before = package_facts([str(scratch / "site")])
        edit(scratch / "site")
        return overlay(facts | before, before, package_facts([str(scratch / "site")])), facts | before

    return change


def upgraded(name: str, old: str, new: str):
    def edit(site: Path) -> None:
        shutil.rmtree(site / f"{name}-{old}.dist-info")
        install(site, name, new)

    return edit


def another_wheel(name: str, version: str):
    def edit(site: Path) -> None:
        shutil.rmtree(site / f"{name}-{version}.dist-info")
        install(site, name, version, b"VERSION = 2\n")

    return edit


def code_with(edit):
    """edit: what is done in a copy of the checkout."""

    def change(facts, root, scratch):
        shutil.copytree(root / "checkout", scratch / "checkout")
        before, old = code_facts(scratch / "checkout")
        edit(scratch / "checkout")
        after, new = code_facts(scratch / "checkout")
        return overlay(facts | before, before, after), facts | before, (old, new)

    return change


def line(name: str, then=lambda folder: None):
    def edit(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with (folder / name).open("a") as file:
            file.write("e = 5\n")
        then(folder)

    return edit


def environment(**values: str):
    return lambda facts, root, _: overlay(facts, {}, environment_facts(values))


def hosts(*, second: Mapping[str, Any] | None = None, **first: Any):
    """Two hosts of two ranks; first, second: what is another on one of them."""

    def gathered(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
        kinds = [
            {"name": "a", "cpu": "EPYC", "memory_gib": 64} | dict(one),
            {"name": "b", "cpu": "EPYC", "memory_gib": 64} | dict(other),
        ]
        gpus = [kind.pop("gpu", "H100") for kind in kinds]
        differs = [kind.pop("differs", {}) for kind in kinds]
        ranks = [{"host": key, "device": [gpus[i], f"{key}-{r}"], "facts": {}} for i, key in enumerate("AB") for r in range(2)]
        told = [{"host": kind, "differs": differ} for kind, differ in zip(kinds, differs, strict=True)]
        return facts_of_hosts(told, ranks, ["A", "B"]) | facts_of_ranks(ranks, ["A", "B"])

    def change(facts, root, _):
        before = gathered({}, {})
        return overlay(facts | before, before, gathered(first, second or {})), facts | before

    return change


def rank_with(**own: Any):
    def change(facts, root, _):
        ranks = [{"host": "A", "facts": {"threads.torch": 2}}, {"host": "A", "facts": {"threads.torch": 2} | own}]
        before = facts_of_ranks([ranks[0], ranks[0]], ["A"])
        return overlay(facts | before, before, facts_of_ranks(ranks, ["A"])), facts | before

    return change


def version_of(name: str):
    """Another version of an algorithm, as the gatherer finds it."""

    def change(facts, root, _):
        recipe = tiny_recipe(root / "tokens")
        before = told(recipe)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(recording, name, getattr(recording, name) + 1)
            return overlay(facts, before, told(recipe))

    return change


def fact(name: str, value: Any):
    """What this machine cannot make another: a library, a driver."""
    return lambda facts, root, _: facts | {name: value}


def legacy_rope(facts, root, _):
    """The record of an earlier transformers, which had the same value under another name."""
    without = {n: v for n, v in facts.items() if not n.startswith("recipe.model.rope_parameters.")}
    return without | {"recipe.model.rope_theta": facts["recipe.model.rope_parameters.rope_theta"]}


def without(name: str):
    return lambda facts, root, _: {n: v for n, v in facts.items() if n != name}


OLD_TORCH = {"differs": {"package.torch.version": "2.8"}}
ZERO = "deepspeed.zero_optimization"
ROPE = {"rope_type": "default", "rope_theta": 5e5}
# what is changed: how, the name of the gravest difference, its class, and how many are counted where not one
CHANGES = {
    "seed": (recipe_with(seed=7), "recipe.seed", ORDER),
    "learning rate": (recipe_with(optimizer=replace(OPTIMIZER, lr=2e-3)), "recipe.optimizer.lr", COURSE),
    "clipping": (recipe_with(optimizer=replace(OPTIMIZER, clip=1.0)), "recipe.optimizer.clip", COURSE),
    "betas": (recipe_with(optimizer=replace(OPTIMIZER, betas=(0.9, 0.99))), "recipe.optimizer.betas", MATHEMATICS),
    "eps": (recipe_with(optimizer=replace(OPTIMIZER, eps=1e-8)), "recipe.optimizer.eps", MATHEMATICS),
    "weight decay": (recipe_with(optimizer=replace(OPTIMIZER, weight_decay=0.0)), "recipe.optimizer.weight_decay", COURSE),
    "optimizer": (recipe_with(optimizer=SGD(lr=1e-3, weight_decay=0.1, clip=0.5)), "recipe.optimizer.class", STATE),
    "batch": (recipe_with(batch=replace(BATCH, global_seqs=8)), "recipe.batch.global_seqs", COURSE),
    "micro batch": (recipe_with(batch=replace(BATCH, micro_seqs=2)), "recipe.batch.micro_seqs", ROUNDING),
    "sequence length": (recipe_with(batch=replace(BATCH, seq_len=32)), "recipe.batch.seq_len", ORDER),
    "ramp": (recipe_with(batch=replace(BATCH, ramp=((8, 2),))), "recipe.batch.ramp", COURSE),
    "schedule": (recipe_with(schedule=Cosine(warmup_steps=2)), "recipe.schedule.class", COURSE),
    "warm-up": (recipe_with(schedule=Constant(warmup_steps=4)), "recipe.schedule.warmup_steps", COURSE),
    "steps": (recipe_with(steps=9), "recipe.steps", COURSE),
    "z-loss": (recipe_with(z_loss=1e-4), "recipe.z_loss", MATHEMATICS),
    "document masks": (recipe_with(mask_documents=True), "recipe.mask_documents", MATHEMATICS),
    "attention kernel": (recipe_with(attention="eager"), "recipe.attention", ROUNDING),
    "chunks of logits": (recipe_with(logits_chunk_tokens=64), "recipe.logits_chunk_tokens", ROUNDING),
    "determinism": (recipe_with(determinism="bitwise"), "recipe.determinism", ROUNDING),
    "reaction": (recipe_with(reaction=Reaction(action="skip")), "recipe.reaction.action", COURSE),
    "evaluation": (recipe_with(evaluation=Evaluation(every_steps=2)), "recipe.evaluation.every_steps", NOTHING),
    "checkpoints": (recipe_with(checkpoints=Checkpoints(every_steps=3)), "recipe.checkpoints.every_steps", NOTHING),
    "monitor": (recipe_with(monitor=Monitor(drift_every_steps=7)), "recipe.monitor.drift_every_steps", NOTHING),
    "name": (recipe_with(name="other"), "recipe.name", NOTHING),
    "layouts of other sizes": (recipe_with(layouts={1: Layout(), 16: Layout(tensor=4)}), "recipe.layouts", NOTHING),
    "activation": (model_with(hidden_act="gelu"), "recipe.model.hidden_act", MATHEMATICS),
    "eps of norms": (model_with(rms_norm_eps=1e-3), "recipe.model.rms_norm_eps", MATHEMATICS),
    "width": (model_with(intermediate_size=128), "recipe.model.intermediate_size", STATE),
    "rotary base": (model_with(rope_parameters=ROPE), "recipe.model.rope_parameters.rope_theta", MATHEMATICS),
    "initial weights' size": (model_with(initializer_range=0.01), "recipe.model.initializer_range", MATHEMATICS),
    "dropout": (model_with(attention_dropout=0.1), "recipe.model.attention_dropout", MATHEMATICS),
    "a field renamed, equal": (legacy_rope, "recipe.model.rope_theta", NOTHING, 2),
    "a default left out": (without("recipe.z_loss"), "recipe.z_loss", NOTHING),
    "dtype": (ds_with("bf16.enabled", True), "deepspeed.bf16.enabled", ROUNDING),
    "ZeRO stage": (ds_with("zero_optimization.stage", 2), "deepspeed.zero_optimization.stage", ROUNDING),
    "reduce bucket": (ds_with("zero_optimization.reduce_bucket_size", 1000), f"{ZERO}.reduce_bucket_size", ROUNDING),
    "gather bucket": (ds_with("zero_optimization.allgather_bucket_size", 1000), f"{ZERO}.allgather_bucket_size", SPEED),
    "type of messages": (ds_with("communication_data_type", "bf16"), "deepspeed.communication_data_type", ROUNDING),
    "tensor ranks": (laid_out(2, tensor=2), "layout.tensor", ROUNDING, 2),
    "stages": (laid_out(2, pipeline=2), "layout.pipeline", ROUNDING, 2),
    "data ranks": (laid_out(2), "sizes.world", ROUNDING),
    "recomputation": (laid_out(recompute="full"), "layout.recompute", SPEED),
    "pipeline schedule": (laid_out(pipeline_schedule="zero_bubble"), "layout.pipeline_schedule", SPEED),
    "one data byte": (data_with(one_byte), "data.tokens", ORDER),
    "a shard less": (data_with(lambda folder: (folder / "train_00000.bin").unlink()), "data.tokens", ORDER),
    "data prepared anew, equal": (data_with(other_manifest(inputs_hash="sha256:" + 64 * "a")), "data.tokens", NOTHING),
    "stale tokenizer": (data_with(other_manifest(tokenizer_hash="sha256:" + 64 * "a")), "data.tokens.tokenizer", MATHEMATICS, 2),
    "another tokenizer": (data_with(other_tokenizer), "tokenizer.hash", MATHEMATICS),
    "data moved": (moved, "recipe.data", NOTHING),
    "torch": (site_with(upgraded("torch", "2.9.0", "2.10.0")), "package.torch", MATHEMATICS),
    "another wheel of the same version": (site_with(another_wheel("deepspeed", "0.19.8")), "package.deepspeed", MATHEMATICS),
    "NCCL's package": (site_with(upgraded("nvidia_nccl_cu12", "2.27", "2.28")), "package.nvidia-nccl-cu12", ROUNDING),
    "a tool's package": (site_with(upgraded("pytest", "9.0", "9.1")), "package.pytest", NOTHING),
    "a package nobody knows": (site_with(lambda site: install(site, "unheard_of", "1")), "package.unheard-of", MATHEMATICS),
    "a package gone": (site_with(lambda site: shutil.rmtree(site / "pytest-9.0.dist-info")), "package.pytest", NOTHING),
    "an edited package": (fact("package.torch.edited", {"torch/optim/adamw.py": "x"}), "package.torch.edited", MATHEMATICS),
    "an uncommitted line": (code_with(line("recipes/common/loss.py")), "git.patch", MATHEMATICS),
    "an uncommitted new file": (code_with(line("recipes/common/new.py")), "git.patch", MATHEMATICS),
    "an uncommitted line of text": (code_with(line("README.md")), "git.patch", NOTHING),
    "an uncommitted line of a test": (code_with(line("tests/test_loss.py")), "git.patch", NOTHING),
    "an uncommitted line of a tool": (code_with(line("tools/x.py")), "git.patch", NOTHING),
    "a commit": (code_with(line("recipes/common/loss.py", commit)), "git.commit", MATHEMATICS),
    "a commit of text": (code_with(line("README.md", commit)), "git.commit", NOTHING),
    "NCCL_ALGO": (environment(NCCL_ALGO="Tree"), "environment.NCCL_ALGO", ROUNDING),
    "CUBLAS_WORKSPACE_CONFIG": (environment(CUBLAS_WORKSPACE_CONFIG=":4096:8"), "environment.CUBLAS_WORKSPACE_CONFIG", ROUNDING),
    "NVIDIA_TF32_OVERRIDE": (environment(NVIDIA_TF32_OVERRIDE="1"), "environment.NVIDIA_TF32_OVERRIDE", ROUNDING),
    "OMP_NUM_THREADS": (environment(OMP_NUM_THREADS="3"), "environment.OMP_NUM_THREADS", ROUNDING),
    "NCCL_SOCKET_IFNAME": (environment(NCCL_SOCKET_IFNAME="eth9"), "environment.NCCL_SOCKET_IFNAME", NOTHING),
    "CUDA_MODULE_LOADING": (environment(CUDA_MODULE_LOADING="LAZY"), "environment.CUDA_MODULE_LOADING", SPEED),
    "LD_PRELOAD": (environment(LD_PRELOAD="/lib/x.so"), "environment.LD_PRELOAD", MATHEMATICS),
    "threads": (fact("threads.torch", 31), "threads.torch", ROUNDING),
    "a rank's threads": (rank_with(**{"threads.torch": 1}), "rank.1.threads.torch", ROUNDING),
    "a rank's environment": (rank_with(**{"environment.NCCL_PROTO": "LL"}), "rank.1.environment.NCCL_PROTO", ROUNDING),
    "a host swapped": (hosts(name="c"), "host.0.name", NOTHING),
    "a host of another kind": (hosts(second={"cpu": "Xeon"}), "host.1.cpu", ROUNDING),
    "another GPU": (hosts(gpu="A100"), "host.0.gpus", ROUNDING),
    "memory of a host": (hosts(memory_gib=128), "host.0.memory_gib", SPEED),
    "a package of one host": (hosts(second=OLD_TORCH), "host.1.package.torch.version", MATHEMATICS),
    "the order's version": (version_of("ORDER_VERSION"), "algorithm.order", ORDER),
    "the initialiser's version": (version_of("INITIAL_WEIGHTS_VERSION"), "algorithm.initial_weights", MATHEMATICS),
    "NCCL": (fact("library.nccl", "2.99"), "library.nccl", ROUNDING),
    "CUDA": (fact("library.cuda", "99.0"), "library.cuda", ROUNDING),
    "driver": (fact("library.driver", "999.1"), "library.driver", ROUNDING),
    "firmware": (fact("host.0.firmware.gpus", ["96.00"]), "host.0.firmware.gpus", ROUNDING),
    "skipped sequences": (fact("run.skips", [[4, 8]]), "run.skips", ORDER),
    "a factor on the rate": (fact("run.lr_factors", [[1, 2, 0.5]]), "run.lr_factors", COURSE),
}  # fmt: skip


def test_there_are_sixty():
    assert len(CHANGES) >= 60


@pytest.mark.parametrize("what", CHANGES)
def test_a_single_change_is_found_in_its_class(what, real, root, tmp_path):
    change, name, effect, *count = CHANGES[what]
    made = change(real, root, tmp_path)
    after, before, patches = (*made, (None, None))[:3] if isinstance(made, tuple) else (made, real, (None, None))
    differences = find_differences(before, after, patches)
    own = [d for d in differences if not d.follows]
    assert own[0].effect is effect and (name, effect) in [(d.name, d.effect) for d in own], differences
    assert len(own) == (count[0] if count else 1), differences
    able = effect in (STATE, MATHEMATICS, ORDER, COURSE, ROUNDING)
    assert (counted(differences)[0] > 0) is able
    back = find_differences(after, before, patches[::-1])  # the other way round as well
    assert sorted((d.effect.name, bool(d.follows)) for d in back) == sorted((d.effect.name, bool(d.follows)) for d in differences)


def test_nothing_changed_is_no_difference(real, root, tmp_path):
    recipe = tiny_recipe(root / "tokens", evaluation=Evaluation(), checkpoints=Checkpoints())
    for change in (
        recipe_with(),
        laid_out(),
        data_with(lambda folder: None),
        hosts(),
        code_with(lambda folder: None),
        rank_with(),
    ):
        (tmp_path / "scratch").mkdir()
        made = change(real, root, tmp_path / "scratch")
        after, before = made[:2] if isinstance(made, tuple) else (made, real)
        assert find_differences(before, after) == [] and verdict([]) == "no differences"
        shutil.rmtree(tmp_path / "scratch")
    assert changed_facts(told(recipe), real | told(recipe)) != []  # the run records more than its recipe


def test_every_fact_that_a_run_records_has_a_class_of_its_own(real):
    """What nobody classified would be called mathematics, on any change."""
    unknown = [n for n in real if not n.startswith(("package.", "recipe.")) and effect_of_fact(n) is MATHEMATICS]
    unknown = [n for n in unknown if n.removeprefix("deepspeed.") not in DEEPSPEED_EFFECTS]
    allowed = ("git.", "code.", "algorithm.", "seed.", "tokenizer.", "record.", "environment.LD_", "environment.PYTHONPATH")
    assert [n for n in unknown if not n.startswith(allowed) and not n.endswith(".tokenizer")] == []


def test_a_record_written_with_a_change_shows_it_at_its_segment(real, root, tmp_path):
    for number, (cause, facts) in enumerate((("start", real), ("resume", real | {"environment.NCCL_ALGO": "Ring"})), 1):
        append_segment(tmp_path / "run", cause=cause, step=number - 1, attempt=number, run_id="x", facts=facts)
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    (_, none), (segment, changes) = segment_changes(open_record(os.fspath(tmp_path / "run")))
    assert none == [] and segment.cause == "resume" and [d.name for d in changes] == ["environment.NCCL_ALGO"]
