"""Qwen3 0.6B, 60B tokens in batches of 1M, for 1, 8 or 32 80GB GPUs. Measured: not yet.

    bash launch/local.sh recipes/qwen3_0_6b.py --out-dir /ckpt/qwen3_0_6b        # one machine
    python recipes/qwen3_0_6b.py --dry-run --world-size 8                        # check and print, no GPU

Planned (H100, not measured; memory a GPU over the stages): 1 GPU 50 GiB, MFU 19%, 18 days; 8 GPUs 44 GiB, MFU 19%, 2.3 days;
32 GPUs 44 GiB, MFU 19%, 14 hours.

Where the numbers come from: shape from Qwen3's published config (arXiv 2505.09388). Its learning rate and batch are not
published: the peak is DeepSeek's rule for this compute, 0.3118 * C^-0.125 (arXiv 2401.02954, section 3.1) with C = 6ND =
2.1e20 FLOPs, rounded; the batch is its other rule, 0.2920 * C^0.3271 tokens = 1.3M, to a power of two. WSD from arXiv
2404.06395: training on more tokens needs no new schedule.
"""

import sys
from pathlib import Path

if not __package__:  # run as a script: import from the repository root, not from recipes/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from transformers import Qwen3Config

from recipes.common.recipe import WSD, AdamW, Batch, Checkpoints, Evaluation, Layout, Recipe
from recipes.common.train import main

recipe = Recipe(
    name="qwen3_0_6b",
    model=Qwen3Config(
        vocab_size=151_936,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=32_768,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        tie_word_embeddings=True,
        bos_token_id=151_643,
        eos_token_id=151_643,
    ),
    num_params=596_049_920,
    tokenizer="/data/qwen3_0_6b/tokenizer",
    data="/data/qwen3_0_6b/tokens",
    layouts={
        1: Layout(),
        8: Layout(),
        32: Layout(),
    },
    batch=Batch(seq_len=4096, micro_seqs=4, global_seqs=256),  # 1.05M tokens a step
    optimizer=AdamW(lr=9e-4, betas=(0.9, 0.95), weight_decay=0.1, clip=1.0),
    schedule=WSD(warmup_steps=1000, cooldown_steps=11_500),
    steps=57_500,  # 60B tokens
    z_loss=1e-4,
    evaluation=Evaluation(every_steps=1000, seqs=1024),
    checkpoints=Checkpoints(every_steps=1000, every_minutes=30, keep_last=3, keep_every_steps=10_000),
    deepspeed="zero1_bf16.json",
)

if __name__ == "__main__":
    main(recipe)
