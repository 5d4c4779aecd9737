"""Real ranks check each other: a good job passes, and each planted fault is found, with the host that has it."""

import json
import os
import resource
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from recipes.common.recipe import Layout
from recipes.common.runtime.network import free_port
from tests.support.launched import copy_repository
from tests.support.small_runs import call
from tests.support.tiny import ROOT
from tools.common.forked_ranks import run_ranks
from tools.preflight import __main__ as preflight
from tools.preflight import communication, compute, coordinator, host_facts, rank_checks, rendezvous, storage

HOSTS = "a:1,b:1,c:1,d:1"
RECIPE = str(ROOT / "recipes" / "quickstart.py")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """The quickstart on tiny data of its own."""
    return str(copy_repository(tmp_path_factory.mktemp("preflight")))


def look(faults, *flags, ranks=4):
    """Return (exit code, report) of a preflight on forked ranks; faults: {rank: what is planted in it}."""
    answers = run_ranks(_look, ranks, faults, [str(flag) for flag in flags])
    codes = {code for code, _ in answers}
    assert len(codes) == 1, "every rank exits with the code of the report"
    return codes.pop(), json.loads(answers[0][1])


def _look(faults, flags):
    # a launcher would have started this process: run_rank then prints, and gives its text as well
    rank = int(os.environ["RANK"])
    storage.MOST_BYTES = storage.LEAST_BYTES  # quicker
    faults.get(rank, lambda: None)()
    return preflight.run_rank(preflight.parse_args([*flags, "--json"]))


def test_a_good_job_passes(recipe, tmp_path):
    code, found = look({}, recipe, "--out-dir", tmp_path / "out", "--hosts", "a,b")
    assert (code, found["passed"], found["problems"], found["bad_hosts"]) == (0, True, [], [])
    assert found["hosts"] == ["a", "b"] and found["world_size"] == 4 and found["layout"]["tensor"] == 2
    measured = {(group["kind"], group["operation"], tuple(group["ranks"])) for group in found["groups"]}
    reduced = {("tensor", operation, ranks) for operation in ("all_reduce", "all_gather") for ranks in ((0, 1), (2, 3))}
    assert measured == reduced | {("pipeline", "send_recv", (0, 2)), ("pipeline", "send_recv", (1, 3))}
    assert all(group["bus_bytes_per_second"] > 0 for group in found["groups"])
    shares = [row["share"] for row in found["rows"]]
    assert sorted(row["rank"] for row in found["rows"]) == [0, 1, 2, 3] and shares == sorted(shares)
    assert list((tmp_path / "out").iterdir()) == [], "nothing is left in the output folder"


def other_code():
    host_facts.git_state = lambda: {"commit": "f" * 40, "dirty": True}
    hashes = host_facts.source_hashes
    host_facts.source_hashes = lambda root: hashes(root) | {"recipes/common/parallel/cross_entropy.py": "changed"}


def other_package():
    versions = host_facts.package_versions
    host_facts.package_versions = lambda: versions() | {"transformers": "4.57.0"}


def clock_ahead():
    rendezvous.time = SimpleNamespace(time=lambda: time.time() + 90, monotonic=time.monotonic, sleep=time.sleep)


