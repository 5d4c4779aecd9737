"""Start a recipe through a launcher, watch its ranks, and start it again from its last checkpoint when one is lost.

    python -m tools.supervise [OPTIONS] --launcher 'deepspeed --hostfile {hostfile} ...' RECIPE [FLAGS of the recipe]

The launch scripts call it. In the launcher's words {hostfile}, {hosts}, {nodes}, {master}, {port} and {force_multi} are replaced
at every attempt. Restarted: a lost rank or host, a hang, an exception. Not restarted: a wrong recipe (exit 2), numbers that
make going on useless (3), a request to leave (SIGTERM, SIGINT, SIGUSR1: saves, then 75). 0: trained to the end; 1: gave up.
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
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from recipes.common.run_dir.attempts import begin_attempt, end_attempt, has_begun, sealed_step, sealed_time
from recipes.common.runtime.supervisor_link import SUPERVISOR
from tools.common.console import FAILED, MISTAKE, UsageError, exit_code
from tools.supervise.attempt import POLL_SECONDS, run_attempt, say
from tools.supervise.endings import EXIT_CODES, HOST_LOST, LEFT, PREFLIGHT, USER_ERROR, Ending, Restarts, is_restarted
from tools.supervise.hang_detector import Limits
from tools.supervise.hosts import RecipeFacts, choose_hosts, own_address, probe_hosts, read_hostfile, read_recipe
from tools.supervise.launcher import fill_words, run_preflight, write_exports
from tools.supervise.rank_links import RankLinks

ONCE = ("--dry-run", "--help", "-h")  # flags of a recipe that start no run


@dataclass
class Asked:
    """How often, and by which signal first, this process was asked to end."""

    times: int = 0
    name: str = ""

    def count(self) -> int:
        return self.times

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
    if flags.join:
        return _follow(flags, run_dir, asked)
    return _supervise(flags, facts, run_dir, asked)


def _supervise(flags: argparse.Namespace, facts: RecipeFacts, run_dir: Path, asked: Asked) -> int:
    rule = Restarts(flags.restarts, flags.backoff_seconds)
    cause, in_a_row, began_with = ("asked" if flags.go_on else "first"), 0, sealed_time(run_dir)
    progress = began_with
    while True:
        ending = _attempt(flags, facts, run_dir, cause, asked)
        say(f"ended: {ending.cause}: {ending.detail}")
        if ending.cause == LEFT or (asked.times and is_restarted(ending.cause)):
            return _leave(flags, asked, run_dir, began_with)
        if not is_restarted(ending.cause):
            return EXIT_CODES[ending.cause]
        if ending.cause == PREFLIGHT and cause in ("first", "asked"):
            return FAILED
        if sealed_time(run_dir) > progress:
            in_a_row, progress = 0, sealed_time(run_dir)
        in_a_row, cause = in_a_row + 1, ending.cause
        wait = rule.wait_seconds(in_a_row)
        if wait is None:
            say(f"giving up after {rule.limit} restarts without a new checkpoint; the last is of step {sealed_step(run_dir)}")
            return FAILED
        say(f"restart {in_a_row} of {rule.limit} without a new checkpoint, from step {sealed_step(run_dir)}, in {wait:.0f} s")
        end = time.monotonic() + wait
        while time.monotonic() < end and not asked.times:
            time.sleep(min(0.2, wait))
        if asked.times:
            return _leave(flags, asked, run_dir, began_with)


def _follow(flags: argparse.Namespace, run_dir: Path, asked: Asked) -> int:
    """This machine's ranks of a job whose supervisor is on another: started once, with the same words, and watched from there."""
    with tempfile.TemporaryDirectory(prefix="trifold-") as folder:
        environment = os.environ | {SUPERVISOR: flags.join}
        command = fill_words(flags.launcher, Path(folder), {}, flags.master)
        if flags.preflight:
            code, _ = run_preflight(command, environment, flags.recipe, run_dir, {}, asked.count)
            if code:
                return code
        cause = "asked" if flags.go_on else "first"
        command += [flags.recipe, *flags_of_attempt(flags.recipe_flags, run_dir, cause)]
        job = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True)
        told = 0
        while job.poll() is None:
            time.sleep(POLL_SECONDS)
            if asked.times > told:  # the launcher passes it on; then every rank of the job saves and leaves
                told = asked.times
                os.killpg(job.pid, signal.SIGTERM)
    return job.returncode if job.returncode >= 0 else FAILED


@dataclass(frozen=True)
class Start:
    """What the next attempt is started with."""

    hosts: dict[str, int]  # host -> ranks; {} where the launcher knows them itself
    command: list[str]  # the launcher's words
    environment: dict[str, str]


