"""Start a recipe through a launcher, watch its ranks, and start it again from its last checkpoint when one is lost.

    python -m tools.supervise [OPTIONS] --launcher 'deepspeed --hostfile {hostfile} ...' RECIPE [FLAGS of the recipe]

The launch scripts call it. In the launcher's words {hostfile}, {hosts}, {nodes}, {master}, {port} and {force_multi} are replaced at
every attempt. Restarted: a lost rank or host, a hang, an exception. Not restarted: a wrong recipe (exit 2), numbers that make going
on useless (3), a request to leave (SIGTERM, SIGINT, SIGUSR1: saves, then 75). 0: trained to the end; 1: gave up.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # run as a script: import from the repository root, not from tools/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from recipes.common.lifeline import SUPERVISOR
from tools.common.console import UsageError, exit_code
from tools.launching.attempt import run_attempt, say
from tools.launching.attempts import begin_attempt, end_attempt, sealed_step
from tools.launching.endings import EXIT_CODES, HOST_LOST, LEFT, Ending, Restarts, is_restarted
from tools.launching.hosts import (
    RecipeFacts,
    choose_hosts,
    is_here,
    master_address,
    own_address,
    probe_hosts,
    read_hostfile,
    read_recipe,
    write_hostfile,
)
from tools.launching.lease import Lease
from tools.launching.stall import Limits

EXPORTS = "TRIFOLD_EXPORTS"  # names of variables that go to other hosts; launch/env.sh lists them
ONCE = ("--dry-run", "--help", "-h")  # flags of a recipe that start no run


@dataclass
class Asked:
    """How often, and by which signal first, this process was asked to end."""

    times: int = 0
    name: str = ""

    def note(self, number: int, frame: object) -> None:
        self.times += 1
        self.name = self.name or signal.Signals(number).name


def main() -> int:
    flags = _parse_flags()
    recipe = Path(flags.recipe)
    if not recipe.is_file():
        raise UsageError(f"there is no recipe file {recipe}")
    facts = read_recipe(recipe)
    if set(ONCE) & set(flags.recipe_flags):
        return subprocess.call([sys.executable, flags.recipe, *_for_one_process(flags.recipe_flags, flags.processes)])
    run_dir = _run_dir(flags.recipe_flags, facts)
    asked = Asked()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, asked.note)
    return _supervise(flags, facts, run_dir, asked)


def _supervise(flags: argparse.Namespace, facts: RecipeFacts, run_dir: Path, asked: Asked) -> int:
    rule = Restarts(flags.restarts, flags.backoff_seconds)
    cause, in_a_row, progress = ("asked" if flags.go_on else "first"), 0, sealed_step(run_dir)
    bad: list[str] = []
    while True:
        hosts = read_hostfile(Path(flags.hostfile)) if flags.hostfile else {}
        if hosts and (in_a_row or flags.spares) and flags.probe:
            bad = probe_hosts(list(hosts), flags.probe)
            for host in bad:
                say(f"host {host} does not answer: left out")
        ending = _attempt(flags, facts, run_dir, hosts, bad, cause, asked)
        say(f"ended: {ending.cause}: {ending.detail}")
        if ending.cause == LEFT or (asked.times and is_restarted(ending.cause)):
            return _leave(flags, asked, sealed_step(run_dir))
        if not is_restarted(ending.cause):
            return EXIT_CODES[ending.cause]
        if sealed_step(run_dir) > progress:
            in_a_row, progress = 0, sealed_step(run_dir)
        in_a_row, cause = in_a_row + 1, ending.cause
        wait = rule.wait_seconds(in_a_row)
        if wait is None:
            say(f"giving up after {rule.limit} restarts without a new checkpoint; the last is of step {progress}")
            return 1
        say(f"restart {in_a_row} of {rule.limit} without a new checkpoint, from step {progress}, in {wait:.0f} s")
        end = time.monotonic() + wait
        while time.monotonic() < end and not asked.times:
            time.sleep(min(0.2, wait))
        if asked.times:
            return _leave(flags, asked, progress)


def _attempt(
    flags: argparse.Namespace,
    facts: RecipeFacts,
    run_dir: Path,
    hosts: dict[str, int],
    bad: list[str],
    cause: str,
    asked: Asked,
) -> Ending:
    """One start of the ranks, recorded in logs/attempts.jsonl, on the hosts that are good."""
    chosen = choose_hosts(hosts, bad, facts.layouts, flags.spares, flags.min_hosts) if hosts else {}
    if hosts and not chosen:
        if not bad:  # waiting would not help
            raise UsageError(
                f"--hostfile {flags.hostfile}: {len(hosts)} hosts with {sum(hosts.values())} ranks, {flags.spares} spare; the "
                f"recipe has layouts for {list(facts.layouts or ())} ranks: change the slots, --spares, or add a layout"
            )
        return Ending(HOST_LOST, f"too few hosts answer, or the recipe has no layout for them: without {', '.join(bad)}")
    with tempfile.TemporaryDirectory(prefix="trifold-") as folder:
        lease = Lease(flags.address or own_address(list(chosen)), flags.lease_port, flags.token)
        try:
            environment = os.environ | {SUPERVISOR: lease.address}
            if chosen:
                environment["DS_ENV_FILE"] = _write_exports(Path(folder) / "environment", environment)
            command = _fill(flags, Path(folder), chosen)
            command += [flags.recipe, *_flags_of_attempt(flags, cause, sealed_step(run_dir))]
            world_size = sum(chosen.values()) or flags.processes
            number = begin_attempt(run_dir, world_size, chosen or {socket.gethostname(): 0}, cause)
            say(f"attempt {number}: {shlex.join(command)}")
            stacks = run_dir / "logs" / "stacks" / f"attempt_{number}"
            limits = Limits(flags.stall_steps, flags.stall_floor_seconds, flags.start_seconds, flags.long_seconds)
            ending = run_attempt(command, environment, lease, run_dir, stacks, limits, flags.stop_seconds, lambda: asked.times)
        finally:
            lease.close()
    end_attempt(run_dir, number, ending.cause, ending.detail)
    return ending


def _leave(flags: argparse.Namespace, asked: Asked, step: int) -> int:
    say(f"left on {asked.name or 'request'} with step {step} saved; go on with --resume")
    if flags.requeue and asked.name == "SIGUSR1":
        job = os.environ.get("SLURM_JOB_ID", "")
        say(f"back into the queue: scontrol requeue {job}")
        subprocess.call(["scontrol", "requeue", job])
    return EXIT_CODES[LEFT]


def _fill(flags: argparse.Namespace, folder: Path, hosts: dict[str, int]) -> list[str]:
    """The launcher's words for this attempt. Each has a port of its own: the last one's may still be in its closing wait."""
    hostfile = folder / "hostfile"
    write_hostfile(hostfile, hosts)
    alone = len(hosts) == 1 and is_here(next(iter(hosts)))
    values = {
        "{hostfile}": str(hostfile),
        "{hosts}": ",".join(hosts),
        "{nodes}": str(len(hosts)),
        "{master}": flags.master or master_address(list(hosts)),
        "{port}": os.environ.get("MASTER_PORT") or str(_free_port()),
        "{force_multi}": "" if alone else "--force_multi",
    }
    words = []
    for word in shlex.split(flags.launcher):
        for name, value in values.items():
            word = word.replace(name, value)
        words += [word] if word else []
    return words


def _flags_of_attempt(flags: argparse.Namespace, cause: str, sealed: int) -> list[str]:
    """The recipe's flags as given; every start but the first goes on from what is sealed, if anything is."""
    given = [word for word in flags.recipe_flags if cause == "first" or word != "--resume"]
    return given + (["--resume"] if cause != "first" and sealed else [])


