"""Qwen3 30B-A3B, 30.5B parameters of which a token uses 3.3B, for 32 to 512 80GB GPUs. Measured: not yet.

    bash launch/hostfile.sh --hostfile hosts recipes/qwen3_30b_a3b.py --out-dir /ckpt/qwen3_30b_a3b
    python recipes/qwen3_30b_a3b.py --dry-run --world-size 64                    # check and print, no GPU

Planned (H100, not measured; memory a GPU over the stages): 32 GPUs 37 to 72 GiB, MFU 10%, 43 days; 64 GPUs 33 to 66 GiB, MFU
10%, 22 days; 512 GPUs 29 to 61 GiB, MFU 8%, 3.3 days.

Where the numbers come from: shape from arXiv 2505.09388, table 2, and the published config. Balanced over the global batch, as
section 2 there says (its loss: arXiv 2501.11873, with the counts of the step so far), with the published config's coefficient,
0.001. Learning rate, batch and length are ours: the report publishes none.
"""

import sys
from pathlib import Path

if not __package__:  # run as a script: import from the repository root, not from recipes/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from transformers import Qwen3MoeConfig

from recipes.common.recipe import AdamW, Batch, Checkpoints, Cosine, Evaluation, Layout, Recipe, Router
from recipes.common.train import main

recipe = Recipe(
    name="qwen3_30b_a3b",
    model=Qwen3MoeConfig(
        vocab_size=151_936,
        hidden_size=2048,
        intermediate_size=6144,
        moe_intermediate_size=768,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        router_aux_loss_coef=0.001,
        max_position_embeddings=40_960,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        tie_word_embeddings=False,
        bos_token_id=151_643,
        eos_token_id=151_645,
    ),
    num_params=30_532_122_624,
    tokenizer="/data/qwen3/tokenizer",
    data="/data/qwen3/tokens",
    layouts={
        32: Layout(tensor=2, pipeline=4),
        64: Layout(tensor=2, pipeline=4),
        512: Layout(tensor=2, pipeline=4),
    },
    batch=Batch(seq_len=4096, micro_seqs=1, global_seqs=1024),  # 4.2M tokens a step
    optimizer=AdamW(lr=2e-4, betas=(0.9, 0.95), weight_decay=0.1, clip=1.0),
    schedule=Cosine(warmup_steps=2000, min_lr=2e-5),
    steps=120_000,  # 503B tokens
    z_loss=1e-4,
    router=Router(loss="global_batch", count_ahead=False),
    evaluation=Evaluation(every_steps=1000, seqs=1024),
    checkpoints=Checkpoints(every_steps=1000, every_minutes=30, keep_last=3, keep_every_steps=10_000),
    deepspeed="zero1_bf16.json",
)

if __name__ == "__main__":
    main(recipe)
