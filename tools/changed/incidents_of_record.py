"""Names what the records of two runs show: an upgrade nobody chose, a setting without effect, stale tokens, another layout.

Each rule is an incident that large runs have had, and found weeks later.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from packaging.version import InvalidVersion, Version

from recipes.common.config.fact_effects import CHANGES_LOSS
from recipes.common.config.field_effects import Effect
from recipes.common.run_dir.data_differences import CONTENT, INPUTS, folder_facts
from recipes.common.run_dir.difference import Difference, short_value
from recipes.common.run_dir.differences import short_name
from recipes.common.run_dir.patch_differences import patch_lines
from tools.changed.incident import Compared, Incident

# DeepSpeed's releases that trained wrongly without an error: first, first good one, what, and where it shows
WRONG_RELEASES = (
    ("0.17.6", "0.17.7", "ZeRO 2 trains wrongly (issue 7718)", lambda facts: facts.get("deepspeed.zero_optimization.stage") == 2),
    ("0.18.3", "0.19.3", "pipelines scale gradients by 1/accumulation once per stage (issue 8152)",
     lambda facts: (facts.get("layout.pipeline") or facts.get("sizes.pipeline") or 1) > 1),
    ("0.18.6", "0.18.11", "a micro batch is lost from the accumulated gradient (issue 7985)",
     lambda facts: (facts.get("deepspeed.gradient_accumulation_steps") or 1) > 1),
    ("0.0", "0.19.4", "a submodule that a step uses twice gets a wrong gradient (issue 8224)",
     lambda facts: facts.get("recipe.model.tie_word_embeddings") is True and facts.get("deepspeed.zero_optimization.stage") == 3),
)  # fmt: skip
ASKED = ("recipe", "deepspeed", "flags")  # facts that somebody asked for, and that act at every step
CODE = ("package", "git", "library")
LATE = (
    "recipe.steps",
    "recipe.evaluation",
    "recipe.checkpoints",
    "recipe.reaction",
    "recipe.monitor",
    "recipe.schedule",
    "recipe.batch.ramp",
)  # act at some steps only; whether the schedule was applied is a rule of its own
ENOUGH_STEPS = 3  # with numbers that are equal, before a setting is said to have no effect
PROCESSORS = ("cpu", "gpus")  # facts of a host
LAYOUT = ("tensor", "pipeline", "context", "data", "world")


def unchosen_upgrade(compared: Compared) -> Iterator[Incident]:
    """Other code, and not one field of the recipe that would say why: OPT went from Megatron 2.4 to 2.6 so, by accident."""
    code = [d for d in compared.differences if d.name.partition(".")[0] in CODE and d.can_change_loss and not d.follows]
    chosen = [d for d in compared.differences if d.name.startswith("recipe.") and d.can_change_loss]
    if not code or chosen:
        return
    named = ", ".join(f"{short_name(d.name)} {short_value(d.old, 24)} -> {short_value(d.new, 24)}" for d in code[:4])
    named += f" and {len(code) - 4} more" if len(code) > 4 else ""
    yield Incident("code replaced", f"the code is another, and no field of the recipe: {named}", tuple(_speed(compared)))


def _speed(compared: Compared) -> Iterator[str]:
    times = [side.column("seconds") for side in compared.sides]
    if len(times) < 2 or not all(times):
        return
    medians = [sorted(t.values())[len(t) // 2] for t in times]
    change = medians[1] / medians[0] - 1 if medians[0] else 0.0
    if abs(change) >= 0.005:
        yield f"its median step takes {abs(change):.1%} {'longer' if change > 0 else 'less time'}"


def wrong_release(compared: Compared) -> Iterator[Incident]:
    """A release of DeepSpeed that trains wrongly, in the configuration in which it does."""
    for side in compared.sides:
        version = side.facts.get("package.deepspeed.version")
        for first, good, what, concerned in WRONG_RELEASES:
            if version and _within(str(version), first, good) and concerned(side.facts):
                yield Incident(
                    "wrong release", f"{side.name} trains with deepspeed {version}, in which {what}; {good} is the first good one"
                )


def _within(version: str, first: str, good: str) -> bool:
    try:
        return Version(first) <= Version(version) < Version(good)
    except InvalidVersion:
        return False


def without_effect(compared: Compared) -> Iterator[Incident]:
    """A setting that differs, and no number does: DeepSpeed ignored Megatron's --no-load-optim so."""
    metrics = compared.metrics
    if metrics is None or metrics.partings or len(metrics.steps) < ENOUGH_STEPS or "loss" not in metrics.equal:
        return
    for d in compared.differences:
        grave = d.effect in CHANGES_LOSS and d.effect is not Effect.ROUNDING
        if grave and not d.follows and d.name.partition(".")[0] in ASKED and not _acts_late(d, compared):
            text = f"{short_name(d.name)}={short_value(d.new)} instead of {short_value(d.old)} was asked for, and was not applied"
            yield Incident(
                "silently ignored",
                f"{text}, or does nothing in these steps",
                (f"it changes {d.effect.value}, yet no number of the {len(metrics.steps)} common steps differs in one bit",),
            )


def _acts_late(d: Difference, compared: Compared) -> bool:
    """Whether a setting need not have acted yet: a limit that no gradient has reached, a change of the data that is to come."""
    if d.name == "recipe.optimizer.clip":
        limits = [limit for limit in (d.old, d.new) if isinstance(limit, int | float) and limit > 0]  # 0: no limit
        norms = [norm for side in compared.sides for norm in side.column("grad_norm").values()]
        return bool(norms) and max(norms) <= min(limits, default=math.inf)
    if d.name == "recipe.data" and isinstance(d.old, Mapping) and isinstance(d.new, Mapping):
        return d.old.get("weights") == d.new.get("weights")
    return d.name.startswith(LATE)