def _write_exports(path: Path, environment: dict[str, str]) -> str:
    """DeepSpeed's environment file for the other hosts: what launch/env.sh names, then the user's own .deepspeed_env."""
    names = [SUPERVISOR, *environment.get(EXPORTS, "").split()]
    lines = [f"{name}={environment[name]}\n" for name in names if "\n" not in environment.get(name, "\n")]
    for own in (Path.home() / ".deepspeed_env", Path(".deepspeed_env")):
        if own.is_file():
            lines += [f"{line}\n" for line in own.read_text().splitlines() if "=" in line]
    path.write_text("".join(lines))
    return str(path)


def _run_dir(recipe_flags: list[str], facts: RecipeFacts) -> Path:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--out-dir", default=f"runs/{facts.name}" if facts.name else None)
    found = parser.parse_known_args(recipe_flags)[0].out_dir
    if found is None:
        raise UsageError("the recipe's source does not spell out its name, so give --out-dir")
    return Path(found).expanduser().resolve()


def _for_one_process(recipe_flags: list[str], processes: int | None) -> list[str]:
    """A dry run needs no launcher, but the number of ranks that there would be."""
    if "--dry-run" in recipe_flags and processes and "--world-size" not in recipe_flags:
        return [*recipe_flags, "--world-size", str(processes)]
    return recipe_flags


