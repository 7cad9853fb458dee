"""Offline batch inference: python examples/offline.py DIR [PROMPT ...]"""

import sys

from vllm import LLM, SamplingParams


def main(model: str, prompts: list[str]) -> None:
    llm = LLM(model, quantization="ue8m0", max_model_len=512, enforce_eager=True)
    for result in llm.generate(prompts, SamplingParams(temperature=0, max_tokens=24)):
        print(f"{result.prompt!r} -> {result.outputs[0].text!r}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:] or ["The capital of France is", "Water boils at"])
