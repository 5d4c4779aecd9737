"""Whose processor it is, as Linux tells it."""

import pytest

from recipes.common.runtime.processor import is_intel


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
