"""Compares the facts of two entries of runs' records: what differs, and what each difference can change, the gravest first.

A value that follows from another that differs too is shown with it, not counted again: `gradient_clipping` of DeepSpeed from
`optimizer.clip` of the recipe. What is the same under another name, or stated in one and left at its default in the other, is
said to be equal (`equal_configs`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from recipes.common.config.fact_effects import effect_of_fact, gravest
from recipes.common.config.field_effects import Effect
from recipes.common.run_dir.data_differences import data_differences, same_data, with_names_of
from recipes.common.run_dir.difference import ABSENT, Difference, differ, short_value
from recipes.common.run_dir.equal_configs import FieldNames, equal_defaults, match_model_fields
from recipes.common.run_dir.patch_differences import patch_differences
from recipes.common.run_dir.segments import changed_facts

_WHOLE_GROUPS = ("package", "library", "environment", "threads", "host", "data", "tokenizer", "algorithm", "seed", "recipe",
                 "deepspeed", "layout", "sizes", "git")  # fmt: skip

_BATCH = (
    "recipe.batch.global_seqs",
    "recipe.batch.micro_seqs",
    "sizes.world",
    "layout.tensor",
    "layout.pipeline",
    "layout.context",
)
_FIRST_WEIGHTS = ("recipe.model.initializer_range", "recipe.model.initializer_factor", "recipe.model.init_std")
_CHOSEN = ("recipe.optimizer", "recipe.schedule")  # whose class a recipe chooses
_DROPOUTS = ("attention_dropout", "hidden_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop", "dropout", "embedding_dropout")
_DROPOUT_KEYS = ("layout.pipeline", "layout.context", "sizes.world", "sizes.data", "recipe.batch.micro_seqs")
_SHOWN = 3  # changes that a line names
# a fact -> those that it follows from: with one of them among the differences, it is no choice of its own
_FOLLOWS = {
    "deepspeed.gradient_clipping": ("recipe.optimizer.clip",),
    "deepspeed.train_batch_size": ("recipe.batch.global_seqs",),
    "deepspeed.train_micro_batch_size_per_gpu": ("recipe.batch.micro_seqs",),
    "deepspeed.gradient_accumulation_steps": ("sizes.accumulation", *_BATCH),
    "sizes.accumulation": _BATCH,
    "sizes.tokens_per_step": ("recipe.batch.global_seqs", "recipe.batch.seq_len"),
    "sizes.data": ("sizes.world", "layout.tensor", "layout.pipeline"),
    "rank_hosts": ("sizes.world",),
    "host.0.gpus": ("sizes.world",),
    "recipe.num_params": ("recipe.model.",),
    "recipe.layouts": ("layout.",),
    "recipe.deepspeed": ("deepspeed.",),
    "recipe.tokenizer": ("tokenizer.",),
    "git.dirty": ("git.patch",),
    "code.hash": ("git.commit", "git.patch"),
    "library.torch_build": ("package.torch",),
    "library.openmp": ("package.torch",),
    "library.driver": ("host.",),
    "tokenizer.hash": ("recipe.tokenizer",),
    "seed.recipe": ("recipe.seed",),
    "seed.dropout": ("recipe.seed",),
    "determinism": ("recipe.determinism",),
    "torch.deterministic_algorithms": ("recipe.determinism",),
    "library.nccl": ("package.torch", "package.nvidia-nccl-cu12", "package.nvidia-nccl-cu13"),
    "library.cudnn": ("package.torch", "package.nvidia-cudnn-cu12", "package.nvidia-cudnn-cu13"),
    "library.cuda": ("package.torch",),
    "library.mkl": ("package.torch",),
    "library.onednn": ("package.torch",),
}  # fmt: skip


def find_differences(
    before: Mapping[str, Any], after: Mapping[str, Any], patches: tuple[bytes | None, bytes | None] = (None, None)
) -> list[Difference]:
    """Return all differences of the facts of two entries, the gravest first. patches: their uncommitted changes."""
    after = with_names_of(before, after)
    left_out = set(not_recorded(before, after))
    names = [name for name in changed_facts(before, after) if _group(name) not in left_out]
    fields = match_model_fields(before, after, names)
    equal = fields.equal | equal_defaults(before, after, names)
    found = list(_packages(before, after, [n for n in names if _group(n) == "package"]))
    found += _hosts(before, after, [n for n in names if n.startswith("host.") or n == "rank_hosts"])
    found += data_differences(before, after, [n for n in names if _group(n) == "data"])
    found += patch_differences(before, after, names, patches)
    for name in names:
        if name in fields.renamed.values():
            continue  # told with its new name
        if name in fields.renamed:
            found.append(_renamed(before, after, name, fields))
        elif name in equal:
            found.append(differ(before, after, name, Effect.NOTHING, equal[name]))
        elif _group(name) not in ("package", "host", "data") and name not in ("rank_hosts", "git.patch"):
            found.append(_other(before, after, name))
    return _sorted(_with_sources(found))


def not_recorded(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, int]:
    """Return group -> number of facts, of groups that one of two records holds no fact of: that of an earlier version."""
    kept = [{_group(name) for name in facts} for facts in (before, after)]
    groups = (kept[0] ^ kept[1]) & set(_WHOLE_GROUPS) if all(kept) else set()
    if "environment" in groups and {"host", "library", "threads"} & kept[0] & kept[1]:
        groups -= {"environment"}  # none of the listed variables was set
    return {group: sum(_group(name) == group for name in (*before, *after)) for group in sorted(groups)}


def counted(differences: Sequence[Difference]) -> tuple[int, int]:
    """Return how many of the differences can change the loss, and how many cannot."""
    own = [d for d in differences if not d.follows]
    able = sum(d.can_change_loss for d in own)
    return able, len(own) - able


def verdict(differences: Sequence[Difference]) -> str:
    """Return the sentence on all differences."""
    able, unable = counted(differences)
    if not able + unable:
        return "no differences"
    return f"{_these(able)} can change the loss; {_these(unable)} cannot"


def describe_changes(differences: Sequence[Difference]) -> str:
    """Return the gravest changes of a segment in a few words, for a log's line or a mark on a curve: "" without any."""
    own = [d for d in differences if not d.follows]
    named = [f"{short_name(d.name)} {short_value(d.old, 18)} → {short_value(d.new, 18)}" for d in own[:_SHOWN]]
    if len(own) > _SHOWN:
        named.append(f"{len(own) - _SHOWN} more")
    able = counted(differences)[0]
    return "; ".join(named) + (f" ({able} can change the loss)" if able else " (none can change the loss)" if named else "")


