"""Prepares training data, and says what is in it: what a step read, and whether a folder is intact.

python -m tools.data prepare INPUT... --tokenizer T --out DIR    # text, JSON lines or Parquet to token shards
python -m tools.data check DIR                                   # checksums, bounds, token ids; exit 1 if damaged
python -m tools.data show RUN --step 120 [--rank 3]              # documents, source, file, offset and text
python -m tools.data show RUN --sequences 4000:4008              # by sequences consumed, also ahead of the run
python -m tools.data stats DIR                                   # lengths, sources, repeats, and a histogram
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from tools.common.verbs import Verb, run_tool

VERBS = {
    "prepare": Verb("tools.data.prepare", "tokenize text into shards"),
    "check": Verb("tools.data.check", "check that a prepared folder is intact"),
    "show": Verb("tools.data.show", "the documents of a step or of a range of sequences"),
    "stats": Verb("tools.data.stats", "document lengths, sources and repeats"),
}


def main(argv: list[str] | None = None) -> int:
    return run_tool("data", __doc__, VERBS, argv)


if __name__ == "__main__":
    sys.exit(main())
