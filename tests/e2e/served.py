"""Full-vocabulary logits of a served model, straight from vLLM's own `compute_logits`.

Run as a program so that each engine lives and dies in a process of its own:
    python served.py MODEL TOKENS.pt OUT.pt '{"tensor_parallel_size": 2}'
TOKENS.pt holds a list of token-id lists; OUT.pt receives what `conftest.served` returns. Of the
options, these are not vLLM's: "env", variables to set; "generate", how many tokens to continue
prompts by; and "steps", further [question, argument] pairs, answered in order by `Served`.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

import operators
import torch
from harness import SMALL

GREEDY_PROMPT = 32


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


class Load:
    """model.load_weights of a checkpoint, as a program would that knows nothing of reloading."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __call__(self, model: torch.nn.Module) -> None:
        from safetensors.torch import load_file

        model.load_weights(load_file(Path(self.folder) / "model.safetensors").items())


def sums_of_experts(model: torch.nn.Module) -> list:
    """A number for each expert that this rank has, layer by layer."""
    layers = [m.w13_weight for m in model.modules() if hasattr(m, "w13_weight")]
    return [code for w in layers for code in w.data.view(torch.uint8).flatten(1).sum(1).tolist()]


def check_cache(model: torch.nn.Module) -> None:
    """From now on, MLA layers whose rows are written by the rotation compare them."""
    for impl in latent_attentions(model):
        update = vars(impl).get("do_kv_cache_update")
        if update is not None:
            impl.do_kv_cache_update = checked(update)


def checked_rows(model: torch.nn.Module) -> list:
    """Of each MLA layer, the rows of every step that the rotation had written rightly."""
    return [
        getattr(vars(impl).get("do_kv_cache_update"), "rows", [])
        for impl in latent_attentions(model)
    ]


def latent_attentions(model: torch.nn.Module) -> list:
    return [m.impl for m in model.modules() if hasattr(m, "W_UV")]


def checked(update):
    from vllm_ue8m0.plugin import mla_cache

    class Checked(mla_cache._Update):
        rows: list

        def __call__(self, latent, key, cache, slots, *args):
            wanted = cache.clone()
            self.original(latent, key, wanted, slots, *args)
            if self.name in mla_cache._written and torch.equal(wanted, cache):
                self.rows.append(len(slots))
            super().__call__(latent, key, cache, slots, *args)

    comparing = Checked(update.name, update.original)
    comparing.rows = []
    return comparing


