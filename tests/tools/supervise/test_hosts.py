"""Which hosts take part in an attempt."""

import re

import pytest

from recipes.common.recipe import ROOT
from tools.common.console import UsageError
from tools.supervise.hosts import IMPORTS_FROM_ABOVE, RecipeFacts, choose_hosts, read_hostfile, read_recipe, refuse_misplaced


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


def test_a_recipe_is_read_from_its_source(tmp_path):
    assert read_recipe(ROOT / "recipes/quickstart.py") == RecipeFacts("quickstart", (1, 2, 4, 8))
    own = tmp_path / "own.py"
    own.write_text("recipe = Recipe(name=NAME, layouts=make())")
    assert read_recipe(own) == RecipeFacts(None, None)
    own.write_text("recipe = (")
    with pytest.raises(UsageError, match=r"own.py is not a recipe"):
        read_recipe(own)


def test_a_recipe_runs_only_where_it_finds_what_it_imports(tmp_path, monkeypatch):
    monkeypatch.delenv("PYTHONPATH", raising=False)
    shelf = [path for path in (ROOT / "recipes").glob("*.py") if path.stem != "__init__"]
    for path in shelf:
        assert path.read_text().count(f"\n    {IMPORTS_FROM_ABOVE}\n") == 1, path
        refuse_misplaced(path, "")
    (tmp_path / "link.py").symlink_to(shelf[0])
    refuse_misplaced(tmp_path / "link.py", "")
    mine = tmp_path / "folder" / "mine.py"
    mine.parent.mkdir()
    mine.write_text(shelf[0].read_text())
    refuse_misplaced(mine, f"/none:{ROOT}")
    with pytest.raises(UsageError) as error:
        refuse_misplaced(mine, "/none")
    why = f"it imports recipes.common from the folder above its own, and {tmp_path} has none"
    assert str(error.value) == f"{mine} cannot run where it lies: {why}; copy it into {ROOT / 'recipes'}"
    with pytest.raises(UsageError, match="cannot run where it lies"):
        read_recipe(mine)
    mine.write_text("from elsewhere import recipe\n")
    refuse_misplaced(mine, "")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# none\n\n", "names no host; write lines of `HOST slots=N`"),
        ("a slots=2\na slots=2\n", "line 2: 'a slots=2' must be `HOST slots=N`, each host once"),
        ("a slots=2\nA. slots=2\n", "line 2: 'A. slots=2' must be `HOST slots=N`, each host once"),
        ("a 2x\n", "line 1: 'a 2x' must be"),
        ("a slots=0\n", "line 1: 'a slots=0' must be"),
        ("a slots=٣\n", "line 1: 'a slots=٣' must be"),
        ("-oProxyCommand=reboot slots=2\nb slots=1\n$(reboot) slots=1\n", "line 1: '-oProxyCommand=reboot' is no host name"),
        ("a slots=1\n`x` slots=1\n;x slots=1", "line 3: ';x' is no host name"),  # all at once
        ("root@a slots=2\n", "line 1: 'root@a' names a user; write the host alone, and `Host a` with `User` in ~/.ssh/config"),
        ("a[1-3] slots=2\n", "is no host name"),
        ("a:22 slots=2\n", "ports belong into ~/.ssh/config"),
        ("ä slots=2\n", "is no host name"),
    ],
)
def test_a_wrong_hostfile_is_refused(tmp_path, text, message):
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(UsageError, match=re.escape(message)):
        read_hostfile(tmp_path / "hosts")


def test_names_and_addresses_of_hosts_are_read(tmp_path):
    (tmp_path / "hosts").write_text("node-1.gpu_rack.example.com slots=8\n10.0.0.2   slots=4 # a remark\n")
    assert read_hostfile(tmp_path / "hosts") == {"node-1.gpu_rack.example.com": 8, "10.0.0.2": 4}
    (tmp_path / "hosts").write_bytes(b"\xff\xfe slots=2\n")
    with pytest.raises(UsageError, match="it is not a text"):
        read_hostfile(tmp_path / "hosts")
