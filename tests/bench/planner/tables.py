"""Reads published measurements: the columns of `published_runs.csv` (facts with their sources) and of vTrain's tables.

What a row does not say is filled in by rules stated here, the same for every row: layers and hidden size of a GPT known by its
parameter count are GPT-3's (arXiv 2005.14165, table 2.1); data ranks are GPUs / (tensor x pipeline x context), also where a row
says otherwise. Some facts are of a source, not of a row: which links its machine had, and what its software does.
"""

from __future__ import annotations

import csv
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path

from recipes.common.model.flops import sc21_eq3
from tools.common.console import UsageError
from tools.common.devices import DEVICES, GIB, Device, find_device

# vTrain's tables do not say these; its paper (arXiv 2312.12391) and the configs of its measured runs do (config/validation in
# github.com/VIA-Research/vTrain: use_checkpoint, so every layer runs its forward pass twice; inter_node_bandwidth, 800 Gb/s)
VTRAIN_VOCAB = 50257
VTRAIN_DEVICE = "A100-80"
VTRAIN_NETWORK = 800e9 / 8 / 8  # bytes/s of a GPU: eight share the node's
# parameters (billions) -> (layers, hidden size)
GPT3_SHAPES = {0.125: (12, 768), 0.35: (24, 1024), 0.76: (24, 1536), 1.3: (24, 2048), 2.7: (32, 2560), 6.7: (32, 4096),
               13.0: (40, 5120), 30.0: (48, 7168), 65.0: (80, 8192), 175.0: (96, 12288)}  # fmt: skip
_VTRAIN = {"# GPUs", "global batch", "micro batch", "hidden size", "attention heads", "# layers", "sequence length",
           "tensor parallelism", "data parallelism", "pipeline parallelism", "iteration time (ms)"}  # fmt: skip
_PUBLISHED = {"source", "model", "params_B", "gpus", "gpu_type", "tp", "pp", "memory_note"}
_NUMBERS = ("params_B", "layers", "hidden", "heads", "seq", "vocab", "gpus", "tp", "pp", "dp", "global_batch", "micro_batch",
            "tflops_per_gpu", "step_time_s", "mem_gb")  # fmt: skip
