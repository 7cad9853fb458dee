"""Sums of parts, in their order."""

import pytest
import torch
from checks import same_bits

from vllm_ue8m0.kernels import sum_parts


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("P", "M", "N"), [(28, 1, 256), (3, 5, 64), (1, 2, 128), (28, 33, 256)])
def test_are_added_in_order(device, P, M, N, dtype):
    parts = (
        torch.randn(P, M, N, device=device) * torch.logspace(-3, 3, P, device=device)[:, None, None]
    )
    parts[:, 0, 0] = float("nan")
    whole = torch.full((M * N + 64,), 7.0, dtype=dtype, device=device)
    out = whole[: M * N].view(M, N)
    sum_parts.launch(parts, out)
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    assert same_bits(out, total.to(dtype))
    assert (whole[M * N :] == 7).all()
