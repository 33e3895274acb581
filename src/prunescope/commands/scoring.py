"""What pruning costs in tasks and saves in time, and the page that shows it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from prunescope.jobs.options import DType, LoadOptions, OutputOptions, SpreadOptions
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
    workers: int = 1,
    ray_address: str | None = None,
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
        tasks: comma-separated names: quick, quick-gen, quick-mc or a quick task; any task of lm-evaluation-harness (gsm8k, mmlu, ...); a .jsonl file with question and answer, and optionally choices
        out: run folder to write
        limit: use only the first N items of each task; a quick task has 100
        shots: solved examples before each item; default: the task's own number
        max_new_tokens: most tokens a generative task of the harness may write; default: the task's own number
        data: folder of local files for the harness's tasks; without it, they come from the Hugging Face hub
        allow_code_execution: run programs that the models write (humaneval, mbpp), in a sandbox
        seed: seed of the quick tasks' items, of the harness's choice of shots, and of bootstraps
        batch_size: items per batch
        ladder: GGUF types such as q8_0,q4_k,q2_k: also measure each model's KL from the first, on what the first writes, and say which two of its quantised types it lies between
        cache: keep the rungs of the ladder for the next call
        workers: processes that share the tasks, each with a model and a GPU of its own, or its share of the CPU's threads
        ray_address: address of a running Ray cluster, whose workers share the tasks instead; auto finds one, local starts one here
        dtype: auto is the checkpoint's own on an accelerator and float32 on a CPU
        device: a torch device, or gpus to spread the blocks over all of them; auto is cuda if there is one, else cpu
        revision: revision of a Hugging Face id (of the first model)
        adapter: LoRA adapter to merge into the first model, a folder or a Hugging Face id
        trust_remote_code: run code that comes with a model
        dequantise: load the packed weights of a quantised checkpoint as dense floats, so that they can be pruned
        resume: continue an interrupted run
        overwrite: replace an existing run folder

    Raises:
        UserError: invalid input, in one line; nothing is written.
    """
    from prunescope.jobs import evaluate as job

    return job.run(
        job.EvaluateOptions(
            models=models, tasks=tasks, limit=limit, shots=shots, max_new_tokens=max_new_tokens, data=data,
            allow_code_execution=allow_code_execution, seed=seed, batch_size=batch_size, ladder=ladder, cache=cache,
            spread=SpreadOptions(workers, ray_address), loading=LoadOptions(dtype, device, revision, trust_remote_code, adapter, dequantise), output=OutputOptions(out, overwrite, resume),
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
    """Measure task scores against dropped sublayers, sparsity or quantised formats, on one axis of bytes, with h, z and p at the same points.

    Args:
        model: Hugging Face id, folder, .gguf file or smollm2-135m
        out: run folder to write; each point is saved as soon as it is measured
        target: what to drop, comma-separated: attn, mlp, block, all; default: attn,mlp,block if nothing else is asked for
        n: how many to drop, such as 0..12, 0..12..4 or 1,2,8; default: 0..12
        method: how to prune weights, comma-separated: magnitude, wanda, sparsegpt (the default)
        sparsity: shares of weights to prune, such as 0.3..0.7 (in steps of 0.1) or 0.5,0.6
        pattern: N:M patterns to prune to, such as 2:4,4:8
        quant: formats to quantise to, comma-separated, such as int8,int4-g128,q4_0; any that may follow quant: in a target
        join: formats in which every dropped or pruned point is measured too, such as int4-g128
        ladder: GGUF types to place every KL among, such as q8_0,q4_k,q2_k, measured once on the same texts; default: those measured before
        sparse_bytes: do not count the zeros of pruned weights in a point's bytes, as a sparse format would
        tasks: comma-separated names; quick is all built-in pairs, quick-gen and quick-mc one half of them; agreement: share of the dense tokens after --prompts that stay the most likely
        limit: items per task
        shots: solved examples before each item; default: the task's own number
        data: folder of local task files
        allow_code_execution: run what the model writes, for tasks that need it
        prompts: prompts to compare h, z and p on: JSONL with a field prompt, or one prompt per line; default: the 15 shipped ones
        chat: put each of these prompts into the model's chat template
        max_new_tokens: most decoding steps compared per prompt
        metric_temperature: temperature T of p = softmax(z / T) in the metrics
        calibration: self (text the model samples), a text, JSON or JSONL file, or a data set id (c4, wikitext2)
        samples: calibration samples; default: 128 from a text, 32 from the model
        seq_len: tokens per sample; default: 2048 from a text, 256 from the model, never past its context
        batch_size: items per batch
        workers: processes that share the points, each with a model and a GPU of its own, or its share of the CPU's threads
        ray_address: address of a running Ray cluster, whose workers share the points instead; auto finds one, local starts one here
        seed: seed of tasks, calibration and bootstrap
        dtype: auto is the checkpoint's own on an accelerator and float32 on a CPU
        device: a torch device, or gpus to spread the blocks over all of them; auto is cuda if there is one, else cpu
        revision: revision of a Hugging Face id
        adapter: LoRA adapter to merge into the model, a folder or a Hugging Face id
        trust_remote_code: run code that comes with the model
        dequantise: load the packed weights of a quantised checkpoint as dense floats, so that they can be pruned
        cache: keep drop scores and self-sampled text for the next call
        resume: continue an interrupted sweep, or add points to a finished one
        overwrite: replace an existing run folder

    Raises:
        UserError: invalid input, in one line; nothing is written.
    """
    from prunescope.jobs import sweep as job

    return job.run(
        job.SweepOptions(
            model=model, target=target, n=n, method=method, sparsity=sparsity, pattern=pattern, quant=quant, join=join,
            sparse_bytes=sparse_bytes, ladder=ladder, tasks=tasks, limit=limit, shots=shots, data=data, allow_code_execution=allow_code_execution, prompts=prompts, chat=chat,
            max_new_tokens=max_new_tokens, metric_temperature=metric_temperature, calibration=calibration, samples=samples,
            seq_len=seq_len, batch_size=batch_size, spread=SpreadOptions(workers, ray_address), seed=seed, cache=cache,
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
    engine: Literal["transformers", "llama.cpp", "vllm"] = "transformers",
    engine_python: str | None = None,
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
        batch_size: texts per batch; several sizes comma-separated
        length: tokens per prompt
        max_new_tokens: tokens written after the prompt
        repeats: measurements of each time after a warm-up; the median counts
        sparse_kernels: run 2:4 weights with PyTorch's semi-structured kernels (CUDA, bfloat16 or float16)
        seed: seed of the random prompts
        engine: what runs the models; llama.cpp and vllm write one text at a time (no --batch-size), models are exported and timed in turn
        engine_python: Python of an environment with vllm, for --engine vllm
        dtype: auto is the checkpoint's own on an accelerator and float32 on a CPU
        device: a torch device, or gpus to spread the blocks over all of them; auto is cuda if there is one, else cpu
        revision: revision of a Hugging Face id (of the first model)
        adapter: LoRA adapter to merge into the first model, a folder or a Hugging Face id
        trust_remote_code: run code that comes with the model
        dequantise: load the packed weights of a quantised checkpoint as dense floats, so that they can be pruned
        overwrite: replace an existing run folder

    Raises:
        UserError: invalid input, in one line; nothing is written.
    """
    from prunescope.jobs import speed as job

    return job.run(
        job.SpeedOptions(
            models=models, batch_size=batch_size, length=length, max_new_tokens=max_new_tokens, repeats=repeats,
            sparse_kernels=sparse_kernels, seed=seed, engine=engine, engine_python=engine_python,
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
    heal: bool = False,
    seed: int = 0,
    dtype: DType = "auto",
    device: str = "auto",
    revision: str | None = None,
    adapter: str | None = None,
    trust_remote_code: bool = False,
    dequantise: bool = False,
    out: str | None = None,
    overwrite: bool = False,
) -> AdviseResult:
    """Tell from sweeps how much can be pruned before a use breaks, which kind of pruning or quantisation saves most, and the command for it.

    A point is safe where even the low end of its 95 % interval over items loses no more than --loss of what the dense model scores above
    chance. With sweeps given no model is loaded; without one, a small sweep is run first, beside --out, and its cost is printed before.

    Args:
        model: the model of the sweeps, as they name it; or the folder of one sweep
        sweep: folders of sweep runs of that model, comma-separated; without it, a sweep is run first
        speed: folders of speed runs of that model and its points, for --budget speed; without it, the points are timed
        use: writing, choice, chat, code, maths, retrieval, the name of a task in the sweeps, or a file of your own prompts, with or without answers
        budget: bytes takes the safe point of the fewest bytes, speed the safe point that writes fastest, score the one that keeps most
        loss: share of the score above chance that may be lost
        limit: items per task in a sweep that advise runs itself
        heal: also heal, in each series of that sweep, the first point that may lose the use; takes minutes a point on a CPU
        seed: seed of the draws for intervals
        dtype: dtype of measurements; auto is the checkpoint's own on an accelerator and float32 on a CPU
        device: where measurements run; auto is cuda if there is one, else cpu
        revision: revision of a Hugging Face id
        adapter: LoRA adapter to merge into the model, a folder or a Hugging Face id
        trust_remote_code: run code that comes with the model
        dequantise: load the packed weights of a quantised checkpoint as dense floats, so that they can be pruned
        out: run folder to write
        overwrite: replace an existing run folder

    Raises:
        UserError: no sweep, a sweep of another model, or no task of that use; nothing is written.
    """
    from prunescope.jobs import advise as job

    return job.run(
        job.AdviseOptions(
            model=model, sweep=sweep, speed=speed, use=use, budget=budget, loss=loss, limit=limit, heal=heal, seed=seed,
            loading=LoadOptions(dtype, device, revision, trust_remote_code, adapter, dequantise), output=OutputOptions(out, overwrite),
        )
    )  # fmt: skip


def report(runs: list[str], *, out: str = "report.html", figures: str | None = None, overwrite: bool = False) -> Path:
    """Make one self-contained HTML page from run folders and checkpoints; it needs no network.

    Args:
        runs: run folders and checkpoints of any command, or a folder of demo
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
