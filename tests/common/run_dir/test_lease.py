"""One living process holds a folder: whoever else comes is refused with its name; the dead are taken over, and find it out."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from recipes.common.recipe import ROOT
from recipes.common.run_dir import lease as module
from recipes.common.run_dir.lease import LeaseHeldError, LeaseLostError, held, hold_run, take_lease

HOLD = """
import sys, time
from pathlib import Path
from recipes.common.run_dir.lease import take_lease
lease = take_lease(Path(sys.argv[1]), Path(sys.argv[1]), "job", "a run")
print(lease.token, flush=True)
time.sleep(60)
"""


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(module, "RENEW_SECONDS", 0.05)
    monkeypatch.setattr(module, "DEAD_SECONDS", 0.6)
    monkeypatch.setattr(module, "_POLL_SECONDS", 0.02)


def take(folder: Path) -> module.Lease:
    return take_lease(folder, folder, "job", "a run")


def elsewhere(folder: Path, **fields: object) -> tuple[Path, module.Holder]:
    """A lease of a process on another machine."""
    holder = module.Holder("a run", "far", "another boot", "pid:[1]", 77, "1", "5-abc", **fields)
    path = folder / "job.000005.json"
    path.write_bytes(module._encode(holder))
    return path, holder


def test_a_living_holder_is_named_and_a_released_or_dead_one_is_followed(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    first = child.stdout.readline().strip()
    with pytest.raises(LeaseHeldError, match=rf"^{tmp_path} is in use by a run \(process {child.pid} on "):
        take(tmp_path)
    child.send_signal(signal.SIGSTOP)  # does not renew, and lives
    with pytest.raises(LeaseHeldError, match=f"process {child.pid}"):
        take(tmp_path)
    child.kill()
    lease = take(tmp_path)  # though the child is a zombie
    child.wait()
    assert [token.split("-")[0] for token in (first, lease.token)] == ["1", "2"]
    lease.release()
    again = take(tmp_path)
    assert again.token.startswith("3-")
    again.release(keep=False)
    assert list(tmp_path.iterdir()) == []


def test_a_process_number_that_is_another_program_s_by_now_is_no_holder(tmp_path):
    lease = take(tmp_path)
    lease._stop.set()
    path = tmp_path / "job.000001.json"
    path.write_bytes(module._encode(replace(lease._holder, started="1")))
    take(tmp_path).release()


def test_a_holder_on_another_machine_lives_as_long_as_it_renews(tmp_path):
    path, holder = elsewhere(tmp_path)
    stop = threading.Event()

    def renew():
        for beats in range(1, 1000):
            path.write_bytes(module._encode(replace(holder, beats=beats)))
            if stop.wait(0.05):
                return

    thread = threading.Thread(target=renew)
    thread.start()
    with pytest.raises(LeaseHeldError, match=r"in use by a run \(process 77 on far\)"):
        take(tmp_path)
    stop.set()
    thread.join()
    began = time.monotonic()
    lease = take(tmp_path)
    assert time.monotonic() - began >= module.DEAD_SECONDS
    assert lease.token.startswith("6-") and not path.exists()
    lease.release()


@pytest.mark.parametrize("content", [b"", b"\0" * 1024, b"[]", b"{"], ids=["empty", "zeroed", "a list", "cut"])
def test_a_lease_that_cannot_be_read_holds_for_as_long_as_a_silent_one(tmp_path, content):
    (tmp_path / "job.000001.json").write_bytes(content)
    take(tmp_path).release()


def test_of_many_that_come_at_once_one_gets_it(tmp_path):
    elsewhere(tmp_path, released=True)
    got, refused = [], []

    def come():
        try:
            got.append(take(tmp_path))
        except LeaseHeldError as error:
            refused.append(error)

    threads = [threading.Thread(target=come) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(got), len(refused)) == (1, 11)
    got[0].confirm()
    got[0].release()


def test_a_holder_that_was_taken_over_finds_out(tmp_path):
    lease = take(tmp_path)
    lease.check()
    number, _, rest = lease.token.partition("-")
    other = replace(lease._holder, what="another run", host="far", token=f"{int(number) + 1}-{rest}")
    (tmp_path / "job.000002.json").write_bytes(module._encode(other))
    with pytest.raises(LeaseLostError, match="was taken over by another run"):
        lease.confirm()
    with pytest.raises(LeaseLostError):
        lease.check()
    lease.release()
    assert not json.loads((tmp_path / "job.000002.json").read_bytes())["released"]


def test_a_lease_whose_file_is_deleted_is_written_anew(tmp_path):
    folder = tmp_path / "lease"
    lease = take(folder)
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    lease.confirm()
    with pytest.raises(LeaseHeldError):
        take(folder)
    lease.release()
    take(folder).release()


def test_without_hard_links(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(PermissionError(1, "Operation not permitted")))
    with held(tmp_path, tmp_path, "job", "an export"), pytest.raises(LeaseHeldError, match="in use by an export"):
        take(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_run_in_a_folder_in_use_ends_with_code_2(tmp_path, capsys):
    words = []
    with hold_run(tmp_path, words.append), pytest.raises(SystemExit) as left, hold_run(tmp_path, words.append):
        pass
    assert (left.value.code, words) == (2, ["user_error"])
    assert f"error: --out-dir: {tmp_path} is in use by a run (process {os.getpid()} on " in capsys.readouterr().err
