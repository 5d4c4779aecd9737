"""Measures a Hugging Face folder in plain transformers: validation loss and perplexity, and text after a few prompts.

    python -m tools.sample RUN/hf --data DIR
    python -m tools.sample RUN/hf --data DIR --prompt "def read(" --tokens 100 --temperature 0

Uses only the data reader of the training code; AutoModelForCausalLM and AutoTokenizer load the rest. Over the same sequences the
loss equals the run's own `val_loss`; an exported folder records their number and length (trifold.json), other folders need --seqs
and --seq-len.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import json
import math
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from recipes.common.config.json_files import read_json
from recipes.common.data.batches import validation_micro_batches
from recipes.common.data.shards import TokenStream, open_split
from tools.common.console import GOOD, UsageError, as_usage_error, exit_code, quiet_transformers
from tools.common.hf_config import refuse_code

PROMPT_TOKENS = 16  # in a prompt taken from the validation split
MAX_SEQ_LEN = 2048  # unless trifold.json or --seq-len gives the length
MAX_SEQS = 64
BATCH_TOKENS = 4096
LOGITS_CHUNK_TOKENS = 1024  # fp32 logits over a large vocabulary, in chunks


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.sample", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "folder", type=Path, metavar="FOLDER", help="a Hugging Face model folder, as tools.checkpoint to-hf writes it"
    )
    parser.add_argument("--data", type=Path, required=True, help="a folder written by tools.data prepare")
    parser.add_argument(
        "--prompt", action="append", default=[], help="repeatable (default: starts of sequences of the validation split)"
    )
    parser.add_argument("--tokens", type=int, default=48, help="tokens to generate after each prompt (default: %(default)s)")
    parser.add_argument("--seqs", type=int, help="sequences of the validation split (default: as in the run's evaluation)")
    parser.add_argument("--seq-len", type=int, help="tokens in a sequence (default: as in the run's batches)")
    parser.add_argument("--prompts", type=int, default=3, help="prompts to take from the validation split (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.7, help="0: always the likeliest token (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling (default: %(default)s)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="precision to compute in (default: %(default)s)",
    )
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to compute (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout and nothing else")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    quiet_transformers()
    return exit_code(lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    if args.tokens < 0 or args.prompts < 0 or args.temperature < 0:
        raise UsageError("--tokens, --prompts and --temperature must not be negative")
    model, tokenizer = load(args.folder, args.dtype, args.device)
    stream, seqs = open_validation(args, model)
    loss, seconds = validation_loss(model, stream, seqs)
    result: dict[str, Any] = {
        "folder": str(args.folder),
        "val_loss": loss,
        "perplexity": math.exp(loss) if loss < 700 else math.inf,
        "seqs": seqs,
        "seq_len": stream.seq_len,
        "tokens_per_second": seqs * stream.seq_len / seconds,
        "samples": [],
    }
    if not args.json:
        size = f"{seqs} sequences of {stream.seq_len} tokens"
        print(f"validation loss {loss:.6f}, perplexity {result['perplexity']:.2f} ({size}, {seconds:.1f} s)")
    for prompt in args.prompt or prompts_from(stream, tokenizer, args.prompts):
        text = generate(model, tokenizer, prompt, args.tokens, args.temperature, args.seed)
        result["samples"].append({"prompt": prompt, "continuation": text})
        if not args.json:
            print(f"\n--- prompt\n{prompt}\n--- continuation\n{text}")
    if args.json:
        print(json.dumps(result))
    return GOOD


def load(folder: Path, dtype: str, device: str) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """Load the model and its tokenizer. Raises UsageError when either cannot be loaded."""
    if not (folder / "config.json").is_file():
        raise UsageError(f"{folder} is no Hugging Face model folder (no config.json); tools.checkpoint to-hf exports one")
    refuse_code(folder)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), local_files_only=True, trust_remote_code=False
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"{folder}: transformers cannot load it: {error}") from error
    return model.to(device).eval(), tokenizer


def open_validation(args: argparse.Namespace, model: nn.Module) -> tuple[TokenStream, int]:
    """Return the validation split, and how many of its sequences to use."""
    path = args.folder / "trifold.json"
    remembered = read_json(path) if path.is_file() else {}
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or MAX_SEQ_LEN
    seq_len = args.seq_len or remembered.get("seq_len") or min(longest, MAX_SEQ_LEN)
    if seq_len < 1:
        raise UsageError(f"--seq-len={seq_len}: must be at least 1")
    with as_usage_error(OSError, ValueError):
        stream = open_split(args.data, "validation", seq_len)
    there = stream.num_positions
    seqs = args.seqs or remembered.get("evaluation_seqs") or min(MAX_SEQS, there)
    if not 1 <= seqs <= there:
        raise UsageError(f"--seqs={seqs}: the validation split of {args.data} has {there} sequences of {seq_len} tokens")
    return stream, seqs


@torch.no_grad()
def validation_loss(model: nn.Module, stream: TokenStream, seqs: int) -> tuple[float, float]:
    """Return (mean cross-entropy in nats over every token of the first `seqs` sequences, seconds)."""
    started = time.perf_counter()
    device = next(model.parameters()).device
    micro_seqs = max(1, min(seqs, BATCH_TOKENS // stream.seq_len))
    total = 0.0
    for tokens, rows in validation_micro_batches(stream, seqs=seqs, micro_seqs=micro_seqs, data_rank=0, data_size=1):
        tokens = tokens[rows].to(device)
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits.flatten(0, 1)
        targets = tokens[:, 1:].flatten()
        for scores, wanted in zip(logits.split(LOGITS_CHUNK_TOKENS), targets.split(LOGITS_CHUNK_TOKENS), strict=True):
            total += F.cross_entropy(scores.float(), wanted, reduction="sum").item()
    return total / (seqs * stream.seq_len), time.perf_counter() - started


def prompts_from(stream: TokenStream, tokenizer: PreTrainedTokenizerBase, count: int) -> list[str]:
    """Return the starts of `count` sequences, spread over the split."""
    positions = torch.arange(count) * stream.num_positions // max(count, 1)
    tokens = stream.read(positions.numpy())[:, : min(PROMPT_TOKENS, stream.seq_len)]
    return [tokenizer.decode(row, skip_special_tokens=True) for row in tokens.tolist()]


@torch.no_grad()
def generate(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompt: str, tokens: int, temperature: float, seed: int
) -> str:
    """Return the model's text after `prompt`; a prompt beyond the context length loses its start."""
    device = next(model.parameters()).device
    ids = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).input_ids.to(device)
    if not ids.numel():
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        ids = torch.tensor([[start or 0]], device=device)
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or ids.shape[1] + tokens
    tokens = min(tokens, longest - 1)
    ids = ids[:, -(longest - tokens) :]
    if not tokens:
        return ""
    torch.manual_seed(seed)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    drawn = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    mask = torch.ones_like(ids)
    written = model.generate(ids, attention_mask=mask, max_new_tokens=tokens, pad_token_id=pad, **drawn)
    return tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)


if __name__ == "__main__":
    sys.exit(main())
