"""Llama 8B, continued from published weights: 50B tokens of a domain, 4.2M a step, for 8 or 64 80GB GPUs. Measured: not yet.

    python -m tools.checkpoint from-hf /models/Meta-Llama-3-8B /ckpt/llama_8b_continued     # the starting checkpoint
    bash launch/local.sh recipes/llama_8b_continued.py --out-dir /ckpt/llama_8b_continued --resume
    python recipes/llama_8b_continued.py --dry-run --world-size 64               # check and print, no GPU

The model must be the folder's own: the same fields as its config.json. The data has the folder's tokenizer.

Planned (H100, not measured; memory a GPU over the stages): 8 GPUs 59 GiB, MFU 51%, 7.5 days; 64 GPUs 49 GiB, MFU 51%, 22
hours.

Where the numbers come from: a second warm-up, to a peak below the first training's, and a second decay are from arXiv 2403.08763
(sections 4 and 5: half the first peak, 1 % of warm-up); mix in 5 % or more of the first training's kind of text against
forgetting, with data=Blend(weights={...}), as its section 4.2 does.
"""

import sys
from pathlib import Path

if not __package__:  # run as a script: import from the repository root, not from recipes/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from transformers import LlamaConfig

from recipes.common.recipe import AdamW, Batch, Checkpoints, Cosine, Evaluation, Layout, Recipe
from recipes.common.train import main

recipe = Recipe(
    name="llama_8b_continued",
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
    tokenizer="/data/llama_8b_continued/tokenizer",
    data="/data/llama_8b_continued/tokens",
    layouts={
        8: Layout(tensor=2, sequence_parallel=True),
        64: Layout(tensor=2, sequence_parallel=True),
    },
    batch=Batch(seq_len=8192, micro_seqs=1, global_seqs=512),  # 4.2M tokens a step
    optimizer=AdamW(lr=1.5e-4, betas=(0.9, 0.95), weight_decay=0.1, clip=1.0),
    schedule=Cosine(warmup_steps=120, min_lr=1.5e-5),
    steps=12_000,  # 50B tokens
    evaluation=Evaluation(every_steps=250, seqs=512),
    checkpoints=Checkpoints(every_steps=250, keep_last=3, keep_every_steps=2000),
    deepspeed="zero1_bf16.json",
    kernels="compile",
)

if __name__ == "__main__":
    main(recipe)