def short_name(name: str) -> str:
    """Return a fact's name as people say it."""
    for prefix in ("recipe.", "package.", "environment."):
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    return name


def _these(count: int) -> str:
    return f"this {count}" if count == 1 else f"these {count}"


def _group(name: str) -> str:
    return name.partition(".")[0]


def _other(before: Mapping[str, Any], after: Mapping[str, Any], name: str) -> Difference:
    """Return the difference of a fact that is judged by itself and what its folder, or its file, holds."""
    if name == "recipe.data" and same_data(before, after):
        return differ(before, after, name, Effect.NOTHING, "moved: the folders hold the same data")
    if name == "recipe.tokenizer" and "tokenizer.hash" in before and before["tokenizer.hash"] == after.get("tokenizer.hash"):
        return differ(before, after, name, Effect.NOTHING, "moved: the same tokenizer")
    if name == "recipe.deepspeed" and any(_group(n) == "deepspeed" for n in (*before, *after)):
        return differ(before, after, name, Effect.NOTHING, "a file's name; what it holds is compared by itself")
    if name == "git.commit" and before.get("code.hash", ABSENT) == after.get("code.hash"):
        return differ(before, after, name, Effect.NOTHING, "the code that trains is the same in both")
    if name == "recipe.layouts" and _used_layout(before) == _used_layout(after) != {}:
        return differ(before, after, name, Effect.NOTHING, "of other numbers of GPUs: both train in the same layout")
    if name in _FIRST_WEIGHTS:
        return differ(before, after, name, Effect.MATHEMATICS, "of the initial weights: a run that goes on has them already")
    if name in _DROPOUT_KEYS and any(_drops(facts) for facts in (before, after)):
        return differ(before, after, name, Effect.MATHEMATICS, "dropout is on: each data rank and stage draws masks of its own")
    values = (before.get(name, ABSENT), after.get(name, ABSENT))
    if name.startswith("recipe.model.") and ABSENT in values and any(value is None or value is False for value in values):
        return differ(before, after, name, Effect.NOTHING, "off in one, and not a field of the other's version")
    return differ(before, after, name)


