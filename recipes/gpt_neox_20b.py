"""GPT-NeoX 20B, 472B tokens in batches of 3.1M, for 96 40GB GPUs, or 32 or 256 of 80GB. Measured: not yet.

    bash launch/hostfile.sh --hostfile hosts recipes/gpt_neox_20b.py --out-dir /ckpt/gpt_neox_20b
    python recipes/gpt_neox_20b.py --dry-run --world-size 96                     # check and print, no GPU

Planned (H100, not measured; memory a GPU over the stages): 32 GPUs 51 to 72 GiB, MFU 39%, 55 days; 96 GPUs 30 to 34 GiB, MFU
28%, 25 days; 256 GPUs 25 to 59 GiB, MFU 34%, 7.9 days.

Where the numbers come from: arXiv 2204.06745: shape (table 1 and its published config), learning rate 0.97e-4, 1536 sequences
of 2048 a step (micro batch 4 x 32 accumulated x 12 replicas), 150,000 steps, decay 0.01, cosine to a tenth with 1 % of warm-
up, tensor 2 x pipeline 4 on 96 GPUs (appendix B and section 2.3).
"""

import sys
from pathlib import Path

if not __package__:  # run as a script: import from the repository root, not from recipes/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from transformers import GPTNeoXConfig

from recipes.common.recipe import AdamW, Batch, Checkpoints, Cosine, Evaluation, Layout, Recipe
from recipes.common.train import main

recipe = Recipe(
    name="gpt_neox_20b",
    model=GPTNeoXConfig(
        vocab_size=50_432,
        hidden_size=6144,
        intermediate_size=24_576,
        num_hidden_layers=44,
        num_attention_heads=64,
        max_position_embeddings=2048,
        hidden_act="gelu_fast",
        layer_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.25},
        use_parallel_residual=True,
        bos_token_id=0,
        eos_token_id=0,
    ),
    num_params=20_554_567_680,
    tokenizer="/data/gpt_neox_20b/tokenizer",
    data="/data/gpt_neox_20b/tokens",
    layouts={
        32: Layout(tensor=4, pipeline=2, sequence_parallel=True),
        96: Layout(tensor=2, pipeline=4, recompute="full"),  # the paper's own, on 40GB GPUs
        256: Layout(tensor=4, pipeline=4, sequence_parallel=True),
    },
    batch=Batch(seq_len=2048, micro_seqs=4, global_seqs=1536),  # 3.1M tokens a step
    optimizer=AdamW(lr=0.97e-4, betas=(0.9, 0.95), weight_decay=0.01, clip=1.0),
    schedule=Cosine(warmup_steps=1500, min_lr=0.97e-5),
    steps=150_000,  # 472B tokens
    evaluation=Evaluation(every_steps=1000, seqs=1024),
    checkpoints=Checkpoints(every_steps=1000, every_minutes=30, keep_last=3, keep_every_steps=10_000),
    deepspeed="zero1_bf16.json",
)

if __name__ == "__main__":
    main(recipe)