def _parse_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.supervise", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--launcher", required=True, metavar="WORDS", help="the command that starts the ranks, up to the recipe")
    add("--processes", type=int, help="ranks, where the launcher's words say so and no hostfile does: for the record")
    where = parser.add_argument_group("hosts")
    add = where.add_argument
    add("--hostfile", help="lines of `HOST slots=N`, read anew at every attempt: hosts may come and go")
    add("--spares", type=int, default=0, metavar="N", help="hosts that stay idle until another is bad (default: %(default)s)")
    add("--min-hosts", type=int, metavar="N", help="go on with as few as N when others are bad (default: with all but spares)")
    add("--probe", metavar="WORDS", help="a command that ends well where {host} is usable; asked before every restart")
    add("--master", help="rank 0's address (default: the first host's, as the others reach it)")
    add("--address", help="this machine's address, as the ranks reach it (default: found)")
    add("--lease-port", type=int, default=0, metavar="PORT", help="where the ranks report (default: any free one)")
    add("--token", help="what a rank must say to be heard (default: drawn)")
    add("--no-preflight", dest="preflight", action="store_false", help="start without `python -m tools.preflight`")
    when = parser.add_argument_group("restarts")
    add = when.add_argument
    add("--restarts", type=int, default=5, metavar="N", help="in a row without a new checkpoint (default: %(default)s)")
    add("--backoff-seconds", type=float, default=5.0, metavar="S", help="before the first; then doubled (default: %(default)s)")
    add("--continue", dest="go_on", action="store_true", help="the first attempt too goes on from a checkpoint, if there is one")
    add("--requeue", action="store_true", help="after SIGUSR1 and a save: `scontrol requeue` this job")
    add("--stop-seconds", type=float, default=60.0, metavar="S", help="to save and leave when asked (default: %(default)s)")
    limits = parser.add_argument_group("hangs")
    add = limits.add_argument
    add("--stall-steps", type=float, default=10.0, metavar="K", help="median steps without progress (default: %(default)s)")
    add("--stall-floor-seconds", type=float, default=120.0, metavar="S", help="but at least (default: %(default)s)")
    add("--start-seconds", type=float, default=1800.0, metavar="S", help="up to the first step's end (default: %(default)s)")
    add("--long-seconds", type=float, default=1800.0, metavar="S", help="an evaluation, a save (default: %(default)s)")
    parser.add_argument("recipe", help="the recipe's file")
    parser.add_argument("recipe_flags", nargs=argparse.REMAINDER, help="flags of the recipe, as --out-dir DIR")
    flags = parser.parse_args()
    for name in ("spares", "restarts"):
        if getattr(flags, name) < 0:
            parser.error(f"--{name}={getattr(flags, name)} must be 0 or more")
    return flags


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    sys.exit(exit_code(main))
