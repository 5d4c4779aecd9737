"""Reads the shelf, the table of recipes/README.md. A recipe that is not in it is nobody's promise."""

import re

from recipes.common.recipe import ROOT


def read_shelf() -> dict[str, tuple[str, str]]:
    """Return {recipe on the shelf: (parameters, layouts), as written}."""
    text = (ROOT / "recipes" / "README.md").read_text()
    section = re.search(r"^## The shelf\n(.*?)^## ", text, flags=re.M | re.S)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section[1].splitlines() if line.startswith("| `")]
    return {name.strip("`"): (params, layouts) for name, params, layouts, *_ in rows}
