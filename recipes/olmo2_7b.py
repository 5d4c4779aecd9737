"""OLMo 2 7B, 4T tokens in batches of 4.2M, for 16 to 1024 80GB GPUs. Measured: not yet.

    bash launch/hostfile.sh --hostfile hosts recipes/olmo2_7b.py --out-dir /ckpt/olmo2_7b
    python recipes/olmo2_7b.py --dry-run --world-size 256                        # check and print, no GPU

Planned (H100, not measured; memory a GPU over the stages): 16 GPUs 62 to 71 GiB, MFU 31%, 416 days; 256 GPUs 57 to 66 GiB, MFU
30%, 27 days; 1024 GPUs 51 to 64 GiB, MFU 26%, 7.9 days. In stages: its norms of queries and keys span all heads, so tensor
ranks would gather them whole.

Where the numbers come from: arXiv 2501.00656, tables 2 to 4, and the published config: normal initialisation of 0.02
everywhere, norms after the sub-layers, QK norm, z-loss 1e-5, no decay on embeddings, eps 1e-8, 2000 warm-up steps to 3e-4, a
cosine to 3e-5 over 5T tokens that stops at 4T.
"""

import sys
from pathlib import Path

if not __package__:  # run as a script: import from the repository root, not from recipes/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from transformers import Olmo2Config

from recipes.common.recipe import AdamW, Batch, Checkpoints, Cosine, Evaluation, Layout, Recipe
from recipes.common.train import main

recipe = Recipe(
    name="olmo2_7b",
    model=Olmo2Config(
        vocab_size=100_352,
        hidden_size=4096,
        intermediate_size=11_008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        max_position_embeddings=4096,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        pad_token_id=100_277,
        bos_token_id=100_257,
        eos_token_id=100_257,
    ),
    num_params=7_298_617_344,
    tokenizer="/data/olmo2_7b/tokenizer",
    data="/data/olmo2_7b/tokens",
    layouts={
        16: Layout(pipeline=2, pipeline_schedule="zero_bubble", chunks=2),
        256: Layout(pipeline=2, pipeline_schedule="zero_bubble", chunks=2),
        1024: Layout(pipeline=2, pipeline_schedule="zero_bubble"),
    },
    batch=Batch(seq_len=4096, micro_seqs=1, global_seqs=1024),  # 4.2M tokens a step
    optimizer=AdamW(lr=3e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, decay_embeddings=False, clip=1.0),
    schedule=Cosine(warmup_steps=2000, decay_steps=1_192_000, min_lr=3e-5),  # the cosine of 5T tokens
    steps=953_000,  # 4.0T tokens
    z_loss=1e-5,
    evaluation=Evaluation(every_steps=1000, seqs=1024),
    checkpoints=Checkpoints(every_steps=1000, every_minutes=30, keep_last=3, keep_every_steps=10_000),
    deepspeed="zero1_bf16.json",
)

if __name__ == "__main__":
    main(recipe)
