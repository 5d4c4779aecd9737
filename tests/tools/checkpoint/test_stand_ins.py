"""What users put into client_state is read without running anything; every other name in a pickle is refused."""

from __future__ import annotations

import argparse
import datetime
import os
import pathlib
import pickle
import subprocess
import types

import numpy as np
import pytest
import torch

from tools.checkpoint.deepspeed_files import load
from tools.checkpoint.deepspeed_folder import find_checkpoint
from tools.checkpoint.stand_ins import Inert
from tools.common.console import UsageError
from tools.common.forked_ranks import run_ranks

CLIENT = {
    "args": argparse.Namespace(lr=0.1, path=pathlib.Path("/data"), nested=types.SimpleNamespace(a=[1])),
    "loss": np.float64(1.5),
    "half": np.float32(0.25),
    "steps": np.int64(1_234_567_890_123),
    "flag": np.bool_(True),
    "big": np.frombuffer(b"\x00\x00\x01\x02", dtype=">i4")[0],
    "array": np.arange(6.0).reshape(2, 3),
    "objects": np.array([{"a": 1}], dtype=object),
    "time": datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC),
    "random": np.random.default_rng(0).integers(0, 9, 3),
}
VALUES = {"loss": 1.5, "half": 0.25, "steps": 1_234_567_890_123, "flag": True, "big": 258}


def _read_back(path: pathlib.Path) -> dict:
    torch.save(CLIENT | {"w": torch.arange(3.0)}, path)
    found = load(path)
    return {key: (type(value).__name__, value if key in VALUES else None) for key, value in found.items()}


def test_what_users_save_is_read_as_numbers_or_as_nothing(tmp_path):
    found = run_ranks(_read_back, 1, tmp_path / "a.pt")[0]
    assert {key: value for key, (_, value) in found.items() if key in VALUES} == VALUES
    assert {key for key, (kind, _) in found.items() if kind == "Inert"} == {"args", "array", "objects", "time", "random"}
    assert found["w"][0] == "Tensor"


class _Calls:
    def __init__(self, function, *args) -> None:
        self.called = function, args

    def __reduce__(self):
        return self.called


EVIL = {
    "a command": lambda path: _Calls(os.system, f"touch {path}"),
    "another": lambda path: _Calls(subprocess.check_call, ["touch", str(path)]),
    "a method of a path": lambda path: _Calls(pathlib.Path.touch, path),
    "eval": lambda path: _Calls(eval, f"open({str(path)!r}, 'w')"),
    "getattr": lambda path: _Calls(getattr, path, "touch"),
    "in a namespace": lambda path: argparse.Namespace(a=_Calls(os.system, f"touch {path}")),
    "in an array": lambda path: np.array([_Calls(os.system, f"touch {path}")], dtype=object),
    "in a state": lambda path: {"args": _Calls(os.mkdir, str(path))},
}


def _refusals(folder: pathlib.Path) -> list[str]:
    said = []
    for name, make in EVIL.items():
        for write in (torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))):
            write({"w": torch.ones(1), name: make(folder / "ran")}, folder / "evil.pt")
            try:
                load(folder / "evil.pt")
                said.append(f"{name} was loaded")
            except UsageError as error:
                said.append(str(error))
    return said


def test_nothing_else_is_loaded_and_nothing_runs(tmp_path):
    for said in run_ranks(_refusals, 1, tmp_path)[0]:
        assert "evil.pt: not a file of tensors that is safe to load" in said and "it was not loaded" in said
    assert not (tmp_path / "ran").exists()


def test_latest_leads_to_no_other_place(tmp_path):
    (tmp_path / "latest").write_text("../global_step1")
    with pytest.raises(UsageError, match=r"latest: '\.\./global_step1' leads out of the folder"):
        find_checkpoint(tmp_path)


@pytest.mark.parametrize("args", [(), ("f8",), (b"f8", False, True), ({},), (None, 1, 2, 3)])
def test_stand_ins_take_anything(args):
    one = Inert(*args)
    one.__setstate__(("x", None))
    one.__setstate__({"numel": 3})
    assert one.numel == 3
