"""What the suite rehearses: real widths and sequences of the shelf's recipes, few layers; pairs of options, not products."""

from dataclasses import dataclass, replace

from recipes.common.recipe import ROOT, Layout
from tools.common.devices import find_device
from tools.common.recipe_io import load_recipe, parse_layout
from tools.plan.calibrate import shorten
from tools.plan.rehearsal.rehearsal_case import Rehearsal

GPU = find_device("H100")


@dataclass(frozen=True)
class Budget:
    """What a variant's layer may cost for each micro batch beside products and attention, and its loss: measured, rounded up.

    Who makes a layer cheaper lowers it. Elements of gradients that a step adds up count elsewhere.
    """

    kernels: int
    kilobytes: float  # moved for each token of the micro batch, on one rank
    logit_bytes: float = 0.0  # moved for each logit of the micro batch on one rank


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A shelf recipe with few layers, in a layout, and the rank of it that is rehearsed."""

    recipe: str
    layers: int
    gpus: int
    layout: str
    rank: int
    extras: tuple[str, ...] = ()
    deepspeed: str = "zero1_bf16.json"
    documents: bool = False
    attention: str = "sdpa"
    kernels: str = "none"
    steps: tuple[int, ...] = (1, 1, 2)
    seq_len: int | None = None
    vocab_size: int | None = None
    exchanges: int = 0  # layers whose tokens travel to experts on other ranks
    budget: Budget | None = None

    @property
    def name(self) -> str:
        words = [self.recipe, self.layout or "data", f"rank {self.rank}", self.deepspeed.removesuffix(".json")]
        words += [self.attention] if self.attention != "sdpa" else []
        words += ["compiled"] if self.kernels == "compile" else []
        return ", ".join([*words, *(["documents"] if self.documents else []), *self.extras])

    def rehearsal(self, rank: int | None = None) -> Rehearsal:
        recipe = shorten(load_recipe(str(ROOT / "recipes" / f"{self.recipe}.py")), self.layers)
        if self.seq_len is not None:
            recipe = replace(recipe, batch=replace(recipe.batch, seq_len=self.seq_len))
        if self.vocab_size is not None:
            recipe.model.vocab_size = self.vocab_size
        options = {"mask_documents": self.documents, "attention": self.attention, "kernels": self.kernels}
        recipe = replace(recipe, deepspeed=self.deepspeed, **options)
        layout = parse_layout(self.layout)[0] if self.layout else Layout()
        return Rehearsal(
            recipe=recipe,
            layout=layout,
            world_size=self.gpus,
            rank=self.rank if rank is None else rank,
            micro_batches=self.steps,
            extras=self.extras,
        )


SP = "sequence_parallel=1"
# Each stage, schedule, ds_config and recomputation at least once, most of them with another of the others each time. A stage is
# rehearsed with as many micro batches as it ever holds, where its memory is judged. With many data ranks one updates little. Two
# kernels of a layer with "varlen" are autograd's zeros, for what torch's operator returns beside its output.
STEPS = (
    Variant(recipe="llama_8b", layers=2, gpus=64, layout=f"tensor=2,{SP}", rank=1, extras=("evaluate", "save"),
            documents=True, attention="varlen", kernels="compile", budget=Budget(14, 227, 10)),
    Variant(recipe="llama_70b", layers=3, gpus=192, layout=f"tensor=8,pipeline=3,{SP},recompute=full", rank=65,
            extras=("evaluate", "layers"), kernels="compile", budget=Budget(18, 158)),
    Variant(recipe="llama_405b", layers=2, gpus=2048, layout=f"tensor=8,pipeline=2,{SP},recompute=selective", rank=2047,
            budget=Budget(114, 1450, 51)),
    Variant(recipe="qwen3_8b", layers=8, gpus=512, layout="pipeline=2,pipeline_schedule=zero_bubble,recompute=full", rank=511,
            extras=("evaluate",), budget=Budget(179, 3230, 33)),
    Variant(recipe="qwen3_8b", layers=8, gpus=512, layout="pipeline=2,pipeline_schedule=zero_bubble_v,layers_per_stage=4+1+2+1",
            rank=0, steps=(1, 3, 4), budget=Budget(134, 2500, 33)),
    Variant(recipe="llama_1b", layers=2, gpus=8, layout="recompute=full", rank=7, deepspeed="zero2_bf16.json",
            extras=("skip", "load"), budget=Budget(115, 1270, 27)),
    Variant(recipe="qwen3_0_6b", layers=2, gpus=64, layout="", rank=0, documents=True, budget=Budget(135, 960, 27)),
    Variant(recipe="mixtral_8x7b", layers=2, gpus=1024, layout="tensor=2,pipeline=2", rank=0, budget=Budget(143, 2590)),
    Variant(recipe="mixtral_8x7b", layers=2, gpus=64, layout="expert=2", rank=0, exchanges=2, budget=Budget(168, 3910, 34)),
    Variant(recipe="llama_8b_128k", layers=2, gpus=64, layout=f"tensor=2,context=2,{SP},recompute=full", rank=2, seq_len=16_384,
            documents=True, attention="varlen", kernels="compile", budget=Budget(48, 473, 10)),
    Variant(recipe="llama_1b", layers=2, gpus=64, layout="pipeline=2", rank=1, deepspeed="zero1_fp16.json", extras=("skip",),
            steps=(1, 2, 3), budget=Budget(86, 980)),
    Variant(recipe="gemma_2b", layers=2, gpus=64, layout="mlp_chunk_tokens=2048", rank=0, budget=Budget(128, 1660, 28)),
    Variant(recipe="olmo2_7b", layers=2, gpus=64, layout=f"tensor=2,{SP},recompute=full,offload_activations=1", rank=0,
            budget=Budget(204, 3820, 34)),
)  # fmt: skip
