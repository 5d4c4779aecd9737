"""Llama 1B, continued on long sequences: 10B tokens at 65,536 after llama_1b, for 8 or 32 80GB GPUs. Measured: not yet.

    python -m tools.checkpoint from-hf /models/llama_1b /ckpt/llama_1b_long    # llama_1b, as `tools.checkpoint to-hf` exported it
    bash launch/local.sh recipes/llama_1b_long.py --out-dir /ckpt/llama_1b_long --resume
    python recipes/llama_1b_long.py --dry-run --world-size 32                    # check and print, no GPU

The tensor ranks share a sequence, also outside attention and MLP; the loss holds logits_chunk_tokens rows of logits at most.

Planned (H100, not measured; memory a GPU over the stages): 8 GPUs 38 GiB, MFU 30%, 1.0 days; 32 GPUs 36 GiB, MFU 30%, 6.0
hours.

Where the numbers come from: 65,536 tokens and a higher rotary base, 8e6, from ProLong's ablation (arXiv 2410.02660, sections
3 and 4), its peak of 1e-5 with 10 % of warm-up, 4M-token batches; shape as llama_1b with its rotary scaling dropped. It also
keeps attention inside documents: mask_documents=True, with attention="flash_attention_2" where that package is installed (a
mask of 65,536 x 65,536 is 4 GB).
"""

import sys
from pathlib import Path

if not __package__:  # run as a script: import from the repository root, not from recipes/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from transformers import LlamaConfig

from recipes.common.recipe import AdamW, Batch, Checkpoints, Cosine, Evaluation, Layout, Recipe
from recipes.common.train import main

recipe = Recipe(
    name="llama_1b_long",
    model=LlamaConfig(
        vocab_size=128_256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=65_536,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 8_000_000.0},
        tie_word_embeddings=True,
        bos_token_id=128_000,
        eos_token_id=128_001,
    ),
    num_params=1_235_814_400,
    tokenizer="/data/llama_1b_long/tokenizer",
    data="/data/llama_1b_long/tokens",
    layouts={
        8: Layout(tensor=4, sequence_parallel=True),
        32: Layout(tensor=4, sequence_parallel=True),
    },
    batch=Batch(seq_len=65_536, micro_seqs=1, global_seqs=64),  # 4.2M tokens a step
    optimizer=AdamW(lr=1e-5, betas=(0.9, 0.95), weight_decay=0.1, clip=1.0),
    schedule=Cosine(warmup_steps=240, min_lr=1e-6),
    steps=2400,  # 10B tokens
    logits_chunk_tokens=1024,
    evaluation=Evaluation(every_steps=100, seqs=32),
    checkpoints=Checkpoints(every_steps=100, keep_last=3),
    deepspeed="zero1_bf16.json",
)

if __name__ == "__main__":
    main(recipe)
