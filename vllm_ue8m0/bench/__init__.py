"""Benchmarks: `vllm-ue8m0 bench ...`. Every one of them runs on the same spine.

command.py   what the command line calls
case.py      what is measured: inputs, our operator, its peers, the bytes it has to move
quant.py     the quantizers' cases, their inputs from operands.py, their checks in gate.py,
             vLLM's operators beside them in peers.py
gemm.py      the products' cases, gemm_peers.py beside them
moe.py       the routed experts' cases, tokens drawn by routing.py, moe_peers.py beside them
e2e.py       serving: vLLM started with our method and with its own, each in processes of its own
             (e2e_engine.py; e2e_worker.py in vLLM's workers, e2e_split.py for the kernels of a
             step; e2e_serve.py for a server under load; e2e_process.py ends them), shown by
             e2e_report.py
run.py       a case -> a record: check first, then time; machine.py says where
timing.py    how time is taken, the same for ours, peers and what bounds them: of quantizers a
             copy (limit.py), of products a roof (roof.py)
tune.py      `vllm-ue8m0 tune`: the fastest configurations of the products, by the same clock, from
             candidates.py, which also compiles them
records.py   one JSON object per line; table.py and plot.py show them, without a GPU

A new benchmark of operators is a module of cases like quant.py. Importing this package loads no
torch.
"""

QUANT_OPS = ("act_quant", "silu_mul_quant", "rms_norm_quant", "weight_quant", "weight_dequant")

GEMM_BENCHES = ("prefill_gemm", "middle_gemm", "decode_gemm", "decode_linear")

MOE_LAYERS = (
    "tp1_uniform", "tp1_skewed", "tp1_single", "tp8_uniform", "tp8_skewed", "tp8_single",
    "ep8_uniform", "ep8_skewed",
)  # fmt: skip


E2E_BENCHES = ("start_cold", "start_warm", "prefill", "decode_step", "serve")
E2E_SIDES = ("ours", "vllm_fp8")


class BenchError(RuntimeError):
    """A benchmark that cannot be run or shown; the text says what was found and what to do."""
