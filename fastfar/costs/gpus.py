"""The figures of the GPUs that the cost model knows.

Marks: [data sheet] the vendor's figure; [measured] published by somebody who measured it;
[derived] arithmetic on the two; [assumed] our guess, to be replaced by a measurement.

Tensor peaks are dense, with float32 sums. Sources:
    H100, H200    NVIDIA data sheets (half of the figures "with sparsity")
    H20           press reports of its data sheet (148 TFLOP/s bfloat16, 78 SMs, 60 MB, 4.0 TB/s)
    A100          NVIDIA A100 white paper (80 GB SXM)
    B200          NVIDIA Blackwell brief (HGX), chipsandcheese.com on B200: 148 SMs, 126 MB
    RTX 4090      NVIDIA Ada white paper
    library_share best measured torch.matmul over the peak, stas00/ml-engineering (MAMF table):
                  A100 271 of 312, H100 795 of 989, B200 1745 of 2250
    l2            microbenchmarks of H100 give 5.5 to 7 TB/s and one blog 12; products tell more: a
                  tile of 128 x 256 takes 0.0117 byte per FLOP, so a register-staged product at 600
                  TFLOP/s, as Triton reaches, gets 7 TB/s. 7 it is, 0.75 of 5120 bytes per clock
    launch_gap    1.3 us between two kernels of a CUDA graph on H100, Hazy Research's "no bubbles"
                  (Llama-1B megakernel); the others are assumed to be the same
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Host time that an eager PyTorch call takes before its kernel starts, and that a blocking copy of
# a small tensor from pageable memory takes [assumed, from profiles of small models].
EAGER_CALL = 6e-6
BLOCKING_COPY = 12e-6


@dataclass(frozen=True)
class GPU:
    """One GPU.

    Attributes:
        name: as `fastfar bench --predict` takes it.
        title: as its maker writes it.
        arch: 10 major + minor of its compute capability, which chooses the kernels' tiles.
        half, tf32, fp32: peak FLOP/s of bfloat16 and float16, of TF32, and of plain float32.
        memory: bytes/s from device memory.
        l2_size: bytes of the L2 cache.
        l2: bytes/s that all SMs together get from it.
        sms: number of multiprocessors.
        clock: Hz under load.
        sm_bytes: bytes per clock that one SM gets from L2.
        shared: bytes of shared memory that one program may use.
        latency: seconds of a load that hits L2, under load.
        library_share: of the peak that cuBLAS and cuDNN reach where nothing else bounds.
        triton_share: the same for Triton kernels whose loads pass through registers (no TMA).
        attention_share: the same for PyTorch's flash attention.
        launch_gap: seconds from the end of a kernel to the start of the next in a CUDA graph.
        barrier: seconds of a barrier over the whole grid inside a kernel.
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
    launch_gap: float = 1.3e-6
    barrier: float = 0.8e-6  # [assumed] an atomic and its broadcast; cooperative groups: about 1.4

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
    l2=7e12,  # [measured] and [derived], see above
    sms=132,
    clock=1.83e9,  # [derived] 989.4e12 / (132 SMs * 4096 FLOP per clock)
    sm_bytes=64,  # [measured] per clock and SM on Volta to Hopper
    shared=227 << 10,
    latency=0.3e-6,  # [measured] 0.15 us idle in the near half (chipsandcheese.com); [assumed] x 2
    library_share=0.80,
    triton_share=0.60,  # [assumed] register-staged wgmma; Triton's own tutorial is near it
    attention_share=0.40,  # [measured] FlashAttention-2 reaches 350-400 TFLOP/s on H100
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
            l2=7e12,  # [assumed] the L2 of H100
            sms=78,
            clock=1.83e9,  # [assumed] that of H100
            sm_bytes=64,
            shared=227 << 10,
            latency=0.3e-6,
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
            l2=5.4e12,  # [derived] 0.75 of 5120 bytes per clock (white paper), as on H100
            sms=108,
            clock=1.41e9,
            sm_bytes=64,
            shared=163 << 10,
            latency=0.3e-6,  # [assumed]
            library_share=0.87,
            triton_share=0.75,  # [assumed] Triton is close to cuBLAS on mma.sync
            attention_share=0.65,  # [measured] FlashAttention-2 paper: up to 230 TFLOP/s
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
            l2=14e12,  # [assumed] two dies, each with the L2 of H100
            sms=148,
            clock=1.86e9,  # [derived] 2250e12 / (148 SMs * 8192 FLOP per clock)
            sm_bytes=64,  # [assumed]
            shared=227 << 10,
            latency=0.3e-6,  # [assumed] as H100: 0.15 us idle in the near half
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
            latency=0.3e-6,  # [assumed]
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
