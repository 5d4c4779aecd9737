"""Every judgement of a preflight on planted facts: equal hosts pass, one that differs is named, with both values and a cure."""

from dataclasses import replace

import pytest

from recipes.common.recipe import SGD, AdamW, Layout
from tools.preflight.communication import pairs
from tools.preflight.host_facts import environment_of_interest, parse_apps, parse_gpus, parse_xid
from tools.preflight.judge_hosts import clock_notes, host_problems, storage_problems
from tools.preflight.judge_ranks import (
    GroupResult,
    collective_problems,
    culprits,
    device_problems,
    merge_groups,
    product_problems,
    usual_speed,
)
from tools.preflight.problems import Problem, by_host, majority, span
from tools.preflight.rendezvous import RankInfo, host_names, this_rank
from tools.preflight.report import PreflightReport, as_text, with_exit_code
from tools.preflight.storage import bytes_needed

HOSTS = ["a", "a", "b", "b", "c", "c", "d", "d"]  # by rank
LAYOUT = Layout(tensor=2, pipeline=2)
RANKS_OF = {host: [rank for rank, name in enumerate(HOSTS) if name == host] for host in "abcd"}
GB = 10**9


def facts(**of_b):
    """`host_facts` of four hosts, equal but for what host b says otherwise; a dict replaces keys of the same dict."""

    def one(host):
        plain = {
            "code": {"commit": "1" * 40, "files": {"recipes/x.py": "aa", "tools/y.py": "bb"}},
            "versions": {"python": "3.11.2", "torch": "2.13.0", "NCCL": "2.27.3"},
            "environment": {},
            "limits": {"open_files": 65536, "locked_bytes": -1, "shm_free_bytes": 8 << 30, "infiniband": True},
            "address": "10.0.0.1",
            "gloo_interface": None,
            "network": host,
            "device": "cuda",
            "recipe_hash": "sha256:recipe",
            "data": {"problems": [], "identity": {"tokens": "sha256:data"}, "sampled_shards": 4, "bad_shards": []},
        }
        for key, value in (of_b if host == "b" else {}).items():
            plain[key] = plain[key] | value if isinstance(value, dict) else value
        return plain

    return {host: one(host) for host in "abcd"}


def test_equal_hosts_have_no_problem():
    assert host_problems(facts(), LAYOUT, 8, RANKS_OF) == []


