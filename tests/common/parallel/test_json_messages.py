"""Plain values cross between ranks as they are; and none of our code lets a pickle cross."""

import ast
import math

import pytest
import torch
import torch.distributed as dist

from recipes.common.parallel.json_messages import LONGEST_BYTES, _checked, broadcast_json, gather_json
from tests.test_layering import SOURCE, name_of, parse
from tools.common.forked_ranks import run_ranks

VALUES = [[], {"loss": 0.1 + 0.2, "": math.inf, "ü": "é\n"}, None, [[1, {"a": -(2**63)}]] * 1000]


def _exchange():
    dist.init_process_group("gloo")
    rank, device = dist.get_rank(), torch.device("cpu")
    return gather_json(VALUES[rank], device), [broadcast_json(value if rank == 0 else rank, device) for value in VALUES]


def test_every_rank_gets_the_values_of_all_and_of_rank_0():
    for gathered, broadcast in run_ranks(_exchange, len(VALUES)):
        assert gathered == VALUES
        assert broadcast == VALUES


@pytest.mark.parametrize("length", [0, -1, LONGEST_BYTES + 1, 2**62])
def test_a_length_that_no_rank_sends_is_refused(length):
    with pytest.raises(RuntimeError, match="between ranks"):
        _checked(torch.tensor([length]))


PICKLES = {
    *("all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list", "send_object_list"),
    *("recv_object_list", "broadcast_object", "pickle.loads", "pickle.load", "pickle.Unpickler", "marshal.loads", "yaml.load"),
    *("shelve", "dill", "cloudpickle", "joblib", "rpc_sync", "rpc_async", "multiprocessing.managers", "Listener", "Client"),
}
# read from a pipe, or from a folder that is this user's alone, what a child or the parent of their own made: no network
OWN_CHILD = {
    *("tools/common/forked_ranks.py", "tools/plan/rehearsal/rehearsing.py", "tools/plan/rehearsal/worker.py"),
    "tools/replay/compute.py",
}


@pytest.mark.parametrize("path", SOURCE, ids=name_of)
def test_no_pickle_crosses_the_network_and_none_is_loaded(path):
    """torch.load only as torch's restricted reader, which makes tensors and plain values."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Attribute | ast.Name):
            name = ast.unparse(node)
            own = {"pickle.load", "pickle.loads"} if name_of(path) in OWN_CHILD else set()
            assert not {name, name.rpartition(".")[2]} & PICKLES - own, f"{name_of(path)}:{node.lineno} {name}"
        if isinstance(node, ast.ImportFrom):
            assert not {node.module, *(alias.name for alias in node.names)} & PICKLES, f"{name_of(path)}:{node.lineno}"
        if isinstance(node, ast.Import):
            assert not {alias.name for alias in node.names} & PICKLES, f"{name_of(path)}:{node.lineno}"
        if isinstance(node, ast.keyword):
            assert node.arg != "allow_pickle" or ast.unparse(node.value) == "False", f"{name_of(path)}:{node.value.lineno}"
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load" and name_of(path) not in OWN_CHILD:
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert given.get("weights_only") == "True", f"{name_of(path)}:{node.lineno} torch.load"
