"""Full-vocabulary logits of a served model, straight from vLLM's own `compute_logits`.

Run as a program so that each engine lives and dies in a process of its own:
    python served.py MODEL TOKENS.pt OUT.pt '{"tensor_parallel_size": 2}'
TOKENS.pt holds a list of token-id lists; OUT.pt receives one float32 [T, V] tensor for each and
the greedy continuations asked for by "generate" in the options.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

import torch


class Tap:
    """Replaces model.compute_logits on every worker; rank 0's full logits go to a folder."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __call__(self, model: torch.nn.Module) -> None:
        original = model.compute_logits
        folder = Path(self.folder)

        def compute_logits(hidden, *args, **kwargs):
            logits = original(hidden, *args, **kwargs)
            if logits is not None:
                count = len(list(folder.glob(f"{os.getpid()}-*.pt")))
                torch.save(logits.float().cpu(), folder / f"{os.getpid()}-{count:05}.pt")
            return logits

        model.compute_logits = compute_logits


def main(model: str, tokens_file: str, out_file: str, options: dict) -> None:
    from vllm import LLM, SamplingParams

    prompts = torch.load(tokens_file)
    generate = options.pop("generate", 0)
    options = {
        "quantization": "ue8m0",
        "enforce_eager": True,
        "max_model_len": 1024,
        "max_num_batched_tokens": 1024,
        "enable_prefix_caching": False,
        "skip_tokenizer_init": True,
        "disable_log_stats": False,
        **options,
    }
    llm = LLM(model, **options)
    results, greedy = [], []
    with tempfile.TemporaryDirectory() as folder:
        llm.apply_model(Tap(folder))
        for prompt in prompts:
            for file in Path(folder).glob("*.pt"):
                file.unlink()
            params = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
            llm.generate({"prompt_token_ids": prompt}, params, use_tqdm=False)
            files = sorted(Path(folder).glob("*.pt"))
            ranks = {file.name.split("-")[0] for file in files}
            rank = min(ranks)
            parts = [torch.load(file) for file in files if file.name.startswith(f"{rank}-")]
            # the sampler's last row comes before or after the prompt's own rows
            rows = max(parts, key=len)
            last = next((part for part in parts if part is not rows), rows[:0])
            results.append(torch.cat([rows, last])[: len(prompt)])
        if generate:
            params = SamplingParams(
                max_tokens=generate, temperature=0, detokenize=False, ignore_eos=True
            )
            outputs = llm.generate([{"prompt_token_ids": p[:32]} for p in prompts], params)
            greedy = [list(output.outputs[0].token_ids) for output in outputs]
    counters = {
        metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")
    }
    accepted = counters.get("vllm:spec_decode_num_accepted_tokens", 0)
    torch.save({"logits": results, "greedy": greedy, "accepted": accepted}, out_file)


if __name__ == "__main__":
    os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    # Processes of the engine's own would import vLLM twice more, 20 of 35 seconds; the server's
    # and the examples' tests have them.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    main(*sys.argv[1:4], json.loads(sys.argv[4]) if len(sys.argv) > 4 else {})
