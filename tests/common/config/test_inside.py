"""A name in a list leads to a file in its folder, or is refused."""

from __future__ import annotations

import pytest

from recipes.common.config.inside import leads_out, outside


@pytest.mark.parametrize("name", ["/etc/passwd", "..", "../a", "a/../../b", "model/../a", "", "a\0b", None, 5, ["a"], {}])
def test_absolute_climbing_and_other_names_are_refused(tmp_path, name):
    assert leads_out(name) and outside(tmp_path, name) == leads_out(name)


def test_links_may_stay_inside_or_lead_to_the_blobs_of_their_own_hub_cache(tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "01" / "sub"
    blobs, other = tmp_path / "models--a--b" / "blobs", tmp_path / "models--c--d" / "blobs"
    for folder in (snapshot, blobs, other):
        folder.mkdir(parents=True)
    for path in (blobs / "x", other / "x", snapshot / "real", tmp_path / "out", tmp_path / "models--a--b" / "refs"):
        path.write_text("")
    links = {
        "to a blob": blobs / "x",
        "to a neighbour": snapshot / "real",
        "to another repository": other / "x",
        "out": tmp_path / "out",
        "beside the blobs": tmp_path / "models--a--b" / "refs",
        "in a circle": snapshot / "in a circle",
        "nowhere": tmp_path / "nowhere",
    }
    for name, target in links.items():
        (snapshot / name).symlink_to(target)
    (tmp_path / "linked").symlink_to(snapshot)
    for folder in (snapshot, tmp_path / "linked"):  # the folder itself may be a link
        good = {name for name in (*links, "real", "not there yet") if not outside(folder, name)}
        assert good == {"to a blob", "to a neighbour", "real", "not there yet"}
    (snapshot / "folder").symlink_to(tmp_path)
    assert "is a link to" in outside(snapshot, "folder/out")