def full_disk():
    """The kernel lets this process write no file of more than a megabyte."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))


def few_files():
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))


def slow_rank():
    """Each product is computed eight times."""
    timed = compute._timed

    def slowly(left, right):
        return sum(timed(left, right) for _ in range(8))

    compute._timed = slowly


def wrong_sums():
    """One element of what this rank gets from an all_reduce is off by one."""
    all_reduce = dist.all_reduce

    def damaged(tensor, **options):
        all_reduce(tensor, **options)
        if tensor.numel() > 7:  # not of a group's first message, which has one
            tensor[7] += 1

    dist.all_reduce = damaged


def other_products():
    facts = compute.product_facts
    rank_checks.product_facts = lambda device: facts(device) | {"result": 1}


def other_environment():
    os.environ["NCCL_ALGO"] = "Tree"


@pytest.fixture(scope="module")
def many_faults(recipe, tmp_path_factory):
    """One run with something wrong on three of four hosts."""

    def on_b():
        other_code(), other_package(), clock_ahead()

    def on_c():
        full_disk(), few_files(), wrong_sums()

    def on_d():
        slow_rank(), other_products(), other_environment()

    out = tmp_path_factory.mktemp("many") / "out"
    return look({1: on_b, 2: on_c, 3: on_d}, recipe, "--out-dir", out, "--hosts", HOSTS)


@pytest.mark.parametrize(
    ("check", "host", "words"),
    [
        ("code", "b", ["commit ffffffffff", "in recipes/common/parallel/cross_entropy.py", "3 of 4 hosts"]),
        ("packages", "b", ["transformers 4.57.0, 3 of 4 hosts have "]),
        ("storage", "c", ["File too large"]),
        ("limits", "c", ["200 open files are allowed, 4 ranks need "]),
        ("communication", "c", ["all_reduce among tensor ranks 2-3 is wrong", "rank 2 on host c element 7 is"]),
        ("compute", "d", ["rank 3 on host d multiplies", "the median of 4 ranks"]),
        ("compute", "d", ["rank 3 on host d computes another product"]),
        ("environment", "d", ["NCCL_ALGO Tree, 3 of 4 hosts have None"]),
    ],
)
def test_each_of_many_faults_is_named_with_its_host(many_faults, check, host, words):
    code, found = many_faults
    assert code == 1 and not found["passed"]
    matching = [one for one in found["problems"] if one["check"] == check and all(word in one["message"] for word in words)]
    assert [one["hosts"] for one in matching] == [[host]], found["problems"]
    assert matching[0]["cure"]


def test_nothing_else_is_told_and_the_good_host_is_not_blamed(many_faults):
    _, found = many_faults
    assert len(found["problems"]) == 8, found["problems"]
    assert sorted(found["bad_hosts"]) == ["b", "c", "d"]


def test_a_clock_that_is_ahead_is_noted_and_excludes_no_host(many_faults):
    _, found = many_faults
    assert [note.split(":")[0] for note in found["notes"] if "clock" in note] == [
        "the clock of host b is 90.0 s ahead of the others'"
    ]


def test_a_folder_that_is_not_shared_is_found(recipe, tmp_path):
    """A relative folder, and one host that starts elsewhere."""

    def elsewhere():
        (tmp_path / "elsewhere").mkdir()
        os.chdir(tmp_path / "elsewhere")
        storage.SEEN_SECONDS = 0.1  # the word is not to come

    code, found = look({0: lambda: os.chdir(tmp_path), 1: elsewhere}, recipe, "--out-dir", "out", "--hosts", "a,b", ranks=2)
    assert code == 1 and found["bad_hosts"] == ["b"]
    assert [one["check"] for one in found["problems"]] == ["shared storage"]
    assert not (tmp_path / "elsewhere" / "out").exists()


def test_a_damaged_shard_is_found_and_blames_no_host(tmp_path):
    damaged = copy_repository(tmp_path)
    shard = tmp_path / "data" / "train_00000.bin"
    content = bytearray(shard.read_bytes())
    content[1000] ^= 1
    shard.write_bytes(content)
    code, found = look({}, damaged, "--out-dir", tmp_path / "out", "--hosts", "a,b", ranks=2)
    assert (code, found["bad_hosts"]) == (1, [])
    assert [one["check"] for one in found["problems"]] == ["data"]
    assert "train_00000.bin has sha256:" in found["problems"][0]["message"]


def test_a_rank_that_never_joins_is_named_with_its_host(recipe, tmp_path):
    answers = run_ranks(_look_without, 4, [3], recipe, str(tmp_path))
    found = json.loads(answers[0][1])
    assert [code for code, _ in answers] == [1, 1, 1, None]
    assert found["bad_hosts"] == ["d"] and found["seconds"]["joining"] < 5
    assert "rank 3 on host d" in found["problems"][0]["message"]
    assert json.loads((tmp_path / "report.json").read_text()) == found


def _look_without(absent, recipe, folder):
    if int(os.environ["RANK"]) in absent:
        return None, None
    return _look(
        {}, [recipe, "--out-dir", folder, "--hosts", HOSTS, "--join-seconds", "2", "--json-file", f"{folder}/report.json"]
    )


def test_a_rank_that_hangs_in_a_collective_does_not_hang_the_rest(recipe, tmp_path):
    """One that never ends: `run_ranks` would give up, and raise."""

    def hang():
        communication._all_reduce = lambda *_: threading.Event().wait()

    code, found = look({3: hang}, recipe, "--out-dir", tmp_path, "--hosts", HOSTS, "--step-seconds", "5")
    assert code == 1
    stuck = [one for one in found["problems"] if one["check"] == "communication"]
    hanging = next(one for one in stuck if 3 in one["ranks"])
    assert hanging["ranks"] == [2, 3] and "did not end within 5 s, the last begun: tensor all_reduce" in hanging["message"]
    waiting = next(one for one in stuck if 0 in one["ranks"])
    assert waiting["ranks"] == [0, 1] and waiting["message"].endswith("the last begun: the wait for all tensor groups")


def test_a_rank_that_ends_on_the_way_is_named(recipe, tmp_path):
    """It joins and says no more: the process is gone, or stopped."""

    def leave():
        preflight.run_checks = lambda *_: 1

    def impatient():
        coordinator.GRACE_SECONDS = 1.0

    code, found = look({0: impatient, 3: leave}, recipe, "--out-dir", tmp_path, "--hosts", HOSTS, "--step-seconds", "4")
    assert (code, found["bad_hosts"]) == (1, ["d"])
    assert [one["check"] for one in found["problems"]] == ["host facts"]
    assert "rank 3 on host d did not report within 5 s" in found["problems"][0]["message"]


def test_bandwidth_counts_the_ranks_of_the_group():
    for rank, facts in enumerate(run_ranks(_collectives, 4)):
        by_operation = {(one["kind"], one["operation"]): one for one in facts}
        size = communication.BYTES["cpu"]
        expected = {("data", "all_reduce"): 2 * 3 / 4 * size, ("data", "all_gather"): 3 / 4 * size}
        assert set(by_operation) == {*expected, ("hosts", "send_recv")}
        for key, passed in expected.items():
            one = by_operation[key]
            assert one["bus_bytes_per_second"] * one["seconds"] == pytest.approx(passed)
            assert tuple(one["ranks"]) == (0, 1, 2, 3) and one["wrong"] is None
        rings = [set(one["ranks"]) for one in facts if one["kind"] == "hosts"]
        assert rings == [{rank, rank ^ 1}, {rank, (rank + (1 if rank % 2 else -1)) % 4}]
        assert all(one["bus_bytes_per_second"] * one["seconds"] == pytest.approx(size) for one in facts if one["kind"] == "hosts")


def _collectives():
    dist.init_process_group("gloo")
    return communication.collective_facts(Layout(), torch.device("cpu"), [0, 1, 2, 3], [])


def test_the_process_group_is_started_as_training_starts_it(monkeypatch):
    """On NCCL too, without a device: the streams that are measured are those of training."""
    asked = {}
    monkeypatch.setattr(
        communication.dist, "init_process_group", lambda backend, **options: asked.update(options, backend=backend)
    )
    communication.join_group(None, 3, 8, torch.device("cuda", 3), 5.0)
    assert asked["backend"] == "nccl" and (asked["rank"], asked["world_size"]) == (3, 8)
    assert "device_id" not in asked


def test_it_starts_ranks_itself_and_prints_a_table(recipe, tmp_path):
    called = call("preflight", recipe, "--processes", 2, "--out-dir", tmp_path)
    assert called.code == 0
    title, header, *rows = called.out.splitlines()
    assert title == "quickstart: 2 ranks on 1 host, tensor 1 x pipeline 2 x data 1"
    assert header.split() == ["rank", "host", "placement", "of", "median", "product", "pipeline", "write", "clock"]
    assert sorted(row.split()[0] for row in rows[:2]) == ["0", "1"]
    assert rows[-1] == "passed"


def test_a_launcher_starts_it_like_a_recipe_from_any_folder(recipe, tmp_path):
    """By what a launcher tells each of its ranks; torchrun itself: tests/test_entrypoints.py."""
    words = [ROOT / "tools" / "preflight" / "__main__.py", recipe, "--out-dir", tmp_path / "out", "--resume", "--json"]
    told = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    environment = os.environ | {name: str(value) for name, value in told.items()}
    done = subprocess.run([sys.executable, *map(str, words)], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["passed"] and found["world_size"] == 1


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["none.py"], "there is no such file"),
        ([RECIPE, "--processes", "3"], "layouts has no entry for 3 GPUs"),
        ([RECIPE, "--hosts", "a,b"], "must add up to 1"),
        ([RECIPE, "--hosts", "a:1,a:1"], "names a host twice"),
        ([RECIPE, "--hosts", "a:1,A.:1"], "names a host twice"),
        ([RECIPE, "--json-file", "/proc/nowhere/v.json"], "--json-file=/proc/nowhere/v.json cannot be written"),
        ([RECIPE, "--step-seconds", "0"], "--step-seconds=0.0 must be over 0"),
    ],
    ids=["no file", "no layout", "hosts do not add up", "a host twice", "by two names", "no file to write", "no time"],
)
def test_a_mistake_of_the_user_is_exit_2_and_one_message(words, part, tmp_path):
    called = call("preflight", *words, "--out-dir", tmp_path)
    assert (called.code, called.out) == (2, "")
    assert part in called.err and "Traceback" not in called.err
