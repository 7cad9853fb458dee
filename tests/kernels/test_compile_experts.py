"""The sm_90 experts' kernels compile as they are launched; see test_compile_hopper.py."""

from offline_compiler import Launches, empty, number, report
from recorded_compilation import check

from vllm_ue8m0.layouts import ceil_div

SHARED_BYTES = 227 * 1024  # of a program; an SM has 1024 more for each
# Tokens, experts held and in all, intermediate size; scales, factors, whether K is one part.
LAYERS = (
    (1, 256, 256, 2048, "u8", False, False),
    (1, 256, 256, 256, "f32", True, False),
    (1, 32, 256, 2048, "u8", False, True),
    (8, 256, 256, 2048, "u8", False, False),
    (128, 256, 256, 256, "u8", True, False),
    (128, 32, 256, 2048, "f32", False, True),
    (512, 256, 256, 2048, "u8", False, False),
    (1024, 256, 256, 2048, "u8", True, False),
    (1024, 32, 256, 2048, "f32", False, False),
    (2048, 256, 256, 2048, "u8", False, False),
    (2048, 256, 256, 256, "f32", True, False),
)
# Rows that each expert has room for, and as above.
BATCHED = ((16, 32, 32, 2048, "u8", False, None), (1024, 32, 32, 2048, "f32", True, None))
H, TOPK, SMS = 7168, 8, 132


def test_as_recorded():
    check(__file__)


def test_experts_compile():
    lines = report(__file__)
    chains = sum(config_of(layer).chain is not None for layer in LAYERS)
    assert chains and len(lines) == 2 * (len(LAYERS) + len(BATCHED)) - chains
    for name, line in lines.items():
        assert number(line, "bytes spilled") == 0, f"{name}: {line}"
        assert number(line, "shared") <= SHARED_BYTES, f"{name}: {line}"
        columns = name.split()[1]  # of the tensor cores' result
        assert f"wgmma.mma_async.sync.aligned.m64n{columns}k32.f32.e4m3.e4m3" in line, name
        assert "cp.async.bulk.tensor" in line, name
        assert "griddepcontrol.wait" in line, name
        assert "griddepcontrol.launch_dependents" in line, name
        quantizes = "gated" in name or "chain" in name
        assert ("cvt.rn.satfinite.e4m3x2.f32" in line) == quantizes, name


def test_estimates_of_shared_memory_hold():
    for name, line in report(__file__).items():
        least, estimate = number(line, "shared"), int(name.rpartition(" ")[2])
        assert least <= estimate <= least + 16 * 1024, f"{name}: {line}"


def test_programs_of_few_rows_fit_an_sm():
    """Each product's own, or those of both: where there are two for an SM, they share it."""
    from vllm_ue8m0.kernels import expert_config as rules

    for layer in (*LAYERS, *BATCHED):
        config, inner, scale_bytes = config_of(layer), layer[3], 1 if layer[4] == "u8" else 4
        if config.chain is not None:
            NK = max(H, inner) // 128
            used = rules.chain_bytes(config.chain, config.rows, NK, scale_bytes)
            fits(1, used, rules.CHAIN_WARPS, rules.CHAIN_REGISTERS)
        for product, K in ((config.gated, H), (config.down, inner)):
            if product is None:
                continue
            gated, each = product is config.gated, ceil_div(product.programs, SMS)
            used = rules.shared_bytes(
                product, config.rows, K // 128, gated, config.one_token, scale_bytes
            )
            fits(each, used, product.warps, rules.registers(config.rows))


def fits(each, used, warps, registers):
    """So many programs an SM; four warps are the least that copy."""
    assert each * (used + 1024) <= SHARED_BYTES + 1024
    assert each * 32 * (warps + 4) * registers <= 1 << 16


def config_of(layer):
    """Of LAYERS or BATCHED."""
    from vllm_ue8m0.kernels import expert_config as rules

    M, E, num_global, inner, scale, _, invariant = layer
    scale_bytes = 1 if scale == "u8" else 4
    if invariant is None:
        return rules.batched_config(M, H, inner, scale_bytes, SMS)
    return rules.experts_config(M, TOPK, E, num_global, H, inner, scale_bytes, invariant, SMS)


