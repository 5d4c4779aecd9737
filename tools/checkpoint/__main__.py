"""Look after checkpoints: what is there, whether it is intact, what is in it, what differs, how often to save.

    python -m tools.checkpoint ls runs/llama_8b
    python -m tools.checkpoint verify runs/llama_8b                          # or one checkpoint
    python -m tools.checkpoint inspect runs/llama_8b/checkpoints/latest --name mlp
    python -m tools.checkpoint diff A B                                      # exit 1 when anything differs
    python -m tools.checkpoint advise --save-seconds 40 --mtbf-hours 12      # or a RUN, whose own figures are taken

One block of rows is in memory at a time. No GPU, no process group.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import argparse
import json
import math
from dataclasses import asdict
from datetime import datetime
from typing import Any

from recipes.common.checkpoint.files import SEAL, CheckpointError
from recipes.common.checkpoint.reader import Reader
from tools.checkpoint.contents import (
    compare,
    damaged_files,
    elements,
    gaps,
    matching,
    missized_files,
    open_checkpoint,
    tensor_stats,
)
from tools.checkpoint.save_interval import METRICS, Measured, advise, measured
from tools.common.console import FAILED, GOOD, UsageError, exit_code, human_bytes, progress_bar, table


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.checkpoint", description=__doc__.split("\n")[0])
    verbs = parser.add_subparsers(dest="verb", required=True)

    def verb(name: str, text: str) -> argparse.ArgumentParser:
        added = verbs.add_parser(name, help=text, description=text)
        added.add_argument("--json", action="store_true", help="print one JSON object")
        return added

    verb("ls", "a run's checkpoints").add_argument("run", type=Path, metavar="RUN")
    verb("verify", "read every byte and compare it with the seal").add_argument("path", type=Path, metavar="CHECKPOINT|RUN")
    inspect = verb("inspect", "shape, norm, range and non-finite elements of every tensor")
    inspect.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    inspect.add_argument("--name", metavar="PATTERN", help="part of a name, or a pattern with * and ?")
    inspect.add_argument("--kind", help="master, exp_avg, exp_avg_sq, buffer, ... (default: all)")
    diff = verb("diff", "the largest differences between two checkpoints, by name")
    diff.add_argument("a", type=Path, metavar="A")
    diff.add_argument("b", type=Path, metavar="B")
    diff.add_argument("--top", type=int, default=20, help="rows to print (default: %(default)s; --json has all)")
    advice = verb("advise", "the interval between saves that loses the least time (Young, Daly)")
    advice.add_argument("run", type=Path, nargs="?", metavar="RUN", help="take its measured save, stall and step times")
    advice.add_argument("--mtbf-hours", type=float, required=True, help="between failures of the job: a node's, over the nodes")
    advice.add_argument("--save-seconds", type=float, help="from the start of a save to its seal")
    advice.add_argument("--stall-seconds", type=float, help="of it, how long training stands still (default: all of it)")
    advice.add_argument("--step-seconds", type=float, help="of a training step, to give the interval in steps")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    if words[:1] and words[0] in ("to-hf", "from-hf", "from-deepspeed"):
        import importlib

        return importlib.import_module("tools.checkpoint." + words[0].replace("-", "_")).main(words[1:])
    args = parse_args(argv)
    return exit_code(lambda: VERBS[args.verb](args), CheckpointError)


def list_run(args: argparse.Namespace) -> int:
    found = [_describe(folder) for folder in _folders(args.run)]
    latest = args.run / "checkpoints" / "latest"
    target = latest.resolve().name if latest.exists() else None
    for entry in found:
        entry["latest"] = entry["name"] == target
    if args.json:
        print(json.dumps({"run": str(args.run), "checkpoints": found}))
        return GOOD
    rows = [
        [e["name"], e["state"], human_bytes(e["bytes"]), e["sealed_at"] or "", e["ranks"] or "", "latest" if e["latest"] else ""]
        for e in found
    ]
    print(table(rows, ["checkpoint", "state", "size", "sealed at", "ranks", ""]) if rows else f"{args.run}: no checkpoints")
    return GOOD


def _folders(run: Path) -> list[Path]:
    if not (run / "checkpoints").is_dir():
        raise UsageError(f"{run} is no run directory: it has no folder `checkpoints`")
    return sorted(path for path in (run / "checkpoints").iterdir() if path.is_dir() and not path.is_symlink())


def _describe(folder: Path) -> dict[str, Any]:
    """State, size and time of one folder, by its seal alone; `verify` reads the rest."""
    entry: dict[str, Any] = {"name": folder.name, "state": "sealed", "ranks": None, "step": None, "sealed_at": None}
    entry["bytes"] = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    try:
        wrong = missized_files(folder)
    except CheckpointError:
        entry["state"] = "being written, or left by a kill" if folder.name.startswith(".") else "not sealed: never loaded"
        return entry
    if wrong:
        entry["state"] = f"damaged: {len(wrong)} files of another size"
        return entry
    reader = Reader(folder)
    entry |= {"ranks": reader.state["world_size"], "step": reader.state["step"]}
    entry["sealed_at"] = datetime.fromtimestamp((folder / SEAL).stat().st_mtime).isoformat(" ", "seconds")
    return entry


def verify(args: argparse.Namespace) -> int:
    path = args.path
    folders = (
        [f for f in _folders(path) if not f.name.startswith(".")] if (path / "checkpoints").is_dir() else [open_checkpoint(path)]
    )
    if not folders:
        raise UsageError(f"{path}: no checkpoints to verify")
    results = {str(folder): _verify_one(folder) for folder in folders}
    if args.json:
        print(json.dumps({"good": not any(results.values()), "checkpoints": results}))
    else:
        for folder, wrong in results.items():
            print(f"{folder}: {'intact' if not wrong else 'DAMAGED'}")
            for line in wrong:
                print(f"  {line}")
    return FAILED if any(results.values()) else GOOD


def _verify_one(folder: Path) -> list[str]:
    try:
        wrong = damaged_files(folder)
    except CheckpointError as error:
        return [str(error)]
    return wrong or gaps(Reader(folder))


def inspect(args: argparse.Namespace) -> int:
    reader = Reader(open_checkpoint(args.checkpoint))
    names = matching(reader, args.name)
    chosen = [(n, k) for n in names for k in sorted(reader.tensors[n]["kinds"]) if args.kind in (None, k)]
    if not chosen:
        raise UsageError(f"{args.checkpoint}: nothing matches --name {args.name} --kind {args.kind}")
    with progress_bar("reading", sum(4 * elements(reader, name) for name, _ in chosen)) as bar:
        stats = []
        for name, kind in chosen:
            stats.append(tensor_stats(reader, name, kind))
            bar.update(4 * elements(reader, name))
    kinds = sorted({s.kind for s in stats})
    totals = {
        kind: {
            "elements": sum(math.prod(s.shape) for s in stats if s.kind == kind),
            "norm": math.sqrt(sum(s.norm**2 for s in stats if s.kind == kind)),
            "non_finite": sum(s.non_finite for s in stats if s.kind == kind),
        }
        for kind in kinds
    }
    if args.json:
        print(json.dumps({"state": reader.state, "tensors": [asdict(s) for s in stats], "totals": totals}))
        return GOOD
    rows = [
        [s.name, s.kind, _shape(s.shape), _number(s.norm), _number(s.min), _number(s.max), s.zeros, s.non_finite] for s in stats
    ]
    print(table(rows, ["tensor", "kind", "shape", "norm", "min", "max", "zeros", "non-finite"]))
    print(f"\nstep {reader.state['step']}, {reader.state['consumed_seqs']} sequences consumed, tied head: {reader.state['tied']}")
    for kind, total in totals.items():
        print(f"{kind}: {total['elements']:,} elements, norm {total['norm']:.6g}, {total['non_finite']} non-finite")
    return GOOD


def diff(args: argparse.Namespace) -> int:
    a, b = Reader(open_checkpoint(args.a)), Reader(open_checkpoint(args.b))
    with progress_bar("comparing", sum(8 * elements(a, name) * len(e["kinds"]) for name, e in a.tensors.items())) as bar:
        found = compare(a, b, bar)
    same = not any(found[key] for key in ("differences", "only_in_a", "only_in_b", "other_shape"))
    if args.json:
        print(json.dumps({"a": str(args.a), "b": str(args.b), "equal": same, **found}))
        return GOOD if same else FAILED
    for key, (left, right) in found["state"].items():
        print(f"state {key}: {left} and {right}")
    for line in [f"only in A: {line}" for line in _few(found["only_in_a"])] + [
        f"only in B: {line}" for line in _few(found["only_in_b"])
    ]:
        print(line)
    for line in found["other_shape"]:
        print(f"other shape: {line}")
    shown = found["differences"][: args.top]
    rows = [
        [d["name"], d["kind"], f"{d['relative']:.3e}", f"{d['largest']:.3e}", f"{d['changed'] / d['elements']:.1%}"]
        for d in shown
    ]
    if rows:
        print(table(rows, ["tensor", "kind", "relative", "largest", "elements changed"]))
    if len(found["differences"]) > len(shown):
        print(f"... and {len(found['differences']) - len(shown)} more with smaller differences")
    if same:
        print("all tensors are equal")
    return GOOD if same else FAILED


def interval(args: argparse.Namespace) -> int:
    if args.run is not None and not (args.run / METRICS).is_file():
        raise UsageError(f"{args.run} is no run directory: it has no {METRICS}")
    seen = measured(args.run) if args.run is not None else Measured(None, None, None)
    save, stall, step = args.save_seconds or seen.save, args.stall_seconds or seen.stall, args.step_seconds or seen.step
    if save is None:
        where = "give --save-seconds or a RUN" if args.run is None else f"{args.run} has recorded no save; give --save-seconds"
        raise UsageError(f"how long does a save take? {where}")
    given = {"--save-seconds": save, "--stall-seconds": stall, "--step-seconds": step, "--mtbf-hours": args.mtbf_hours}
    wrong = [f"{flag}={value}" for flag, value in given.items() if value is not None and not 0 < value < math.inf]
    if wrong:
        raise UsageError(f"{', '.join(wrong)}: must be over 0")
    found = advise(save, 3600 * args.mtbf_hours, stall=stall, step=step)
    if args.json:
        print(json.dumps({"save_seconds": save, "stall_seconds": stall, "step_seconds": step} | asdict(found)))
        return GOOD
    print(f"save every {found.interval / 60:.1f} minutes" + (f", or {found.steps} steps of {step:.2f} s" if found.steps else ""))
    print(f"  a save takes {save:.1f} s, training stands still for {save if stall is None else stall:.2f} s of it")
    print(f"  lost to saving {found.lost_to_saving:.2%}, to repeated work after failures {found.lost_to_failures:.2%}")
    print(f"  Daly 2006; Young 1974 gives {found.young / 60:.1f} minutes")
    if found.bound_by_writing:
        print("  no shorter, because one save must be written before the next begins")
    every = f"every_steps={found.steps}" if found.steps else f"every_minutes={found.interval / 60:.1f}"
    print(f"  in the recipe: Checkpoints({every})")
    return GOOD


def _few(names: list[str]) -> list[str]:
    """["exp_avg a", "exp_avg b", ...] as one line a kind."""
    kinds: dict[str, list[str]] = {}
    for entry in names:
        kind, _, name = entry.partition(" ")
        kinds.setdefault(kind, []).append(name)
    return [f"{kind} of {len(n)} tensors: {', '.join(n[:3])}{', ...' if len(n) > 3 else ''}" for kind, n in kinds.items()]


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


VERBS = {"ls": list_run, "verify": verify, "inspect": inspect, "diff": diff, "advise": interval}

if __name__ == "__main__":
    sys.exit(main())