class Served:
    """An engine and the questions that tests ask it."""

    def __init__(self, model: str, prompts: list, folder: str, options: dict) -> None:
        from vllm import LLM

        self.prompts, self.folder = prompts, Path(folder)
        self.llm = LLM(model, **options)
        self.llm.apply_model(Tap(folder))

    def ask(self, prompts: list, **params):
        from vllm import SamplingParams

        prompts = [{"prompt_token_ids": prompt} for prompt in prompts]
        params = SamplingParams(temperature=0, detokenize=False, ignore_eos=True, **params)
        return self.llm.generate(prompts, params, use_tqdm=False)

    def logits(self, _=None) -> list:
        """[T, V] float32 of each prompt, asked alone."""
        results = []
        for prompt in self.prompts:
            for file in self.folder.glob("*.pt"):
                file.unlink()
            self.ask([prompt], max_tokens=1, prompt_logprobs=0)
            files = sorted(self.folder.glob("*.pt"))
            rank = min(file.name.split("-")[0] for file in files)
            parts = [torch.load(file) for file in files if file.name.startswith(f"{rank}-")]
            # The sampler's one row comes before or after the prompt's own rows of a chunk.
            rows = [part for part in parts if len(part) > 1]
            last = [part for part in parts if len(part) == 1][-1:]
            results.append(torch.cat(rows + last)[: len(prompt)])
        return results

    def greedy(self, count: int) -> list:
        """`count` tokens after the start of each prompt, all asked together."""
        outputs = self.ask([p[:GREEDY_PROMPT] for p in self.prompts], max_tokens=count)
        return [list(output.outputs[0].token_ids) for output in outputs]

    def next(self, _=None) -> list:
        """([V] log-probabilities after it, tokens from the prefix cache) of each prompt, alone.

        vLLM 0.26's counter of such tokens loses those that a step without output reports.
        """
        outputs = [self.ask([prompt], max_tokens=1, logprobs=-1)[0] for prompt in self.prompts]
        return [(in_order(one.outputs[0].logprobs[0]), one.num_cached_tokens) for one in outputs]

    def scores(self, together: bool) -> list:
        """(log-probabilities of a prompt's tokens, of four more after it) for each."""
        params = {"max_tokens": 4, "prompt_logprobs": 0, "logprobs": -1}
        groups = [self.prompts] if together else [[prompt] for prompt in self.prompts]
        found = []
        for group in groups:
            for output, prompt in zip(self.ask(group, **params), group, strict=True):
                pairs = zip(output.prompt_logprobs[1:], prompt[1:], strict=True)
                own = torch.tensor([logprobs[token].logprob for logprobs, token in pairs])
                found.append((own, torch.stack(list(map(in_order, output.outputs[0].logprobs)))))
        return found

    def decoded(self, count: int) -> tuple[list, list]:
        """[count, V] log-probabilities of `count` tokens after each prompt, all asked together;
        and of the same tokens, each from a prompt of all that is before it."""
        params = {"logprobs": -1}
        outputs = [one.outputs[0] for one in self.ask(self.prompts, max_tokens=count, **params)]
        longer = [
            prompt + list(output.token_ids[:i])
            for prompt, output in zip(self.prompts, outputs, strict=True)
            for i in range(count)
        ]
        again = [one.outputs[0] for one in self.ask(longer, max_tokens=1, **params)]
        rows = torch.stack([in_order(one.logprobs[0]) for one in again])
        return (
            [torch.stack(list(map(in_order, output.logprobs))) for output in outputs],
            list(rows.split(count)),
        )

    def operators(self, _=None) -> dict:
        """What `operators.compare` says of every prompt and a token after it."""
        self.llm.apply_model(operators.watch)
        for prompt in self.prompts:
            self.ask([prompt], max_tokens=2)
        return self.llm.apply_model(operators.compare)[0]

    def cache(self, _=None) -> list:
        """`checked_rows` of a prompt and three tokens after it."""
        self.llm.apply_model(check_cache)
        self.ask(self.prompts[:1], max_tokens=4)
        return self.llm.apply_model(checked_rows)[0]

    def counters(self, _=None) -> dict:
        metrics = self.llm.get_metrics()
        return {metric.name: metric.value for metric in metrics if hasattr(metric, "value")}

    def reload(self, folder: str | None) -> str | None:
        """vLLM's own reload; the error or None."""
        options = {"weights_path": folder} if folder else {}
        return attempt(lambda: self.llm.collective_rpc("reload_weights", kwargs=options))

    def fails(self, question: str) -> str | None:
        return attempt(getattr(self, question))

    def load(self, folder: str) -> str | None:
        return attempt(lambda: self.llm.apply_model(Load(folder)))

    def experts(self, _=None) -> list:
        return self.llm.apply_model(sums_of_experts)

    def nap(self, level: int) -> None:
        """Sleep and wake; from level 2, which drops the weights, by loading them again."""
        self.llm.sleep(level=level)
        if level == 1:
            self.llm.wake_up()
        else:
            self.llm.wake_up(tags=["weights"])
            self.llm.collective_rpc("reload_weights")
            self.llm.wake_up(tags=["kv_cache"])

    def lora(self, folder: str | None) -> None:
        """Prompts from now on go through the adapter; None: no longer."""
        from vllm.lora.request import LoRARequest

        request = LoRARequest("adapter", 1, folder) if folder else None
        original = type(self.llm).generate.__get__(self.llm)
        self.llm.generate = lambda *args, **kwargs: original(*args, lora_request=request, **kwargs)


def in_order(logprobs: dict) -> torch.Tensor:
    return torch.tensor([logprobs[token].logprob for token in sorted(logprobs)])


def attempt(call) -> str | None:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def main(model: str, tokens_file: str, out_file: str, options: dict) -> None:
    generate, steps = options.pop("generate", 0), options.pop("steps", [])
    options = {
        "quantization": "ue8m0",
        "enforce_eager": True,
        "max_model_len": 1024,
        "max_num_batched_tokens": 1024,
        "enable_prefix_caching": False,
        "skip_tokenizer_init": True,
        "disable_log_stats": False,
        "max_logprobs": -1,
        **SMALL,
        **options,
    }
    with tempfile.TemporaryDirectory() as folder:
        served = Served(model, torch.load(tokens_file), folder, options)
        logits = served.logits()
        greedy = served.greedy(generate) if generate else []
        answers = [getattr(served, question)(argument) for question, argument in steps]
    accepted = served.counters().get("vllm:spec_decode_num_accepted_tokens", 0)
    torch.save(
        {"logits": logits, "greedy": greedy, "steps": answers, "accepted": accepted}, out_file
    )


if __name__ == "__main__":
    given = json.loads(sys.argv[4]) if len(sys.argv) > 4 else {}
    os.environ |= given.pop("env", {})
    os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    # Processes of the engine's own would import vLLM twice more, 20 of 35 seconds; the server's
    # and the examples' tests have them.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    main(*sys.argv[1:4], given)
