"""An exported folder has the run's own validation loss in plain transformers, and generates."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from recipes.common.data.batches import validation_micro_batches
from recipes.common.data.shards import open_split
from recipes.common.model.initial_weights import build_empty
from recipes.common.recipe import Evaluation, Layout
from tests.support.small_runs import run
from tests.support.tiny import FAMILIES, tiny_config, tiny_recipe, write_shards
from tools.checkpoint.to_hf import export
from tools.common.forked_ranks import run_ranks

STEPS, SEQS = 2, 6


# a family's own is how its matrices are cut; stages are cut alike in all
LAYOUTS = dict.fromkeys(FAMILIES, Layout(tensor=2)) | {
    "llama": Layout(tensor=2, pipeline=2),
    "olmo2": Layout(pipeline=2),
    "mixtral": Layout(tensor=2, expert=2),
}


@pytest.mark.parametrize(("family", "tied"), [(family, bool(number % 2)) for number, family in enumerate(FAMILIES)])
def test_validation_loss_of_the_exported_model(family, tied, tmp_path):
    """Each family, tied or not in turn: a tie is exported by one path for all. Experts are in parts of slices."""
    write_shards(tmp_path / "data", tokens=4_000)
    model, layout = tiny_config(family, num_hidden_layers=2, tie_word_embeddings=tied), LAYOUTS[family]
    world = layout.tensor * layout.pipeline * layout.expert
    recipe = tiny_recipe(
        tmp_path / "data",
        model=model,
        num_params=run_ranks(_count, 1, model)[0],
        layouts={world: layout},
        steps=STEPS,
        attention="eager",  # what every family has
        evaluation=Evaluation(every_steps=STEPS, seqs=SEQS),
    )
    trained = run(recipe, world, tmp_path / "run")[STEPS]["val_loss"]
    loss, generated = run_ranks(_evaluate, 1, tmp_path)[0]
    assert loss == pytest.approx(trained, rel=1e-6)
    assert generated == (1, 8)


def _count(model) -> int:
    return sum(parameter.numel() for parameter in build_empty(model, "eager").parameters())


def _evaluate(folder: Path) -> tuple[float, tuple[int, ...]]:
    export(folder / "run" / "checkpoints" / "latest", folder / "hf", dtype="float32", shard_bytes=10**9, verify=False)
    model = AutoModelForCausalLM.from_pretrained(folder / "hf", attn_implementation="eager").eval()
    stream = open_split(folder / "data", "validation", 16)
    total = 0.0
    with torch.no_grad():
        for tokens, _ in validation_micro_batches(stream, seqs=SEQS, micro_seqs=1, data_rank=0, data_size=1):
            logits = model(input_ids=tokens[:, :-1]).logits
            total += F.cross_entropy(logits.reshape(-1, logits.shape[-1]), tokens[:, 1:].reshape(-1), reduction="sum").item()
        generated = model.generate(tokens[:, :4], max_new_tokens=4, min_new_tokens=4, do_sample=False)
    return total / (SEQS * 16), tuple(generated.shape)
