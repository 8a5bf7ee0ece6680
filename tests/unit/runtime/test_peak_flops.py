from __future__ import annotations

import pytest

from megatron_qwenvl.runtime.peak_flops import dense_bf16_flops


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA L40S", 362),
        ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", None),
        ("NVIDIA H20", None),
        ("NVIDIA RTX A1000 Laptop GPU", None),
        ("CPU (x86_64)", None),
    ],
)
def test_peak_by_the_name_that_the_driver_reports(name: str, teraflops: float | None) -> None:
    assert dense_bf16_flops(name) == (None if teraflops is None else teraflops * 1e12)
