"""Llama 70B (the shape of Llama 3 70B), 1.4T tokens in batches of 8.4M, from 64 to 2048 80GB GPUs. Measured: not yet.

    bash launch/hostfile.sh --hostfile hosts recipes/llama_70b.py --out-dir /ckpt/llama_70b
    python recipes/llama_70b.py --dry-run --world-size 512                       # check and print, no GPU

Planned (H100, not measured; memory a GPU over the stages): 64 GPUs 45 to 72 GiB, MFU 48%, 242 days; 512 GPUs 24 to 70 GiB, MFU
45%, 32 days; 2048 GPUs 62 to 72 GiB, MFU 43%, 8.3 days.

The layouts need compiled kernels, which hold less: with kernels="none" stages exceed 80 GB.

Where the numbers come from: shape, vocabulary and rotary base from Llama 3's published config; peak learning rate 1.5e-4,
8000 warm-up steps and a cosine down to a hundredth from Llama 3 (arXiv 2407.21783, table 3 and section 3.4.1); batch from
4.2M to 8.4M tokens after 252M, the first step of Llama 3's own ramp. 20 tokens a parameter (arXiv 2203.15556); Llama 3 saw
15T in all.
"""

import sys
from pathlib import Path

if not __package__:  # run as a script: import from the repository root, not from recipes/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from transformers import LlamaConfig

from recipes.common.recipe import AdamW, Batch, Checkpoints, Cosine, Evaluation, Layout, Recipe
from recipes.common.train import main

recipe = Recipe(
    name="llama_70b",
    model=LlamaConfig(
        vocab_size=128_256,
        hidden_size=8192,
        intermediate_size=28_672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        bos_token_id=128_000,
        eos_token_id=128_001,
    ),
    num_params=70_553_706_496,
    tokenizer="/data/llama_70b/tokenizer",
    data="/data/llama_70b/tokens",
    layouts={
        64: Layout(tensor=4, pipeline=4, context=2, sequence_parallel=True),
        512: Layout(tensor=4, pipeline=8, sequence_parallel=True, pipeline_schedule="zero_bubble"),
        2048: Layout(tensor=4, pipeline=8, sequence_parallel=True, pipeline_schedule="zero_bubble", chunks=2),
    },
    batch=Batch(seq_len=8192, micro_seqs=1, global_seqs=1024, ramp=((30_720, 512),)),  # 4.2M, then 8.4M tokens a step
    optimizer=AdamW(lr=1.5e-4, betas=(0.9, 0.95), weight_decay=0.1, clip=1.0),
    schedule=Cosine(warmup_steps=8000, min_lr=1.5e-6),
    steps=168_000,  # 1.4T tokens
    evaluation=Evaluation(every_steps=1000, seqs=1024),
    checkpoints=Checkpoints(every_steps=1000, every_minutes=30, keep_last=3, keep_every_steps=10_000),
    deepspeed="zero1_bf16.json",
    kernels="compile",
)

if __name__ == "__main__":
    main(recipe)
