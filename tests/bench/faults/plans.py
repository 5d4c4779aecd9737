"""Draws a trial of the fault bench from its seed: what is broken, where and when. Pure."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.bench.faults.jobs import STEPS
from tests.bench.faults.planted import EXCEPTIONS, PlantedFault

SIGNALS = ("TERM", "INT", "USR1", "HUP")
CLOCKS = (-86400.0, -3600.0, -660.0, 660.0, 3600.0, 86400.0 * 400)
FILES = ("rank file", "checksums", "index", "state", "latest", "run.json", "recipe.json", "metrics", "attempts", "heartbeat")
HARMS = ("flip", "cut", "zero", "empty", "remove")
OBSTACLES = ("copy", "best", "empty step", "file", "saving")  # what somebody left in checkpoints/


@dataclass(frozen=True)
class Blow:
    """Something that is done to a running job from the outside."""

    what: str  # "kill", "stop", one of SIGNALS, "second job", "close pipe", "heartbeats"
    target: str = "supervisor"  # or "launcher", "rank N", "guard N", "all ranks"
    step: int | None = None  # after this step of rank 0; None: counted from the start
    seconds: float = 0.0  # later than that
    pause: float = 0.0  # "stop": continued after so many seconds; 0: never. "heartbeats": how often
    other: bool = False  # "second job": of a recipe with another learning rate


@dataclass(frozen=True)
class Harm:
    """What is done to a file between two starts."""

    what: str  # one of HARMS or OBSTACLES
    file: str = ""  # one of FILES
    at: float = 0.0  # where in it, as a share of its length


@dataclass(frozen=True)
class FaultTrial:
    """Commands: the first with `inside` and `blows`; then `harms`; a second with `again`, if any; a last one undisturbed."""

    number: int
    seed: int
    kind: str
    ranks: int
    pipelined: bool  # of 2 ranks: two stages, or two data ranks
    inside: tuple[PlantedFault, ...] = ()
    blows: tuple[Blow, ...] = ()
    harms: tuple[Harm, ...] = ()
    again: tuple[PlantedFault, ...] = ()
    output: str = "file"  # stdout and stderr: "file", "pipe", "cut pipe" (nobody reads from the start), "closed"

    def broken(self) -> bool:
        """Return whether anything inside the processes of the first command fails, other than a clock."""
        return any(fault.what != "clock" for fault in self.inside)

    def harmless(self) -> bool:
        """Return whether the first command must reach the end, in one attempt, in spite of this."""
        return not self.broken() and all(blow.what in ("close pipe", "heartbeats") for blow in self.blows)


def draw_trial(number: int, seed: int, only: str | None = None) -> FaultTrial:
    """Return trial `number` of a bench with this seed."""
    rng = random.Random(f"{seed} {number}")
    weights = {name: weight for name, (weight, _) in KINDS.items()}
    kind = only or rng.choices(list(weights), list(weights.values()))[0]
    ranks = rng.choices((1, 2, 4), (42, 42, 16))[0]
    fields = KINDS[kind][1](rng, ranks)
    if kind in ("error", "kill", "memory") and rng.random() < 0.25:  # two at once
        more = KINDS[rng.choice(("error", "kill", "signal", "clock"))][1](rng, ranks)
        fields = {name: (*fields.get(name, ()), *more.get(name, ())) for name in ("inside", "blows", "harms")}
    if rng.random() < 0.2:
        fields["again"] = KINDS[rng.choice(("error", "kill"))][1](rng, ranks).get("inside", ())
    return FaultTrial(number, seed, kind, ranks, rng.random() < 0.6, **fields)


def _process(rng: random.Random, ranks: int) -> str:
    return rng.choices(("supervisor", "every rank", f"rank {rng.randrange(ranks)}"), (15, 10, 75))[0]


def _calls(rng: random.Random) -> dict[str, Any]:
    """Return at which calls: two in three on checkpoints, most of them of the kinds that change something."""
    kind = rng.choices(
        ("any", "open", "read", "write", "fsync", "rename", "link", "unlink", "mkdir", "list", "stat"),
        (20, 10, 4, 20, 12, 12, 4, 6, 6, 3, 3),
    )[0]
    return {"calls": kind, "place": rng.choices(("checkpoints", "any", "logs", "metrics", "other"), (60, 20, 6, 7, 7))[0]}


def _error(rng: random.Random, ranks: int) -> dict[str, Any]:
    what = rng.choices(("EIO", "ENOSPC", "EROFS", "EACCES", "ESTALE", "EMFILE", "EDQUOT"), (35, 35, 10, 5, 5, 5, 5))[0]
    for_good = rng.random() < 0.45
    again = for_good and rng.random() < 0.6
    return {
        "inside": (
            PlantedFault(_process(rng, ranks), what, **_calls(rng), at=rng.random(), for_good=for_good, every_attempt=again),
        )
    }


def _kill(rng: random.Random, ranks: int) -> dict[str, Any]:
    return {"inside": (PlantedFault(_process(rng, ranks), "kill", **_calls(rng), at=rng.random()),)}


def _memory(rng: random.Random, ranks: int) -> dict[str, Any]:
    process = rng.choice((f"rank {rng.randrange(ranks)}", "every rank"))
    if rng.random() < 0.3:
        return {"inside": (PlantedFault(process, "memory", **_calls(rng), at=rng.random(), value=rng.choice((0, 1, 4, 16, 64))),)}
    for_good = rng.random() < 0.3
    return {"inside": (PlantedFault(process, rng.choice(tuple(EXCEPTIONS)), **_calls(rng), at=rng.random(), for_good=for_good),)}


def _clock(rng: random.Random, ranks: int) -> dict[str, Any]:
    process = rng.choices(("supervisor", "every rank", f"rank {rng.randrange(ranks)}"), (40, 30, 30))[0]
    at = rng.choice((0.0, rng.random()))
    jump = PlantedFault(process, "clock", at=at, every_attempt=True, value=rng.choice(CLOCKS))
    stopped = rng.random() < 0.3
    return {"inside": (jump,)} | ({"blows": (Blow("TERM", step=rng.randrange(1, STEPS)),)} if stopped else {})


def _when(rng: random.Random) -> dict[str, Any]:
    if rng.random() < 0.3:
        return {"seconds": rng.uniform(0.0, 2.0)}
    return {"step": rng.randrange(STEPS + 1), "seconds": rng.choice((0.0, rng.uniform(0.0, 0.2)))}


def _target(rng: random.Random, ranks: int) -> str:
    rank = rng.randrange(ranks)
    return rng.choices(("supervisor", "launcher", f"rank {rank}", f"guard {rank}", "all ranks"), (25, 15, 35, 15, 10))[0]


def _blow(rng: random.Random, ranks: int) -> dict[str, Any]:
    return {"blows": (Blow("kill", _target(rng, ranks), **_when(rng)),)}


def _stop(rng: random.Random, ranks: int) -> dict[str, Any]:
    pause = rng.choice((0.0, 0.3, 1.5, 6.0, 12.0))
    return {"blows": (Blow("stop", _target(rng, ranks), **_when(rng), pause=pause),)}


def _signal(rng: random.Random, ranks: int) -> dict[str, Any]:
    target = rng.choices(("supervisor", "launcher", f"rank {rng.randrange(ranks)}", "all ranks"), (60, 15, 15, 10))[0]
    blows = [Blow(rng.choice(SIGNALS), target, **_when(rng))]
    if rng.random() < 0.25:
        blows.append(Blow(rng.choice(SIGNALS), target, step=blows[0].step, seconds=blows[0].seconds + rng.uniform(0.0, 0.5)))
    return {"blows": tuple(blows)}


def _second(rng: random.Random, ranks: int) -> dict[str, Any]:
    when = {"seconds": rng.choice((0.0, rng.uniform(0.0, 0.3), rng.uniform(0.0, 3.0)))}
    blows = [Blow("second job", **when, other=rng.random() < 0.5)]
    if not blows[0].other and rng.random() < 0.4:
        blows.append(Blow("kill", _target(rng, ranks), **_when(rng)))
    return {"blows": tuple(blows)}


def _output(rng: random.Random, ranks: int) -> dict[str, Any]:
    output = rng.choice(("pipe", "cut pipe", "closed"))
    return {"output": output, "blows": (Blow("close pipe", **_when(rng)),) if output == "pipe" else ()}


def _heartbeats(rng: random.Random, ranks: int) -> dict[str, Any]:
    target = rng.choice(("remove", "garbage", "remove folder", "old"))
    return {"blows": (Blow("heartbeats", target, **_when(rng), pause=rng.choice((1, 1, 20))),)}


def _damage(rng: random.Random, ranks: int) -> dict[str, Any]:
    """Stop the run after some saves, and damage what it left."""
    how = rng.random()
    if how < 0.5:
        stopped = {"blows": (Blow("kill", _target(rng, ranks), step=rng.randrange(6, STEPS + 1), seconds=rng.uniform(0.0, 0.1)),)}
    elif how < 0.8:
        stopped = {"blows": (Blow("TERM", "supervisor", step=rng.randrange(5, STEPS + 1)),)}
    else:
        stopped = {}  # it has finished
    harms = [Harm(rng.choice(HARMS), rng.choice(FILES), rng.random()) for _ in range(rng.choice((1, 1, 2, 3)))]
    if rng.random() < 0.3:
        harms.append(Harm(rng.choice(OBSTACLES)))
    return stopped | {"harms": tuple(harms)}


KINDS: dict[str, tuple[int, Callable[[random.Random, int], dict[str, Any]]]] = {
    "error": (28, _error),
    "kill": (14, _kill),
    "blow": (12, _blow),
    "damage": (13, _damage),
    "memory": (8, _memory),
    "second": (8, _second),
    "clock": (6, _clock),
    "signal": (5, _signal),
    "output": (4, _output),
    "heartbeats": (3, _heartbeats),
    "stop": (4, _stop),
}
