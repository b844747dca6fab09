"""GPUs as their data sheets describe them, clusters of them, and how long a step takes by these figures."""

from __future__ import annotations

import dataclasses
from typing import Literal

from trainer.schema import UserError

GB = 10**9
UTILISATION = 0.4
"""Share of the data sheet's FLOP/s that large matrix products reach in training; 0.3 to 0.5 is usual."""

LINK_SHARE = 0.8
"""Share of a link's bytes per second that large collectives reach."""

HOST_LINK = 25 * GB
"""Bytes per second from the CPU's memory to a GPU: PCIe 4.0 x16 as measured, rather than its 32 GB/s."""

RESERVE = 1 * GB
"""What every process keeps on its GPU beside tensors: CUDA's context, cuBLAS workspaces, NCCL's buffers."""

FRAGMENTATION = 0.05
"""Share of the tensors that come and go which PyTorch's allocator holds beyond them."""


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A data sheet: memory in GB, dense TFLOP/s by kind of matrix product, GB/s to its neighbours one way."""

    memory: float
    bfloat16: float
    tf32: float
    float32: float
    link: float


# NVIDIA's data sheets of A100 (2021), H100 (2023), H200 (2024), HGX B200 (2024), L40S (2023), L4 (2023), A10 (2021)
# and the Ada GPU architecture paper (RTX 4090), SXM forms where there are such. Rates are without sparsity; links
# are half of the NVLink (or PCIe) figure, which counts both ways.
GPUS = {
    "a10": Gpu(24, 125, 62.5, 31.2, 32),
    "a100-40": Gpu(40, 312, 156, 19.5, 300),
    "a100": Gpu(80, 312, 156, 19.5, 300),
    "b200": Gpu(180, 2250, 1125, 75, 900),
    "h100": Gpu(80, 989, 494, 67, 450),
    "h200": Gpu(141, 989, 494, 67, 450),
    "l4": Gpu(24, 121, 60, 30.3, 32),
    "l40s": Gpu(48, 362, 183, 91.6, 32),
    "rtx4090": Gpu(24, 165, 82.6, 82.6, 32),
}


def known_gpu(name: str) -> Gpu:
    """The data sheet of a GPU by its name.

    Raises:
        UserError: it is not in the table.
    """
    if name.lower() not in GPUS:
        raise UserError(
            f"--gpu {name}: not known; give one of {', '.join(GPUS)}, with --gpu_memory GB where yours has another size"
        )
    return GPUS[name.lower()]


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Equal GPUs, equally many on each node.

    Args:
        gpus: of all nodes together.
        nodes: how many machines they are in.
        gpu: one GPU's data sheet.
        memory: bytes of one GPU.
        network: bytes per second into each node, from the other nodes.
    """

    gpus: int
    nodes: int
    gpu: Gpu
    memory: int
    network: float

    def __post_init__(self) -> None:
        for name, value in (("gpus", self.gpus), ("nodes", self.nodes)):
            if value < 1:
                raise UserError(f"--{name} {value}: is below 1; give at least one")
        if self.gpus % self.nodes:
            raise UserError(f"--nodes {self.nodes}: does not divide --gpus {self.gpus}; give equal nodes")
        for name, amount in (("gpu_memory", self.memory), ("network", self.network)):
            if amount <= 0:
                raise UserError(f"--{name}: {amount / GB:g} GB is not above 0")

    def compute_seconds(self, flops: float, dtype: str, matmul: str) -> float:
        """Time for so many FLOPs on one GPU. float32 weights run in TF32 where `float32_matmul` allows it."""
        kind: Literal["bfloat16", "tf32", "float32"] = "bfloat16"
        if dtype == "float32":
            kind = "float32" if matmul == "highest" else "tf32"
        return flops / (getattr(self.gpu, kind) * 1e12 * UTILISATION)

    def exchange_seconds(self, whole: float) -> float:
        """Time until every GPU has `whole` bytes of which each held an equal share (or has reduced as many).

        Every GPU receives what it lacks over its link; every node what its GPUs lack together, once, over the network.
        """
        inside = whole * (self.gpus - 1) / self.gpus / (self.gpu.link * GB)
        between = whole * (self.nodes - 1) / self.nodes / self.network
        return max(inside, between) / LINK_SHARE
