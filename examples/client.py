"""Ask a running server over the OpenAI-compatible API, whole and streaming.

vllm serve DIR --quantization ue8m0 &
python examples/client.py http://localhost:8000 "What is 2 + 2?"
"""

import sys

from openai import OpenAI


def main(url: str, question: str, prompt: str = "The capital of France is") -> None:
    client = OpenAI(base_url=f"{url}/v1", api_key="none")
    model = client.models.list().data[0].id
    completion = client.completions.create(model=model, prompt=prompt, max_tokens=16, temperature=0)
    print(f"completion: {prompt}{completion.choices[0].text}")
    print(f"chat: {question} -> ", end="", flush=True)
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        max_tokens=48,
        temperature=0,
        stream=True,
    )
    for chunk in stream:
        if chunk.choices:
            print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "What is 2 + 2?")
