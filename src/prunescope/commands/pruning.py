"""Load a model, prune it, heal it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from prunescope.jobs.options import DType, LoadOptions, OutputOptions, SpreadOptions
from prunescope.results import DropResult, HealResult, SparsifyResult

if TYPE_CHECKING:
    from prunescope.jobs.options import Model
    from prunescope.models.loaded import LoadedModel
else:
    Model = str  # what it is on the command line

__all__ = ["drop", "export", "heal", "load", "sparsify"]


def load(
    model: Model,
    *,
    dtype: DType = "auto",
    device: str = "auto",
    drop: str | None = None,
    revision: str | None = None,
    adapter: str | None = None,
    trust_remote_code: bool = False,
    dequantise: bool = False,
) -> LoadedModel:
    """Load a model, optionally with sublayers dropped.

    Args:
        model: a Hugging Face id, a folder, a .gguf file, smollm2-135m (bundled), or a prunescope or LLM-Drop checkpoint folder
        dtype: auto is the checkpoint's own on an accelerator and float32 on a CPU
        device: a torch device, or gpus to spread the blocks over all of them; auto is cuda if there is one, else cpu
        drop: sublayers to drop, for example attn=0,5;mlp=7
        revision: revision of a Hugging Face id
        adapter: LoRA adapter to merge into the model, a folder or a Hugging Face id
        trust_remote_code: run code that comes with the model
        dequantise: load the packed weights of a quantised checkpoint as dense floats, so that they can be pruned

    Returns:
        An object with `.model` (the ordinary transformers model, `generate()` and all), `.tokenizer`, `.restore()`.

    Raises:
        UserError: whatever is wrong with the reference, the files, the weights or the architecture.
    """
    from prunescope.models.loading import load_model

    return load_model(
        model,
        dtype=dtype,
        device=device,
        drop=drop,
        revision=revision,
        adapter=adapter,
        trust_remote_code=trust_remote_code,
        dequantise=dequantise,
    )


def drop(
    model: Model,
    *,
    target: Literal["attn", "mlp", "block", "all"] = "attn",
    n: int = 8,
    out: str | None = None,
    format: Literal["recipe", "zeroed", "compact"] = "recipe",
    order: Literal["discrete", "consecutive"] = "discrete",
    iterative: bool = False,
    score_on: Literal["stream", "norm"] = "stream",
    select: str = "cosine",
    generations: int = 20,
    compensate: bool = False,
    calibration: str = "self",
    samples: int | None = None,
    seq_len: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    dtype: DType = "auto",
    device: str = "auto",
    revision: str | None = None,
    adapter: str | None = None,
    trust_remote_code: bool = False,
    dequantise: bool = False,
    cache: bool = True,
    stream: bool | Literal["auto"] = "auto",
    workers: int = 1,
    ray_address: str | None = None,
    overwrite: bool = False,
) -> DropResult:
    """Score sublayers, drop the n least needed, save a checkpoint.

    Args:
        model: Hugging Face id, folder, .gguf file or smollm2-135m
        target: what to drop; all ranks attention and MLP sublayers together
        n: how many sublayers or blocks to drop
        out: checkpoint folder to write
        format: recipe (drop lists, no weights), zeroed (full weights, silent branches) or compact (blocks removed)
        order: discrete takes the n highest scores, consecutive the run of n blocks whose ends are most alike
        iterative: drop one, score again, n times
        score_on: stream compares the residual stream before and after, norm the module's normed input with its output
        select: cosine (scores of the stream), kl (greedy: drop what changes the model's predictions least, given what is already dropped), search (continues from there over whole sets) or task:NAME (greedy, by the score of a quick task)
        generations: generations of search, 8 sets each
        compensate: fold a least-squares map into the sublayer before what is dropped; with format zeroed or compact
        calibration: self (text the model samples), traces:FILE (what it answers to prompts, commas between files; traces alone: it writes them too), a text, JSON or JSONL file, or a data set id (c4, wikitext2)
        samples: calibration samples; default: 128 from a text, 32 from the model
        seq_len: tokens per sample; default: 2048 from a text, 256 from the model, never past its context
        batch_size: samples per batch; default: 32 while the model samples (on a GPU as many as fit), 8 while it scores
        seed: seed of the choice of calibration samples
        dtype: auto is the checkpoint's own on an accelerator and float32 on a CPU
        device: a torch device; auto is cuda if there is one, else cpu
        revision: revision of a Hugging Face id
        adapter: LoRA adapter to merge into the model, a folder or a Hugging Face id
        trust_remote_code: run code that comes with the model
        dequantise: load the packed weights of a quantised checkpoint as dense floats, so that they can be pruned
        cache: keep scores for the next call ($PRUNESCOPE_CACHE, else the user's cache folder)
        stream: leave the model on disk and score it a block at a time, with the same scores; by cosine, from a text, for format recipe; auto: if it does not fit into free memory
        workers: processes that share the candidates of kl, search and task:NAME, each with a model and a GPU of its own, or its share of the CPU's threads
        ray_address: address of a running Ray cluster, whose workers share the candidates instead; auto finds one, local starts one here
        overwrite: replace an existing checkpoint folder

    Raises:
        UserError: invalid input, in one line; nothing is written.
    """
    from prunescope.jobs import drop as job

    return job.run(
        job.DropOptions(
            model=model, target=target, n=n, format=format, order=order, iterative=iterative, score_on=score_on,
            select=select, generations=generations, compensate=compensate, calibration=calibration, samples=samples, seq_len=seq_len, batch_size=batch_size, seed=seed, cache=cache, stream=stream, spread=SpreadOptions(workers, ray_address),
            loading=LoadOptions(dtype, device, revision, trust_remote_code, adapter, dequantise), output=OutputOptions(out, overwrite),
        )
    )  # fmt: skip


def sparsify(
    model: Model,
    *,
    method: Literal["magnitude", "wanda", "sparsegpt", "structured", "experts"] = "sparsegpt",
    sparsity: float | None = None,
    pattern: str | None = None,
    out: str | None = None,
    variant: bool = False,
    sparsity_map: str | None = None,
    allocation: Literal["uniform", "owl"] = "uniform",
    owl_spread: float = 0.08,
    owl_threshold: float = 5.0,
    block_size: int = 128,
    damping: float = 0.01,
    refine: Literal["swaps", "admm", "swaps-admm", "admm-gradual"] | None = None,
    refine_steps: int | None = None,
    calibration: str = "self",
    samples: int | None = None,
    seq_len: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    perplexity: str | None = None,
    perplexity_windows: int | None = None,
    shares: int | None = None,
    memory_mb: int = 4096,
    dtype: DType = "auto",
    device: str = "auto",
    revision: str | None = None,
    adapter: str | None = None,
    trust_remote_code: bool = False,
    dequantise: bool = False,
    cache: bool = True,
    dry_run: bool = False,
    resume: bool = False,
    overwrite: bool = False,
) -> SparsifyResult:
    """Prune weights block by block, with one block of the model in memory at a time, and save a plain checkpoint.

    Args:
        model: Hugging Face id, folder, .gguf file or smollm2-135m
        method: magnitude, wanda, sparsegpt, structured (whole MLP neurons, physically removed), or experts (whole experts of MoE models, by REAP, physically removed)
        sparsity: share of the weights to remove, at least 0 and below 1
        pattern: N:M keeps at most N weights of every M consecutive inputs (2:4, 4:8); or unstructured, with a sparsity
        out: checkpoint folder to write
        variant: wanda: one threshold per matrix on the share of each row's score that is lost
        sparsity_map: YAML file, glob pattern of module names -> share or N:M; the last match counts, 0 leaves a module unpruned
        allocation: uniform, or owl (blocks with more outliers are pruned less)
        owl_spread: owl: how far a block's sparsity may be from the mean
        owl_threshold: owl: multiple of the mean score that makes an outlier
        block_size: sparsegpt: columns per block
        damping: sparsegpt and --refine: damping relative to the mean of the Hessian's diagonal
        refine: lower each layer's error after pruning: swaps (of kept and pruned weights), admm (the best weights for the mask), swaps-admm (one after the other), or admm-gradual (a mask of its own that grows with the weights); only of matrices that lose less by it on a quarter of the samples held out
        refine_steps: steps of --refine; default: at most 5 scans of swaps, 20 steps of admm, 50 of admm-gradual
        calibration: self (text that the model samples, for which it is loaded whole), traces:FILE or traces (what it answers to prompts, see drop), a text, JSON or JSONL file, a data set id (c4, wikitext2), or none (magnitude only)
        samples: calibration samples; default: 128 from a text, 32 from the model
        seq_len: tokens per sample and per perplexity window; default: 2048, or 256 for text the model samples; never past its context
        batch_size: samples per batch; default: as many as make 2048 tokens (8192 on a GPU), one for models with fused experts
        seed: seed of the choice of calibration samples
        perplexity: text, JSON or JSONL file to measure perplexity on, before and after
        perplexity_windows: use only the first N windows of it
        shares: pieces of the calibration text whose sums are added pair by pair; default: one per process of torchrun; the result depends on them, not on the processes
        memory_mb: memory for hidden states, in MB; more are kept on disk
        dtype: dtype of the computation, at least as precise as the checkpoint's; auto is the checkpoint's own on an accelerator and float32 on a CPU
        device: a torch device; auto is cuda if there is one, else cpu
        revision: revision of a Hugging Face id
        adapter: LoRA adapter to merge into the model, a folder or a Hugging Face id
        trust_remote_code: run code that comes with the model
        dequantise: load the packed weights of a quantised checkpoint as dense floats, so that they can be pruned
        cache: keep self-sampled calibration text for the next call
        dry_run: print what would be pruned, with estimated memory and time, and write no checkpoint
        resume: continue an interrupted run
        overwrite: replace an existing checkpoint folder

    Raises:
        UserError: invalid input, in one line; nothing is written.
    """
    from prunescope.jobs import sparsify as job

    return job.run(
        job.SparsifyOptions(
            model=model, method=method, sparsity=sparsity, pattern=pattern, variant=variant, sparsity_map=sparsity_map,
            allocation=allocation, owl_spread=owl_spread, owl_threshold=owl_threshold, block_size=block_size, damping=damping,
            refine=refine, refine_steps=refine_steps, calibration=calibration, samples=samples, seq_len=seq_len, batch_size=batch_size, seed=seed, perplexity=perplexity,
            perplexity_windows=perplexity_windows, shares=shares, memory_mb=memory_mb, cache=cache, dry_run=dry_run,
            loading=LoadOptions(dtype, device, revision, trust_remote_code, adapter, dequantise), output=OutputOptions(out, overwrite, resume),
        )
    )  # fmt: skip


def heal(
    target: Model,
    *,
    teacher: Model,
    out: str | None = None,
    traces: str | None = None,
    samples: int = 256,
    new_tokens: int = 128,
    temperature: float = 1.0,
    held_out: int = 16,
    steps: int = 300,
    batch_size: int = 8,
    micro_batch: int | None = None,
    learning_rate: float | None = None,
    warmup: float = 0.05,
    decay: Literal["cosine", "linear", "constant"] = "cosine",
    weight_decay: float = 0.0,
    clip: float = 1.0,
    on_policy: float = 0.0,
    reconstruct: int = 0,
    lora: int | None = None,
    embeddings: bool = False,
    compile: bool = False,
    check_every: int = 20,
    patience: int | None = 5,
    seed: int = 0,
    dtype: DType = "auto",
    device: str = "auto",
    revision: str | None = None,
    adapter: str | None = None,
    dequantise: bool = False,
    trust_remote_code: bool = False,
    cache: bool = True,
    resume: bool = False,
    overwrite: bool = False,
) -> HealResult:
    """Train the pruned model to predict what the dense model predicts; zeros stay zero, and dropped sublayers stay dropped.

    Args:
        target: the pruned model, a folder of drop or sparsify, or sublayers of the teacher to drop, for example drop:attn=3,5
        teacher: the dense model
        out: checkpoint folder to write
        traces: files of prompts for the teacher to continue, comma-separated, and self for prompts that it writes too; default: self
        samples: texts that the teacher writes
        new_tokens: most tokens of each
        temperature: sampling temperature of the teacher
        held_out: texts held out for checks, from prompts that are not trained on
        steps: optimiser steps
        batch_size: texts per step
        micro_batch: texts in memory at a time, of each process; default: all of a step
        learning_rate: learning rate after the warm-up; default: 2e-5, or 1e-3 with --lora
        warmup: share of the steps over which the learning rate rises
        decay: how the learning rate falls after that, to zero at the last step
        weight_decay: weight decay of AdamW
        clip: gradient norm to clip to; 0 turns clipping off
        on_policy: share of steps on texts that the target itself writes, after the same prompts
        reconstruct: steps of a cheap first stage in which each sublayer by itself learns to reproduce the teacher's stream
        lora: train a low-rank change of this rank for each matrix, merged at the end; without it, all weights of the blocks are trained
        embeddings: train embedding and head too
        compile: run the blocks through torch.compile; faster on a GPU after a minute of compiling
        check_every: steps between checks on the held-out texts; the run can be resumed from each
        patience: stop after N checks without improvement
        seed: seed of the texts, of their order and of the low-rank changes
        dtype: dtype of weights and optimiser, float32 or float64; on a GPU, auto still multiplies in bfloat16
        device: a torch device; auto is cuda if there is one, else cpu
        revision: revision of the teacher's Hugging Face id
        adapter: LoRA adapter to merge into the teacher, a folder or a Hugging Face id
        dequantise: load the packed weights of a quantised checkpoint as dense floats
        trust_remote_code: run code that comes with the model
        cache: keep the teacher's texts for the next call
        resume: continue an interrupted run
        overwrite: replace an existing checkpoint folder

    Raises:
        UserError: invalid input, in one line; nothing is written.
    """
    from prunescope.jobs import heal as job

    return job.run(
        job.HealOptions(
            target=target, teacher=teacher, traces=traces, samples=samples, new_tokens=new_tokens, temperature=temperature,
            held_out=held_out, steps=steps, batch_size=batch_size, micro_batch=micro_batch, learning_rate=learning_rate, warmup=warmup,
            decay=decay, weight_decay=weight_decay, clip=clip, on_policy=on_policy, reconstruct=reconstruct, lora=lora, embeddings=embeddings, compile=compile,
            check_every=check_every, patience=patience, seed=seed, cache=cache,
            loading=LoadOptions(dtype, device, revision, trust_remote_code, adapter, dequantise), output=OutputOptions(out, overwrite, resume),
        )
    )  # fmt: skip


def export(
    model: Model,
    *,
    out: str,
    engine: Literal["llama.cpp", "transformers", "vllm", "sglang"],
    drop: str | None = None,
    run_check: bool = False,
    engine_python: str | None = None,
    measured: str | None = None,
    push_to_hub: str | None = None,
    private: bool = False,
    dtype: DType = "auto",
    device: str = "auto",
    revision: str | None = None,
    adapter: str | None = None,
    dequantise: bool = False,
    trust_remote_code: bool = False,
    overwrite: bool = False,
) -> Path:
    """Write a folder that an engine can run directly: dropped sublayers are left out, not zeroed.

    Args:
        model: a Hugging Face id, a folder, a .gguf file, smollm2-135m (bundled), or a prunescope or LLM-Drop checkpoint folder
        out: folder to write
        engine: the engine that will run it; also --for on the command line
        drop: sublayers to drop of a dense model, for example attn=0,5;mlp=7
        run_check: run the export in its engine on this machine and fail unless it writes the same tokens; also --check on the command line
        engine_python: Python of an environment with vllm, for --check
        measured: run folders that measured the damage, for the model card, comma-separated
        push_to_hub: Hugging Face repository to upload the folder to, OWNER/NAME
        private: make that repository private
        dtype: auto is the checkpoint's own on an accelerator and float32 on a CPU
        device: a torch device; auto is cuda if there is one, else cpu
        revision: revision of a Hugging Face id
        adapter: LoRA adapter to merge into the model, a folder or a Hugging Face id
        dequantise: load the packed weights of a quantised checkpoint as dense floats
        trust_remote_code: run code that comes with the model
        overwrite: replace an existing folder

    Returns:
        The folder: model.gguf for llama.cpp, safetensors and if needed a modelling file for the others, and README.md.

    Raises:
        UserError: the engine cannot run the model or computes something else, or whatever is wrong with the reference or the folder.
    """
    from prunescope.jobs.export import ExportOptions, run

    return run(
        ExportOptions(
            model=model, engine=engine, drop=drop, run_check=run_check, engine_python=engine_python, measured=measured, push_to_hub=push_to_hub, private=private,
            loading=LoadOptions(dtype, device, revision, trust_remote_code, adapter, dequantise),
            output=OutputOptions(out, overwrite),
        )
    )  # fmt: skip
