"""DeepSeek-V3's shape, 671B parameters of which a token uses 37B, for 1024 to 2048 80GB GPUs. Measured: not yet.

    bash launch/hostfile.sh --hostfile hosts recipes/deepseek_v3.py --out-dir /ckpt/deepseek_v3
    python recipes/deepseek_v3.py --dry-run --world-size 1024                    # check and print, no GPU

Planned (H100, not measured; memory a GPU over the stages): 1024 GPUs 20 to 57 GiB, MFU 5%, 819 days; 2048 GPUs 19 to 53 GiB,
MFU 5%, 414 days.

Where the numbers come from: shape, learning rate, batch ramp and router settings from arXiv 2412.19437, section 4.2, and the
published config: latent attention, biases that move by 0.001 a step against the load, and a loss of each sequence with weight
0.0001. Left out: the second token's prediction, FP8, experts spread over nodes (here each expert's matrices are sharded), and the
end of its schedule (constant until 10T tokens, a cosine to 2.2e-5 over 4.3T, then 0.5T at lower rates with biases that stay).
"""

import sys
from pathlib import Path

if not __package__:  # run as a script: import from the repository root, not from recipes/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from transformers import DeepseekV3Config

from recipes.common.recipe import WSD, AdamW, Batch, Checkpoints, Evaluation, Layout, Recipe, Router
from recipes.common.train import main

recipe = Recipe(
    name="deepseek_v3",
    model=DeepseekV3Config(
        vocab_size=129_280,
        hidden_size=7168,
        intermediate_size=18_432,
        moe_intermediate_size=2048,
        num_hidden_layers=61,
        num_attention_heads=128,
        num_key_value_heads=128,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        first_k_dense_replace=3,
        n_shared_experts=1,
        n_routed_experts=256,
        num_experts_per_tok=8,
        n_group=8,
        topk_group=4,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
        max_position_embeddings=4096,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
    ),
    num_params=671_026_404_352,
    tokenizer="/data/deepseek_v3/tokenizer",
    data="/data/deepseek_v3/tokens",
    layouts={
        1024: Layout(tensor=8, pipeline=16, recompute="full"),
        2048: Layout(tensor=8, pipeline=16, recompute="full"),
    },
    # 12.6M tokens a step, 62.9M from 469B tokens on
    batch=Batch(seq_len=4096, micro_seqs=1, global_seqs=15_360, ramp=((114_500_000, 3072),)),
    optimizer=AdamW(lr=2.2e-4, betas=(0.9, 0.95), weight_decay=0.1, clip=1.0),
    schedule=WSD(warmup_steps=2000, cooldown_steps=68_000, shape="cosine", min_lr=2.2e-5),
    steps=258_000,  # 14.3T tokens
    router=Router(loss="sequence", coefficient=1e-4, bias_rate=1e-3),
    evaluation=Evaluation(every_steps=1000, seqs=1024),
    checkpoints=Checkpoints(every_steps=500, every_minutes=30, keep_last=2, keep_every_steps=10_000),
    deepspeed="zero1_bf16.json",
)

if __name__ == "__main__":
    main(recipe)
