"""The rules of supervision, one by one: which ending it was, whether to restart, who hangs, which hosts take part."""

import itertools
import json
import os
import socket
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest

from recipes.common.recipe import ROOT
from recipes.common.run_dir.attempts import begin_attempt, sealed_step, sealed_time
from recipes.common.run_dir.heartbeat import Beat, Heartbeat, read_beats
from recipes.common.runtime import rank_guard
from recipes.common.runtime.network import choose_interface, free_port, interface_towards
from recipes.common.runtime.supervisor_link import SUPERVISOR
from tools.common.console import UsageError
from tools.supervise.__main__ import flags_of_attempt
from tools.supervise.endings import Restarts, is_restarted, judge
from tools.supervise.hang_detector import Limits, StepTimes, innermost_frames, is_waiting, name_culprits, patience_seconds
from tools.supervise.hosts import RecipeFacts, choose_hosts, read_hostfile, read_recipe
from tools.supervise.launcher import fill_words, write_exports
from tools.supervise.rank_links import RankEvent, RankLinks

HOSTS = {"a": {0, 1}, "b": {2, 3}}


def event(kind: str, rank: int, word: str = "", detail: str = "", at: float = 0.0) -> RankEvent:
    return RankEvent(kind, rank, "ab"[rank // 2], word, detail, at)


@pytest.mark.parametrize(
    ("events", "code", "cause", "detail", "hosts"),
    [
        ([event("end", r, "finished") for r in range(4)], 0, "finished", "the last step is reached", ()),
        ([event("end", r, "left") for r in range(4)], 143, "left", "asked to leave", ()),
        ([event("end", 0, "user_error")], 2, "user_error", "the message is above", ()),
        ([], 2, "user_error", "the message is above", ()),
        ([], 255, "launcher_failed", "the launcher ended with code 255", ()),
        ([event("end", 1, "training_error", "loss is nan"), event("lost", 0)], 3, "training_error", "loss is nan", ()),
        # the first that fails is the cause, and what the others say is not
        ([event("lost", 1), event("end", 0, "peer_lost", "reset", 1.0)], 247, "rank_lost", "rank 1 on a: killed", ("a",)),
        ([event("end", 2, "failed", "LookupError: x"), event("lost", 0, at=1.0)], 1, "rank_failed", "rank 2 on b: Look", ("b",)),
        ([event("lost", 3), event("end", 0, "failed", "RuntimeError", 2.0)], 1, "rank_lost", "rank 3 on b", ("b",)),
        ([event("end", 0, "peer_lost", "reset")], 1, "rank_lost", "rank 0 on a lost a peer: reset", ()),
        ([event("silent", 2, detail="no word"), event("silent", 3, at=0.1)], None, "host_lost", "b with ranks [2, 3]", ("b",)),
        ([event("silent", 2, detail="no word")], None, "rank_lost", "rank 2 on b: no word", ("b",)),
    ],
)  # fmt: skip
def test_the_first_that_fails_is_the_cause(events, code, cause, detail, hosts):
    ending = judge(events, code, HOSTS)
    assert (ending.cause, ending.hosts) == (cause, hosts)
    assert detail in ending.detail


def test_waits_double_up_to_a_bound_and_end():
    rule = Restarts(limit=5, first_wait_seconds=5.0, longest_wait_seconds=30.0)
    assert [rule.wait_seconds(count) for count in range(1, 7)] == [5.0, 10.0, 20.0, 30.0, 30.0, None]
    assert Restarts(limit=0).wait_seconds(1) is None
    assert not any(is_restarted(cause) for cause in ("finished", "left", "user_error", "training_error"))


def beat(rank: int, step: int = 7, phase: str = "step", seconds: float = 2.0) -> Beat:
    return Beat(rank, "ab"[rank // 2], 100 + rank, step, phase, 1000.0, seconds, {})


def test_patience_follows_the_median_step_and_the_phase():
    limits = Limits(steps=10.0, floor_seconds=60.0, start_seconds=900.0, long_seconds=300.0)
    assert patience_seconds("step", None, limits) == 900.0  # the first step: compilation, first collectives
    assert patience_seconds("start", 2.0, limits) == 900.0
    assert patience_seconds("step", 2.0, limits) == 60.0
    assert patience_seconds("data", 20.0, limits) == 200.0
    assert patience_seconds("save", 2.0, limits) == patience_seconds("evaluate", 2.0, limits) == 300.0
    times = StepTimes()
    for step, seconds in ((1, 0.0), (2, 30.0), (3, 2.0), (3, 2.0), (4, 2.5)):  # one step of 30 s does not stretch the patience
        times.add([beat(0, step, seconds=seconds), beat(1, step - 1, seconds=9.0)])
    assert times.median() == 2.5


STACK = """Thread 0x01 (most recent call first):
  File "/x/threading.py", line 1 in wait

Current thread 0x02 (most recent call first):
  File "{innermost}
  File "/r/recipes/common/engine/trainer.py", line 200 in train_step
"""
WAITS = STACK.format(innermost='/v/torch/distributed/distributed_c10d.py", line 3034 in all_reduce')
SUMS = STACK.format(innermost='/r/recipes/common/engine/trainer.py", line 255 in _sum_over_ranks')
BUSY = STACK.format(innermost='/r/recipes/common/data/shards.py", line 88 in read')


def test_stacks_tell_who_waits_for_others():
    assert innermost_frames(BUSY)[0].endswith('shards.py", line 88 in read')
    assert is_waiting(WAITS)
    assert is_waiting(SUMS)
    assert not is_waiting(BUSY)


@pytest.mark.parametrize(
    ("beats", "stacks", "states", "culprits"),
    [
        ([beat(0), beat(1)], {0: WAITS}, {0: "S", 1: "T"}, {1: "its process is stopped (state T)"}),
        ([beat(0), beat(1)], {0: WAITS}, {0: "S", 1: "D"}, {1: "its process waits for a disk or a device (state D)"}),
        ([beat(0), beat(1, phase="data")], {0: WAITS, 1: BUSY}, {}, {1: 'it is in "data" of step 7'}),
        ([beat(0, 8), beat(1)], {0: WAITS, 1: WAITS}, {}, {1: 'it is in "step" of step 7'}),
        ([beat(0), beat(1)], {0: WAITS}, {}, {1: "it did not print its stacks"}),
        ([beat(0), beat(1)], {0: WAITS, 1: BUSY}, {}, {1: 'it is at File "/r/recipes/common/data/shards.py", line 88 in read'}),
        ([beat(0), beat(1)], {0: WAITS, 1: SUMS}, {0: "S", 1: "S"}, {}),
    ],
)  # fmt: skip
def test_who_did_not_reach_the_collective(beats, stacks, states, culprits):
    assert name_culprits(beats, stacks, states) == culprits


@pytest.mark.parametrize(
    ("bad", "spares", "min_hosts", "expected"),
    [
        ([], 0, None, "abcd"),
        (["b"], 0, None, ""),  # all are needed
        ([], 1, None, ""),  # 3 hosts: no layout for 6 ranks
        ([], 2, None, "ab"),
        (["a"], 2, None, "bc"),
        (["a", "b", "c"], 2, None, ""),
        (["b"], 0, 1, "ac"),  # of three good ones, two have a layout
        (["a", "b", "c"], 0, 1, "d"),
    ],
)
def test_hosts_take_part_by_layout_spares_and_least_number(bad, spares, min_hosts, expected):
    hosts = dict.fromkeys("abcd", 2)
    assert "".join(choose_hosts(hosts, bad, (2, 4, 8), spares, min_hosts)) == expected


def test_a_recipe_is_read_off_its_source(tmp_path):
    assert read_recipe(ROOT / "recipes/quickstart.py") == RecipeFacts("quickstart", (1, 2, 4, 8))
    own = tmp_path / "own.py"
    own.write_text("recipe = Recipe(name=NAME, layouts=make())")
    assert read_recipe(own) == RecipeFacts(None, None)
    own.write_text("recipe = (")
    with pytest.raises(UsageError, match=r"own.py is no recipe"):
        read_recipe(own)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# none\n\n", "names no host; write lines of `HOST slots=N`"),
        ("a slots=2\na slots=2\n", "line 2: 'a slots=2' must be `HOST slots=N`, each host once"),
        ("a 2x\n", "line 1: 'a 2x' must be"),
        ("a slots=0\n", "line 1: 'a slots=0' must be"),
    ],
)
def test_a_wrong_hostfile_is_refused(tmp_path, text, message):
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(UsageError, match=message.replace("(", r"\(")):
        read_hostfile(tmp_path / "hosts")


def test_the_launchers_words_are_filled_in(tmp_path, monkeypatch):
    monkeypatch.setenv("MASTER_PORT", "29777")
    words = "deepspeed --hostfile {hostfile} {force_multi} --master_addr {master} --master_port {port} x={hosts}/{nodes}"
    two = fill_words(words, tmp_path, {"10.77.0.8": 2, "10.77.0.9": 2}, "10.77.0.8")
    assert two[3:] == ["--force_multi", "--master_addr", "10.77.0.8", "--master_port", "29777", "x=10.77.0.8,10.77.0.9/2"]
    assert read_hostfile(tmp_path / "hostfile") == {"10.77.0.8": 2, "10.77.0.9": 2}
    one = fill_words(words, tmp_path, {"localhost": 2}, None)
    assert one[3:5] == ["--master_addr", "127.0.0.1"]


def test_other_hosts_get_what_env_names_and_the_users_own_file(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".deepspeed_env").write_text("NCCL_DEBUG=INFO\n\n# a remark\n")
    variables = {SUPERVISOR: "h:1:t", "TRIFOLD_EXPORTS": "NCCL_DEBUG LINES", "NCCL_DEBUG": "WARN", "LINES": "a\nb", "PATH": "/"}
    lines = Path(write_exports(tmp_path / "out", variables)).read_text().splitlines()
    assert lines == ["TRIFOLD_SUPERVISOR=h:1:t", "NCCL_DEBUG=WARN", "NCCL_DEBUG=INFO", "NCCL_DEBUG=INFO"]  # the last one holds


@pytest.mark.skipif("lo" not in dict(map(reversed, socket.if_nameindex())), reason="no loopback interface called lo")
def test_gloo_gets_the_interface_that_reaches_rank_0():
    assert interface_towards("127.0.0.1") == "lo"
    alone = {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "4"}
    choose_interface(alone)
    assert alone["GLOO_SOCKET_IFNAME"] == "lo"
    several = {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "4", "LOCAL_SIZE": "2"}
    choose_interface(several)
    assert several.get("GLOO_SOCKET_IFNAME") != "lo"  # the others could not come there
    users = {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "4", "GLOO_SOCKET_IFNAME": "ib0"}
    choose_interface(users)
    assert users["GLOO_SOCKET_IFNAME"] == "ib0"


def test_heartbeats_are_read_back_and_old_ones_left_out(tmp_path, monkeypatch):
    clock = itertools.count(time.time() - 100, 0.5)
    monkeypatch.setattr(time, "time", lambda: next(clock))
    for rank in (1, 0):
        heart = Heartbeat(tmp_path, rank)
        heart.beat(1, "data")
        heart.beat(1, "step")
        heart.beat(2, "data")
    beats = read_beats(tmp_path)
    assert [(b.rank, b.step, b.phase, b.pid) for b in beats] == [(0, 2, "data", os.getpid()), (1, 2, "data", os.getpid())]
    assert beats[0].step_seconds == 1.0
    assert {name: seconds for name, seconds in beats[0].phase_seconds.items() if seconds} == {
        "start": 1.0,
        "data": 0.5,
        "step": 0.5,
    }
    (tmp_path / "logs/heartbeat/rank_00001.json").write_text("{cut")
    assert [b.rank for b in read_beats(tmp_path)] == [0]
    assert read_beats(tmp_path, since=time.time() + 200) == []


RANK = """
import os, sys, time
sys.path.insert(0, {root!r})
from recipes.common.runtime.supervisor_link import SupervisorLink
line = SupervisorLink(3)
{work}
"""


def start_rank(address: str, work: str) -> subprocess.Popen:
    program = RANK.format(root=str(ROOT), work=work)
    return subprocess.Popen([sys.executable, "-c", program], env={**os.environ, SUPERVISOR: address})


def collect(lease: RankLinks, kind: str, seconds: float = 20.0) -> RankEvent:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for found in lease.poll(0.1):
            if found.kind == kind:
                return found
    raise AssertionError(f"no {kind} in {seconds} s")


def test_a_rank_tells_how_it_ends_shows_its_stacks_and_dies_with_its_supervisor():
    lease = RankLinks()
    address = f"127.0.0.1:{lease.port}:{lease.token}"
    ended = start_rank(address, "line.report_exit('training_error', 'loss is nan'); os._exit(3)")
    found = collect(lease, "end")
    assert (found.rank, found.word, found.detail) == (3, "training_error", "loss is nan")
    assert ended.wait() == 3

    stuck = start_rank(address, "def stuck_here(): time.sleep(1000)\nstuck_here()")
    collect(lease, "hello")
    time.sleep(0.5)  # into the sleep
    lease.tell("stacks")
    assert "in stuck_here" in collect(lease, "stacks").detail
    lease.close()
    assert stuck.wait(timeout=5) == -9

    stranger = RankLinks(token="another")
    rejected = start_rank(f"127.0.0.1:{stranger.port}:{lease.token}", "time.sleep(1000)")
    while rejected.poll() is None:
        assert stranger.poll(0.1) == []
    stranger.close()


def test_a_silent_supervisor_is_left(monkeypatch):
    monkeypatch.setattr(rank_guard, "SILENCE_SECONDS", 0.3)
    monkeypatch.setattr(rank_guard, "BEAT_SECONDS", 0.1)
    killed = []
    monkeypatch.setattr(rank_guard, "_kill", lambda pid, rank, why: killed.append((pid, rank, why)))
    ours, theirs = socket.socketpair()
    stdin, stacks = os.pipe(), os.pipe()
    monkeypatch.setattr(rank_guard, "WORDS_FD", stdin[0])
    rank_guard.serve(ours, {"hello": "t"}, pid=77, rank=5, stacks=stacks[0])
    assert killed == [(77, 5, "no word from the supervisor in 0 s")]
    assert json.loads(theirs.recv(100).split(b"\n")[0]) == {"hello": "t"}
    for file in (*stdin, *stacks):
        os.close(file)


def test_a_restart_goes_on_from_the_jobs_own_checkpoints(tmp_path):
    given = ["--out-dir", "x", "--resume-step", "100", "--skip", "3:5"]
    assert flags_of_attempt(given, tmp_path, "first") == given
    begin_attempt(tmp_path, 2, {"a": 2}, "first")
    (tmp_path / "checkpoints" / "step_00000200").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step_00000200" / "checksums.json").touch()
    manifest = {"starts": [{"time": "2020-01-01T00:00:00+00:00"}]}
    (tmp_path / "run.json").write_text(json.dumps(manifest))
    # the ranks died before they set the later checkpoint aside: --resume alone would go on from it
    assert flags_of_attempt(given, tmp_path, "rank_lost") == given
    manifest["starts"].append({"time": datetime.now(UTC).isoformat(timespec="seconds")})
    (tmp_path / "run.json").write_text(json.dumps(manifest))
    assert flags_of_attempt(given, tmp_path, "rank_lost") == ["--out-dir", "x", "--skip", "3:5", "--resume"]
    assert flags_of_attempt(["--resume"], tmp_path, "asked") == ["--resume"]
    (tmp_path / "checkpoints" / "step_00000200" / "checksums.json").unlink()
    assert flags_of_attempt(["--resume"], tmp_path, "hang") == []
    assert (sealed_step(tmp_path), sealed_time(tmp_path)) == (0, 0.0)


def test_a_free_port_is_none_that_outgoing_connections_get():
    ports = {free_port() for _ in range(20)}
    assert len(ports) > 10
    assert max(ports) < 32768  # Linux begins there (ip(7), ip_local_port_range)
    with socket.create_server(("127.0.0.1", ports.pop())):
        pass