@pytest.mark.parametrize(
    ("other", "check", "words"),
    [
        ({"code": {"commit": "2" * 40}}, "code", ["host b is at commit 2222222222, the majority at 1111111111"]),
        ({"code": {"files": {"recipes/x.py": "zz", "tools/y.py": "bb"}}}, "code", ["host b", "recipes/x.py", "3 of 4 hosts"]),
        ({"code": {"files": {"recipes/x.py": "aa"}}}, "code", ["host b", "tools/y.py"]),
        ({"versions": {"torch": "2.12.0"}}, "packages", ["host b has torch 2.12.0, 3 of 4 hosts have 2.13.0"]),
        ({"versions": {"torch": None}}, "packages", ["torch None", "2.13.0"]),
        ({"versions": {"python": "3.12.1"}}, "packages", ["python 3.12.1", "3.11.2"]),
        ({"environment": {"NCCL_ALGO": "Tree"}}, "environment", ["NCCL_ALGO Tree", "None"]),
        ({"recipe_error": "ImportError: no flash"}, "recipe", ["host b: ImportError: no flash"]),
        ({"recipe_hash": "sha256:other"}, "recipe", ["sha256:other", "3 of 4 hosts have sha256:recipe"]),
        ({"device": "cpu"}, "devices", ["the device cpu", "cuda"]),
        ({"device": "cpu", "unused_gpus": "nvidia-smi lists 8 GPUs, but torch none"}, "devices", ["8 GPUs, but torch none"]),
        ({"data": {"problems": ["data=tokens: shard x is missing"]}}, "data", ["host b: data=tokens: shard x is missing"]),
        ({"data": {"identity": {"tokens": "sha256:old"}}}, "data", ["has tokens/dataset.json sha256:old", "sha256:data"]),
        ({"data": {"bad_shards": ["train_00003.bin has sha256:1"]}}, "data", ["host b: train_00003.bin has sha256:1"]),
        ({"limits": {"open_files": 512}}, "limits", ["host b: 512 open files are allowed, 8 ranks need"]),
        ({"limits": {"shm_free_bytes": 64 << 20}}, "limits", ["67.1 MB free in /dev/shm"]),
        ({"limits": {"locked_bytes": 65536}}, "limits", ["65.5 kB of memory may be locked"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_one_host_that_differs_is_named(other, check, words):
    problems = host_problems(facts(**other), LAYOUT, 8, RANKS_OF)
    assert [(problem.check, problem.hosts) for problem in problems] == [(check, ("b",))]
    assert all(word in problems[0].message for word in words) and problems[0].cure


def test_a_name_that_resolves_to_loopback_matters_between_machines_without_gpus():
    there = facts(address="127.0.1.1", device="cpu")
    assert ["GLOO_SOCKET_IFNAME" in problem.message for problem in host_problems(there, LAYOUT, 8, RANKS_OF)] == [False, True]
    there["b"]["gloo_interface"] = "eth0"
    assert [problem.check for problem in host_problems(there, LAYOUT, 8, RANKS_OF)] == ["devices"]
    one_machine = {host: one | {"device": "cpu", "network": "same", "address": "127.0.0.1"} for host, one in facts().items()}
    assert host_problems(one_machine, LAYOUT, 8, RANKS_OF) == []


def test_what_is_wrong_everywhere_blames_no_host():
    everywhere = {host: one | {"recipe_error": "ImportError: x"} for host, one in facts().items()}
    problems = host_problems(everywhere, LAYOUT, 8, RANKS_OF)
    assert [problem.hosts for problem in problems] == [()] and problems[0].message.startswith(
        "all 4 hosts; on host a: ImportError"
    )


def test_of_two_hosts_that_differ_rank_0s_is_taken_for_right():
    assert majority({"a": 1, "b": 2}) == 1
    assert majority({"a": 1, "b": 2, "c": 2}) == 2


@pytest.mark.parametrize(
    ("seconds", "hosts"),
    [
        ({"a": 0, "b": 0.2, "c": -0.3, "d": 0.1}, []),
        ({"a": 0, "b": 4.0, "c": 0, "d": 0}, ["b"]),
        ({"a": 0, "b": -4.0}, ["b"]),
        ({"a": 0, "b": 4.0, "c": 4.1, "d": 4.2}, ["a"]),  # rank 0's own clock is the wrong one
    ],
)
def test_a_skewed_clock_is_named(seconds, hosts):
    notes = clock_notes({host: {"offset": value, "uncertainty": 0.01} for host, value in seconds.items()})
    assert [note.split(" is ")[0] for note in notes] == [f"the clock of host {host}" for host in hosts]


def test_a_clock_is_not_blamed_for_a_slow_answer():
    assert clock_notes({"a": {"offset": 0.0, "uncertainty": 0.0}, "b": {"offset": 1.5, "uncertainty": 0.6}}) == []


def stored(**of_b):
    plain = {"sees_word": True, "free_bytes": 100 * GB, "write_bytes_per_second": GB}
    return {host: plain | (of_b if host == "b" else {}) for host in "abcd"}


@pytest.mark.parametrize(
    ("of_b", "unseen", "check", "words"),
    [
        ({"sees_word": False, "write_bytes_per_second": None}, [], "shared storage", "host b: its /out is not rank 0's"),
        ({}, ["b"], "shared storage", "host b: its /out is not rank 0's"),
        ({"write_error": "No space left on device (errno 28)", "write_bytes_per_second": None}, [], "storage", "No space left"),
        ({"free_bytes": 3 * GB}, [], "storage", "3.0 GB free at /out"),
        (
            {"write_bytes_per_second": 0.1 * GB},
            [],
            "storage speed",
            "writes 100.0 MB/s to /out, the median of 4 hosts is 1.0 GB/s",
        ),
    ],
    ids=["word not seen", "answer not seen", "full", "little room", "slow"],
)
def test_a_hosts_storage_is_named(of_b, unseen, check, words):
    problems = storage_problems(stored(**of_b), unseen, 50 * GB, "/out")
    assert [(problem.check, problem.hosts) for problem in problems] == [(check, ("b",))]
    assert words in problems[0].message
    assert storage_problems(stored(), [], 50 * GB, "/out") == []


def test_too_little_room_for_all_blames_no_host():
    problems = storage_problems(stored(), [], 500 * GB, "/out")
    assert [problem.hosts for problem in problems] == [()] and "need 500.0 GB" in problems[0].message


def test_room_is_asked_for_every_kept_checkpoint_and_the_one_being_written():
    assert bytes_needed(10, AdamW(lr=1.0), keep_last=3, already=0) == 4 * 10 * 12
    assert bytes_needed(10, SGD(lr=1.0), keep_last=1, already=30) == 2 * 10 * 4 - 30
    assert bytes_needed(10, SGD(lr=1.0, momentum=0.9), keep_last=1, already=10**6) == 0


def devices(**of_2):
    plain = {rank: {"name": "H100", "uuid": f"uuid{rank}"} for rank in range(8)}
    return plain | {2: plain[2] | of_2}


SMI = [[f"GPU-uuid{rank}", "H100", "550.1", "4", "81559"] for rank in range(8)]


def smi(rows=SMI, ecc="0", busy=(), xid=()):
    health = [[row[0], ecc if row[0] == "GPU-uuid2" else "0", "No", "[N/A]", "0"] for row in rows]
    found = parse_gpus(rows, health)
    quiet = found | {"busy": {}, "xid": []}
    return dict.fromkeys("acd", quiet) | {"b": found | {"busy": parse_apps(list(busy)), "xid": list(xid)}}


def test_healthy_gpus_have_no_problem():
    assert device_problems(devices(), smi(), HOSTS) == []


@pytest.mark.parametrize(
    ("of_2", "nvidia", "words"),
    [
        ({"error": "LOCAL_RANK=2 but 1 GPUs are visible"}, smi(), "rank 2 on host b: LOCAL_RANK=2 but 1 GPUs are visible"),
        ({"uuid": "uuid3"}, smi(), "ranks 2-3 on host b share GPU uuid3"),
        ({"name": "A100"}, smi(), "rank 2 on host b: the device is A100, the majority's is H100"),
        ({}, smi(ecc="3"), "GPU-uuid2: uncorrected ECC errors"),
        ({}, smi(busy=[["GPU-uuid2", "4711"]]), "GPU-uuid2 is used by processes 4711"),
        ({}, smi(xid=["NVRM: Xid (PCI:0000:3b:00): 79, GPU has fallen off the bus."]), "Xid (PCI:0000:3b:00): 79"),
    ],
    ids=["not visible", "shared", "another kind", "ECC", "busy", "Xid"],
)
def test_a_gpu_is_named_with_its_host(of_2, nvidia, words):
    found = devices(**of_2)
    if "error" in of_2:
        found[2] = of_2
    problems = device_problems(found, nvidia, HOSTS)
    assert [problem.hosts for problem in problems] == [("b",)]
    assert words in problems[0].message


def test_memory_in_use_another_driver_and_only_our_own_gpus_count():
    rows = [[*row[:3], "9000", row[4]] if row[0] == "GPU-uuid6" else row for row in SMI]
    taken = device_problems(devices(), {"d": parse_gpus(rows, None) | {"busy": {}, "xid": None}}, HOSTS)
    assert ["9000 MiB in use" in problem.message for problem in taken] == [True]
    old = parse_gpus([[*row[:2], "535.9", *row[3:]] for row in SMI], None) | {"busy": {}, "xid": None}
    assert ["the driver 535.9" in problem.message for problem in device_problems(devices(), smi() | {"b": old}, HOSTS)] == [True]
    unused = {"a": parse_gpus([["GPU-other", "H100", "550.1", "70000", "81559"]], None) | {"busy": {"GPU-other": [1]}, "xid": []}}
    assert device_problems(devices(), unused, HOSTS) == []


def test_kernel_messages_of_programs_faults_and_of_other_days_do_not_count():
    log = """[  100.5] NVRM: Xid (PCI:0000:3b:00): 79, old
[ 90000.25] usb 1-1: new device
[90001.25] NVRM: Xid (PCI:0000:3b:00): 48, new"""
    assert parse_xid(log, now=90_100.0) == ["NVRM: Xid (PCI:0000:3b:00): 48, new"]
    program = smi(xid=["NVRM: Xid (PCI:0000:3b:00): 31, a page fault of a program"])
    assert device_problems(devices(), program, HOSTS) == []


def products(**of_5):
    plain = {rank: {"flops_per_second": 600e12 + rank, "result": 42} for rank in range(8)}
    return plain | {5: plain[5] | of_5}


def test_a_slow_and_a_wrong_product_are_named():
    assert product_problems(products(), HOSTS, "cuda") == []
    slow = product_problems(products(flops_per_second=300e12), HOSTS, "cuda")
    assert [(problem.hosts, problem.ranks) for problem in slow] == [(("c",), (5,))]
    assert "300,000.0 GFLOP/s, the median of 8 ranks is 600,000.0 (50%; 85% is allowed)" in slow[0].message
    assert product_problems(products(flops_per_second=550e12), HOSTS, "cuda") == []
    wrong = product_problems(products(result=41), HOSTS, "cuda")
    assert [(problem.hosts, problem.ranks) for problem in wrong] == [(("c",), (5,))]


def groups(speeds, kind="tensor", operation="all_reduce"):
    """{ranks: GB/s} as Groups."""
    return [
        GroupResult(kind=kind, operation=operation, ranks=ranks, bus_bytes_per_second=speed * GB, wrong={})
        for ranks, speed in speeds.items()
    ]


TENSOR = {(0, 1): 200.0, (2, 3): 200.0, (4, 5): 205.0, (6, 7): 198.0}


def test_a_slow_group_names_its_host_with_the_median_of_the_others():
    assert collective_problems(groups(TENSOR), HOSTS, judge_speed=True) == []
    slow = collective_problems(groups(TENSOR | {(2, 3): 20.0}), HOSTS, judge_speed=True)
    assert [problem.hosts for problem in slow] == [("b",)]
    assert "1 of 4 tensor groups are slow in all_reduce" in slow[0].message
    assert "20.0 GB/s, the median of the others is 200.0 GB/s" in slow[0].message
    assert collective_problems(groups(TENSOR | {(2, 3): 20.0}), HOSTS, judge_speed=False) == []


def test_a_host_whose_links_are_slow_on_both_sides_is_told_from_its_neighbours():
    for ring in (
        {(0, 2): 5.0, (2, 4): 5.0, (4, 0): 50.0},
        {(0, 2): 5.0, (2, 4): 5.0, (4, 6): 50.0, (6, 0): 50.0},
    ):
        found = collective_problems(groups(ring, "hosts", "send_recv"), HOSTS, judge_speed=True)
        assert [problem.hosts for problem in found] == [("b",)]


def test_hosts_that_explain_as_much_are_not_blamed():
    assert culprits([(0, 2)], [(4, 6)], HOSTS) == ()
    assert culprits([(0, 2)], [(0, 4)], HOSTS) == ("b",)
    assert culprits([(0, 2), (2, 4)], [(6, 7)], HOSTS) == ("b",)
    assert culprits([(0, 1), (2, 3)], [(4, 5)], HOSTS) == ("a", "b")
    assert culprits([(0, 1)], [], HOSTS) == ()


def test_a_wrong_result_names_who_saw_it_or_the_group():
    good = groups(TENSOR)
    one = [replace(good[1], wrong={3: "element 7 is 5 instead of 4"}), good[0], *good[2:]]
    problem = collective_problems(one, HOSTS, judge_speed=True)[0]
    assert problem.hosts == ("b",) and problem.ranks == (3,)
    assert problem.message == "all_reduce among tensor ranks 2-3 is wrong: on rank 3 on host b element 7 is 5 instead of 4"
    both = [replace(good[1], wrong={2: "x", 3: "x"}), good[0], *good[2:]]
    assert collective_problems(both, HOSTS, judge_speed=True)[0].hosts == ("b",)


def test_a_group_is_as_fast_as_its_slowest_rank():
    measured = {"kind": "data", "operation": "all_reduce", "ranks": [0, 1], "seconds": 1.0, "wrong": None}
    merged = merge_groups({0: [measured | {"bus_bytes_per_second": 9.0}], 1: [measured | {"bus_bytes_per_second": 4.0}]})
    assert [(one.ranks, one.bus_bytes_per_second, one.wrong) for one in merged] == [((0, 1), 4.0, {})]
    assert usual_speed(merged[0], merged) is None


@pytest.mark.parametrize("count", [2, 3, 4, 5, 8, 9])
@pytest.mark.parametrize("closed", [False, True])
def test_pairs_cover_every_neighbour_and_no_turn_uses_a_place_twice(count, closed):
    if closed and count < 3:
        return
    found = pairs(count, closed=closed)
    assert sorted((one, other) for one, other, _ in found) == sorted((i, (i + 1) % count) for i in range(count - (not closed)))
    for turn in range(3):
        used = [place for one, other, when in found if when == turn for place in (one, other)]
        assert len(used) == len(set(used))


def joined(rank, hostname, node, size=2):
    return RankInfo(rank=rank, local_rank=rank % 2, local_size=size, node=node, hostname=hostname, network="n")


def test_a_missing_ranks_host_is_told_by_the_flag_or_by_its_neighbours():
    here = {0: joined(0, "x", 0), 1: joined(1, "x", 0), 3: joined(3, "y", 1)}
    assert host_names(here, 6, []) == ["x", "x", "y", "y", "(node 2)", "(node 2)"]
    assert host_names(here, 6, [("a", 4), ("b", 2)]) == ["a"] * 4 + ["b"] * 2
    assert host_names({0: joined(0, "x", 0, size=0)}, 2, []) == ["x", "(unknown)"]
    twice = {0: joined(0, "x", 0), 1: joined(1, "x", 0), 2: joined(2, "x", 1), 3: joined(3, "x", 1)}
    assert host_names(twice, 4, []) == ["x#0", "x#0", "x#1", "x#1"]


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (0, 0, 0, None)),
        ({"RANK": "9", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8", "GROUP_RANK": "1"}, (9, 1, 8, 1)),  # torchrun
        ({"RANK": "9", "LOCAL_RANK": "1", "LOCAL_SIZE": "8", "CROSS_RANK": "1"}, (9, 1, 8, 1)),  # DeepSpeed's launcher
        ({"RANK": "9", "LOCAL_RANK": "1", "SLURM_NTASKS_PER_NODE": "8", "SLURM_NODEID": "1"}, (9, 1, 8, 1)),  # srun
    ],
    ids=["python", "torchrun", "deepspeed", "srun"],
)
def test_a_rank_knows_its_place_under_every_launcher(environment, expected):
    me = this_rank(environment)
    assert (me.rank, me.local_rank, me.local_size, me.node) == expected


def test_variables_that_name_a_hosts_own_interface_may_differ():
    assert environment_of_interest({"NCCL_IB_HCA": "mlx5_0", "NCCL_ALGO": "Ring", "PATH": "/bin"}) == {"NCCL_ALGO": "Ring"}


def test_spans_and_blame_in_words():
    assert span([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8"
    told = by_host("data", {"b": "x"}, ["a", "b"], "cure it")
    assert [str(problem) for problem in told] == ["data: host b: x; cure it"]


def test_the_report_counts_each_bad_host_once():
    problems = tuple(Problem(check="c", hosts=hosts, message="m", cure="k") for hosts in (("b",), (), ("d", "b")))
    report = with_exit_code(PreflightReport(recipe="r", world_size=8, hosts=("a", "b", "c", "d"), exit_code=0, problems=problems))
    assert (report.exit_code, report.bad_hosts) == (1, ["b", "d"])
    assert as_text(report).splitlines()[-1] == "bad hosts: b, d"
    assert with_exit_code(replace(report, problems=())).exit_code == 0
