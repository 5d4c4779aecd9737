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


TIED = {family: bool(number % 2) for number, family in enumerate(FAMILIES)}  # in turn: a tie is exported by one path for all


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Family -> (validation loss of its run, that of the exported model, shape of what this generates)."""
    base = tmp_path_factory.mktemp("export")
    write_shards(base / "data", tokens=4_000)
    models = {family: tiny_config(family, num_hidden_layers=2, tie_word_embeddings=tied) for family, tied in TIED.items()}
    counts, losses = run_ranks(_count, 1, models)[0], {}
    for family, model in models.items():
        layout = LAYOUTS[family]
        world = layout.tensor * layout.pipeline * layout.expert
        recipe = tiny_recipe(
            base / "data",
            model=model,
            num_params=counts[family],
            layouts={world: layout},
            steps=STEPS,
            attention="eager",  # what every family has
            evaluation=Evaluation(every_steps=STEPS, seqs=SEQS),
        )
        losses[family] = run(recipe, world, base / family)[STEPS]["val_loss"]
    found = run_ranks(_evaluate_each, 1, base)[0]
    return {family: (losses[family], *found[family]) for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
def test_validation_loss_of_the_exported_model(exported, family):
    """Experts are in parts of slices."""
    trained, loss, generated = exported[family]
    assert loss == pytest.approx(trained, rel=1e-6)
    assert generated == (1, 8)


def _count(models) -> dict[str, int]:
    return {name: sum(p.numel() for p in build_empty(model, "eager").parameters()) for name, model in models.items()}


def _evaluate_each(base: Path) -> dict[str, tuple[float, tuple[int, ...]]]:
    return {family: _evaluate(base, family) for family in FAMILIES}


def _evaluate(base: Path, family: str) -> tuple[float, tuple[int, ...]]:
    folder = base / f"{family}_hf"
    export(base / family / "checkpoints" / "latest", folder, dtype="float32", shard_bytes=10**9, verify=False)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    stream = open_split(base / "data", "validation", 16)
    total = 0.0
    with torch.no_grad():
        for tokens, _ in validation_micro_batches(stream, seqs=SEQS, micro_seqs=1, data_rank=0, data_size=1):
            logits = model(input_ids=tokens[:, :-1]).logits
            total += F.cross_entropy(logits.reshape(-1, logits.shape[-1]), tokens[:, 1:].reshape(-1), reduction="sum").item()
        generated = model.generate(tokens[:, :4], max_new_tokens=4, min_new_tokens=4, do_sample=False)
    return total / (SEQS * 16), tuple(generated.shape)
