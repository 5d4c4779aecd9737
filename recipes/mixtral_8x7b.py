"""Mixtral 8x7B, 46.7B parameters of which a token uses 12.9B, for 64 to 512 80GB GPUs. Measured: not yet.

    bash launch/hostfile.sh --hostfile hosts recipes/mixtral_8x7b.py --out-dir /ckpt/mixtral_8x7b
    python recipes/mixtral_8x7b.py --dry-run --world-size 128                    # check and print, no GPU

Planned (H100, not measured; memory a GPU over the stages): 64 GPUs 35 to 60 GiB, MFU 26%, 28 days; 128 GPUs 30 to 56 GiB, MFU
26%, 14 days; 512 GPUs 27 to 53 GiB, MFU 22%, 4.2 days.

Where the numbers come from: shape from arXiv 2401.04088, table 1, and the published config. Its training is not published:
the learning rate and the 4.2M-token batch are Llama 3's between 8B and 70B (arXiv 2407.21783, table 3). Each
expert's matrices are sharded. The loss that balances the experts is transformers', with the published config's 0.02.
"""

import sys
from pathlib import Path

if not __package__:  # run as a script: import from the repository root, not from recipes/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from transformers import MixtralConfig

from recipes.common.recipe import AdamW, Batch, Checkpoints, Cosine, Evaluation, Layout, Recipe
from recipes.common.train import main

recipe = Recipe(
    name="mixtral_8x7b",
    model=MixtralConfig(
        vocab_size=32_000,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=32_768,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        router_aux_loss_coef=0.02,
        bos_token_id=1,
        eos_token_id=2,
    ),
    num_params=46_702_792_704,
    tokenizer="/data/mixtral_8x7b/tokenizer",
    data="/data/mixtral_8x7b/tokens",
    layouts={
        64: Layout(tensor=2, pipeline=8),
        128: Layout(tensor=2, pipeline=8),
        512: Layout(tensor=2, pipeline=8),
    },
    batch=Batch(seq_len=4096, micro_seqs=1, global_seqs=1024),  # 4.2M tokens a step
    optimizer=AdamW(lr=2e-4, betas=(0.9, 0.95), weight_decay=0.1, clip=1.0),
    schedule=Cosine(warmup_steps=2000, min_lr=2e-5),
    steps=120_000,  # 503B tokens
    z_loss=1e-4,
    evaluation=Evaluation(every_steps=1000, seqs=1024),
    checkpoints=Checkpoints(every_steps=1000, every_minutes=30, keep_last=3, keep_every_steps=10_000),
    deepspeed="zero1_bf16.json",
)

if __name__ == "__main__":
    main(recipe)
