"""Reads a recipe file that raises, to the end, so that everything wrong in it is told at once, each with its line.

Python stops at the first field that a class does not have, and transformers at the first value that it refuses. Such a file is
run a second time, with constructors that note what is wrong and go on with what is right.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import os
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from recipes.common import recipe as declarations
from recipes.common.checks.model_checks import config_problems
from recipes.common.config.arguments import place_of
from recipes.common.config.field_types import REFUSED
from recipes.common.recipe import Recipe, RecipeError
from recipes.common.runtime.supervisor_link import SupervisorLink

DECLARED = tuple(
    value
    for value in vars(declarations).values()
    if inspect.isclass(value) and dataclasses.is_dataclass(value) and value is not declarations.Sizes
)


def report_recipe_file(kind: type[BaseException], error: BaseException, trace: types.TracebackType | None) -> None:
    """Tell what is wrong with the recipe's file that runs, if it is that which raised; any other error as Python does.

    For sys.excepthook. The file's `main` is recipes.common.train's, which refuses what is found here with all it finds itself.
    """
    main = sys.modules["recipes.common.train"].main
    path = _failed_recipe_file(trace, main) if issubclass(kind, Exception) else None
    if path is None:
        sys.__excepthook__(kind, error, trace)
        return
    try:
        recipe, problems = read_failing_recipe(path)
    except RecipeError as unreadable:
        rank, _ = place_of(os.environ)
        if rank == 0:  # every rank finds the same
            print(f"error: {unreadable}", file=sys.stderr)
        SupervisorLink(rank).report_exit("user_error")
        sys.exit(2)
    main(recipe, problems)


def _failed_recipe_file(trace: types.TracebackType | None, main: Callable[..., Any]) -> Path | None:
    """Return the program's own file if it is a recipe's and raised while it declared the recipe, not in `main(recipe)`."""
    path = Path(getattr(sys.modules["__main__"], "__file__", None) or "")
    codes = []
    while trace is not None:
        codes.append(trace.tb_frame.f_code)
        trace = trace.tb_next
    declaring = any(code.co_name == "<module>" and code.co_filename == str(path) for code in codes)
    if not declaring or main.__code__ in codes:
        return None
    names = {node.id for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Name)}
    return path if {"Recipe", "recipe"} & names else None


def read_failing_recipe(path: Path) -> tuple[Recipe, list[str]]:
    """Return the recipe of a file that raises, as far as it can be made, and what is wrong with it.

    A field that is given nowhere is `dataclasses.MISSING`. Raises RecipeError when the file ends without a recipe.
    """
    notes = _Notes(path)
    module = types.ModuleType(path.stem)
    module.__dict__.update(__file__=str(path), __package__="recipes")
    module.__name__ = f"failing_{path.stem}"
    with _patient_constructors(notes):
        try:
            sys.modules[module.__name__] = module  # where a dataclass of the file looks for it
            exec(compile(notes.source, str(path), "exec"), module.__dict__)
        except Exception as error:  # whatever the file's own code raises
            notes.add(f"{type(error).__name__}: {' '.join(str(error).split())}", line=_line_in(path, error))
        finally:
            del sys.modules[module.__name__]
    recipe = notes.given or vars(module).get("recipe")
    if not isinstance(recipe, Recipe):
        raise RecipeError(f"recipe file {path}", notes.lines or [f"{path} defines no `recipe = Recipe(...)`"])
    if recipe.name is dataclasses.MISSING:
        notes.lines.append("name is missing: it must be a text")
        recipe = dataclasses.replace(recipe, name=path.stem)
    if id(recipe.model) in notes.refused:
        with suppress(Exception):  # as far as it was made
            notes.lines += config_problems(recipe.model)
        recipe = dataclasses.replace(recipe, model=REFUSED)
    return recipe, notes.lines


class _Notes:
    """What is wrong, in the order it was found."""

    def __init__(self, path: Path) -> None:
        self.path, self.source = path, path.read_text(encoding="utf-8")
        self.lines: list[str] = []
        self.refused: set[int] = set()  # ids of configs that lack what was refused
        self.being_made: set[int] = set()
        self.given: Recipe | None = None  # to `main`, by a file that calls it whoever reads it
        calls = [node for node in ast.walk(ast.parse(self.source)) if isinstance(node, ast.Call)]
        self._keywords = {(word.arg, word.value.lineno) for call in calls for word in call.keywords if word.arg}

    def add(self, text: str, *, field: str | None = None, line: int | None = None) -> None:
        """Add a message, with the line of `field`'s value, or of the call that is running."""
        found = {number for name, number in self._keywords if name == field}
        if len(found) == 1:
            line = found.pop()
        if line is None:
            frame = sys._getframe()
            while frame is not None and frame.f_code.co_filename != str(self.path):
                frame = frame.f_back
            line = frame.f_lineno if frame is not None else 1
        self.lines.append(f"{self.path.name} line {line}: {text}")


