"""act_quant, bit for bit: plain torch and Triton against exact arithmetic."""

import golden
import numpy as np
import pytest
import torch
from checks import same_bits, same_quantized

from vllm_ue8m0 import portable, reference
from vllm_ue8m0.layouts import SCALE_LAYOUTS, from_layout

BACKENDS = pytest.mark.parametrize("backend", [reference, portable], ids=["reference", "portable"])
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def check(backend, x, group, ue8m0):
    q, s = backend.act_quant(x, group, ue8m0)
    codes, scales = (golden.act_quant_ue8m0 if ue8m0 else golden.act_quant_float)(x, group)
    assert q.dtype == torch.float8_e4m3fn and q.is_contiguous() and q.shape == x.shape
    assert s.dtype == (torch.uint8 if ue8m0 else torch.float32) and s.is_contiguous()
    np.testing.assert_array_equal(s.cpu().numpy(), scales)
    np.testing.assert_array_equal(q.view(torch.uint8).cpu().numpy(), codes)


@BACKENDS
@pytest.mark.parametrize(("amax", "byte"), golden.ACT_QUANT_BYTES)
def test_golden_bytes(backend, device, amax, byte):
    x = torch.zeros(1, 32, device=device)
    x[0, 7] = -amax
    assert backend.act_quant(x, 32, True)[1].tolist() == [[byte]]


@BACKENDS
def test_golden_codes(backend, device):
    # amax 448: the scale is 1 and the codes are those of the values themselves.
    values = [
        448.0,
        432.0,
        416.0,
        -448.0,
        1.0,
        1.0625,
        1.1875,
        -0.0,
        2.0**-9,
        2.0**-10,
        3 * 2.0**-10,
    ]
    codes = [0x7E, 0x7E, 0x7D, 0xFE, 0x38, 0x38, 0x3A, 0x80, 0x01, 0x00, 0x02]
    x = torch.zeros(1, 32, device=device)
    x[0, : len(values)] = torch.tensor(values)
    q, s = backend.act_quant(x, 32, True)
    assert s.tolist() == [[127]]
    assert q.view(torch.uint8)[0, : len(codes)].tolist() == codes


@BACKENDS
@pytest.mark.parametrize("ue8m0", [True, False])
def test_every_bfloat16_amax(backend, device, ue8m0):
    amax = torch.arange(0x7F80, dtype=torch.int16, device=device).view(torch.bfloat16)
    x = torch.rand(amax.numel(), 32, device=device) * 2 - 1
    x = (x * amax[:, None]).to(torch.bfloat16)
    x[torch.arange(amax.numel()), torch.randint(32, (amax.numel(),))] = amax
    check(backend, x.view(-1, 1024), 32, ue8m0)


@BACKENDS
@pytest.mark.parametrize("ue8m0", [True, False])
def test_float32_around_every_boundary(backend, device, ue8m0):
    bits = torch.tensor([448 * 2.0**k for k in range(-149, 119)]).view(torch.int32)
    bits = (bits[:, None] + torch.arange(-8, 9, dtype=torch.int32)).clamp(min=0).flatten()
    amax = bits.view(torch.float32).to(device)
    x = torch.rand(amax.numel(), 32, device=device) * amax[:, None]
    x[:, 31] = -amax
    check(backend, x.view(1, -1) if amax.numel() % 64 else x.view(2, -1), 32, ue8m0)


@BACKENDS
@pytest.mark.parametrize("ue8m0", [True, False])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_random(backend, device, dtype, group, ue8m0):
    x = torch.randn(17, 576, device=device) * torch.randn(17, 1, device=device).mul(3).exp()
    x[3], x[4, 128:256], x[5] = 0, 0, x[5].abs()
    check(backend, x.to(dtype), group, ue8m0)


@BACKENDS
@pytest.mark.parametrize("ue8m0", [True, False])
@pytest.mark.parametrize("K", [1, 31, 70, 192, 300])
def test_partial_last_group(backend, device, K, ue8m0):
    check(backend, torch.randn(5, K, device=device).bfloat16(), 128, ue8m0)


@BACKENDS
@pytest.mark.parametrize("ue8m0", [True, False])
@pytest.mark.parametrize("odd", [golden.NAN, -golden.NAN, golden.INF, -golden.INF])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_inf_show_in_their_group_only(backend, device, dtype, odd, ue8m0):
    clean = torch.randn(3, 256, device=device).to(dtype)
    x = clean.clone()
    x[1, 130] = odd
    q, s = backend.act_quant(x, 128, ue8m0)
    wanted_q, wanted_s = backend.act_quant(clean, 128, ue8m0)
    assert q[1, 130].isnan()
    values = reference.dequantize_activations(q, s, 128)
    assert values[1, 128:].isnan().all()
    if ue8m0:
        assert s[1, 1] == 255
        assert (q[1, 128:].view(torch.uint8) == 0x7F).all()
    else:
        assert not s[1, 1].isfinite()
    keep = torch.tensor([0, 1, 2, 4, 5])
    assert torch.equal(s.flatten()[keep], wanted_s.flatten()[keep])
    groups = q.view(torch.uint8).view(6, 128), wanted_q.view(torch.uint8).view(6, 128)
    assert torch.equal(groups[0][keep], groups[1][keep])


@BACKENDS
def test_floor(backend, device):
    x = torch.zeros(2, 128, device=device)
    x[1] = 1e-30
    assert backend.act_quant(x, 128, True, 85)[1].tolist() == [[85], [85]]
    assert backend.act_quant(x, 128, True, 0)[1].tolist() == [[0], [golden.quant_byte(1e-30, 0)]]


