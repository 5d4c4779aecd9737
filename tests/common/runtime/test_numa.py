"""A rank is bound beside its GPU where a host has several nodes, and left alone everywhere else."""

import os

import pytest

from recipes.common.runtime.numa import bind_beside, cpus_beside

GPU = "0000:3B:00.0"
EVERY = set(range(8))


def host(folder, nodes, gpu_node):
    """A /sys of nodes with these lists of processors."""
    for name, cpus in nodes.items():
        (folder / "devices/system/node" / name).mkdir(parents=True)
        (folder / "devices/system/node" / name / "cpulist").write_text(cpus + "\n")
    (folder / "bus/pci/devices" / GPU.lower()).mkdir(parents=True)
    (folder / "bus/pci/devices" / GPU.lower() / "numa_node").write_text(f"{gpu_node}\n")
    return folder


@pytest.mark.parametrize(
    ("nodes", "gpu_node", "allowed", "bound"),
    [
        ({"node0": "0-1,4-5", "node1": "2-3,6-7"}, 1, EVERY, {2, 3, 6, 7}),
        ({"node0": "0-1,4-5", "node1": "2-3,6,7"}, 0, EVERY, {0, 1, 4, 5}),
        ({"node0": "0-7"}, 0, EVERY, set()),  # one node
        ({"node0": "0-7", "node1": ""}, 1, EVERY, set()),  # a node of memory alone, such as a GPU's
        ({"node0": "0-3", "node1": "4-7"}, -1, EVERY, set()),  # the kernel does not know
        ({"node0": "0-3", "node1": "4-7"}, 1, {0, 1}, set()),  # Slurm or numactl has bound it
    ],
)
def test_where_a_rank_runs(tmp_path, nodes, gpu_node, allowed, bound):
    assert cpus_beside(GPU, allowed, host(tmp_path, nodes, gpu_node)) == bound


def test_a_machine_that_tells_nothing_changes_nothing(tmp_path):
    assert cpus_beside(GPU, EVERY, tmp_path) == set()


def test_the_process_is_bound(tmp_path):
    before = os.sched_getaffinity(0)
    if len(before) < 2:
        pytest.skip("one processor cannot be two nodes")
    first, *others = sorted(before)
    sys = host(tmp_path, {"node0": str(first), "node1": ",".join(map(str, others))}, 0)
    try:
        assert bind_beside(GPU, sys) == {first} == os.sched_getaffinity(0)
        assert bind_beside(GPU, sys) == set()  # bound already
    finally:
        os.sched_setaffinity(0, before)
