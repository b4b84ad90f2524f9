"""The figures of the GPUs that the cost model knows.

Marks: [data sheet] the vendor's figure; [measured] by us on an H100 80GB HBM3 (PyTorch 2.11, CUDA
13.0, Triton 3.6), see benchmarks/LOG.md; [published] by somebody else who measured it; [derived]
arithmetic on these; [assumed] our guess, to be replaced by a measurement. A [measured] figure fits
what it was taken from by construction; tests/test_costs_measured.py holds it against other things.

Tensor peaks are dense, with float32 sums. Sources:
    H100, H200    NVIDIA data sheets (half of the figures "with sparsity")
    H20           press reports of its data sheet (148 TFLOP/s bfloat16, 78 SMs, 60 MB, 4.0 TB/s)
    A100          NVIDIA A100 white paper (80 GB SXM)
    B200          NVIDIA Blackwell brief (HGX), chipsandcheese.com on B200: 148 SMs, 126 MB
    RTX 4090      NVIDIA Ada white paper
    library_share H100: 8192^3 in bfloat16 at 784 TFLOP/s [measured]. Others: best torch.matmul over
                  the peak, stas00/ml-engineering (MAMF table) [published]: A100 271 of 312, B200
                  1745 of 2250 (H100 795 of 989)
    memory_share  a copy of 1 GiB on an H100 reads and writes 2.33 TB/s of 3.35 [measured]
    l2            x * 2 out of place, 8 and 16 MB each way: 4.0 and 7.7 us in a CUDA graph on an
                  H100 [measured]; without the 1.22 us of a kernel that does next to nothing 6.0 and
                  5.2 TB/s. 6.0 it is, as our kernels move a few MB each: 0.64 of 5120 bytes a clock
    launch_gap    the denoising loop of FAR-H takes 79.3 us a diffusion step in a CUDA graph on an
                  H100, its 13.4 kernels 75.7 by the profiler [measured]
    latency       what is left of those 1.22 us, halved: one load, one store
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Host time of an eager PyTorch call with the Python around it [derived: the published way takes
# 2.36 s an image beside an H100 (FAR-H, T = 100, with decoding); hosts differ], and of a blocking
# copy of a small tensor from pageable memory [assumed].
EAGER_CALL = 22e-6
BLOCKING_COPY = 12e-6


@dataclass(frozen=True)
class GPU:
    """One GPU.

    Attributes:
        name: as `fastfar bench --predict` takes it.
        title: as its maker writes it.
        arch: 10 major + minor of its compute capability, which chooses the kernels' tiles.
        half, tf32, fp32: peak FLOP/s of bfloat16 and float16, of TF32, and of plain float32.
        memory: bytes/s from device memory [data sheet].
        l2_size: bytes of the L2 cache.
        l2: bytes/s that all SMs together get from it.
        sms: number of multiprocessors.
        clock: Hz under load.
        sm_bytes: bytes per clock that one SM gets from L2.
        shared: bytes of shared memory that one program may use.
        latency: seconds of a load that hits L2, the start of its program included.
        library_share: of the peak that cuBLAS and cuDNN reach where nothing else bounds.
        triton_share: the same for Triton kernels whose loads pass through registers (no TMA).
        attention_share: the same for PyTorch's fused attention.
        launch_gap: seconds from the end of a kernel to the start of the next in a CUDA graph.
        memory_share: of `memory` that a kernel which reads and writes it reaches.
    """

    name: str
    title: str
    arch: int
    half: float
    tf32: float
    fp32: float
    memory: float
    l2_size: float
    l2: float
    sms: int
    clock: float
    sm_bytes: float
    shared: int
    latency: float
    library_share: float
    triton_share: float
    attention_share: float
    launch_gap: float = 0.3e-6  # [measured] H100; [assumed] of the others
    memory_share: float = 0.70  # [measured] H100; [assumed] of the others

    def peak(self, dtype: torch.dtype) -> float:
        """FLOP/s of products with operands of `dtype`, whose results are as exact as the dtype.

        float32 is either plain or three TF32 products, whichever is faster.
        """
        if dtype in (torch.bfloat16, torch.float16):
            return self.half
        return max(self.fp32, self.tf32 / 3)


_H100 = GPU(
    name="h100",
    title="H100 SXM",
    arch=90,
    half=989.4e12,
    tf32=494.7e12,
    fp32=66.9e12,
    memory=3.35e12,
    l2_size=50e6,
    l2=6e12,  # [derived], see above
    sms=132,
    clock=1.83e9,  # [derived] 989.4e12 / (132 SMs * 4096 FLOP per clock)
    sm_bytes=64,  # [published] per clock and SM on Volta to Hopper
    shared=227 << 10,
    latency=0.46e-6,  # [derived], see above; 0.15 us idle in the near half (chipsandcheese.com)
    library_share=0.79,  # [measured]
    triton_share=0.50,  # [measured] 4096 x 10272 x 1024 in 173 us, the best of 12 tilings
    attention_share=0.17,  # [measured] cuDNN, 2 x 16 heads of 320 x 80: short rows, 11.4 us
)

GPUS: dict[str, GPU] = {
    gpu.name: gpu
    for gpu in (
        _H100,
        # The same chip with faster memory.
        GPU(**{**vars(_H100), "name": "h200", "title": "H200 SXM", "memory": 4.8e12}),
        GPU(
            name="h20",
            title="H20",
            arch=90,
            half=148e12,
            tf32=74e12,
            fp32=44e12,
            memory=4.0e12,
            l2_size=60e6,
            l2=6e12,  # [assumed] the L2 of H100
            sms=78,
            clock=1.83e9,  # [assumed] that of H100
            sm_bytes=64,
            shared=227 << 10,
            latency=0.46e-6,  # [assumed] as H100
            library_share=0.90,  # [assumed] so few FLOPs are not bound by power
            triton_share=0.85,  # [assumed]
            attention_share=0.75,  # [assumed]
        ),
        GPU(
            name="a100",
            title="A100 80 GB SXM",
            arch=80,
            half=312e12,
            tf32=156e12,
            fp32=19.5e12,
            memory=2.04e12,
            l2_size=40e6,
            l2=4.6e12,  # [derived] 0.64 of 5120 bytes per clock (white paper), as on H100
            sms=108,
            clock=1.41e9,
            sm_bytes=64,
            shared=163 << 10,
            latency=0.46e-6,  # [assumed] as H100
            library_share=0.87,
            triton_share=0.75,  # [assumed] Triton is close to cuBLAS on mma.sync
            attention_share=0.65,  # [published] FlashAttention-2: up to 230 TFLOP/s, long rows
        ),
        GPU(
            name="b200",
            title="B200 SXM",
            arch=100,
            half=2250e12,
            tf32=1125e12,
            fp32=75e12,
            memory=8.0e12,
            l2_size=126e6,
            l2=12e12,  # [assumed] two dies, each with the L2 of H100
            sms=148,
            clock=1.86e9,  # [derived] 2250e12 / (148 SMs * 8192 FLOP per clock)
            sm_bytes=64,  # [assumed]
            shared=227 << 10,
            latency=0.46e-6,  # [assumed] as H100
            library_share=0.78,
            triton_share=0.45,  # [assumed] without TMA and warp specialisation
            attention_share=0.22,  # [assumed] FlashAttention-2 does not use tcgen05
        ),
        GPU(
            name="rtx4090",
            title="GeForce RTX 4090",
            arch=89,
            half=165.2e12,
            tf32=82.6e12,
            fp32=82.6e12,
            memory=1.008e12,
            l2_size=72e6,
            l2=5.0e12,  # [assumed]
            sms=128,
            clock=2.52e9,
            sm_bytes=64,
            shared=99 << 10,
            latency=0.46e-6,  # [assumed] as H100
            library_share=0.90,  # [assumed]
            triton_share=0.80,  # [assumed]
            attention_share=0.75,  # [assumed]
        ),
    )
}


def find(name: str) -> GPU:
    """The GPU of that name; ValueError lists those that are known."""
    if name not in GPUS:
        raise ValueError(f"no figures of a GPU {name!r}; there are {', '.join(GPUS)}")
    return GPUS[name]


def of_device(device_name: str) -> GPU | None:
    """The GPU whose name is a word of what the driver calls the device; PCIe boards are others."""
    words = device_name.lower().replace("rtx 4090", "rtx4090").replace("-", " ").split()
    if "pcie" in words:
        return None
    return next((gpu for name, gpu in GPUS.items() if name in words), None)