def _attempt(flags: argparse.Namespace, facts: RecipeFacts, run_dir: Path, cause: str, asked: Asked) -> Ending:
    """One start of the ranks on the hosts that are good, recorded in logs/attempts.jsonl."""
    with tempfile.TemporaryDirectory(prefix="trifold-") as folder:
        lease: RankLinks | None = None
        try:
            lease = RankLinks(flags.token, flags.lease_port)
            start = _find_start(flags, facts, run_dir, Path(folder), lease, cause, asked)
            if isinstance(start, Ending):
                return start
            words = flags_of_attempt(flags.recipe_flags, run_dir, cause)
            command = [*start.command, flags.recipe, *words]
            world_size, hosts = sum(start.hosts.values()) or flags.processes, start.hosts or {socket.gethostname(): 0}
            number = begin_attempt(run_dir, world_size, hosts, cause, _resumed_step(words, run_dir))
            say(f"attempt {number}: {shlex.join(command)}")
            stacks = run_dir / "logs" / "stacks" / f"attempt_{number}"
            limits = Limits(flags.stall_steps, flags.stall_floor_seconds, flags.start_seconds, flags.long_seconds)
            ending = run_attempt(command, start.environment, lease, run_dir, stacks, limits, flags.stop_seconds, asked.count)
        finally:
            if lease is not None:
                lease.close()
    end_attempt(run_dir, number, ending.cause, ending.detail)
    return ending


def _find_start(
    flags: argparse.Namespace, facts: RecipeFacts, run_dir: Path, folder: Path, lease: RankLinks, cause: str, asked: Asked
) -> Start | Ending:
    """Hosts that answer and pass preflight, and the words to start on them; an ending where there are too few."""
    hosts = read_hostfile(Path(flags.hostfile)) if flags.hostfile else {}
    bad: list[str] = []
    if hosts and flags.probe and (flags.spares or cause not in ("first", "asked")):
        bad = probe_hosts(list(hosts), flags.probe)
        for host in bad:
            say(f"host {host} does not answer: left out")
    while True:
        chosen = choose_hosts(hosts, bad, facts.layouts, flags.spares, flags.min_hosts) if hosts else {}
        if hosts and not chosen:
            if bad:
                return Ending(HOST_LOST, f"without {', '.join(bad)} too few hosts are left, or the recipe has no layout for them")
            raise UsageError(
                f"--hostfile {flags.hostfile}: {len(hosts)} hosts with {sum(hosts.values())} ranks, {flags.spares} spare; the "
                f"recipe has layouts for {list(facts.layouts or ())} ranks: change the slots, --spares, or add a layout"
            )
        address = flags.address or own_address(list(chosen))
        environment = os.environ | {SUPERVISOR: f"{address}:{lease.port}:{lease.token}"}
        if chosen:
            environment["DS_ENV_FILE"] = write_exports(folder / "environment", environment)
        if not flags.preflight:
            return Start(chosen, fill_words(flags.launcher, folder, chosen, flags.master), environment)
        command = fill_words(flags.launcher, folder, chosen, flags.master)
        code, blamed = run_preflight(command, environment, flags.recipe, run_dir, chosen, asked.count)
        if code == 0:
            return Start(chosen, fill_words(flags.launcher, folder, chosen, flags.master), environment)
        if code == MISTAKE:
            return Ending(USER_ERROR, "the recipe or its flags are wrong; the message is above")
        blamed = [host for host in blamed if host in chosen]
        if not blamed or (not flags.spares and flags.min_hosts is None) or asked.times:
            return Ending(PREFLIGHT, "the machines are not fit; what is wrong is above (--no-preflight starts without a look)")
        say(f"preflight blames {', '.join(blamed)}: left out")
        bad += blamed


def _leave(flags: argparse.Namespace, asked: Asked, run_dir: Path, began_with: float) -> int:
    """began_with: when the newest checkpoint had been sealed, as this process began."""
    step = sealed_step(run_dir)
    say(f"left on {asked.name or 'request'} with step {step} saved; go on with --resume")
    if flags.requeue and asked.name == "SIGUSR1" and sealed_time(run_dir) > began_with:
        job = os.environ.get("SLURM_JOB_ID", "")
        say(f"back into the queue: scontrol requeue {job}")
        subprocess.call(["scontrol", "requeue", job])
    elif flags.requeue and asked.name == "SIGUSR1":
        say("not queued again: the time limit brought no new checkpoint, and would bring none again; raise --time")
    return EXIT_CODES[LEFT]


def flags_of_attempt(given: list[str], run_dir: Path, cause: str) -> list[str]:
    """The recipe's flags as given; once the job has begun, a start goes on from what is sealed, if anything is."""
    if cause == "first" or not has_begun(run_dir):
        return given
    others = _resume_flags(given)[1]  # --resume-step went back once: again, it would undo what was trained since
    return [*others, "--resume"] if sealed_step(run_dir) else others


def _resume_flags(words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """(.resume, .resume_step as a recipe reads them; the other words)"""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--resume-step", type=int)
    return parser.parse_known_args(words)


def _resumed_step(words: list[str], run_dir: Path) -> int:
    """The step that a start with these flags goes on from; 0 for a fresh one."""
    flags = _resume_flags(words)[0]
    return flags.resume_step or (sealed_step(run_dir) if flags.resume else 0)


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
    add("--join", metavar="HOST:PORT:TOKEN", help="start this machine's ranks once, for a supervisor that runs there")
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


if __name__ == "__main__":
    sys.exit(exit_code(main))