def compile_layers() -> None:
    import torch

    from vllm_ue8m0.kernels import expert_chain, expert_decode, expert_prefill
    from vllm_ue8m0.kernels import expert_config as rules
    from vllm_ue8m0.kernels.route import TILE_FIELDS, Routing, Tiles

    chain = expert_chain._expert_chain_kernel = Launches(expert_chain._expert_chain_kernel)
    decode = expert_decode._expert_decode_kernel = Launches(expert_decode._expert_decode_kernel)
    prefill = expert_prefill._expert_prefill_kernel = Launches(
        expert_prefill._expert_prefill_kernel
    )
    for layer in (*LAYERS, *BATCHED):
        M, E, num_global, inner, scale, factors, invariant = layer
        slots, scale_bytes, batched = M * TOPK, 1 if scale == "u8" else 4, invariant is None
        config = config_of(layer)
        one = M == 1
        routing = Tiles(
            tiles=empty(slots, TILE_FIELDS, dtype="i32"),
            num_tiles=empty(1, dtype="i32"),
            order=None if batched else empty(slots, dtype="i32"),
        )
        ids, count = empty(TOPK, dtype="i32"), empty(1 << 16, dtype="i32")
        expert_map = empty(num_global, dtype="i32") if num_global > E else None
        if config.chain is not None:
            estimate = rules.chain_bytes(
                config.chain, config.rows, max(H, inner) // 128, scale_bytes
            )
            chain.name = f"chain {config.rows} both {M} {E} {inner} {scale} {factors} {estimate}"
            expert_chain.launch(
                empty(slots, H, dtype="e4m3"), scales(slots, H, scale),
                empty(E, 2 * inner, H, dtype="e4m3"),
                empty(E, 2 * inner // 128, H // 128, dtype=scale),
                empty(E, 2 * inner // 128) if factors else None,
                empty(slots, inner, dtype="e4m3"), scales(slots, inner, scale),
                empty(E, H, inner, dtype="e4m3"), empty(E, H // 128, inner // 128, dtype=scale),
                empty(E, H // 128) if factors else None, empty(slots, H, dtype="bf16"),
                slot_weights=empty(slots), rows=config.rows, stages=config.chain, programs=SMS,
                routing=Routing(
                    **vars(routing), destinations=ids, progress=empty(slots + 1, dtype="i32")
                ),
                ue8m0=scale == "u8", floor=105, dtype=torch.bfloat16,
            )  # fmt: skip
            continue
        for gated, N, K in ((True, 2 * inner, H), (False, H, inner)):
            fused = gated and one
            a = empty(1, K, dtype="bf16") if fused else empty(slots, K, dtype="e4m3")
            out = empty(slots, N // 2, dtype="e4m3") if gated else empty(slots, N, dtype="bf16")
            operands = {
                "a": a,
                "a_s": None if fused else scales(slots, K, scale),
                "w": empty(E, N, K, dtype="e4m3"),
                "sf": empty(E, N // 128, K // 128, dtype=scale),
                "c": empty(E, N // 128) if factors else None,
                "out": out,
                "out_s": scales(slots, N // 2, scale) if gated else None,
                "slot_weights": None if gated or batched else empty(slots),
                "ue8m0": scale == "u8",
                "floor": 105,
                "dtype": torch.bfloat16,
            }
            kind = "gated" if gated else "down"
            product = config.gated if gated else config.down
            if product is None:
                estimate = rules.prefill_bytes(expert_prefill.STAGES, scale_bytes, gated)
                prefill.name = f"prefill 128 {kind} {M} {E} {inner} {scale} {estimate}"
                expert_prefill.launch(**operands, routing=routing, counter=count[:1], programs=SMS)
                continue
            estimate = rules.shared_bytes(product, config.rows, K // 128, gated, one, scale_bytes)
            decode.name = (
                f"decode {config.rows} {kind} {M} {E} {inner} {scale} {factors} {estimate}"
            )
            expert_decode.launch(
                **operands, routing=None if one else routing, ids=ids if one else None,
                expert_map=expert_map if one else None,
                combined=empty(1, N, dtype="bf16") if one and not gated else None,
                counters=count, rows=config.rows, config=product,
            )  # fmt: skip


def scales(rows, K, dtype):
    """Column-major, as `empty_quantized` pads them."""
    return empty(K // 128, -(-rows // 16) * 16, dtype=dtype).mT[:rows]


if __name__ == "__main__":
    compile_layers()