def _renamed(before: Mapping[str, Any], after: Mapping[str, Any], name: str, fields: FieldNames) -> Difference:
    old = fields.renamed[name]
    effect = Effect.NOTHING if name in fields.equal else gravest((effect_of_fact(name), effect_of_fact(old)))
    note = fields.equal.get(name, "renamed")
    return Difference(name, before[old], after[name], effect, f"{note}; before, {old.removeprefix('recipe.model.')}")


def _drops(facts: Mapping[str, Any]) -> bool:
    """Whether a run trains with dropout."""
    return any(
        name.startswith("recipe.model.") and name.rpartition(".")[2] in _DROPOUTS and value for name, value in facts.items()
    )


def _used_layout(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in facts.items() if _group(name) in ("layout", "sizes")}


def _packages(before: Mapping[str, Any], after: Mapping[str, Any], names: Sequence[str]) -> Iterator[Difference]:
    """Yield a difference for each package: of its version, or of its files alone."""
    for package in dict.fromkeys(name.removeprefix("package.").rpartition(".")[0] for name in names):
        version, files = f"package.{package}.version", f"package.{package}.files"
        old, new = before.get(version, ABSENT), after.get(version, ABSENT)
        effect = effect_of_fact(version)
        edited = [facts.get(f"package.{package}.edited") or {} for facts in (before, after)]
        if old != new:
            yield Difference(f"package.{package}", old, new, effect)
        if edited[0] != edited[1]:
            told = [f"edited: {', '.join(sorted(e))}" if e else "as installed" for e in edited]
            yield Difference(f"package.{package}.edited", *told, effect, "files edited in place after the installation")
        if old == new and before.get(files) != after.get(files):
            values = [short_value(facts.get(files, ABSENT)) for facts in (before, after)]
            note = "another build of the same version: its files differ"
            yield Difference(f"package.{package}", f"{old} ({values[0]})", f"{new} ({values[1]})", effect, note)


def _hosts(before: Mapping[str, Any], after: Mapping[str, Any], names: Sequence[str]) -> Iterator[Difference]:
    """Yield what differs between the hosts; another one of the same kind changes no number."""
    for name in names:
        if name != "rank_hosts":
            yield differ(before, after, name)
        elif _shape(before.get(name)) == _shape(after.get(name)):
            yield differ(before, after, name, Effect.NOTHING, "other hosts, with the same ranks on each")
        else:
            yield differ(before, after, name, None, "other ranks share a host: sums over ranks take other ways")


def _shape(hosts: Any) -> Any:
    """Return which ranks share a host, whatever its name."""
    if not isinstance(hosts, list | Mapping):
        return hosts
    of_rank = list(hosts.values()) if isinstance(hosts, Mapping) else hosts
    first = {str(host): index for index, host in reversed(list(enumerate(of_rank)))}
    return [first[str(host)] for host in of_rank]


def _with_sources(found: Sequence[Difference]) -> list[Difference]:
    """Return the differences, each that follows from another with that one's name."""
    done = []
    for d in found:
        able = [
            other.name for other in found if other is not d and (other.effect is not Effect.NOTHING or d.effect is Effect.NOTHING)
        ]
        sources = _FOLLOWS.get(d.name, ())
        source = next((n for n in able for s in sources if n == s or (s.endswith(".") and n.startswith(s))), "")
        group = d.name.rpartition(".")[0]
        if group in _CHOSEN and ABSENT in (d.old, d.new) and f"{group}.class" in able:
            source = f"{group}.class"  # a field that the other class does not have
        done.append(replace(d, follows=source))
    followed = {d.name: d.follows for d in done}
    effects = {d.name: d.effect for d in reversed(_sorted(found))}  # of two of one name the graver
    mutual = [followed.get(d.follows) == d.name and d.name < d.follows for d in done]
    return [
        replace(d, follows="") if both else replace(d, effect=effects.get(d.follows, d.effect))
        for d, both in zip(done, mutual, strict=True)
    ]


def _sorted(found: Sequence[Difference]) -> list[Difference]:
    order = list(Effect)
    return sorted(found, key=lambda d: (order.index(d.effect), bool(d.follows), d.name))
