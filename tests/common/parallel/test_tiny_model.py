"""A tiny model keeps its family's shape at small sizes."""

from transformers import AutoConfig

from recipes.common.parallel.tiny_model import shrink
from recipes.common.recipe import Layout


def test_a_width_for_each_layer_is_shrunk_as_one_for_all():
    """Gemma 3n's neurons are on above a threshold: among 16,384 of them some always lie on it, and rounding decides."""
    widths = shrink(AutoConfig.for_model("gemma3n_text", num_kv_shared_layers=0), Layout(pipeline=2)).intermediate_size
    assert widths == [shrink(AutoConfig.for_model("llama"), Layout(pipeline=2)).intermediate_size] * 4


def test_an_encoder_of_images_inside_is_shallow_too():
    tiny = shrink(AutoConfig.for_model("git"), Layout(pipeline=2))
    assert (tiny.num_hidden_layers, tiny.vision_config.num_hidden_layers) == (4, 2)
