"""Finds the file that defines a tokenizer, and says what is wrong with it before any work."""

from __future__ import annotations

import re
from pathlib import Path

from recipes.common.config.inside import outside
from recipes.common.config.json_files import JsonError, read_json
from tools.common.console import UsageError
from tools.data.compressed import is_pointer, wrong_kind

COPIED = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model", "chat_template.jinja")
HEAD_BYTES = 1 << 12
_TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+")
_SAVE = 'python -c \'from transformers import AutoTokenizer as T; T.from_pretrained("{0}").save_pretrained("NEW")\''
FOLDER = "give the Hugging Face folder of the same model, which has a tokenizer.json"


def find_tokenizer(name: str) -> Path:
    """Return the file that defines the tokenizer `name`: a tokenizer.json, or a SentencePiece .model.

    A `name` that is no path is looked up on the Hugging Face hub (its files are fetched once, into the hub's cache). Raises
    UsageError for a file of another kind, a pointer to one, or an empty one.
    """
    path = Path(name)
    found = path if path.is_file() and _is_tokenizer(path) else _in_folder(path)
    if found is None and not path.exists() and name.count("/") <= 1 and not name.startswith((".", "/")):
        found = _in_folder(_from_hub(name))
    if found is None:
        raise UsageError(
            f"--tokenizer {name}: neither a folder with tokenizer.json or tokenizer.model, nor such a file{_else(path)}"
        )
    if problem := file_problem(found):
        raise UsageError(f"--tokenizer {found}: {problem}")
    for name in COPIED:
        if (found.parent / name).is_symlink() and (why := outside(found.parent, name)):
            raise UsageError(f"--tokenizer {found.parent}: {why}")
    return found


def copied_files(found: Path) -> list[Path]:
    """Return the files that a preparation takes from the tokenizer that `found` defines: the .model alone, or it and its kin."""
    if found.suffix == ".model":
        return [found]
    return [found.parent / name for name in COPIED if (found.parent / name).is_file()]


def _is_tokenizer(path: Path) -> bool:
    return path.name == "tokenizer.json" or path.suffix in (".model", ".tiktoken")


def _in_folder(folder: Path) -> Path | None:
    places = (folder / "tokenizer.json", folder / "tokenizer.model", *sorted(folder.glob("*.tiktoken")))
    return next((path for path in places if path.is_file()), None)


def _from_hub(name: str) -> Path:
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(COPIED)))
    except Exception as error:  # offline, unknown, gated: the library raises many kinds
        raise UsageError(f"--tokenizer {name}: no such path, and the hub answered: {error}") from error


def _else(path: Path) -> str:
    """Say what to do with a folder that holds another form of tokenizer."""
    if path.is_dir() and any((path / name).is_file() for name in ("vocab.json", "vocab.txt", "spiece.model")):
        return f"; write a tokenizer.json with: {_SAVE.format(path)}"
    if path.is_dir():
        return "; there is " + (", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing")
    return ""


def file_problem(path: Path) -> str:
    """Return why a file defines no tokenizer that can be used; "" if its form is right."""
    size = path.stat().st_size
    if not size:
        return "the file is empty; fetch it again"
    if is_pointer(str(path), size):
        return wrong_kind(str(path))
    if path.suffix == ".json":
        return _json_problem(path)
    with open(path, "rb") as file:
        lines = file.read(HEAD_BYTES).splitlines()
    if path.suffix == ".tiktoken" or all(_TIKTOKEN_LINE.fullmatch(line) for line in lines[:-1] or lines):
        return f"a tiktoken file, as Llama 3's own tokenizer.model is, not a SentencePiece model; {FOLDER}"
    return ""


def _json_problem(path: Path) -> str:
    try:
        content = read_json(path)
    except JsonError as error:
        return f"{error}; fetch it again"
    model = content.get("model")
    if not isinstance(model, dict):
        return f"no tokenizer of the `tokenizers` library: it has no model; {FOLDER}"
    if model.get("dropout"):
        return f"model.dropout={model['dropout']!r} gives other ids in every run; set it to null"
    return "" if model.get("vocab") else "its vocabulary is empty"
