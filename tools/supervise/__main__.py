"""Start a recipe through a launcher, watch its ranks, and restart it from its last checkpoint when it fails.

    python -m tools.supervise [OPTIONS] --launcher 'deepspeed --hostfile {hostfile} ...' RECIPE [FLAGS of the recipe]

The launch scripts call it. At every attempt these words of --launcher are filled in:
  {hostfile}      a file of the chosen hosts, lines of `HOST slots=N`       {hosts}   their names, comma-separated
  {nodes}         how many they are                                         {master}  the address of rank 0's host
  {force_multi}   --force_multi for several hosts, else nothing             {port}    a free port, new at every attempt
  {packed}        last: the recipe and its flags in one word, where shells of other hosts read the command

Restarted: a lost rank or host, a hang, an exception. Not restarted: a configuration error (exit 2), a diverged run (exit 3), a
last state that could not be saved (exit 4), SIGTERM, SIGINT or SIGUSR1 (the ranks save; exit 75). Exit 0: trained to the end,
with the last state on disk; 1: gave up.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
import unicodedata
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # run as a script: import from the repository root, not from tools/
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from recipes.common.run_dir.attempts import begin_attempt, end_attempt, has_begun, sealed_step, seals
from recipes.common.run_dir.lease import FOLDER, Lease, held
from recipes.common.runtime.authenticated_link import SECRET, SECRET_FILE, SecretError, read_secret
from recipes.common.runtime.network import address_to_listen
from recipes.common.runtime.processes import signal_child
from recipes.common.runtime.screen import keep_screen
from recipes.common.runtime.supervisor_link import SUPERVISOR
from tools.common.console import FAILED, MISTAKE, UsageError, as_usage_error, exit_code
from tools.supervise.attempt import POLL_SECONDS, run_attempt, say
from tools.supervise.endings import (
    DISK,
    EXIT_CODES,
    HOST_LOST,
    LAUNCHER,
    PREFLIGHT,
    STOPPED,
    UNSAVED,
    USER_ERROR,
    Ending,
    RestartPolicy,
    is_restarted,
)
from tools.supervise.hang_detector import HangLimits
from tools.supervise.hosts import RecipeFacts, choose_hosts, own_address, probe_hosts, read_hostfile, read_recipe
from tools.supervise.launcher import complete, fill_words, run_preflight, secret_file, write_exports
from tools.supervise.rank_links import RankLinks
from tools.supervise.relay import relayed
from tools.supervise.stop_requests import StopRequests

NO_RUN = ("--dry-run", "--help", "-h")  # flags of a recipe that start no run


def main() -> int:
    flags = _parse_flags()
    recipe = Path(flags.recipe)
    for word in (flags.recipe, *flags.recipe_flags):
        if any(unicodedata.category(letter) == "Cc" for letter in word):
            raise UsageError(f"{word!r}: a word with a newline or another control character; leave it out")
    if not recipe.is_file():
        raise UsageError(f"there is no recipe file {recipe}")
    facts = read_recipe(recipe)
    if set(NO_RUN) & set(flags.recipe_flags):
        return subprocess.call([sys.executable, flags.recipe, *_for_one_process(flags.recipe_flags, flags.processes)])
    run_dir = _run_dir(flags.recipe_flags, facts)
    stops = StopRequests()
    stops.listen()
    keep_screen()
    with relayed(), contextlib.ExitStack() as undo:
        if flags.join:
            return _join(flags, run_dir, stops)
        with as_usage_error(OSError):
            lease = undo.enter_context(held(run_dir, run_dir / FOLDER, "supervisor", "a supervisor"))
        return _supervise(flags, facts, run_dir, stops, lease)


def _supervise(flags: argparse.Namespace, facts: RecipeFacts, run_dir: Path, stops: StopRequests, lease: Lease) -> int:
    policy = RestartPolicy(flags.restarts, flags.backoff_seconds)
    cause, in_a_row, sealed_before = ("asked" if flags.resume_first else "first"), 0, seals(run_dir)
    progress = sealed_before
    while True:
        lease.check()
        ending = _attempt(flags, facts, run_dir, cause, stops)
        say(f"attempt ended: {ending.cause}: {ending.detail}")
        if ending.cause == STOPPED or (stops.times and is_restarted(ending.cause)):
            return _stop(flags, stops, run_dir, sealed_before)
        if ending.cause == UNSAVED:
            _requeue(flags, stops, run_dir, sealed_before)  # the time limit's stop: what was sealed since the start is gained
        if not is_restarted(ending.cause):
            return EXIT_CODES[ending.cause]
        if ending.cause in (PREFLIGHT, DISK) and cause in ("first", "asked"):  # later it may pass: the same machines did start
            return EXIT_CODES.get(ending.cause, FAILED)
        if seals(run_dir) - progress:
            in_a_row, progress = 0, progress | seals(run_dir)
        in_a_row, cause = in_a_row + 1, ending.cause
        wait, step = policy.wait_seconds(in_a_row), sealed_step(run_dir)
        if wait is None:
            say(f"giving up after {policy.limit} restarts without a new checkpoint; the last checkpoint is of step {step}")
            return FAILED
        say(f"restart {in_a_row} of {policy.limit} without a new checkpoint: from step {step}, in {wait:.0f} s")
        end = time.monotonic() + wait
        while time.monotonic() < end and not stops.times:
            time.sleep(min(0.2, wait))
        if stops.times:
            return _stop(flags, stops, run_dir, sealed_before)


def _join(flags: argparse.Namespace, run_dir: Path, stops: StopRequests) -> int:
    """Start this machine's ranks once, for a supervisor on another machine that watches them."""
    with tempfile.TemporaryDirectory(prefix="trifold-") as folder:
        environment = os.environ | {SUPERVISOR: flags.join, SECRET: _given_secret()}
        command = fill_words(flags.launcher, Path(folder), {}, flags.master)
        if flags.preflight:
            code, _ = run_preflight(command, environment, flags.recipe, run_dir, {}, stops.count)
            if code:
                return code
        cause = "asked" if flags.resume_first else "first"
        command = complete(command, [flags.recipe, *flags_of_attempt(flags.recipe_flags, run_dir, cause)], environment)
        job = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True)
        passed_on = 0
        while job.poll() is None:
            time.sleep(POLL_SECONDS)
            if stops.times > passed_on:  # the launcher passes it on; then every rank of the job saves and exits
                passed_on = stops.times
                signal_child(job.pid, signal.SIGTERM, group=True)
    return job.returncode if job.returncode >= 0 else FAILED


