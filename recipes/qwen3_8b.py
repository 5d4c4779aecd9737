"""Qwen3 8B, 500B tokens in batches of 4.2M, from 16 to 256 80GB GPUs. Measured: not yet.

    bash launch/hostfile.sh --hostfile hosts recipes/qwen3_8b.py --out-dir /ckpt/qwen3_8b
    python recipes/qwen3_8b.py --dry-run --world-size 64                         # check and print, no GPU

Planned (H100, not measured; memory a GPU over the stages): 16 GPUs 51 to 69 GiB, MFU 37%, 49 days; 64 GPUs 46 to 64 GiB, MFU
36%, 13 days; 256 GPUs 45 to 63 GiB, MFU 33%, 3.5 days.

Where the numbers come from: shape from Qwen3's published config (arXiv 2505.09388). Its learning rate and batch are not
published: 3e-4 and 4M tokens are Llama 3's for the same width and size (arXiv 2407.21783, table 3); WSD with a fifth of cool-
down from arXiv 2404.06395 and 2405.18392.
"""

import sys
from pathlib import Path

if not __package__:  # run as a script: import from the repository root, not from recipes/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from transformers import Qwen3Config

from recipes.common.recipe import WSD, AdamW, Batch, Checkpoints, Evaluation, Layout, Recipe
from recipes.common.train import main

recipe = Recipe(
    name="qwen3_8b",
    model=Qwen3Config(
        vocab_size=151_936,
        hidden_size=4096,
        intermediate_size=12_288,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=32_768,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        tie_word_embeddings=False,
        bos_token_id=151_643,
        eos_token_id=151_643,
    ),
    num_params=8_190_735_360,
    tokenizer="/data/qwen3_8b/tokenizer",
    data="/data/qwen3_8b/tokens",
    layouts={
        16: Layout(pipeline=2),
        64: Layout(pipeline=2),
        256: Layout(pipeline=2),
    },
    batch=Batch(seq_len=4096, micro_seqs=1, global_seqs=1024),  # 4.2M tokens a step
    optimizer=AdamW(lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, clip=1.0),
    schedule=WSD(warmup_steps=2000, cooldown_steps=24_000, shape="1-sqrt"),
    steps=120_000,  # 503B tokens
    z_loss=1e-4,
    evaluation=Evaluation(every_steps=1000, seqs=1024),
    checkpoints=Checkpoints(every_steps=1000, every_minutes=30, keep_last=3, keep_every_steps=10_000),
    deepspeed="zero1_bf16.json",
)

if __name__ == "__main__":
    main(recipe)