def other_device(compared: Compared) -> Iterator[Incident]:
    """Another kind of processor: the same seed on V100 and A100 parts by rounding, and then further."""
    kinds = [[_kinds(side.facts, what) for what in PROCESSORS] for side in (compared.a, compared.b)]
    changed = [(what, old, new) for what, old, new in zip(PROCESSORS, *kinds, strict=True) if old and new and old != new]
    if not changed:
        return
    seeds = [side.facts.get("recipe.seed") for side in compared.sides]
    same = "the same seed on " if seeds[0] is not None and len(set(seeds)) == 1 else ""
    parting = compared.metrics.of("loss") if compared.metrics else None
    evidence = [f"{what}: {', '.join(old)} -> {', '.join(new)}" for what, old, new in changed]
    if parting is not None:
        how = "within" if parting.within_rounding else "beyond"
        evidence.append(
            f"the losses part at step {parting.step}, by {abs(parting.difference):.2g}, {how} the rounding to be expected"
        )
    yield Incident(
        "another kind of device", f"{same}another kind of processor: its kernels round in another order", tuple(evidence)
    )


def _kinds(facts: Mapping[str, Any], what: str) -> list[str]:
    """Return the kinds of a processor that a run's hosts have, however many there are of each."""
    values = [value for name, value in facts.items() if re.fullmatch(rf"host\.\d+\.{what}", name)]
    return sorted({str(kind) for value in values for kind in (value if isinstance(value, list) else [value]) if kind})


def tokens_of_before(compared: Compared) -> Iterator[Incident]:
    """Data prepared anew whose tokens are those of before: Marin's cached files still held a test set after its removal."""
    old, new = (folder_facts(side.facts) for side in (compared.a, compared.b))
    preparation = _changed_preparation(compared)
    for folder in old.keys() & new.keys():
        one, other = old[folder], new[folder]
        again = one.get(INPUTS) != other.get(INPUTS)
        if one.get(CONTENT) is None or one.get(CONTENT) != other.get(CONTENT) or not (again or preparation):
            continue
        what = "what it is prepared from" if again else preparation
        text = (
            f"data.{folder}: {what} changed, and its tokens are those of before: a cached copy was read, or that changes no token"
        )
        yield Incident("stale tokens", text, (f"the bytes of all its shards are equal ({short_value(one[CONTENT])})",))


def _changed_preparation(compared: Compared) -> str:
    """Return the code of the preparation in which the uncommitted changes of the two differ, in words; "" for none."""
    patches = [side.record.patch(side.newest) if side.newest else None for side in (compared.a, compared.b)]
    lines = [patch_lines(patch or b"") for patch in patches]
    changed = [
        path
        for path in dict.fromkeys((*lines[0], *lines[1]))
        if path.startswith("tools/data/") and lines[0].get(path) != lines[1].get(path)
    ]
    return f"the code that prepares data ({', '.join(changed)})" if changed else ""


def stale_tokenizer(compared: Compared) -> Iterator[Incident]:
    """Tokens that another tokenizer made than the one of the recipe."""
    for side in compared.sides:
        own = side.facts.get("tokenizer.hash")
        for folder, facts in folder_facts(side.facts).items():
            if facts.get("tokenizer") and own is not None and facts["tokenizer"] != own:
                text = f"{side.name}: the tokens of data.{folder} were made with another tokenizer than the recipe's"
                evidence = f"{short_value(facts['tokenizer'])} made the tokens, {short_value(own)} is the recipe's"
                yield Incident("stale tokenizer", text, (evidence,))


def other_shuffle(compared: Compared) -> Iterator[Incident]:
    """Another algorithm of the order: Marin's affine shuffle read the data in phases, its Feistel network does not."""
    for d in compared.differences:
        if d.name == "algorithm.order":
            text = f"the data are shuffled by another algorithm: {short_value(d.old)} -> {short_value(d.new)}"
            yield Incident(
                "another shuffle", text, ("the same seed gives another order; what was read before a resume may be read again",)
            )


def other_layout(compared: Compared) -> Iterator[Incident]:
    """The same training in another layout: BLOOM went from 48 nodes to 24."""
    changed = {d.name.rpartition(".")[2]: d for d in compared.differences if d.name.startswith(("layout.", "sizes."))}
    if not set(LAYOUT) & set(changed):
        return
    shown = ", ".join(f"{name} {changed[name].old} -> {changed[name].new}" for name in LAYOUT if name in changed)
    same_batch = not any(d.name in ("recipe.batch.global_seqs", "recipe.batch.seq_len") for d in compared.differences)
    evidence = ["the batch of a step is the same: only rounding can change"] if same_batch else []
    evidence += list(_goes_on(compared))
    yield Incident("another layout", f"the run goes on in another layout: {shown}" if len(compared.sides) == 1
                   else f"the layouts differ: {shown}", tuple(evidence))  # fmt: skip


def _goes_on(compared: Compared) -> Iterator[str]:
    segment = compared.b.newest
    losses = compared.b.column("loss")
    if segment is not None and segment.step and segment.step + 1 in losses and len(compared.sides) == 1:
        artefact = any(e.kind == "resume_artefact" and 0 < e.onset_step - segment.step <= 8 for e in compared.b.events)
        yield f"the loss {'leaves' if artefact else 'stays on'} its curve at step {segment.step + 1}, the first in the new layout"


RULES = (
    unchosen_upgrade,
    wrong_release,
    without_effect,
    other_device,
    tokens_of_before,
    stale_tokenizer,
    other_shuffle,
    other_layout,
)


def record_incidents(compared: Compared) -> list[Incident]:
    return [incident for rule in RULES for incident in rule(compared)]
