"""Llama 1B (the shape of Llama 3.2 1B), 100B tokens in batches of 2M, for 8 or 64 80GB GPUs. Measured: not yet.

    bash launch/local.sh recipes/llama_1b.py --out-dir /ckpt/llama_1b            # one machine with 8 GPUs
    python recipes/llama_1b.py --dry-run --world-size 64                         # check and print, no GPU

Planned (H100, not measured; memory a GPU over the stages): 8 GPUs 34 GiB, MFU 53%, 2.3 days; 64 GPUs 33 GiB, MFU 51%, 7.2
hours.

Where the numbers come from: shape, vocabulary and rotary scaling from Llama 3.2's published config; learning rate, warm-up and
decay to a tenth from Llama 3 (arXiv 2407.21783, section 3.4) with its peak for the smallest size; batch 2M tokens from
OLMo 2 1B (arXiv 2501.00656); betas, weight decay and clipping as in both.
"""

import sys
from pathlib import Path

if not __package__:  # run as a script: import from the repository root, not from recipes/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from transformers import LlamaConfig

from recipes.common.recipe import AdamW, Batch, Checkpoints, Cosine, Evaluation, Layout, Recipe
from recipes.common.train import main

recipe = Recipe(
    name="llama_1b",
    model=LlamaConfig(
        vocab_size=128_256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=131_072,
        rms_norm_eps=1e-5,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500_000.0,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        tie_word_embeddings=True,
        bos_token_id=128_000,
        eos_token_id=128_001,
    ),
    num_params=1_235_814_400,
    tokenizer="/data/llama_1b/tokenizer",
    data="/data/llama_1b/tokens",
    layouts={
        8: Layout(),  # planned: 9.3 GB a GPU for weights, fp32 gradients and Adam's states: nothing needs sharding
        64: Layout(),
    },
    batch=Batch(seq_len=4096, micro_seqs=4, global_seqs=512),  # 2.1M tokens a step
    optimizer=AdamW(lr=4e-4, betas=(0.9, 0.95), weight_decay=0.1, clip=1.0),
    schedule=Cosine(warmup_steps=2000, min_lr=4e-5),
    steps=48_000,  # 100B tokens
    z_loss=1e-4,
    evaluation=Evaluation(every_steps=1000, seqs=1024),
    checkpoints=Checkpoints(every_steps=1000, every_minutes=30, keep_last=3, keep_every_steps=10_000),
    deepspeed="zero1_bf16.json",
    kernels="compile",
)

if __name__ == "__main__":
    main(recipe)
