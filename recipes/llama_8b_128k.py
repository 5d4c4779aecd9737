"""Llama 3.1 8B, continued at 131,072 tokens: 10B tokens of long documents, for 8 or 64 80GB GPUs. Measured: not yet.

    python -m tools.checkpoint from-hf /models/Llama-3.1-8B /ckpt/llama_8b_128k       # the starting checkpoint
    bash launch/local.sh recipes/llama_8b_128k.py --out-dir /ckpt/llama_8b_128k --resume
    python recipes/llama_8b_128k.py --dry-run --world-size 64                    # check and print, no GPU

Context ranks share each sequence, a slice each, and the model stays the family's own: attention runs on whole sequences and a
part of the heads. The model must be the folder's own: the same fields as its config.json. The data has the folder's tokenizer.

Planned (H100, not measured; memory a GPU over the stages): 8 GPUs 69 GiB, MFU 25%, 8.7 days; 64 GPUs 64 GiB, MFU 29%, 23
hours.

Where the numbers come from: shape and rotary scaling as published with Llama 3.1 8B, which was trained up to 131,072 tokens in
six stages (arXiv 2407.21783, section 3.4.2); a peak of 1e-5 with 10 % of warm-up and 4M-token batches from ProLong (arXiv
2410.02660, sections 3 and 4). It also keeps attention inside documents: mask_documents=True, with attention="varlen" (a mask of
131,072 x 131,072 is 16 GB).
"""

import sys
from pathlib import Path

if not __package__:  # run as a script: import from the repository root, not from recipes/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from transformers import LlamaConfig

from recipes.common.recipe import AdamW, Batch, Checkpoints, Cosine, Evaluation, Layout, Recipe
from recipes.common.train import main

recipe = Recipe(
    name="llama_8b_128k",
    model=LlamaConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=131_072,
        rms_norm_eps=1e-5,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500_000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        bos_token_id=128_000,
        eos_token_id=128_001,
    ),
    num_params=8_030_261_248,
    tokenizer="/data/llama_8b_128k/tokenizer",
    data="/data/llama_8b_128k/tokens",
    layouts={
        8: Layout(tensor=2, context=2, sequence_parallel=True, recompute="full"),
        64: Layout(tensor=2, context=8, sequence_parallel=True, recompute="selective"),
    },
    batch=Batch(seq_len=131_072, micro_seqs=1, global_seqs=32),  # 4.2M tokens a step
    optimizer=AdamW(lr=1e-5, betas=(0.9, 0.95), weight_decay=0.1, clip=1.0),
    schedule=Cosine(warmup_steps=240, min_lr=1e-6),
    steps=2_400,  # 10B tokens
    evaluation=Evaluation(every_steps=200, seqs=32),
    checkpoints=Checkpoints(every_steps=200, keep_last=3),
    deepspeed="zero1_bf16.json",
)

if __name__ == "__main__":
    main(recipe)
