"""Served models: each engine runs in a process of its own and is started once a session."""

import json

import pytest
import torch
from harness import HERE, run_vllm

pytest.importorskip("vllm")


@pytest.fixture(scope="session")
def served(tmp_path_factory):
    """served(model, prompts, **options) -> {"logits": [[T, V] float32], "greedy": [[id]], "log"}

    and "steps", the answers to the option `steps`; served.py has the questions.
    """
    cache = {}

    def get(model, prompts, **options):
        key = str(model), json.dumps(prompts), json.dumps(options, sort_keys=True)
        if key not in cache:
            folder = tmp_path_factory.mktemp("served")
            torch.save(prompts, folder / "tokens.pt")
            log = run_vllm(
                HERE / "served.py", model, folder / "tokens.pt", folder / "out.pt",
                json.dumps(options),
            )  # fmt: skip
            cache[key] = {**torch.load(folder / "out.pt"), "log": log}
            (folder / "out.pt").unlink()
        return cache[key]

    return get