@dataclass(frozen=True)
class Launch:
    """The hosts, command and environment of an attempt."""

    hosts: dict[str, int]  # host -> ranks; {} where the launcher knows them itself
    command: list[str]
    environment: dict[str, str]


def _attempt(flags: argparse.Namespace, facts: RecipeFacts, run_dir: Path, cause: str, stops: StopRequests) -> Ending:
    """Run the ranks once on the good hosts; record it in logs/attempts.jsonl."""
    with tempfile.TemporaryDirectory(prefix="trifold-") as folder, contextlib.ExitStack() as undo:
        launch = _prepare_launch(flags, facts, run_dir, Path(folder), cause, stops)
        if isinstance(launch, Ending):
            return launch
        address = flags.address or own_address(list(launch.hosts))
        links = undo.enter_context(contextlib.closing(_listen(address, flags.report_port)))
        try:  # a launcher shows the environment on command lines: other hosts read a file
            given = os.environ.get(SECRET_FILE, "")
            if launch.hosts and not given:
                given = undo.enter_context(secret_file(run_dir / "logs", links.secret))
        except OSError as error:
            return Ending(LAUNCHER, f"cannot write the ranks' secret to {run_dir / 'logs'}: {error.strerror}")
        words = flags_of_attempt(flags.recipe_flags, run_dir, cause)
        command = complete(launch.command, [flags.recipe, *words], launch.environment)
        world_size, hosts = sum(launch.hosts.values()) or flags.processes, launch.hosts or {socket.gethostname(): 0}
        number = begin_attempt(run_dir, world_size, hosts, cause, _resumed_step(words, run_dir))
        environment = launch.environment | {SUPERVISOR: f"{address}:{links.port}"}
        if launch.hosts:
            environment[SECRET_FILE] = given
            environment["DS_ENV_FILE"] = write_exports(Path(folder) / "environment", environment)
        else:
            environment[SECRET] = links.secret
        say(f"attempt {number}: {shlex.join([*launch.command, flags.recipe, *words])}")
        stacks = run_dir / "logs" / "stacks" / f"attempt_{number}"
        limits = HangLimits(flags.hang_seconds, flags.long_phase_seconds)
        ending = run_attempt(command, environment, links, run_dir, stacks, limits, flags.stop_seconds, stops.count)
    end_attempt(run_dir, number, ending.cause, ending.detail)
    return ending


