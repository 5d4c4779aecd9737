"""The optimizer's states in ZeRO's flat partitions are created where the optimizer looks for them."""

from types import SimpleNamespace

import pytest
import torch

from recipes.common.engine import zero_state


@pytest.mark.parametrize(("fused", "device"), [(True, "meta"), (None, "cpu")])
def test_adamws_counter_lies_beside_its_weights_where_it_is_fused(monkeypatch, fused, device):
    """As torch creates it: a fused AdamW refuses a counter on another device, the others would wait for one on a GPU."""
    flat = torch.zeros(4, device="meta")
    optimizer = torch.optim.AdamW([flat])
    optimizer.param_groups[0]["fused"] = fused
    monkeypatch.setattr(zero_state, "_locate", lambda trainer: ([flat], [[]]))
    zero_state.create_states(SimpleNamespace(optimizer=optimizer), ["exp_avg"], 3)
    state = optimizer.state[flat]
    assert (state["step"].device.type, state["exp_avg"].device.type, state["exp_avg"].shape) == (device, "meta", (4,))
