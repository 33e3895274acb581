"""`divergence` against the forward passes of both models over the same chunks; the claim is at most 1.5 times, and 2 GB beyond the models.

Two models of Qwen2.5-7B's shape with random bfloat16 weights, the second the first with a little noise, read random tokens. What is timed beside
the whole: both passes without a head, and with the logits of the scored half, as a program has to compute them that does it all with
transformers. The answer is checked first: columns of a few tokens against float64 brute force on the same states.

    python benchmarks/divergence_gpu.py [--chunks 32] [--context 512] [--batch-size 8] [--memory-mb 512]
    python benchmarks/divergence_gpu.py --device cpu --dtype float32 --layers 2 --width 64 --inner 96 --heads 4 --kv-heads 2 --vocab 512 --chunks 2 --context 16
"""

from __future__ import annotations

import argparse

import torch
from layerwise_gpu import build, seconds

from prunescope.compare.context import final_head, read_states
from prunescope.compare.divergence import Slice, divergence_rows, scored
from prunescope.models.loaded import LoadedModel


def passes(models: list[LoadedModel], chunks: torch.Tensor, batch_size: int, kept: int) -> None:
    """Every model over every chunk, ``kept`` logits of each."""
    with torch.no_grad():
        for batch in chunks.split(batch_size):
            for model in models:
                model.model(input_ids=batch[:, :-1].to(model.device), use_cache=False, logits_to_keep=kept)


def check(dense: LoadedModel, target: LoadedModel, chunks: torch.Tensor) -> float:
    """Worst relative error of KL, JS and the log-likelihoods of one chunk against float64 on the same states."""
    rows = divergence_rows(dense, target, [Slice("a", chunks[:1], chunks.shape[1])], batch_size=1).table
    logs = []
    for model in (dense, target):
        states = torch.cat(read_states(model, scored(chunks[:1])))
        logs.append(final_head(model).logits(states.double(), torch.float64).log_softmax(-1).cpu())
    p, q = (log.exp() for log in logs)
    middle = ((p + q) / 2).log()
    tokens = chunks[0, -len(p) :, None]
    exact = {
        "kl_dense_target": (p * (logs[0] - logs[1])).sum(-1), "kl_target_dense": (q * (logs[1] - logs[0])).sum(-1),
        "js": ((p * (logs[0] - middle)).sum(-1) + (q * (logs[1] - middle)).sum(-1)) / 2,
        "nll_dense": -logs[0].gather(1, tokens)[:, 0], "nll_target": -logs[1].gather(1, tokens)[:, 0],
    }  # fmt: skip
    found = {name: torch.tensor(rows[name].to_numpy()) for name in exact}
    return max(
        ((found[name] - value).abs() / value.abs().clamp(min=1e-6)).max().item() for name, value in exact.items()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shape = {"layers": 28, "width": 3584, "inner": 18944, "heads": 28, "kv_heads": 4, "vocab": 152064}
    for name, default in {**shape, "chunks": 32, "context": 512, "batch_size": 8, "memory_mb": 512}.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()
    dense, target = build(options, 0), build(options, 0)
    with torch.no_grad():
        for parameter in target.model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.002)
    chunks = torch.randint(0, options.vocab, (options.chunks, options.context))
    pieces = [Slice("random", chunks, chunks.numel())]
    print(
        f"{options.device}, torch {torch.__version__}, {options.dtype}: {options.chunks} chunks of {options.context}, {options.batch_size} at a time"
    )
    print(f"worst relative error against float64 on the same states: {check(dense, target, chunks):.2g}")
    both = [dense, target]
    steps = options.context - 1 - options.context // 2
    bare = seconds(lambda: passes(both, chunks, options.batch_size, 1), options.device)
    full = seconds(lambda: passes(both, chunks, options.batch_size, steps), options.device)
    held = torch.cuda.memory_allocated() if options.device != "cpu" else 0
    if held:
        torch.cuda.reset_peak_memory_stats()
    whole = seconds(
        lambda: divergence_rows(dense, target, pieces, batch_size=options.batch_size, memory=options.memory_mb * 2**20),
        options.device,
    )
    print(f"both passes, no head       {bare:8.2f} s")
    print(f"both passes, scored logits {full:8.2f} s")
    print(
        f"divergence                 {whole:8.2f} s = {whole / bare:.2f} x the passes, {whole / full:.2f} x the passes with logits"
    )
    if held:
        print(f"memory beyond the models   {(torch.cuda.max_memory_allocated() - held) / 2**30:8.2f} GiB")


if __name__ == "__main__":
    main()
