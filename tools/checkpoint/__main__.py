"""Lists, verifies, inspects, compares and converts checkpoints. Needs no GPU and no process group, and streams the tensors.

python -m tools.checkpoint ls runs/llama_8b
python -m tools.checkpoint verify runs/llama_8b                          # or one checkpoint
python -m tools.checkpoint inspect runs/llama_8b/checkpoints/latest --name mlp
python -m tools.checkpoint diff A B                                      # exit 1 when anything differs
python -m tools.checkpoint advise --save-seconds 40 --mtbf-hours 12      # or a RUN, whose measured times are used
python -m tools.checkpoint to-hf runs/llama_8b/checkpoints/latest OUT --dtype bfloat16
python -m tools.checkpoint from-hf MODEL_FOLDER runs/new
python -m tools.checkpoint from-deepspeed CHECKPOINTS/global_step1000 runs/new --model MODEL_FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from tools.common.verbs import Verb, run_tool

VERBS = {
    "ls": Verb("tools.checkpoint.ls", "list the checkpoints of a run"),
    "verify": Verb("tools.checkpoint.verify", "read every byte and compare it with the recorded checksums"),
    "inspect": Verb("tools.checkpoint.inspect_tensors", "shape, norm, range and non-finite elements of every tensor"),
    "diff": Verb("tools.checkpoint.diff", "the largest differences between two checkpoints, by tensor"),
    "advise": Verb("tools.checkpoint.advise", "the interval between saves that loses the least time"),
    "to-hf": Verb("tools.checkpoint.to_hf", "export a checkpoint to a Hugging Face folder"),
    "from-hf": Verb("tools.checkpoint.from_hf", "make a starting checkpoint from a Hugging Face folder"),
    "from-deepspeed": Verb("tools.checkpoint.from_deepspeed", "convert a checkpoint that DeepSpeed wrote itself"),
}


def main(argv: list[str] | None = None) -> int:
    return run_tool("checkpoint", __doc__, VERBS, argv)


if __name__ == "__main__":
    sys.exit(main())
