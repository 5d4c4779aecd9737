"""Compares the recipe that a run would go on with against the one that its checkpoint was saved under, field by field.

What makes the saved state meaningless is refused. What changes the mathematics or the order of the data needs the user's
`--accept FIELD`, which run.json keeps. The rest is free, and noted (recipes.common.config.field_effects).
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING

from recipes.common.checkpoint.files import CheckpointError, read_seal
from recipes.common.checkpoint.reader import Reader
from recipes.common.config.field_effects import MODEL, NEEDS_CONSENT, Effect, effect_of, flat_fields
from recipes.common.config.json_files import JsonError, read_json
from recipes.common.data.blend import data_folders, data_from_json, folders, shares
from recipes.common.data.shards import data_identity, tokenizer_hash
from recipes.common.model.initial_weights import build_empty
from recipes.common.recipe import Blend, Recipe, RecipeError, from_root
from recipes.common.run_dir.checkpoint_folders import checkpoint_step, sealed_checkpoints
from recipes.common.run_dir.run_files import recipe_to_dict

_ABSENT = "(not there)"
_SHOWN = 5  # tensors of other shapes
_LONGEST = 80  # characters of a value


@dataclass(frozen=True)
class Change:
    """A field whose value is not the checkpoint's; values as JSON holds them."""

    field: str
    old: Any
    new: Any
    effect: Effect

    def __str__(self) -> str:
        return f"{self.field}={_short(self.new)}, {_short(self.old)} in the checkpoint"

    def recorded(self) -> dict[str, Any]:
        """Return what run.json keeps of it."""
        return {"field": self.field, "old": self.old, "new": self.new}


def written_recipe(folder: Path) -> dict[str, Any] | None:
    """Return the recipe that a checkpoint was saved under; None where no run of ours saved it, or it is not readable."""
    try:
        return read_json(folder / "recipe.json")
    except (OSError, JsonError):
        return None


def resume_changes(recipe: Recipe, folder: Path, out_dir: Path) -> list[Change]:
    """Return every field of the recipe, and what it reads, that is not as in the checkpoint `folder` of a run."""
    now = json.loads(json.dumps(recipe_to_dict(recipe)))
    written = written_recipe(folder)
    if written is None:  # not ours: it says at least which model it holds
        config = _written_config(folder)
        written = {"model": config} if config else {}
        now = {"model": now["model"]}
    before, after = flat_fields(written), flat_fields(now)
    found = []
    for name in dict.fromkeys((*before, *after)):
        old, new = before.get(name, _ABSENT), after.get(name, _ABSENT)
        if old != new and name not in ("data", "tokenizer") and not _of_another_class(name, before, after):
            # a field that this version of transformers added or dropped, and that is off
            off = _ABSENT in (old, new) and (old in (None, False) or new in (None, False))
            found.append(Change(name, old, new, Effect.NOTHING if off else effect_of(name)))
    if any(change.field.startswith(MODEL) and change.effect in (Effect.STATE, *NEEDS_CONSENT) for change in found) or not written:
        found += _shape_changes(recipe, folder)
    if "data" in before:
        found += _data_changes(recipe, written["data"], _identities(folder, out_dir))
    return [*found, *_tokenizer_changes(recipe, folder)]


def resume_problems(
    changes: Sequence[Change], folder: Path, accepted: Sequence[str], known: Sequence[Mapping[str, Any]]
) -> list[str]:
    """Return, a line each, what keeps a run from going on. accepted: fields of --accept. known: changes accepted before."""
    problems = []
    for change in changes:
        if change.effect is Effect.STATE:
            problems.append(
                f"{change} {folder.name}: its weights and optimizer states mean nothing then; set it back, or start a new run in "
                "another --out-dir (from these weights: tools.checkpoint to-hf, then from-hf)"
            )
        elif change.effect in NEEDS_CONSENT and not _is_accepted(change, accepted, known):
            problems.append(
                f"{change} {folder.name}: that changes {change.effect.value}; set it back, or go on with --accept {change.field}"
            )
    return problems


def accept_problems(recipe: Recipe, written: Mapping[str, Any] | None, accepted: Sequence[str]) -> list[str]:
    """Return the words of --accept that are no fields, with the nearest that is one."""
    names = {"data", "data.weights", "data.changes", *flat_fields(recipe_to_dict(recipe)), *flat_fields(written or {})}
    groups = {name.rsplit(".", depth)[0] for name in names for depth in (1, 2) if name.count(".") > depth}
    problems = []
    for word in accepted:
        if word not in names | groups:
            close = difflib.get_close_matches(word, sorted(names), n=1)
            hint = f"; did you mean {close[0]}?" if close else ", as a refused resume prints it"
            problems.append(f"--accept {word}: no field of the recipe{hint}")
    return problems


def accepted_before(out_dir: Path) -> list[dict[str, Any]]:
    """Return the changes that were accepted at earlier starts of a run."""
    try:
        return [change for start in read_json(out_dir / "run.json")["starts"] for change in start.get("accepted", ())]
    except (OSError, JsonError, KeyError, TypeError, AttributeError):
        return []


def check_resume(recipe: Recipe, out_dir: Path, folder: Path, accepted: Sequence[str]) -> list[Change]:
    """Return the changes that a resume from `folder` makes. Raises RecipeError with all that it must not make."""
    changes = resume_changes(recipe, folder, out_dir)
    problems = accept_problems(recipe, written_recipe(folder), accepted)
    problems += resume_problems(changes, folder, accepted, accepted_before(out_dir))
    if problems:
        raise RecipeError(f"resume from {folder}", problems)
    return changes


