"""A counterpart to the `generate.py` of DeepSeek-V3's inference folder, on vLLM.

python examples/generate.py --ckpt-path DIR --interactive
python examples/generate.py --ckpt-path DIR --input-file prompts.txt   # one prompt a line
"""

import argparse
from pathlib import Path

from vllm import LLM, SamplingParams


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ckpt-path", required=True)
    parser.add_argument("--input-file", type=Path)
    parser.add_argument("--interactive", action="store_true")
    parser.add_argument("--max-new-tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.2)
    args = parser.parse_args()
    if args.interactive == bool(args.input_file):
        parser.error("give either --interactive or --input-file")
    llm = LLM(args.ckpt_path, quantization="ue8m0", enforce_eager=True, max_model_len=1024)
    params = SamplingParams(temperature=args.temperature, max_tokens=args.max_new_tokens)
    if args.input_file:
        prompts = args.input_file.read_text().strip().splitlines()
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
        for prompt, result in zip(prompts, llm.chat(chats, params), strict=True):
            print(f"Prompt: {prompt}\nCompletion: {result.outputs[0].text}\n")
        return
    messages: list[dict[str, str]] = []
    while True:
        try:
            prompt = input(">>> ")
        except EOFError:
            break
        if prompt == "/exit":
            break
        if prompt == "/clear":
            messages.clear()
            continue
        messages.append({"role": "user", "content": prompt})
        completion = llm.chat(messages, params)[0].outputs[0].text
        print(completion)
        messages.append({"role": "assistant", "content": completion})


if __name__ == "__main__":
    main()
