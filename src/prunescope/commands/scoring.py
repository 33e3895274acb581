"""What pruning costs in tasks and saves in time, and the page that shows it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from prunescope.jobs.options import DType, LoadOptions, OutputOptions
from prunescope.results import AdviseResult, EvaluateResult, SpeedResult, SweepResult

if TYPE_CHECKING:
    from prunescope.jobs.options import Model
else:
    Model = str  # what it is on the command line

__all__ = ["advise", "evaluate", "report", "speed", "sweep"]


def evaluate(
    models: list[Model],
    *,
    tasks: str = "quick",
    out: str | None = None,
    limit: int | None = None,
    shots: int | None = None,
    max_new_tokens: int | None = None,
    data: str | None = None,
    allow_code_execution: bool = False,
    seed: int = 0,
    batch_size: int = 8,
    ladder: str | None = None,
    cache: bool = True,
    dtype: DType = "auto",
    device: str = "auto",
    revision: str | None = None,
    adapter: str | None = None,
    trust_remote_code: bool = False,
    dequantise: bool = False,
    resume: bool = False,
    overwrite: bool = False,
) -> EvaluateResult:
    """Score models on tasks, the built-in quick ones or those of lm-evaluation-harness, and compare each with the first, item by item.

    Args:
        models: the dense model, then any others; drop:attn=3,5;mlp=7 drops from the first
        tasks: names with commas between them: quick, quick-gen, quick-mc or a quick task; any task of lm-evaluation-harness (gsm8k, mmlu, ...); a .jsonl file with question and answer, and choices if any
        out: run folder to write
        limit: take only the first so many items of each task; a quick task has 100
        shots: solved examples before each item; left out, the task's own number
        max_new_tokens: tokens that a generative task of the harness may write at most; left out, the task's own number
        data: folder of local files for the harness's tasks; left out, they come from the Hugging Face hub
        allow_code_execution: run programs that the models write (humaneval, mbpp), in a sandbox
        seed: of the quick tasks' items, of the harness's choice of shots, and of bootstraps
        batch_size: items at a time
        ladder: types of GGUF, such as q8_0,q4_k,q2_k: also measure the KL of each model from the first, on what that one writes, and say which two of its own quantised types it lies between
        cache: keep the rungs of the ladder for the next call
        dtype: auto is the checkpoint's own on an accelerator and float32 on a CPU
        device: a torch device; auto is cuda where there is one, else cpu
        revision: revision of a Hugging Face id (of the first model)
        adapter: LoRA adapter to merge into the first model, a folder or a Hugging Face id
        trust_remote_code: run code that comes with a model
        dequantise: load the packed weights of a quantised checkpoint as dense floats, so that they can be pruned
        resume: continue an interrupted run
        overwrite: replace an existing run folder

    Raises:
        UserError: the user's mistake, in one line; nothing is written.
    """
    from prunescope.jobs import evaluate as job

    return job.run(
        job.EvaluateOptions(
            models=models, tasks=tasks, limit=limit, shots=shots, max_new_tokens=max_new_tokens, data=data,
            allow_code_execution=allow_code_execution, seed=seed, batch_size=batch_size, ladder=ladder, cache=cache,
            loading=LoadOptions(dtype, device, revision, trust_remote_code, adapter, dequantise), output=OutputOptions(out, overwrite, resume),
        )
    )  # fmt: skip


def sweep(
    model: Model,
    *,
    out: str | None = None,
    target: str | None = None,
    n: str | None = None,
    method: str | None = None,
    sparsity: str | None = None,
    pattern: str | None = None,
    quant: str | None = None,
    join: str | None = None,
    sparse_bytes: bool = False,
    ladder: str | None = None,
    tasks: str = "quick",
    limit: int | None = None,
    shots: int | None = None,
    data: str | None = None,
    allow_code_execution: bool = False,
    prompts: str | None = None,
    chat: bool = False,
    max_new_tokens: int = 32,
    metric_temperature: float = 1.0,
    calibration: str = "self",
    samples: int | None = None,
    seq_len: int | None = None,
    batch_size: int = 8,
    workers: int = 1,
    ray_address: str | None = None,
    seed: int = 0,
    dtype: DType = "auto",
    device: str = "auto",
    revision: str | None = None,
    adapter: str | None = None,
    trust_remote_code: bool = False,
    dequantise: bool = False,
    cache: bool = True,
    resume: bool = False,
    overwrite: bool = False,
) -> SweepResult:
    """Task scores against the number of dropped sublayers, sparsity or quantised formats, on one axis of bytes, with h, z and p of the same points.

    Args:
        model: Hugging Face id, folder, .gguf file or smollm2-135m
        out: run folder to write; a point is kept there as soon as it is measured
        target: what to drop, with commas between: attn, mlp, block, all; attn,mlp,block if nothing else is asked for
        n: how many, such as 0..12, 0..12..4 or 1,2,8; left out, 0..12
        method: how to prune weights, with commas between: magnitude, wanda, sparsegpt (the default)
        sparsity: shares of weights to prune, such as 0.3..0.7 (in steps of 0.1) or 0.5,0.6
        pattern: N:M patterns to prune to, such as 2:4,4:8
        quant: formats to quantise to, with commas between, such as int8,int4-g128,q4_0: all that may follow quant: as a target
        join: formats in which every dropped or pruned point is measured as well, such as int4-g128
        ladder: types of GGUF to place every KL among, such as q8_0,q4_k,q2_k, measured once on the same texts; left out, those measured before
        sparse_bytes: leave zeros of pruned weights out of the bytes of a point, not counting them as stored
        tasks: names with commas between; quick are the built-in pairs, quick-gen and quick-mc one half of them
        limit: items of each task
        shots: solved examples before each item; left out, the task's own number
        data: folder of local task files
        allow_code_execution: run what the model writes, for tasks that need it
        prompts: on what to compare h, z and p: JSONL with a field prompt, or one prompt a line; left out, the 15 shipped ones
        chat: put each of these prompts into the model's chat template
        max_new_tokens: decoding steps at most that are compared on a prompt
        metric_temperature: temperature T of p = softmax(z / T) in the metrics
        calibration: self (text the model samples), a text, JSON or JSONL file, or a data set id (c4, wikitext2)
        samples: calibration samples, by default 128 from a text and 32 from the model
        seq_len: tokens of a sample, by default 2048 from a text and 256 from the model, never past its context
        batch_size: items at a time
        workers: processes that share the points through Ray, each with a GPU where there are any
        ray_address: of a running Ray cluster (auto finds one); left out, one is started here for more than one worker
        seed: of tasks, calibration and bootstrap
        dtype: auto is the checkpoint's own on an accelerator and float32 on a CPU
        device: a torch device; auto is cuda where there is one, else cpu
        revision: revision of a Hugging Face id
        adapter: LoRA adapter to merge into the model, a folder or a Hugging Face id
        trust_remote_code: run code that comes with the model
        dequantise: load the packed weights of a quantised checkpoint as dense floats, so that they can be pruned
        cache: keep drop scores and self-sampled text for the next call
        resume: continue an interrupted sweep, or add points to a finished one
        overwrite: replace an existing run folder

    Raises:
        UserError: the user's mistake, in one line; nothing is written.
    """
    from prunescope.jobs import sweep as job

    return job.run(
        job.SweepOptions(
            model=model, target=target, n=n, method=method, sparsity=sparsity, pattern=pattern, quant=quant, join=join,
            sparse_bytes=sparse_bytes, ladder=ladder, tasks=tasks, limit=limit, shots=shots, data=data, allow_code_execution=allow_code_execution, prompts=prompts, chat=chat,
            max_new_tokens=max_new_tokens, metric_temperature=metric_temperature, calibration=calibration, samples=samples,
            seq_len=seq_len, batch_size=batch_size, workers=workers, ray_address=ray_address, seed=seed, cache=cache,
            loading=LoadOptions(dtype, device, revision, trust_remote_code, adapter, dequantise), output=OutputOptions(out, overwrite, resume),
        )
    )  # fmt: skip


def speed(
    models: list[Model],
    *,
    out: str | None = None,
    batch_size: str = "1,8",
    length: int = 128,
    max_new_tokens: int = 32,
    repeats: int = 5,
    sparse_kernels: bool = False,
    seed: int = 0,
    engine: Literal["transformers", "llama.cpp"] = "transformers",
    dtype: DType = "auto",
    device: str = "auto",
    revision: str | None = None,
    adapter: str | None = None,
    trust_remote_code: bool = False,
    dequantise: bool = False,
    overwrite: bool = False,
) -> SpeedResult:
    """Measure what each model costs: parameters, bytes on disk and in memory, cache, prefill and decode tokens a second.

    Args:
        models: models and checkpoints, the dense one first; drop:attn=3,5;mlp=7 drops from the first
        out: run folder to write
        batch_size: texts at a time, several with commas between them
        length: tokens of a prompt
        max_new_tokens: tokens written after it
        repeats: how often each time is measured, after a warm-up; the median counts
        sparse_kernels: run 2:4 weights with PyTorch's semi-structured kernels (CUDA, bfloat16 or float16)
        seed: of the random prompts
        engine: what runs them; llama.cpp writes one text at a time (no --batch-size), models exported and timed in turn
        dtype: auto is the checkpoint's own on an accelerator and float32 on a CPU
        device: a torch device; auto is cuda where there is one, else cpu
        revision: revision of a Hugging Face id (of the first model)
        adapter: LoRA adapter to merge into the first model, a folder or a Hugging Face id
        trust_remote_code: run code that comes with the model
        dequantise: load the packed weights of a quantised checkpoint as dense floats, so that they can be pruned
        overwrite: replace an existing run folder

    Raises:
        UserError: the user's mistake, in one line; nothing is written.
    """
    from prunescope.jobs import speed as job

    return job.run(
        job.SpeedOptions(
            models=models, batch_size=batch_size, length=length, max_new_tokens=max_new_tokens, repeats=repeats,
            sparse_kernels=sparse_kernels, seed=seed, engine=engine,
            loading=LoadOptions(dtype, device, revision, trust_remote_code, adapter, dequantise),
            output=OutputOptions(out, overwrite),
        )
    )  # fmt: skip


def advise(
    model: str,
    *,
    sweep: str | None = None,
    speed: str | None = None,
    use: str = "writing",
    budget: Literal["bytes", "speed", "score"] = "bytes",
    loss: float = 0.05,
    limit: int = 50,
    seed: int = 0,
    dtype: DType = "auto",
    device: str = "auto",
    out: str | None = None,
    overwrite: bool = False,
) -> AdviseResult:
    """Say from sweeps how much may go before a use breaks, which kind of pruning or rounding, and the command that makes it.

    A point is safe where even the low end of its 95 % interval over items loses no more than --loss of what the dense model scores above
    chance. With sweeps given no model is loaded; without one, a small sweep is run first, beside --out, and its cost is printed before.

    Args:
        model: the model of the sweeps, as they name it; or the folder of one sweep
        sweep: folders of sweep runs of that model, several with commas between them; left out, one is run
        speed: folders of speed runs of that model and its points, for --budget speed; left out, the points are timed
        use: writing, choice, chat, code, maths, retrieval, or the name of a task in the sweeps
        budget: bytes takes the safe point of the fewest bytes, speed the safe point that writes fastest, score the one that keeps most
        loss: share of what is above chance that may be lost
        limit: items of each task in a sweep that is run now
        seed: of the draws for intervals
        dtype: of what is measured now; auto is the checkpoint's own on an accelerator and float32 on a CPU
        device: of what is measured now; auto is cuda where there is one, else cpu
        out: run folder to write
        overwrite: replace an existing run folder

    Raises:
        UserError: no sweep, a sweep of another model, or no task of that use; nothing is written.
    """
    from prunescope.jobs import advise as job

    return job.run(
        job.AdviseOptions(
            model=model, sweep=sweep, speed=speed, use=use, budget=budget, loss=loss, limit=limit, seed=seed,
            loading=LoadOptions(dtype, device, None, False), output=OutputOptions(out, overwrite),
        )
    )  # fmt: skip


def report(runs: list[str], *, out: str = "report.html", figures: str | None = None, overwrite: bool = False) -> Path:
    """Make one self-contained page of run folders and checkpoints; it opens from disk with no network.

    Args:
        runs: folders of layerwise, generate, mcq, drop, sparsify or demo
        out: HTML file to write
        figures: folder for publication figures of every view, as SVG, PNG and PDF
        overwrite: replace an existing page and existing figures

    Raises:
        UserError: a folder that is no run, is damaged or of a newer schema; nothing is written.
    """
    from prunescope.jobs import report as job

    return job.run(
        job.ReportOptions(
            runs=runs, figures=figures, output=OutputOptions(out, overwrite),
        )
    )  # fmt: skip
