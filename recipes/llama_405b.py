"""Llama 405B (the shape of Llama 3.1 405B), 16.8M tokens a step, for 1024 to 8192 80GB GPUs. Measured: not yet.

    sbatch --nodes 1024 launch/slurm.sbatch recipes/llama_405b.py --out-dir /ckpt/llama_405b
    python recipes/llama_405b.py --dry-run --world-size 8192                     # check and print, no GPU

Planned (H100, not measured; memory a GPU over the stages): 1024 GPUs 62 to 67 GiB, MFU 47%, 1,058 days; 4096 GPUs 59 to 63
GiB, MFU 46%, 268 days; 8192 GPUs 58 to 63 GiB, MFU 46%, 136 days.

Two context ranks share a sequence, and kernels are compiled: so no layer has to be computed twice. With kernels="none" the
stages reach 80 GB; recompute="full" and context=1 then fit.

Where the numbers come from: shape from Llama 3.1's published config; peak learning rate 8e-5, 8000 warm-up steps, a cosine
down to 8e-7 over 1.2M steps, and a batch of 4M, 8M after 252M tokens and 16M after 2.87T, from arXiv 2407.21783, section
3.4.1; tensor 8 x pipeline 16 from its table 4. There the first 4M-token batches have sequences of 4096; a recipe has one
sequence length.
"""

import sys
from pathlib import Path

if not __package__:  # run as a script: import from the repository root, not from recipes/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from transformers import LlamaConfig

from recipes.common.recipe import AdamW, Batch, Checkpoints, Cosine, Evaluation, Layout, Recipe
from recipes.common.train import main

recipe = Recipe(
    name="llama_405b",
    model=LlamaConfig(
        vocab_size=128_256,
        hidden_size=16_384,
        intermediate_size=53_248,
        num_hidden_layers=126,
        num_attention_heads=128,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        bos_token_id=128_000,
        eos_token_id=128_001,
    ),
    num_params=405_853_388_800,
    tokenizer="/data/llama_405b/tokenizer",
    data="/data/llama_405b/tokens",
    layouts={
        1024: Layout(tensor=8, pipeline=16, context=2, sequence_parallel=True, pipeline_schedule="zero_bubble", chunks=4),
        4096: Layout(tensor=8, pipeline=16, context=2, sequence_parallel=True, pipeline_schedule="zero_bubble", chunks=4),
        8192: Layout(tensor=8, pipeline=16, context=2, sequence_parallel=True, pipeline_schedule="zero_bubble", chunks=4),
    },
    batch=Batch(
        seq_len=8192,
        micro_seqs=1,
        global_seqs=2048,  # 16.8M tokens a step
        ramp=((30_720, 512), (350_352_384, 1024)),  # 4.2M tokens until 252M are seen, 8.4M until 2.87T
    ),
    optimizer=AdamW(lr=8e-5, betas=(0.9, 0.95), weight_decay=0.1, clip=1.0),
    schedule=Cosine(warmup_steps=8000, min_lr=8e-7),
    steps=1_200_000,  # 17.3T tokens
    evaluation=Evaluation(every_steps=1000, seqs=1024),
    checkpoints=Checkpoints(every_steps=1000, every_minutes=30, keep_last=3, keep_every_steps=10_000),
    deepspeed="zero1_bf16.json",
    kernels="compile",
)

if __name__ == "__main__":
    main(recipe)