def _line_in(path: Path, error: BaseException) -> int:
    trace, line = error.__traceback__, 1
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == str(path):
            line = trace.tb_lineno
        trace = trace.tb_next
    return line


@contextmanager
def _patient_constructors(notes: _Notes) -> Iterator[None]:
    """Let the classes of a recipe, and transformers' configs, note what they refuse and go on without it."""
    changed = [*DECLARED, *_config_classes(PreTrainedConfig)]
    kept = {kind: kind.__dict__.get("__init__") for kind in changed}
    for kind in changed:
        if kept[kind] is not None:
            kind.__init__ = (_patient_config if issubclass(kind, PreTrainedConfig) else _patient)(kept[kind], notes)
    train = sys.modules.get("recipes.common.train")  # a recipe that lacks a field must not be trained
    main = getattr(train, "main", None)
    if main is not None:
        train.main = lambda recipe: setattr(notes, "given", recipe)
    try:
        yield
    finally:
        if main is not None:
            train.main = main
        for kind, init in kept.items():
            if init is not None:
                kind.__init__ = init


def _config_classes(kind: type) -> Iterator[type]:
    yield kind
    for each in kind.__subclasses__():
        yield from _config_classes(each)


def _patient(init: Callable[..., None], notes: _Notes) -> Callable[..., None]:
    """Return a dataclass's constructor that takes a misspelt field for the missing one it resembles most."""

    def construct(self: Any, *args: Any, **fields: Any) -> None:
        kind = type(self).__name__
        known = {field.name: field for field in dataclasses.fields(self)}
        if args:
            notes.add(f"{kind}(...): every value needs its field's name; write {next(iter(known))}=... and so on")
            fields = dict(zip([name for name in known if name not in fields], args, strict=False)) | fields
        for name in [name for name in fields if name not in known]:
            free = [other for other in known if other not in fields]
            close = difflib.get_close_matches(name, free, n=1)
            cure = f"did you mean {close[0]!r}?" if close else f"its fields are {', '.join(known)}"
            notes.add(f"{kind} has no field {name!r}; {cure}", field=name)
            value = fields.pop(name)
            if close:
                fields[close[0]] = value
        required = [n for n, f in known.items() if f.default is f.default_factory is dataclasses.MISSING]
        init(self, **dict.fromkeys(required, dataclasses.MISSING) | fields)

    return construct


def _patient_config(init: Callable[..., None], notes: _Notes) -> Callable[..., None]:
    """Return a config's constructor that goes on without the fields that transformers refuses."""

    def construct(self: Any, *args: Any, **fields: Any) -> None:
        if id(self) in notes.being_made:  # called by a subclass's
            return init(self, *args, **fields)
        notes.being_made.add(id(self))
        for _ in range(len(fields) + 1):
            try:
                return init(self, *args, **fields)
            except Exception as error:  # transformers', or a family's own code, which may raise anything
                notes.refused.add(id(self))
                field = _refused_field(error, fields)
                shown = f"model.{field}={fields[field]!r}" if field else "model"
                text = " ".join(str(error.__cause__ or error).split())
                named = type(error.__cause__ or error)
                text = text if named in (ValueError, TypeError) else f"{named.__name__}: {text}"
                notes.add(f"{shown}: {type(self).__name__} refuses it: {text}", field=field)
                if field is None:
                    break
                del fields[field]
        return None

    return construct


def _refused_field(error: Exception, fields: dict[str, Any]) -> str | None:
    """Return the field whose type transformers' own declaration refuses."""
    quoted = str(error).partition("for field '")[2].partition("'")[0]
    return quoted if quoted in fields else None
