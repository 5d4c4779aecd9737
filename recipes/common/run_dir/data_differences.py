"""Compares the data that two runs read: folder by folder, wherever they lie, down to the shard whose bytes are others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from recipes.common.config.field_effects import Effect
from recipes.common.run_dir.difference import ABSENT, Difference, differ, short_value

CONTENT, HASH, INPUTS = "contents", "hash", "inputs"
NO_SHARD = (CONTENT, HASH, INPUTS, "shards", "tokenizer", "problem")  # facts of a folder; every other is a shard
_SHOWN = 3  # shards


def folder_facts(facts: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return folder -> its facts without their prefix."""
    folders: dict[str, dict[str, Any]] = {}
    for name, value in facts.items():
        group, _, rest = name.partition(".")
        folder, _, key = rest.rpartition(".")
        if group == "data" and folder:
            folders.setdefault(folder, {})[key] = value
    return folders


def with_names_of(before: Mapping[str, Any], after: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return `after` with the names that `before` gives to folders that hold the same: one that moved is the same data."""
    old, new = folder_facts(before), folder_facts(after)
    renamed = {}
    for folder in [name for name in new if name not in old]:
        same = [n for n in old if n not in new and n not in renamed.values() and _same(old[n], new[folder])]
        if same:
            renamed[folder] = same[0]
    return {_renamed(name, renamed): value for name, value in after.items()} if renamed else after


def same_data(before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    """Whether two recipes read the same data in the same shares, under whatever paths. `after`: from `with_names_of`."""
    folders = folder_facts(before), folder_facts(after)
    given = [facts.get("recipe.data") for facts in (before, after)]
    if not folders[0] or folders[0] != folders[1]:
        return False
    return _without_paths(given[0]) == _without_paths(given[1])


def data_differences(before: Mapping[str, Any], after: Mapping[str, Any], names: Sequence[str]) -> Iterator[Difference]:
    """Yield a difference for each folder of which a fact differs, and one more where its tokenizer does."""
    old, new = folder_facts(before), folder_facts(after)
    for folder in dict.fromkeys(name.partition(".")[2].rpartition(".")[0] for name in names):
        one, other = old.get(folder, {}), new.get(folder, {})
        if one.get("tokenizer") != other.get("tokenizer") and one and other:
            yield differ(before, after, f"data.{folder}.tokenizer")
        values = [_told(facts) for facts in (one, other)]
        if not one or not other:
            yield Difference(f"data.{folder}", *values, Effect.ORDER, "a folder that only one of the two reads")
            continue
        shards = [key for key in dict.fromkeys((*one, *other)) if key not in NO_SHARD and one.get(key) != other.get(key)]
        if shards or one.get(CONTENT) != other.get(CONTENT) or one.get("problem") != other.get("problem"):
            all_shards = max(sum(key not in NO_SHARD for key in facts) for facts in (one, other))
            shown = ", ".join(shards[:_SHOWN]) + (" ..." if len(shards) > _SHOWN else "")
            note = f"{len(shards)} of {all_shards} shards differ: {shown}" if shards else "its shards differ"
            yield Difference(f"data.{folder}", *values, Effect.ORDER, note)
        elif CONTENT in one and (one.get(HASH) != other.get(HASH) or one.get(INPUTS) != other.get(INPUTS)):
            what = (
                "prepared from other inputs, or with other options" if one.get(INPUTS) != other.get(INPUTS) else "described anew"
            )
            yield Difference(f"data.{folder}", *values, Effect.NOTHING, f"{what}: the tokens are equal")
        elif one.get(HASH) != other.get(HASH):
            yield Difference(f"data.{folder}", *values, Effect.ORDER, "its dataset.json is another")


def _told(facts: Mapping[str, Any]) -> str:
    """Return what a folder holds, for people: what tells it from any other."""
    if not facts:
        return ABSENT
    known = [f"{key} {short_value(facts[key])}" for key in (CONTENT, HASH) if facts.get(key)]
    return facts.get("problem") or ", ".join(known) or ABSENT


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two folders hold the same, as far as both say."""
    return one.get(HASH) is not None and all(one.get(key) == other.get(key) for key in (HASH, CONTENT))


def _renamed(name: str, renamed: Mapping[str, str]) -> str:
    group, _, rest = name.partition(".")
    folder, _, key = rest.rpartition(".")
    return f"data.{renamed[folder]}.{key}" if group == "data" and folder in renamed else name


def _without_paths(data: Any) -> Any:
    """Return `data` of a recipe with the number of each folder for its path: shares, in order."""
    if isinstance(data, str):
        return 0
    if not isinstance(data, Mapping):
        return data
    paths = list(dict.fromkeys([*data.get("weights", {}), *(path for _, weights in data.get("changes", ()) for path in weights)]))
    number = {path: index for index, path in enumerate(paths)}
    weights = [(number[path], share) for path, share in data.get("weights", {}).items()]
    return [weights, [[after, [(number[p], share) for p, share in shares.items()]] for after, shares in data.get("changes", ())]]
