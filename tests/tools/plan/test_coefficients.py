"""A file of coefficients is read whole or not at all: no other numbers, no term more or less."""

import json
from pathlib import Path

import pytest

from tools.common.console import UsageError
from tools.plan.coefficients import SHIPPED, read_coefficients, write_coefficients

WRONG = {
    "time.gemm=nan must be a number over 0": lambda c: c["time"].update(gemm=float("nan")),
    "time.gemm=-1.0 must be a number over 0": lambda c: c["time"].update(gemm=-1.0),
    "time.gemm=True must be a number over 0": lambda c: c["time"].update(gemm=True),
    "memory.states=inf must be a number over 0": lambda c: c["memory"].update(states=float("inf")),
    "spread.memory='0.1' must be a number over 0": lambda c: c["spread"].update(memory="0.1"),
    "time.gemm is missing": lambda c: c["time"].pop("gemm"),
    "time.later is not known": lambda c: c["time"].update(later=1.0),
    "later is not known": lambda c: c.update(later=1.0),
    "memory is missing": lambda c: c.pop("memory"),
    "memory must be an object": lambda c: c.update(memory=[1.0]),
    "device_factor.H100=0 must be a number over 0": lambda c: c["device_factor"].update(H100=0),
    "layer_factor must be a list of [[number, ...], number over 0]": lambda c: c.update(layer_factor=[[[1.0], -1.0]]),
    "provenance must be an object": lambda c: c.update(provenance=[]),
    "time.head=None must be a number over 0; spread.time is missing": lambda c: (
        c["time"].update(head=None),
        c["spread"].pop("time"),
    ),
}


@pytest.mark.parametrize("problem", WRONG)
def test_numbers_that_no_fit_gives_are_named(problem: str, tmp_path: Path):
    content = json.loads(SHIPPED.read_text())
    WRONG[problem](content)
    file = tmp_path / "x.json"
    file.write_text(json.dumps(content))
    with pytest.raises(UsageError) as error:
        read_coefficients(file)
    assert str(error.value) == f"{file}: not a file of `plan calibrate` of this version: {problem}; write it again"


def test_a_key_given_twice_is_refused(tmp_path: Path):
    file = tmp_path / "x.json"
    file.write_text(SHIPPED.read_text().replace('"gemm"', '"gemm": 9.0, "gemm"'))
    with pytest.raises(UsageError) as error:
        read_coefficients(file)
    assert str(error.value) == f"{file}: no JSON: key given twice: ['gemm']; write it again with `plan calibrate`"


def test_what_is_written_is_read(tmp_path: Path):
    shipped = read_coefficients(None)
    write_coefficients(tmp_path / "x.json", shipped)
    assert json.loads((tmp_path / "x.json").read_text()) == json.loads(SHIPPED.read_text())
    assert vars(read_coefficients(tmp_path / "x.json")).keys() == vars(shipped).keys()