@BACKENDS
def test_strided_rows_and_leading_dimensions(backend, device):
    wide = torch.randn(4, 3, 640, device=device).bfloat16()
    x = wide[:, 1:, 100:400]
    q, s = backend.act_quant(x, 128, True)
    wanted = backend.act_quant(x.contiguous().view(8, 300), 128, True)
    assert q.shape == (4, 2, 300) and s.shape == (4, 2, 3)
    assert same_bits(q.view(8, 300), wanted[0]) and same_bits(s.view(8, 3), wanted[1])
    rows = wide[0, :, :300]
    assert same_bits(
        backend.act_quant(rows, 64, False)[1], backend.act_quant(rows.contiguous(), 64, False)[1]
    )
    columns = wide[0, :, :150].t()  # no unit stride
    assert same_bits(
        backend.act_quant(columns, 128, True)[0],
        backend.act_quant(columns.contiguous(), 128, True)[0],
    )


@BACKENDS
def test_empty(backend, device):
    q, s = backend.act_quant(torch.zeros(0, 300, device=device), 128, True)
    assert q.shape == (0, 300) and s.shape == (0, 3)


@BACKENDS
@pytest.mark.parametrize(("M", "K"), [(1, 128), (5, 300), (67, 576), (130, 640)])
@pytest.mark.parametrize("layout", SCALE_LAYOUTS)
def test_layouts(backend, device, poison, layout, M, K):
    x = torch.randn(M, K, device=device).bfloat16()
    x[M // 2, K // 2] = golden.NAN
    q, s = backend.act_quant(x, 128, True, layout=layout)
    codes, scales = golden.act_quant_ue8m0(x, 128)
    groups = -(-K // 128)
    np.testing.assert_array_equal(from_layout(s, groups).cpu().numpy(), scales)
    np.testing.assert_array_equal(q.view(torch.uint8).cpu().numpy(), codes)
    if layout == "mn_major":
        assert s.shape == (M, groups) and s.stride(0) == 1 and s.stride(1) % 16 == 0
    if layout == "mn_major_packed":
        assert s.dtype == torch.int32 and s.shape == (M, -(-groups // 4))
        assert s.stride(0) == 1 and s.stride(1) % 4 == 0
        # Little-endian: group 0 is the low byte; bytes beyond the last group are 0.
        np.testing.assert_array_equal((s[:, 0] & 0xFF).cpu().numpy(), scales[:, 0])
        assert groups % 4 == 0 or not (s[:, -1].cpu() >> (groups % 4 * 8)).any()


@BACKENDS
def test_float_scales_column_major(backend, device, poison):
    x = torch.randn(37, 300, device=device).bfloat16()
    q, s = backend.act_quant(x, 128, False, layout="mn_major")
    assert s.dtype == torch.float32 and s.stride() == (1, 40)
    same_quantized((q, s.contiguous()), backend.act_quant(x, 128, False))


@pytest.mark.parametrize("layout", SCALE_LAYOUTS)
@pytest.mark.parametrize("ue8m0", [True, False])
def test_only_counted_rows_of_each_expert(device, poison, layout, ue8m0):
    if layout == "mn_major_packed" and not ue8m0:
        pytest.skip("packed scales are bytes")
    x = torch.randn(4, 70, 576, device=device).bfloat16()
    counts = torch.tensor([70, 0, 33, 1000], dtype=torch.int32, device=device)
    q, s = portable.act_quant(x, 128, ue8m0, layout=layout, counts=counts)
    wanted_q, wanted_s = reference.act_quant(x, 128, ue8m0, layout=layout, counts=counts)
    assert s.stride() == wanted_s.stride()
    for e, count in enumerate([70, 0, 33, 70]):
        same_quantized((q[e, :count], s[e, :count]), (wanted_q[e, :count], wanted_s[e, :count]))
        assert (q[e, count:].view(torch.uint8) == 0x7F).all()  # still poison
    counts = torch.zeros(4, dtype=torch.int64, device=device)
    q, _ = portable.act_quant(x, 128, ue8m0, layout=layout, counts=counts)
    assert (q.view(torch.uint8) == 0x7F).all()


@pytest.mark.parametrize("layout", SCALE_LAYOUTS)
def test_rows_go_where_they_are_sent(device, poison, layout):
    M, copies, out_rows = 45, 3, 150
    x = torch.randn(M, 576, device=device).bfloat16()
    places = torch.randperm(out_rows)[: M * copies].view(M, copies).to(torch.int32)
    places[torch.rand(M, copies) < 0.3] = -1
    places = places.to(device)
    kind = {"layout": layout, "destinations": places, "out_rows": out_rows}
    q, s = portable.act_quant(x, 128, True, **kind)
    wanted_q, wanted_s = reference.act_quant(x, 128, True, **kind)
    plain = reference.act_quant(x, 128, True)
    written = places[places >= 0].to(torch.int64)
    same_quantized((q[written], s[written]), (wanted_q[written], wanted_s[written]))
    token = (places >= 0).nonzero()[:, 0]
    assert same_bits(wanted_q[written], plain[0][token])
    rest = torch.ones(out_rows, dtype=torch.bool, device=device)
    rest[written] = False
    assert rest.any() and (q.view(torch.uint8)[rest] == 0x7F).all()


@pytest.mark.parametrize("layout", SCALE_LAYOUTS)
@pytest.mark.parametrize("M", [64, 65, 257, 2049])
def test_every_launch_configuration(device, poison, M, layout):
    if device == "cpu" and (M in (65, 2049) or (M, layout) == (64, "mn_major")):
        pytest.skip("slow in the interpreter")
    x = torch.randn(M, 56 * 32, device=device).bfloat16()
    same_quantized(
        portable.act_quant(x, 32, True, layout=layout),
        reference.act_quant(x, 32, True, layout=layout),
    )
