"""Deduplication drops the same documents as a set of all of them."""

import numpy as np

from tools.data.dedup import document_hash, find_duplicates, read_drops, write_hashes


def test_small_buckets_find_the_same_duplicates(tmp_path):
    rng = np.random.default_rng(0)
    units = [[document_hash(bytes([i])) for i in rng.integers(0, 200, 300)] for _ in range(4)]
    found = []
    for name, bucket in (("one", 1 << 24), ("many", 10)):
        (tmp_path / name / "unfinished").mkdir(parents=True)
        for number, hashes in enumerate(units):
            write_hashes(tmp_path / name, number, hashes)
        assert find_duplicates(tmp_path / name, 4, bucket) == 1200 - len({value for unit in units for value in unit})
        found.append([read_drops(tmp_path / name, number) for number in range(4)])
    seen, oracle = set(), []
    for hashes in units:
        oracle.append({row for row, value in enumerate(hashes) if value in seen or seen.add(value)})
    assert found == [oracle, oracle]
