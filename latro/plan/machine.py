"""What a GPU and the links between GPUs do in a second: datasheet figures, and the share of them that is reached."""

from __future__ import annotations

from dataclasses import dataclass

# Of the datasheet. Products and copies: 770 to 798 of 989 TFLOP/s and 4.3 of 4.8 TB/s were measured on an H200.
# Attention: FlashAttention-3 on an H100 does 212 TFLOP/s forward and backward together at 1024 tokens, heads of 128.
# Links: what NCCL's tests show for large messages is eight to nine tenths.
PRODUCTS, ATTENTION, MEMORY, LINKS = 0.8, 0.2, 0.9, 0.8
# Of a GPU's memory, what CUDA, NCCL and the allocator's gaps leave.
USABLE = 0.92


@dataclass(frozen=True)
class GPU:
    name: str
    memory: int  # bytes
    flops: float  # dense bfloat16 products with float32 sums, each second
    bandwidth: float  # bytes each second
    link: float  # to GPUs of the same machine, in one direction
    host: float  # to the memory of the machine, in one direction
    source: str


GPUS = {
    gpu.name: gpu
    for gpu in (
        GPU("h200", 141 * 10**9, 989e12, 4.8e12, 450e9, 64e9, "NVIDIA H200 datasheet, SXM"),
        GPU("h100", 80 * 10**9, 989e12, 3.35e12, 450e9, 64e9, "NVIDIA H100 datasheet, SXM"),
        GPU("a100", 80 * 10**9, 312e12, 2.039e12, 300e9, 32e9, "NVIDIA A100 datasheet, SXM 80 GB"),
        GPU("l40s", 48 * 10**9, 362e12, 0.864e12, 32e9, 32e9, "NVIDIA L40S datasheet; GPUs are linked by PCIe"),
    )
}


@dataclass(frozen=True)
class Machine:
    """`gpus` GPUs, in machines of `per_machine`; each has a network port of `network` bytes a second."""

    gpu: GPU
    gpus: int
    per_machine: int = 8
    network: float = 50e9

    def __post_init__(self) -> None:
        for name, count in (("gpus", self.gpus), ("gpus_per_machine", self.per_machine)):
            if count < 1:
                raise ValueError(f"plan: --{name} must be at least 1, got {count}")
        if self.gpus > self.per_machine and self.gpus % self.per_machine:
            raise ValueError(
                f"plan: --gpus must fill machines of --gpus_per_machine {self.per_machine}, got {self.gpus}"
            )
        if self.network <= 0:
            raise ValueError(f"plan: --network must be above 0 Gbit/s, got {self.network * 8 / 1e9:g}")

    @property
    def machines(self) -> int:
        return max(1, self.gpus // self.per_machine)

    def gather_seconds(self, size: int, every: int = 1) -> float:
        """Each GPU gets, or the sum of all is scattered over, `size` bytes: once through all links at the same time.

        every: only one of so many GPUs takes part in a group, and its neighbours are in other groups at the same time.
        """
        local = self.gpus // self.machines // every
        within = size * (local - 1) / local / self.gpu.link
        # All ports of a machine's members carry a part of what the machine has to get.
        between = size * (self.machines - 1) / self.machines / (local * self.network)
        return max(within, between) / LINKS

    def sum_seconds(self, size: int, every: int = 1) -> float:
        """All GPUs get the sum: scattered, then gathered."""
        return 2 * self.gather_seconds(size, every)

    def neighbour_sum_seconds(self, size: int, among: int) -> float:
        """The same among so many GPUs of a machine."""
        return 2 * size * (among - 1) / among / self.gpu.link / LINKS
