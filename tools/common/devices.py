"""Lists GPU types by the makers' data sheets; the planner multiplies these peaks by fitted efficiencies.

Peaks are dense (no sparsity), with fp32 accumulation. Memory is what the driver reports as total. `link` is one direction of
all of a GPU's links to the others in its node; `network` one direction of its share of the node's network in the usual
reference machine (DGX and HGX: one adapter a GPU). Units are multiprocessors, which compute a tile of a matrix product each.

`matmul` is the share of the peak that the best of many product shapes was measured to reach, in 16 bits and in 8 (Bekman,
Machine Learning Engineering, maximum achievable matmul FLOPS; 0.80 where nobody measured). `flash` is the share in attention's
fused kernels, both passes (FlashAttention-2, arXiv 2307.08691, figures 4 to 7: 189 of 312 TFLOP/s on an A100, 335 of 989 on an
H100; on others the H100's). Prices are round figures for a plan's order of magnitude, not quotes: pass `--price-per-hour`.
"""

from __future__ import annotations

from dataclasses import dataclass

from tools.common.console import UsageError

TERA, GIGA, GIB = 1e12, 1e9, 2**30


@dataclass(frozen=True, kw_only=True)
class Device:
    name: str
    peaks: dict[str, float]  # precision -> FLOP/s of matrix multiplication
    memory: float  # bytes
    bandwidth: float  # bytes/s of its memory
    link: float  # bytes/s to the GPUs of its node, one direction
    network: float  # bytes/s to other nodes, one direction
    node: int  # GPUs a node
    units: int  # multiprocessors
    matmul: float  # share of the peak, measured, in matrix products of 16 bits and more
    matmul_8: float  # of 8 bits and fewer
    flash: float  # in fused attention, of the 16-bit peak
    watts: float
    price: float  # US dollars an hour
    source: str

    def peak(self, precision: str) -> float:
        """FLOP/s in "bf16", "fp16", "fp32", "fp8" or "fp4". Raises UsageError where the GPU lacks the precision."""
        if precision not in self.peaks:
            raise UsageError(f"--gpu-type={self.name}: it has no {precision} matrix units, only {', '.join(self.peaks)}")
        return self.peaks[precision] * TERA

    def product_rate(self, precision: str) -> float:
        """FLOP/s of the best matrix products. Raises as `peak`."""
        return self.peak(precision) * (self.matmul_8 if precision in ("fp8", "fp4") else self.matmul)


def _device(
    name: str, source: str, *, half: float, fp32: float, gib: float, gbs: float, link: float, network: float, watts: float,
    price: float, units: int, fp8: float | None = None, fp4: float | None = None, bf16: bool = True, node: int = 8,
    matmul: float = 0.80, matmul_8: float = 0.709, flash: float = 0.34,
) -> Device:  # fmt: skip
    known = {"fp16": half, "bf16": half if bf16 else None, "fp32": fp32, "fp8": fp8, "fp4": fp4}
    peaks = {precision: peak for precision, peak in known.items() if peak}
    return Device(
        name=name, peaks=peaks, memory=gib * GIB, bandwidth=gbs * GIGA, link=link * GIGA, network=network * GIGA, node=node,
        units=units, matmul=matmul, matmul_8=matmul_8, flash=flash, watts=watts, price=price, source=source,
    )  # fmt: skip


# fp32 is what torch uses for fp32 matrices unless told otherwise: TF32 is off
DEVICES = (
    _device("V100-16", "NVIDIA V100 data sheet", half=125, fp32=15.7, gib=15.8, gbs=900, link=150, network=6.25,
            watts=300, price=0.5, units=80, bf16=False),
    _device("V100-32", "NVIDIA V100 data sheet", half=125, fp32=15.7, gib=31.7, gbs=900, link=150, network=6.25,
            watts=300, price=0.6, units=80, bf16=False),
    _device("A100-40", "NVIDIA A100 data sheet", half=312, fp32=19.5, gib=39.6, gbs=1555, link=300, network=25,
            watts=400, price=1.3, units=108, matmul=0.869, flash=0.6),
    _device("A100-80", "NVIDIA A100 data sheet", half=312, fp32=19.5, gib=79.3, gbs=2039, link=300, network=25,
            watts=400, price=1.8, units=108, matmul=0.869, flash=0.6),
    _device("L40S", "NVIDIA L40S data sheet", half=362, fp32=91.6, gib=45.0, gbs=864, link=32, network=12.5,
            watts=350, price=1.0, units=142, fp8=733),
    _device("H100", "NVIDIA H100 SXM data sheet", half=989, fp32=67, gib=79.6, gbs=3350, link=450, network=50,
            watts=700, price=2.5, units=132, matmul=0.803, fp8=1979),
    _device("H100-96", "NVIDIA H100 data sheet; 96 GB, 500 W variant as torchtitan's benchmarks say", half=989, fp32=67, gib=94.9,
            gbs=2400, link=450, network=50, watts=500, price=2.5, units=132, matmul=0.803, fp8=1979),
    _device("H200", "NVIDIA H200 SXM data sheet", half=989, fp32=67, gib=140.4, gbs=4800, link=450, network=50,
            watts=700, price=3.5, units=132, matmul=0.803, fp8=1979),
    _device("B200", "NVIDIA DGX B200 data sheet", half=2250, fp32=75, gib=179.0, gbs=8000, link=900, network=50,
            watts=1000, price=5.0, units=148, matmul=0.776, fp8=4500, fp4=9000),
    _device("GB200", "NVIDIA GB200 NVL72 data sheet", half=2500, fp32=80, gib=184.0, gbs=8000, link=900, network=50,
            watts=1200, price=6.0, units=148, matmul=0.776, fp8=5000, fp4=10000, node=72),
    _device("GB300", "NVIDIA GB300 NVL72 data sheet", half=2500, fp32=80, gib=277.0, gbs=8000, link=900, network=100,
            watts=1400, price=7.0, units=148, matmul=0.776, fp8=5000, fp4=15000, node=72),
    _device("MI250X", "AMD MI250X data sheet (the whole module, two dies)", half=383, fp32=47.9, gib=128.0, gbs=3277, link=200,
            network=25, watts=560, price=1.5, units=220, matmul=0.767, node=4),
    _device("MI300X", "AMD MI300X data sheet", half=1307, fp32=163, gib=192.0, gbs=5300, link=448, network=50,
            watts=750, price=2.5, units=304, matmul=0.601, fp8=2615),
    # for trying the planner on a CPU; `calibrate` replaces these guesses
    _device("CPU", "a guess, one core of a 2020s server: calibrate", half=0.02, fp32=0.05, gib=16.0, gbs=10, link=5, network=1,
            watts=10, price=0.05, units=1, matmul=1.0, flash=1.0),
)  # fmt: skip


def find_device(name: str) -> Device:
    """Return the device of that name, in upper or lower case. Raises UsageError with the known names."""
    for device in DEVICES:
        if device.name.lower() == name.lower():
            return device
    raise UsageError(f"--gpu-type={name}: not known; use one of {', '.join(device.name for device in DEVICES)}")