def resume_flag_problems(
    recipe: Recipe, out_dir: Path, resume_step: int | None, accepted: Sequence[str], max_steps: int | None = None
) -> list[str]:
    """Return what keeps a run from its resume, before any rank starts, by the newest checkpoint that it may resume from."""
    folders = (f for f in sealed_checkpoints(out_dir)[::-1] if resume_step is None or checkpoint_step(f) <= resume_step)
    newest, problems = next(filter(_has_seal, folders), None), []
    if newest is None:
        return []
    for name, last_step in (("--max-steps", max_steps), ("steps", recipe.steps)):
        if last_step is not None and last_step < checkpoint_step(newest):
            cure = f"give more than {checkpoint_step(newest)}, or an earlier --resume-step"
            problems.append(f"{name}={last_step}: the run is past it, {newest.name} is its newest checkpoint; {cure}")
    try:
        check_resume(recipe, out_dir, newest, accepted)
    except RecipeError as error:
        return problems + error.problems
    except (OSError, CheckpointError, JsonError):  # damaged: the ranks pass it over, and compare with the one that they take
        return problems
    return problems


def _has_seal(folder: Path) -> bool:
    """Return whether a folder with a checkpoint's name is one that a resume may take; an empty one is not."""
    try:
        return bool(read_seal(folder))
    except (OSError, CheckpointError):
        return False


def _is_accepted(change: Change, accepted: Sequence[str], known: Sequence[Mapping[str, Any]]) -> bool:
    return change.recorded() in known or any(
        change.field == word or ("." in word and change.field.startswith(f"{word}.")) for word in accepted
    )


def _of_another_class(name: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    """Whether a field exists in one of two optimizers or schedules only; the class itself is told."""
    group = name.partition(".")[0]
    return group in ("optimizer", "schedule") and (name not in before or name not in after)


def _shape_changes(recipe: Recipe, folder: Path) -> Iterator[Change]:
    try:
        causal = build_empty(recipe.model, recipe.attention)
    except Exception:  # whatever a family's constructor raises: recipe_checks reports it
        return
    tensors = Reader(folder).tensors
    written = {name: tuple(entry["shape"]) for name, entry in tensors.items() if "master" in entry["kinds"]}
    wanted = {name: tuple(parameter.shape) for name, parameter in causal.named_parameters()}
    differing = [name for name in dict.fromkeys((*wanted, *written)) if wanted.get(name) != written.get(name)]
    for name in differing[:_SHOWN]:
        yield Change(f"shape of {name}", str(written.get(name, _ABSENT)), str(wanted.get(name, _ABSENT)), Effect.STATE)
    if len(differing) > _SHOWN:
        yield Change("shapes of more tensors", "others", str(len(differing) - _SHOWN), Effect.STATE)


def _data_changes(recipe: Recipe, written: Any, identities: Mapping[str, str]) -> Iterator[Change]:
    before, names = data_from_json(written), data_folders(recipe)
    old_names = folders(before) if isinstance(before, Blend) else [before]
    if len(old_names) != len(names):
        yield Change("data", old_names, names, Effect.ORDER)
    else:
        for old, new in zip(old_names, names, strict=True):
            was, now = identities.get(old), _identity(new)
            if was is not None and now is not None and was != now:
                yield Change("data", f"{old} ({was[7:15]})", f"{new} ({now[7:15]})", Effect.ORDER)
            elif old != new:
                yield Change("data", old, new, Effect.NOTHING if was is not None else Effect.ORDER)
    for name, old, new in zip(("weights", "changes"), _shares(before), _shares(recipe.data), strict=True):
        if old != new:
            yield Change(f"data.{name}", old, new, Effect.ORDER)


def _identity(name: str) -> str | None:
    try:
        return data_identity(from_root(name))
    except OSError:
        return None  # recipe_checks reports it


def _shares(data: str | Blend) -> tuple[list[str], list[Any]]:
    """Return the shares of the folders, in their order, and those after each change, as text."""
    if not isinstance(data, Blend):
        return ["1"], []
    names = folders(data)
    phases = [[str(shares(weights).get(name, 0)) for name in names] for _, weights in ((0, data.weights), *data.changes)]
    return phases[0], [[after, phase] for (after, _), phase in zip(data.changes, phases[1:], strict=True)]


def _tokenizer_changes(recipe: Recipe, folder: Path) -> Iterator[Change]:
    try:
        old, new = tokenizer_hash(folder / "model"), tokenizer_hash(from_root(recipe.tokenizer))
    except (OSError, ValueError):
        return  # one of another kind; that of the recipe is checked against its data
    if old != new:
        yield Change("tokenizer", old[7:15], f"{recipe.tokenizer} ({new[7:15]})", effect_of("tokenizer"))


def _identities(folder: Path, out_dir: Path) -> dict[str, str]:
    """Return the identity of each folder that the checkpoint's run read."""
    state = read_json(folder / "state.json")
    if "order" in state:
        return {name: reading["identity"] for name, reading in state["order"]["readings"].items() if reading["identity"]}
    try:  # saved by an earlier version
        return read_json(out_dir / "run.json")["starts"][-1]["data"]
    except (OSError, JsonError, KeyError, IndexError, TypeError):
        return {}


def _written_config(folder: Path) -> dict[str, Any] | None:
    try:
        content = read_json(folder / "model" / "config.json")
        config = CONFIG_MAPPING[content["model_type"]].from_dict(content)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return json.loads(json.dumps({"class": type(config).__name__, **config.to_dict()}, default=str))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
