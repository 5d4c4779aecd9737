"""Llama 8B (the shape of Llama 3 8B), 1T tokens in batches of 4.2M, from 8 to 512 80GB GPUs. Measured: not yet.

    bash launch/local.sh recipes/llama_8b.py --out-dir /ckpt/llama_8b            # one machine with 8 GPUs
    python recipes/llama_8b.py --dry-run --world-size 512                        # check and print, no GPU

Planned (H100, not measured; memory a GPU over the stages): 8 GPUs 59 GiB, MFU 51%, 149 days; 64 GPUs 49 GiB, MFU 51%, 19 days;
512 GPUs 47 GiB, MFU 49%, 2.4 days.

Where the numbers come from: shape, vocabulary and rotary base from Llama 3's published config; peak learning rate 3e-4, 8000
warm-up steps and a cosine down to a hundredth from Llama 3 (arXiv 2407.21783, table 3 and section 3.4.1); the batch is Llama
3's first, 4M tokens. Llama 3 8B itself saw 15T tokens; a trillion keeps the recipe affordable, and `steps` is the line to
change.
"""

import sys
from pathlib import Path

if not __package__:  # run as a script: import from the repository root, not from recipes/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from transformers import LlamaConfig

from recipes.common.recipe import AdamW, Batch, Checkpoints, Cosine, Evaluation, Layout, Recipe
from recipes.common.train import main

recipe = Recipe(
    name="llama_8b",
    model=LlamaConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        bos_token_id=128_000,
        eos_token_id=128_001,
    ),
    num_params=8_030_261_248,
    tokenizer="/data/llama_8b/tokenizer",
    data="/data/llama_8b/tokens",
    layouts={
        8: Layout(tensor=2, sequence_parallel=True),
        64: Layout(tensor=2, sequence_parallel=True),
        512: Layout(tensor=2, sequence_parallel=True),
    },
    batch=Batch(seq_len=8192, micro_seqs=1, global_seqs=512),  # 4.2M tokens a step
    optimizer=AdamW(lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, clip=1.0),
    schedule=Cosine(warmup_steps=8000, min_lr=3e-6),
    steps=240_000,  # 1.0T tokens
    evaluation=Evaluation(every_steps=1000, seqs=1024),
    checkpoints=Checkpoints(every_steps=1000, every_minutes=30, keep_last=3, keep_every_steps=10_000),
    deepspeed="zero1_bf16.json",
    kernels="compile",
)

if __name__ == "__main__":
    main(recipe)
