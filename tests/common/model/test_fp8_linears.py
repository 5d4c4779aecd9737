"""Which linears multiply in fp8: those of the layers, but for routers, banks of experts and odd widths."""

from recipes.common.model.decoder import find_stack
from recipes.common.model.fp8_linears import find_fp8_linears
from recipes.common.model.initial_weights import build_empty
from tests.support.tiny import tiny_config

ATTENTION = {f"self_attn.{name}_proj" for name in "qkvo"}


def kinds_of(family, **fields):
    """Return the linears by their names in a layer, and in how many layers there are any."""
    causal = build_empty(tiny_config(family, **fields), "eager")
    names = find_fp8_linears(causal, find_stack(causal))
    assert all(name.startswith("model.layers.") for name in names)
    return {name.split(".", 3)[3] for name in names}, len({name.split(".")[2] for name in names})


def test_linears_of_the_layers_alone():
    assert kinds_of("llama") == (ATTENTION | {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}, 4)


def test_routers_and_banks_are_left_out():
    assert kinds_of("mixtral") == (ATTENTION, 4)


def test_widths_that_are_no_multiples_of_16_are_left_out():
    kinds, _ = kinds_of("llama", intermediate_size=90)
    assert kinds == ATTENTION
