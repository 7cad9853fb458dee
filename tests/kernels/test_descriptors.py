"""Descriptors for the copy engine; Triton's constructor checks them."""

import pytest
import torch

pytest.importorskip("triton.experimental.gluon.nvidia.hopper")
from vllm_ue8m0.kernels import hopper
from vllm_ue8m0.layouts import empty_scale

CPU = torch.device("cpu")


def descriptors():
    codes = torch.zeros(300, 400, dtype=torch.float8_e4m3fn)[:, :384]
    yield hopper.code_tiles(codes, 128), codes
    yield hopper.half_tiles(torch.zeros(70, 264, dtype=torch.bfloat16), 64, 64), None
    for ue8m0 in (True, False):
        scale = empty_scale((), 300, 3, ue8m0, "mn_major", CPU)
        yield hopper.scale_columns(scale, 128), scale


def test_what_they_describe():
    (codes, base), _, (scales, scale), _ = descriptors()
    assert (tuple(codes.shape), tuple(codes.strides)) == ((300, 384), (400, 1))
    assert list(codes.block_shape) == [128, 128] and codes.base is base
    assert (list(scales.shape), list(scales.strides)) == ([3, 300], [scale.stride(1), 1])
    assert list(scales.block_shape) == [1, 128]
