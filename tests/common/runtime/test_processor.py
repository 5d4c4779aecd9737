"""Whose processor it is, as Linux tells it, and which library its products are left to."""

import pytest
import torch

from recipes.common.runtime import processor
from recipes.common.runtime.processor import is_intel, onednn_is_faster


@pytest.mark.parametrize(
    ("text", "intel"),
    [
        ("processor\t: 0\nvendor_id\t: GenuineIntel\ncpu family\t: 6\n", True),
        ("processor\t: 0\nvendor_id\t: AuthenticAMD\nmodel name\t: no GenuineIntel\n", False),
        ("processor\t: 0\nCPU implementer\t: 0x41\n", False),
    ],
)
def test_the_vendor_decides(tmp_path, text, intel):
    (tmp_path / "cpuinfo").write_text(text)
    assert is_intel(tmp_path / "cpuinfo") is intel


def test_a_machine_that_does_not_say_is_not(tmp_path):
    assert is_intel(tmp_path / "missing") is False


@pytest.mark.parametrize(
    ("capability", "intel", "faster"), [("AVX512", False, True), ("AVX512", True, False), ("AVX2", False, False)]
)
def test_onednn_is_chosen_where_mkl_leaves_avx_512_unused(monkeypatch, capability, intel, faster):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(processor, "is_intel", lambda: intel)
    assert onednn_is_faster.__wrapped__() is faster
