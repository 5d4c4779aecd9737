"""A first model on any machine: 2M parameters, trained on the Python standard library's sources in a few minutes on CPU.

    bash launch/quickstart.sh                                        # everything, from the text to generated code
    deepspeed --num_gpus 8 recipes/quickstart.py --out-dir runs/quickstart      # the training alone, 8 processes
    python recipes/quickstart.py --dry-run --world-size 8            # check and print

Copy this file for a new model. A real one, with its numbers explained, is llama_1b.py.
"""

import sys
from pathlib import Path

if not __package__:  # run as a script: import from the repository root, not from recipes/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from transformers import LlamaConfig

from recipes.common.recipe import AdamW, Batch, Checkpoints, Cosine, Evaluation, Layout, Recipe
from recipes.common.train import main

recipe = Recipe(
    name="quickstart",
    model=LlamaConfig(
        vocab_size=4096,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    ),
    num_params=2_361_024,
    tokenizer="runs/quickstart_data/tokenizer",
    data="runs/quickstart_data",
    layouts={
        1: Layout(),
        2: Layout(pipeline=2),
        4: Layout(tensor=2, pipeline=2),
        8: Layout(tensor=2, pipeline=2),
    },
    batch=Batch(seq_len=128, micro_seqs=8, global_seqs=32),  # 4096 tokens a step
    optimizer=AdamW(lr=4e-3, weight_decay=0.1, clip=1.0),
    schedule=Cosine(warmup_steps=20, min_lr=4e-4),
    steps=300,
    evaluation=Evaluation(every_steps=100, seqs=128),
    checkpoints=Checkpoints(every_steps=100),
    deepspeed="zero1_fp32.json",
)

if __name__ == "__main__":
    main(recipe)
