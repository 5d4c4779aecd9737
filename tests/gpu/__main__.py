"""The tier for real GPUs: what a CPU cannot show, on 1, 2 or 8 GPUs of one machine, in under 8 minutes each.

    bash tests/gpu.sh [1|2|8] [--only CHECK ...] [--again]

Each check is a function of a device; `--device cpu` tries the checks themselves at tiny sizes. Results lie in one JSON file and
one page, complete after each check: a call that was stopped, or ran out of its minutes, is continued by the same call, and what
has passed on this machine, code and versions is not repeated. Exit 0: all was run and nothing failed; 1: a check failed, or no
time was left for one; 2: the call was wrong.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

SIZES = (1, 2, 8)
MINUTES = 8.0
ENVIRONMENT = {
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # ranks are forked: looking for GPUs must not start CUDA in their parent
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # equal bits from cuBLAS
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "WANDB_MODE": "disabled",
    "TOKENIZERS_PARALLELISM": "false",
}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("gpus", nargs="?", type=int, choices=SIZES, help="how many (default: the most of these that are here)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: try the checks themselves, tiny")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where results go (default: runs/gpu_tier_GPUS)")
    parser.add_argument("--only", nargs="+", metavar="CHECK", help="these checks; --list names all")
    parser.add_argument("--again", action="store_true", help="repeat what has passed")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="begin no check after as many (default: %(default)g)")
    parser.add_argument("--list", action="store_true", help="name the checks and what each shows")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout and nothing else")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    for name, value in {"DS_ACCELERATOR": args.device, **ENVIRONMENT}.items():
        os.environ.setdefault(name, value)
    # only now: DeepSpeed chooses its device as it is imported
    from tests.gpu.driver import run_tier
    from tools.common.console import exit_code

    return exit_code(lambda: run_tier(args))


if __name__ == "__main__":
    sys.exit(main())