def _listen(address: str, port: int) -> RankLinks:
    """Listen for the ranks' guards on the interface of `address`."""
    interface = address_to_listen(address)
    if not interface:
        say(f"{address} is the address of no interface here: listening on all")
    try:
        return RankLinks(interface, port, _given_secret() if {SECRET, SECRET_FILE} & set(os.environ) else None)
    except OSError as error:
        where = f"{interface or 'every interface'}, port {port}"
        raise UsageError(f"cannot listen on {where}: {error.strerror}; is another supervisor there? see --report-port") from None


def _given_secret() -> str:
    """Return the secret of the environment, which several machines' scripts share. Raises UsageError where it is none."""
    try:
        secret = read_secret(os.environ, wait_seconds=0)
    except SecretError as error:
        raise UsageError(str(error)) from None
    file = Path(os.environ.get(SECRET_FILE, ""))
    if file.is_file() and file.stat().st_mode & 0o077:
        raise UsageError(f"{SECRET_FILE}={file}: other users may read the secret; run `chmod 600` on it")
    return secret


def _prepare_launch(
    flags: argparse.Namespace, facts: RecipeFacts, run_dir: Path, folder: Path, cause: str, stops: StopRequests
) -> Launch | Ending:
    """Return a launch on hosts that answer and pass preflight; an ending where too few do."""
    hosts = read_hostfile(Path(flags.hostfile)) if flags.hostfile else {}
    bad: list[str] = []
    if hosts and flags.probe and (flags.spares or cause not in ("first", "asked")):
        bad = probe_hosts(list(hosts), flags.probe)
        for host in bad:
            say(f"host {host} does not answer: excluded")
    while True:
        chosen = choose_hosts(hosts, bad, facts.layouts, flags.spares, flags.min_hosts) if hosts else {}
        if hosts and not chosen:
            were_all_good = choose_hosts(hosts, [], facts.layouts, flags.spares, flags.min_hosts)
            if bad and (were_all_good or cause not in ("first", "asked")):
                return Ending(HOST_LOST, f"too few hosts without {', '.join(bad)}, or the recipe has no layout for those left")
            raise UsageError(
                f"--hostfile {flags.hostfile}: {len(hosts)} hosts with {sum(hosts.values())} ranks, {flags.spares} spare; the "
                f"recipe has layouts for {list(facts.layouts or ())} ranks: change the slots, --spares, or add a layout"
            )
        environment = {name: value for name, value in os.environ.items() if name not in (SUPERVISOR, SECRET, SECRET_FILE)}
        if chosen:
            environment["DS_ENV_FILE"] = write_exports(folder / "environment", environment)
        if not flags.preflight:
            return Launch(chosen, fill_words(flags.launcher, folder, chosen, flags.master), environment)
        command = fill_words(flags.launcher, folder, chosen, flags.master)
        code, blamed = run_preflight(command, environment, flags.recipe, run_dir, chosen, stops.count)
        if code == 0:
            return Launch(chosen, fill_words(flags.launcher, folder, chosen, flags.master), environment)
        if code == MISTAKE:
            return Ending(USER_ERROR, "the recipe or its flags are wrong; see the message above")
        blamed = [host for host in blamed if host in chosen]
        if not blamed or (not flags.spares and flags.min_hosts is None) or stops.times:
            return Ending(PREFLIGHT, "the machines failed preflight; see the problems above (--no-preflight skips it)")
        say(f"preflight blames {', '.join(blamed)}: excluded")
        bad += blamed


def _stop(flags: argparse.Namespace, stops: StopRequests, run_dir: Path, sealed_before: frozenset) -> int:
    """Report the stop and requeue the job where asked. sealed_before: the seals that were there at our start."""
    step, by = sealed_step(run_dir), stops.first_signal
    say(f"stopped by {by or 'request'}; the last checkpoint is of step {step}; continue with --resume")
    _requeue(flags, stops, run_dir, sealed_before)
    return EXIT_CODES[STOPPED]


def _requeue(flags: argparse.Namespace, stops: StopRequests, run_dir: Path, sealed_before: frozenset) -> None:
    by = stops.first_signal
    if flags.requeue and by == "SIGUSR1" and seals(run_dir) - sealed_before:
        job = os.environ.get("SLURM_JOB_ID", "")
        say(f"requeueing: scontrol requeue {job}")
        subprocess.call(["scontrol", "requeue", job])
    elif flags.requeue and by == "SIGUSR1":
        say("not requeued: no new checkpoint was saved within the time limit, nor would be the next time; raise --time")


