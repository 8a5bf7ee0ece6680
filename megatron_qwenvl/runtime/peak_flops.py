"""Peak FLOP/s of NVIDIA's data-center GPUs, the reference of model FLOPs utilization (MFU)."""

from __future__ import annotations

# Dense bf16 tensor-core FLOP/s from NVIDIA's data sheets; where they give the rate with sparsity, half of it.
# The first entry whose words are part of the name that the driver reports counts, so special forms come first.
_DENSE_BF16 = {
    "GB200": 2500e12,
    "B200": 2250e12,
    "GH200": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,  # SXM
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,  # SXM: "NVIDIA H100 80GB HBM3"
    "H800 PCIe": 756e12,
    "H800": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
}


def dense_bf16_flops(device: str) -> float | None:
    """Peak FLOP/s of a device by its name; None for a CPU, a part of a GPU (MIG) and what is not in the table."""
    words = f" {device.replace('-', ' ')} "
    if " MIG " in words:
        return None
    return next((peak for name, peak in _DENSE_BF16.items() if f" {name} " in words), None)