_FLASH = ("pytorch/torchtitan", "mosaicml/", "NVIDIA-NeMo/", "NVIDIA/Megatron-LM README images/model_table", "glennklockwood")
# in mid-2023, so FlashAttention's first kernels, half as fast as the second's (arXiv 2307.08691)
_FIRST_FLASH = ("mosaicml/",)
# Megatron-Core: sequence parallelism, a sharded optimizer, and gradients and weights exchanged behind compute (its README)
_MEGATRON_CORE = ("NVIDIA-NeMo/", "NVIDIA/Megatron-LM README images/model_table")
_INTERLEAVED = ("glennklockwood.com/garden/llama-3.1",)  # arXiv 2407.21783, 3.3.2; it does not say how finely: a layer a chunk
# embedding and head count as a layer each where that makes stages even: arXiv 2407.21783, 3.3.2; Megatron Bridge's recipes
_ENDS_COUNT = ("NVIDIA-NeMo/", *_INTERLEAVED)
_JEAN_ZAY = ("bigscience-workshop/",)
_JEAN_ZAY_NETWORK = 6.25e9  # bytes/s: eight A100 share four links of 100 Gb/s (huggingface.co/blog/bloom-megatron-deepspeed)
_GPU = re.compile(r"(?:DGX-)?([a-z]+\d+[a-z]?)(?![a-z0-9])", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class MeasuredRun:
    """A row of a table. None: not reported."""

    table: str  # rows of one table were measured alike: same software, GPU and precision
    label: str
    params: float  # as the row states them
    layers: int
    hidden: int
    heads: int
    seq_len: int
    vocab: int
    gpus: int
    tensor: int
    pipeline: int
    data: int
    global_seqs: int
    micro_seqs: int
    recompute: str  # "none", "selective" or "full"
    device: Device
    precision: str
    sequence_share: int = 1  # ranks that share one sequence (context parallelism)
    chunks: int = 1
    sharded: bool = False  # FSDP or ZeRO 3
    sequence_parallel: bool = False
    arithmetic: bool = False  # its memory is a sum that the authors did on paper, not a measurement
    overlapped: bool = False  # what its data ranks exchange hides behind compute; optimizer states are sharded
    zero_stage: int = 0
    embedding_balanced: bool = False
    flash: bool = False
    first_flash: bool = False
    seconds: float | None = None
    memory: float | None = None  # bytes
    out_of_memory: bool = False
    disputed: bool = False  # its time and its TFLOP/s disagree by over a quarter: a figure of the row is wrong

    @property
    def micro_batches(self) -> int:
        return max(self.global_seqs // (self.data * self.micro_seqs), 1)

    @property
    def passes(self) -> int:
        """Work of a layer in a step, in forward passes."""
        return 4 if self.recompute == "full" else 3

    @property
    def layer_params(self) -> float:
        """12 h^2 where that gives the stated size (GPT's shape), else the stated size less embedding and head, by layer."""
        gpt = 12.0 * self.hidden**2
        stated = (self.params - 2.0 * self.hidden * self.vocab) / self.layers
        return gpt if abs(self.layers * gpt + self.hidden * self.vocab - self.params) < 0.08 * self.params else stated


def memory_table(row: MeasuredRun) -> str:
    """Return the table of a row's memory, which 8-bit products do not change: weights, gradients and states stay as they are."""
    return row.table.removesuffix(" fp8")


def read_rows(path: Path) -> tuple[list[MeasuredRun], int]:
    """Return (rows of a CSV that say enough to be predicted, number of others). Raises UsageError for a file of other columns."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:  # Excel writes a byte order mark
            records = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{path}: cannot be read ({error})") from error
    columns = set(records[0]) if records else set()
    if columns >= _VTRAIN:
        return [_vtrain_row(path, number, record) for number, record in enumerate(records, start=2)], 0
    if columns >= _PUBLISHED:
        found = [_published_row(path, number, record) for number, record in enumerate(records, start=2)]
        rows = [row for row in found if row is not None]
        return rows, len(found) - len(rows)
    raise UsageError(
        f"{path}: its columns are neither those of published_runs.csv nor of vTrain's tables; found {sorted(columns)}"
    )


def _number(path: Path, line: int, record: dict[str, str], column: str) -> float | None:
    text = (record.get(column) or "").strip()
    if not text:
        return None
    value = _positive(text)
    if value is None:
        raise UsageError(f"{path}, line {line}: {column}={text!r} is not a number over 0")
    return value


def _positive(text: str | None) -> float | None:
    """Return a number over 0, else None: published tables say some things in words."""
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) and value > 0 else None


def _vtrain_row(path: Path, line: int, record: dict[str, str]) -> MeasuredRun:
    values = {column: _number(path, line, record, column) for column in _VTRAIN}
    missing = sorted(column for column, value in values.items() if value is None)
    if missing:
        raise UsageError(f"{path}, line {line}: {', '.join(missing)} is empty")
    layers, hidden = int(values["# layers"]), int(values["hidden size"])
    return MeasuredRun(
        table=path.stem, label=f"{path.name}:{line}", layers=layers, hidden=hidden, heads=int(values["attention heads"]),
        params=12.0 * layers * hidden**2 + VTRAIN_VOCAB * hidden, seq_len=int(values["sequence length"]), vocab=VTRAIN_VOCAB,
        gpus=int(values["# GPUs"]), tensor=int(values["tensor parallelism"]), pipeline=int(values["pipeline parallelism"]),
        data=int(values["data parallelism"]), global_seqs=int(values["global batch"]), micro_seqs=int(values["micro batch"]),
        recompute="full", device=replace(find_device(VTRAIN_DEVICE), network=VTRAIN_NETWORK), precision="fp16",
        seconds=values["iteration time (ms)"] / 1e3,
    )  # fmt: skip


def _published_row(path: Path, line: int, record: dict[str, str]) -> MeasuredRun | None:
    values = {name: _positive(record.get(name)) for name in _NUMBERS}
    note, model, source = record["memory_note"], record["model"], record["source"]
    device = _device(record["gpu_type"])
    if device is None or not (values["params_B"] and values["gpus"] and values["tp"] and values["pp"] and values["seq"]):
        return None
    layers, hidden = values["layers"], values["hidden"]
    if not (layers and hidden):
        nearest = min(GPT3_SHAPES, key=lambda size: abs(math.log(size / values["params_B"])))
        if abs(math.log(nearest / values["params_B"])) > 0.2:
            return None
        layers, hidden = GPT3_SHAPES[nearest]
    words = f"{model} {note}".lower()
    named = [kind for kind in ("fp4", "fp8") if kind in words and kind in device.peaks]
    cp = int((re.search(r"cp=(\d+)", words) or [0, "1"])[1])
    finest = layers // values["pp"] if source.startswith(_INTERLEAVED) else 1
    chunks = int((re.search(r"vp=(\d+)", words) or [0, finest])[1])
    sharded = bool(re.search(r"fsdp(?!=)|fsdp=[1-9]|full_shard|shard_grad_op|zero-3", words))
    zero = re.search(r"zero-(\d)", words)
    data = int(values["gpus"] // (values["tp"] * values["pp"] * cp) or 1)
    micro = int(values["micro_batch"] or 1)
    tags = [tag for tag in ("zero-3", "fp8", "nvfp4", "mxfp8", "fp16", "bf16") if tag in words]
    if source.startswith(_JEAN_ZAY) and device.name.startswith("A100"):
        device = replace(device, network=_JEAN_ZAY_NETWORK)
    ends_count = bool(re.search("embed-balanced|counted as a pp block", words))
    ends_count |= source.startswith(_ENDS_COUNT) and (layers + 2) % values["pp"] == 0
    core, torchtitan = source.startswith(_MEGATRON_CORE), source.startswith("pytorch/torchtitan ")
    row = MeasuredRun(
        table=" ".join([_short(source), device.name, *tags[:1]]), label=f"{path.name}:{line} {model}",
        params=values["params_B"] * 1e9, layers=int(layers), hidden=int(hidden),
        heads=int(values["heads"] or max(hidden // 128, 1)), seq_len=int(values["seq"]),
        vocab=int(values["vocab"] or 50432), gpus=int(values["gpus"]), tensor=int(values["tp"]),
        pipeline=int(values["pp"]), data=data, global_seqs=int(values["global_batch"] or data * micro),
        micro_seqs=1 if torchtitan and values["pp"] > 1 else micro,  # its column is the batch of a data rank
        recompute=_recompute(record["recompute"]), device=device, precision=[*named, "fp16"][0], sequence_share=cp,
        chunks=chunks, sharded=sharded or torchtitan, overlapped=sharded or torchtitan or core,
        sequence_parallel=torchtitan or core or "sequence-parallel" in record["recompute"],
        arithmetic="activations" in note, zero_stage=int(zero[1]) if zero else 0,
        embedding_balanced=ends_count,
        flash=source.startswith(_FLASH),
        first_flash=source.startswith(_FIRST_FLASH),
        memory=values["mem_gb"] * GIB if values["mem_gb"] and layers and hidden and values["layers"] else None,
        out_of_memory=bool(re.match(r"OOM\b", note)),
    )  # fmt: skip
    return _with_seconds(row, values, note)


def _short(source: str) -> str:
    return re.split(r"[@\[;(,]| as ", source)[0].strip().split("/")[-1]


def _recompute(text: str) -> str:
    return next((kind for kind in ("full", "selective") if text.startswith(kind) or text.startswith("per-op")), "none")


def _device(text: str) -> Device | None:
    """Return the GPU named ("A100-80GB", "h100_80gb", "DGX-GB200"), with the memory nearest to the one stated."""
    kind = _GPU.match(text.strip())
    named = [device for device in DEVICES if kind and device.name.partition("-")[0] == kind[1].upper()]
    size = re.search(r"(\d+)\s*GB", text, re.IGNORECASE)
    if size and named:
        return min(named, key=lambda device: abs(device.memory / GIB - float(size[1])))
    return next((device for device in named if "-" not in device.name), named[-1] if named else None)


def _with_seconds(row: MeasuredRun, values: dict[str, float | None], note: str) -> MeasuredRun:
    """Set the step's time: as measured, or from tokens a second, or from TFLOP/s (eq. 3 of SC21 where recomputation counts)."""
    if values["global_batch"] is None:
        return row
    tokens = row.global_seqs * row.seq_len
    rate = re.search(r"([\d.]+) tokens/s/GPU", note)
    from_flops = None
    if values["tflops_per_gpu"]:
        shape = (row.layers, row.hidden, row.vocab, row.seq_len)
        full = row.recompute == "full"
        flops = sc21_eq3(*shape) if full else 6.0 * row.params + 6.0 * row.layers * row.hidden * row.seq_len
        from_flops = flops * tokens / (values["tflops_per_gpu"] * 1e12 * row.gpus)
    measured = values["step_time_s"]
    if measured and from_flops and not 0.8 < measured / from_flops < 1.25:
        return replace(row, disputed=True)
    return replace(row, seconds=measured or (tokens / (float(rate[1]) * row.gpus) if rate else from_flops))
