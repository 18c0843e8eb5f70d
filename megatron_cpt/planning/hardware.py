"""What an accelerator and its links can do, and the share of it that training reaches."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from megatron_cpt.utils.errors import InputError

# Shares of a peak that are assumed for every device, not fitted to anything.
LINK_EFFICIENCY = 0.75  # large NCCL collectives, of the link's data rate
MEMORY_EFFICIENCY = 0.85  # elementwise kernels, of the memory's data rate
ATTENTION_EFFICIENCY = 0.7  # causal flash attention, relative to matrix products of the same device
HIDDEN_BY_TP_OVERLAP = 0.4  # of tensor-parallel communication, with tp_comm_overlap; fitted to torchtitan's 597 and 652


@dataclass(frozen=True)
class Device:
    """One accelerator.

    Attributes:
        memory_gib: what torch can allocate, GiB
        bf16_tflops, fp8_tflops: dense peak, 1e12 operations per second; fp8 None: it has no such units
        memory_gb_per_s: of device memory, 1e9 bytes per second
        nvlink_gb_per_s: to the other devices of a node, 1e9 bytes per second in one direction
        network_gb_per_s: of a device to other nodes, 1e9 bytes per second in one direction
        devices_per_node: devices that NVLink joins
        matmul_efficiency, fp8_efficiency: share of the peak that large matrix products of a training run reach. The only
            numbers here that are fitted (docs/planning.md)
    """

    name: str
    memory_gib: float
    bf16_tflops: float
    fp8_tflops: float | None
    memory_gb_per_s: float
    nvlink_gb_per_s: float
    network_gb_per_s: float
    devices_per_node: int
    matmul_efficiency: float
    fp8_efficiency: float


A100_BF16, H100_BF16, H100_FP8 = 0.73, 0.56, 0.66  # fitted to planning/published.py; the others take the H100's
DEVICES = {
    device.name: device
    for device in (
        Device("a100-40g", 39.4, 312.0, None, 1555, 300, 25, 8, A100_BF16, 0.0),
        Device("a100-80g", 79.2, 312.0, None, 2039, 300, 25, 8, A100_BF16, 0.0),
        Device("h100", 79.1, 989.4, 1978.9, 3350, 450, 50, 8, H100_BF16, H100_FP8),
        Device("h200", 139.8, 989.4, 1978.9, 4800, 450, 50, 8, H100_BF16, H100_FP8),
        Device("b200", 178.4, 2250.0, 4500.0, 8000, 900, 50, 8, H100_BF16, H100_FP8),
        # Of an NVL72: NVLink joins 72, of which jobs in powers of two use 64. Data sheets; memory less what CUDA reserves.
        Device("gb200", 184.3, 2500.0, 5000.0, 8000, 900, 50, 64, H100_BF16, H100_FP8),
        Device("gb300", 276.0, 2500.0, 5000.0, 8000, 900, 100, 64, H100_BF16, H100_FP8),
    )
}


def find_device(name: str, **changes: float | int | None) -> Device:
    """A device by name (any case), with what is known better.

    Raises:
        InputError: unknown name; the message lists the known ones
    """
    device = DEVICES.get(name.lower())
    if device is None:
        raise InputError(
            f"device is {name!r}; expected {', '.join(DEVICES)}, and change what differs, for example memory_gib"
        )
    return dataclasses.replace(device, **{key: value for key, value in changes.items() if value is not None})  # type: ignore[arg-type]


@dataclass(frozen=True)
class Cluster:
    """Equal devices in equal nodes."""

    device: Device
    devices: int

    def bandwidth(self, span: int) -> float:
        """Bytes per second that each device can send within every group of `span` consecutive devices.

        Groups begin at multiples of `span`; where that does not divide a node, some lie across two.
        """
        device = self.device
        inside = span <= device.devices_per_node and (
            device.devices_per_node % span == 0 or self.devices <= device.devices_per_node
        )
        return (device.nvlink_gb_per_s if inside else device.network_gb_per_s) * 1e9 * LINK_EFFICIENCY

    def bandwidth_of_every(self, stride: int, size: int) -> float:
        """Bytes per second of a ring collective in a group of `size` devices that are `stride` apart.

        A group with several devices in each node uses the network links of all of them.
        """
        device = self.device
        inside = max(1, device.devices_per_node // stride)
        if size <= inside:
            return self.bandwidth(1)
        return min(device.nvlink_gb_per_s, device.network_gb_per_s * inside) * 1e9 * LINK_EFFICIENCY