def flags_of_attempt(given: list[str], run_dir: Path, cause: str) -> list[str]:
    """Return the recipe's flags as given; once the job has begun, with --resume if there is a checkpoint."""
    if cause == "first" or not has_begun(run_dir):
        return given
    others = _resume_flags(given)[1]  # --resume-step rolls back once: again, it would undo what was trained since
    return [*others, "--resume"] if sealed_step(run_dir) else others


def _resume_flags(words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return (.resume and .resume_step as a recipe reads them, the other words)."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--resume-step", type=int)
    return parser.parse_known_args(words)


def _resumed_step(words: list[str], run_dir: Path) -> int:
    """Return the step that a start with these flags resumes from; 0 for a fresh one."""
    flags = _resume_flags(words)[0]
    return flags.resume_step or (sealed_step(run_dir) if flags.resume else 0)


def _run_dir(recipe_flags: list[str], facts: RecipeFacts) -> Path:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--out-dir", default=f"runs/{facts.name}" if facts.name else None)
    found = parser.parse_known_args(recipe_flags)[0].out_dir
    if not found:
        why = "the recipe's source has no literal name" if found is None else "--out-dir='' names no folder"
        raise UsageError(f"{why}; give --out-dir DIR")
    return Path(found).expanduser().resolve()


def _for_one_process(recipe_flags: list[str], processes: int | None) -> list[str]:
    """Return the flags of a dry run, with the number of ranks that a launcher would start."""
    if "--dry-run" in recipe_flags and processes and "--world-size" not in recipe_flags:
        return [*recipe_flags, "--world-size", str(processes)]
    return recipe_flags


def _parse_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.supervise", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--launcher", required=True, metavar="WORDS", help="the command that starts the ranks, up to the recipe")
    add("--processes", type=int, help="number of ranks where no hostfile says it: for the record and for --dry-run")
    add = parser.add_argument_group("hosts").add_argument
    add("--hostfile", help="lines of `HOST slots=N`, read again at every attempt: hosts may come and go")
    add("--spares", type=int, default=0, metavar="N", help="hosts kept idle until another is bad (default: %(default)s)")
    add("--min-hosts", type=int, metavar="N", help="continue with as few as N when others are bad (default: all but the spares)")
    add("--probe", metavar="WORDS", help="command that succeeds where {host} is usable; run before every restart")
    add("--no-preflight", dest="preflight", action="store_false", help="start without `python -m tools.preflight`")
    add("--master", help="rank 0's address (default: the first host's, as the others reach it)")
    add("--address", help="this machine's address, as the ranks reach it (default: found)")
    add("--report-port", type=int, default=0, metavar="PORT", help="port on which the ranks report (default: any free one)")
    add("--join", metavar="HOST:PORT",
        help=f"start this machine's ranks once, for the supervisor there; both have the job's secret in {SECRET}")  # fmt: skip
    add = parser.add_argument_group("restarts").add_argument
    add("--restarts", type=int, default=5, metavar="N", help="give up after N in a row without a new checkpoint (%(default)s)")
    add("--backoff-seconds", type=float, default=5.0, metavar="S", help="wait before the first; doubles up to 300 (%(default)s)")
    add("--continue", dest="resume_first", action="store_true", help="resume in the first attempt too, if there is a checkpoint")
    add("--requeue", action="store_true", help="after SIGUSR1 and a new checkpoint: `scontrol requeue` this job")
    add = parser.add_argument_group("time limits (seconds)").add_argument
    add("--hang-seconds", type=float, default=120.0, metavar="S",
        help="restart after S without progress in a step, and at least 10 median steps (%(default)s)")  # fmt: skip
    add("--long-phase-seconds", type=float, default=1800.0, metavar="S",
        help="the same up to the first step's end, in an evaluation and in a blocking save (%(default)s)")  # fmt: skip
    add("--stop-seconds", type=float, default=60.0, metavar="S", help="to save and exit when asked to stop (%(default)s)")
    parser.add_argument("recipe", help="a recipe file")
    parser.add_argument("recipe_flags", nargs=argparse.REMAINDER, help="flags of the recipe, such as --out-dir DIR")
    flags = parser.parse_args()
    for name in ("spares", "restarts"):
        if getattr(flags, name) < 0:
            parser.error(f"--{name}={getattr(flags, name)} must be 0 or more")
    return flags


if __name__ == "__main__":
    sys.exit(exit_code(main))
