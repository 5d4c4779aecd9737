"""Runs a tool that is made of verbs: `python -m tools.NAME VERB ...`, one module a verb."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass

from tools.common.console import exit_code


@dataclass(frozen=True)
class Verb:
    """A verb of a tool. Its module has `add_flags(parser)` and `run(args)`, which returns the exit code."""

    module: str
    help: str


def run_tool(
    name: str, description: str, verbs: Mapping[str, Verb], argv: Sequence[str] | None, default: str | None = None
) -> int:
    """Parse `argv` (None: the command line), run the verb it names, and return the exit code. Every verb takes --json.

    A verb's module is imported only when it is called: `spikes scan` needs no torch, `spikes replay` does. Its docstring is
    the description in its own --help. default: the verb of words that name none (a folder with a verb's name: ./NAME).
    """
    words = sys.argv[1:] if argv is None else list(argv)
    first = next((word for word in words if not word.startswith("-")), None)
    if default is not None and first is not None and first not in verbs:
        words = [default, *words]
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog=f"python -m tools.{name}", description=description, formatter_class=as_written)
    parsers = parser.add_subparsers(title="verbs", dest="verb", required=True, metavar="VERB")
    added = {verb: parsers.add_parser(verb, help=each.help, formatter_class=as_written) for verb, each in verbs.items()}
    called = words[0] if default is not None and words[:1] == [default] else first
    if called in verbs:
        with redirect_stdout(sys.stderr):  # DeepSpeed logs on what is stdout when it is imported
            module = importlib.import_module(verbs[called].module)
        module.add_flags(added[called])
        added[called].add_argument("--json", action="store_true", help="print one JSON object on stdout and nothing else")
        added[called].description = module.__doc__
    args = parser.parse_args(words)
    return exit_code(lambda: module.run(args))
