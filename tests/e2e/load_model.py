"""Load checkpoints the way a worker does, without an engine; one JSON object a line on stdout.

python load_model.py DIR [DIR ...]   ->  {"error": text or null, "peak": bytes, "before": bytes}
"""

import gc
import json
import os
import sys
from pathlib import Path

import torch


def memory(field):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def load(directory):
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.distributed.parallel_state import model_parallel_is_initialized
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model
    from vllm.utils.network_utils import get_open_port

    config = EngineArgs(
        directory, quantization="ue8m0", enforce_eager=True, max_model_len=128,
        skip_tokenizer_init=True,
    ).create_engine_config()  # fmt: skip
    with set_current_vllm_config(config):
        if not model_parallel_is_initialized():
            address = f"tcp://127.0.0.1:{get_open_port()}"
            init_distributed_environment(1, 0, address, 0, "gloo")
            initialize_model_parallel(1, 1)
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        before = memory("VmRSS")
        model = get_model(vllm_config=config)
        sizes = [p.numel() * p.element_size() for p in model.parameters()]
        return {"before": before, "peak": memory("VmHWM"), "model": sum(sizes)}


if __name__ == "__main__":
    results = sys.stdout
    sys.stdout = sys.stderr
    if not torch.cuda.is_available():
        torch.accelerator.empty_cache = lambda: None  # as vLLM's CPU worker does
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    for directory in sys.argv[1:]:
        try:
            found = {"error": None, **load(directory)}
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(found), file=results, flush=True)
