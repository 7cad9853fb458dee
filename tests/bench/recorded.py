"""Records as `--out` writes them, with figures that make sums easy."""

from vllm_ue8m0.bench.records import Record

VERSIONS = {"torch": "2.11.0", "triton": "3.6.0", "vllm": None, "vllm_ue8m0": "0.1.0",
            "cuda": "13.0", "driver": "580.1"}  # fmt: skip


def record(bench="act_quant", M=8192, N=None, K=7168, ours=50.0, limit=40.0, peers=None,
           context=None, num_bytes=200_000_000, flops=None, roof=None, **variant):  # fmt: skip
    return Record(
        bench=bench, M=M, N=N, K=K, ours_us=ours, peers_us=peers or {}, limit_us=limit,
        context_us=context or {}, num_bytes=num_bytes, ours=f"portable kernels/{bench}.py",
        gpu="Test GPU", versions=VERSIONS, date="2026-11-22",
        variant=variant or {"scale": "ue8m0", "layout": "row_major"}, flops=flops, roof=roof,
    )  # fmt: skip


RECORDS = [
    record(M=1, ours=2.0, limit=1.0, peers={"vllm": 4.0}, context={"empty": 1.5}, num_bytes=21_560),
    record(M=128, ours=4.0, limit=3.0, peers={"vllm": 6.0}, context={"empty": 1.5},
           num_bytes=2_759_680),
    record(peers={"vllm": 400.0}),
    record(scale="fp32", layout="row_major", ours=80.0, limit=60.0),
    record("weight_quant", None, 36864, scale="ue8m0", dtype="bf16", ours=100.0, limit=99.0,
           peers={"other": 50.0}),
    record("rms_norm_quant", M=16, ours=3.0, limit=None, num_bytes=None, scale="ue8m0",
           layout="row_major", residual=True, experts=32),
]  # fmt: skip


def product(M=512, N=256, K=512, bench="prefill_gemm", ours=10.0, limit=5.0, peers=None,
            context=None, scale="ue8m0"):  # fmt: skip
    return record(
        bench, M, N, K, ours, limit, peers or {}, context or {}, M * K + N * K + 2 * M * N,
        2 * M * N * K, {"tb_per_s": 3.0, "tflops": 1500.0}, scale=scale, layout="row_major",
    )  # fmt: skip


PRODUCTS = [
    product(peers={"deepgemm": 20.0, "cutlass": 10.0}, context={"cublas": 8.0}),
    product(M=2048, ours=20.0, peers={"deepgemm": 10.0, "cutlass": 40.0}, context={"cublas": 16.0}),
    product(scale="fp32", ours=10.5, peers={"deepgemm": 21.0}),
    product(8192, 8192, 8192, ours=1000.0, limit=800.0, context={"cublas": 950.0}),
    product(16, bench="decode_linear", ours=2.0, limit=1.0),
]
