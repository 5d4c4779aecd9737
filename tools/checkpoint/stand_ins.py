"""Stand-ins for the classes in DeepSpeed's files: they take what the pickle sets, run nothing, and are of no use but to be read.

torch's restricted reader (weights_only) refuses every name that is not listed here. What users put into client_state most is:
the command line (argparse.Namespace), paths, times, and numbers and arrays of numpy.
"""

from __future__ import annotations

import struct
from typing import Any

_FORMATS = {
    "f8": "d",
    "f4": "f",
    "i8": "q",
    "i4": "i",
    "i2": "h",
    "i1": "b",
    "u8": "Q",
    "u4": "I",
    "u2": "H",
    "u1": "B",
    "b1": "?",
}


class Inert:
    """Stands in for a class: takes what the file sets, and does nothing."""

    numel: int
    start: int

    def __new__(cls, *args: Any, **fields: Any) -> Inert:
        return super().__new__(cls)

    def __init__(self, *args: Any, **fields: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)


class InertNumber(int):
    """Stands in for a DeepSpeed enumeration."""


class NumpyType(Inert):
    """Stands in for numpy.dtype."""

    def __init__(self, code: Any = "", *args: Any) -> None:
        self.code, self.order = code, "<"

    def __setstate__(self, state: Any) -> None:
        self.order = ">" if isinstance(state, tuple) and ">" in state[1:2] else "<"


def numpy_scalar(kind: Any = None, raw: Any = b"") -> Any:
    """Stand in for numpy's function that makes a number of its bytes: return Python's, or nothing that can be used."""
    letter = _FORMATS.get(kind.code) if isinstance(kind, NumpyType) and isinstance(kind.code, str) else None
    if letter is None or not isinstance(raw, bytes) or len(raw) != struct.calcsize(f"={letter}"):
        return Inert()
    return struct.unpack(kind.order + letter, raw)[0]


_INERT = (
    "deepspeed.utils.tensor_fragment.fragment_address",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "argparse.Namespace",
    "types.SimpleNamespace",
    "pathlib.Path",
    "pathlib.PosixPath",
    "pathlib.PurePosixPath",
    "pathlib.WindowsPath",
    "pathlib.PureWindowsPath",
    "pathlib._local.PosixPath",
    "datetime.datetime",
    "datetime.date",
    "datetime.time",
    "datetime.timedelta",
    "datetime.timezone",
    "numpy.ndarray",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct",
)
STAND_INS = [
    *((Inert, name) for name in _INERT),
    (InertNumber, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (NumpyType, "numpy.dtype"),
    *((numpy_scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
]
