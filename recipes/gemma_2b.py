"""Gemma 2B, 200B tokens in batches of 2.1M, for 8 or 64 80GB GPUs. Measured: not yet.

    bash launch/local.sh recipes/gemma_2b.py --out-dir /ckpt/gemma_2b            # one machine with 8 GPUs
    python recipes/gemma_2b.py --dry-run --world-size 64                         # check and print, no GPU

Planned (H100, not measured; memory a GPU over the stages): 8 GPUs 53 GiB, MFU 41%, 11 days; 64 GPUs 50 GiB, MFU 40%, 1.5 days.

Where the numbers come from: shape from arXiv 2403.08295, table 1, and the published config: one key/value head, a vocabulary
of 256,000 that is a fifth of the model. Its training is not published: learning rate and batch are those of llama_1b, which
has the same width.
"""

import sys
from pathlib import Path

if not __package__:  # run as a script: import from the repository root, not from recipes/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from transformers import GemmaConfig

from recipes.common.recipe import AdamW, Batch, Checkpoints, Cosine, Evaluation, Layout, Recipe
from recipes.common.train import main

recipe = Recipe(
    name="gemma_2b",
    model=GemmaConfig(
        vocab_size=256_000,
        hidden_size=2048,
        intermediate_size=16_384,
        num_hidden_layers=18,
        num_attention_heads=8,
        num_key_value_heads=1,
        head_dim=256,
        max_position_embeddings=8192,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    ),
    num_params=2_506_172_416,
    tokenizer="/data/gemma_2b/tokenizer",
    data="/data/gemma_2b/tokens",
    layouts={
        8: Layout(),
        64: Layout(),
    },
    batch=Batch(seq_len=4096, micro_seqs=2, global_seqs=512),  # 2.1M tokens a step
    optimizer=AdamW(lr=4e-4, betas=(0.9, 0.95), weight_decay=0.1, clip=1.0),
    schedule=Cosine(warmup_steps=2000, min_lr=4e-5),
    steps=96_000,  # 201B tokens
    z_loss=1e-4,
    evaluation=Evaluation(every_steps=1000, seqs=1024),
    checkpoints=Checkpoints(every_steps=1000, every_minutes=30, keep_last=3, keep_every_steps=10_000),
    deepspeed="zero1_bf16.json",
)

if __name__ == "__main__":
    main(recipe)
