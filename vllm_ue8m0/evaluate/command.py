"""What `vllm-ue8m0 eval` runs: a process that records MODEL, then a comparison without vLLM."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from . import TOP_K, EvalError, metrics, report
from .recording import Recording, read

STDERR = 2  # the file descriptor; sys.stderr may be something else


def evaluate(
    model: str,
    texts: Sequence[str],
    reference: str | None,
    out: str | None,
    top_k: int | None,
    context: int | None,
    arguments: Sequence[str],
    as_json: bool,
) -> None:
    """Print how far `model` is from `reference`, or its perplexity.

    model: a directory, a name that vLLM finds, or a recording. reference: a recording. texts: paths
    of files.
    """
    recorded = read(reference) if reference is not None else None
    if reference is not None and (texts or top_k or context):
        raise EvalError(
            "--text, --top-k and --context come from the recording that --reference names; leave "
            "them out"
        )
    if Path(model).is_file():
        if texts or out or top_k or context or arguments:
            raise EvalError(
                f"{model} is recorded: with it goes --reference, and nothing to record again with"
            )
        candidate = read(model)
    else:
        if reference is None and not texts:
            raise EvalError(
                "nothing to predict: --text FILE ..., or --reference RECORDING.npz, whose text is "
                "taken"
            )
        job: dict[str, object] = {"model": model, "arguments": list(arguments)}
        if reference is not None:
            job["reference"] = str(Path(reference).absolute())
        else:
            job |= {"texts": [read_text(path) for path in texts], "context": context}
            job["top_k"] = top_k or TOP_K
        candidate = record(job, out)
    scores = candidate, recorded, *metrics.score(candidate, recorded)
    print(json.dumps(report.to_json(*scores)) if as_json else report.text(*scores))


def read_text(path: str) -> tuple[str, str]:
    """Name and contents of a text file; EvalError if it is not UTF-8."""
    try:
        return path, Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise EvalError(f"{path}: not text in UTF-8: {error}") from error


def record(job: dict[str, object], out: str | None) -> Recording:
    """Run recorder.py on a job and read what it wrote, kept if `out` names a file.

    What vLLM prints goes to stderr. The file says whether the work was done, not the exit status:
    vLLM's CPU build sometimes aborts when the interpreter ends.
    """
    if out is not None and not Path(out).absolute().parent.is_dir():
        raise EvalError(f"{out}: there is no directory {Path(out).parent}")
    with tempfile.TemporaryDirectory(prefix="vllm-ue8m0-eval-") as folder:
        new = Path(folder, "recording.npz") if out is None else Path(f"{out}.new").absolute()
        new.unlink(missing_ok=True)
        job_file, error_file = Path(folder, "job.json"), Path(folder, "error")
        job_file.write_text(json.dumps({**job, "out": str(new), "error": str(error_file)}))
        command = [sys.executable, "-m", f"{__package__}.recorder", str(job_file)]
        status = subprocess.run(command, stdout=STDERR, check=False).returncode
        if error_file.exists():
            raise EvalError(error_file.read_text(encoding="utf-8"))
        if not new.exists():
            raise EvalError(
                f"vLLM ended with status {status} before {job['model']} was recorded; it says why "
                "above. If memory ran out: -- --gpu-memory-utilization 0.8, or a smaller --context"
            )
        recording = read(new)
        if out is not None:
            new.replace(out)
        return recording
