"""GPT-2 124M, 10B tokens in batches of 0.5M, on one machine. Measured: not yet.

    bash launch/local.sh recipes/gpt2_124m.py --out-dir /ckpt/gpt2_124m          # one machine, 1 to 8 GPUs
    python recipes/gpt2_124m.py --dry-run --world-size 8                         # check and print, no GPU

Planned (H100, not measured; memory a GPU over the stages): 1 GPU 14 GiB, MFU 19%, 12 hours; 2 GPUs 14 GiB, MFU 19%, 6.0 hours;
4 GPUs 13 GiB, MFU 18%, 3.1 hours; 8 GPUs 13 GiB, MFU 17%, 1.6 hours.

Where the numbers come from: shape from GPT-2's published config, without dropout; learning rate 6e-4, 700 warm-up steps,
cosine to 0, decay 0.1 and 524,288 tokens a step for 10B tokens from the llm.c reproduction (karpathy/llm.c, discussion 481),
which follows GPT-3 (arXiv 2005.14165, table 2.1).
"""

import sys
from pathlib import Path

if not __package__:  # run as a script: import from the repository root, not from recipes/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from transformers import GPT2Config

from recipes.common.recipe import AdamW, Batch, Checkpoints, Cosine, Evaluation, Layout, Recipe
from recipes.common.train import main

recipe = Recipe(
    name="gpt2_124m",
    model=GPT2Config(
        vocab_size=50_257,
        n_positions=1024,
        n_embd=768,
        n_layer=12,
        n_head=12,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=50_256,
        eos_token_id=50_256,
    ),
    num_params=124_439_808,
    tokenizer="/data/gpt2_124m/tokenizer",
    data="/data/gpt2_124m/tokens",
    layouts={
        1: Layout(),
        2: Layout(),
        4: Layout(),
        8: Layout(),
    },
    batch=Batch(seq_len=1024, micro_seqs=16, global_seqs=512),  # 0.5M tokens a step
    optimizer=AdamW(lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1, clip=1.0),
    schedule=Cosine(warmup_steps=700),
    steps=19_073,  # 10B tokens
    evaluation=Evaluation(every_steps=250, seqs=1024),
    checkpoints=Checkpoints(every_steps=1000, keep_last=2),
    deepspeed="zero1_bf16.json",
)

if __name__ == "__main__":
    main(recipe)
