"""Compare a dense model with a target in h, z and p."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from prunescope.jobs.options import DType, LoadOptions, OutputOptions, SpreadOptions
from prunescope.results import DivergenceResult, GenerateResult, LayerwiseResult, McqResult, RetrieveResult

if TYPE_CHECKING:
    from prunescope.jobs.options import Model
else:
    Model = str  # what it is on the command line

__all__ = ["divergence", "generate", "layerwise", "mcq", "retrieve"]


def layerwise(
    dense: Model,
    target: Model | None = None,
    *,
    out: str | None = None,
    prompts: str | None = None,
    continuations: str | None = None,
    stream: bool | Literal["auto"] = "auto",
    chat: bool = False,
    max_new_tokens: int = 64,
    lens: Literal["raw", "final-norm"] = "raw",
    metric_temperature: float = 1.0,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    ignore_eos: bool = False,
    seed: int = 0,
    batch_size: int = 8,
    memory_mb: int = 512,
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
) -> LayerwiseResult:
    """Compare h, z and p after every sublayer at every decoding step, in the same context.

    Args:
        dense: the base model
        target: a model, a checkpoint, drop:attn=3,5;mlp=7 or quant:int4-g128 on the dense model, or both joined by +; without it, every sublayer is dropped in turn
        out: run folder to write
        prompts: JSONL with a field prompt, or one prompt per line; default: the 15 shipped ones
        continuations: JSONL with prompt and continuation, a text or token ids, written by any engine; without it, the dense model writes them
        stream: leave both models on disk and read them a block at a time, with the same numbers; without continuations the dense model is read once a token; auto: if they do not fit into free memory
        chat: put each prompt into the model's chat template
        max_new_tokens: most decoding steps; a text ends earlier at an end-of-text token
        lens: how logits come from an inner stream; raw is W h (the paper), final-norm is W norm(h)
        metric_temperature: temperature T of p = softmax(z / T) in the metrics
        temperature: sampling temperature of the dense text; 0 is greedy
        top_k: sample from the k most likely tokens only; 0 is off
        top_p: sample from the most likely tokens of this total probability only
        ignore_eos: keep writing after an end-of-text token, as the paper's code does
        seed: seed of the sampling and the bootstrap
        batch_size: prompts per batch; texts may be written for more at once on a CPU
        memory_mb: memory that the metrics may use, in MB
        workers: processes that share the prompts, each with both models and a GPU of its own, or its share of the CPU's threads
        ray_address: address of a running Ray cluster, whose workers share the prompts instead; auto finds one, local starts one here
        dtype: auto is the checkpoint's own on an accelerator and float32 on a CPU
        device: a torch device, or gpus to spread the blocks over all of them; auto is cuda if there is one, else cpu
        revision: revision of a Hugging Face id (of the dense model)
        adapter: LoRA adapter to merge into the dense model, a folder or a Hugging Face id
        trust_remote_code: run code that comes with the model
        dequantise: load the packed weights of a quantised checkpoint as dense floats, so that they can be pruned
        resume: continue an interrupted run
        overwrite: replace an existing run folder

    Raises:
        UserError: invalid input, in one line; nothing is written.
    """
    from prunescope.jobs import layerwise as job

    return job.run(
        job.LayerwiseOptions(
            dense=dense, target=target, prompts=prompts, continuations=continuations, stream=stream, chat=chat, max_new_tokens=max_new_tokens, lens=lens,
            metric_temperature=metric_temperature, temperature=temperature, top_k=top_k, top_p=top_p, ignore_eos=ignore_eos,
            seed=seed, batch_size=batch_size, memory_mb=memory_mb, spread=SpreadOptions(workers, ray_address), loading=LoadOptions(dtype, device, revision, trust_remote_code, adapter, dequantise),
            output=OutputOptions(out, overwrite, resume),
        )
    )  # fmt: skip


def generate(
    dense: Model,
    target: Model,
    *,
    out: str | None = None,
    prompts: str | None = None,
    continuations: str | None = None,
    stream: bool | Literal["auto"] = "auto",
    chat: bool = False,
    max_new_tokens: int = 64,
    regime: Literal["both", "free-running", "teacher-forced"] = "both",
    metric_temperature: float = 1.0,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    ignore_eos: bool = False,
    seed: int = 0,
    batch_size: int = 8,
    memory_mb: int = 512,
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
) -> GenerateResult:
    """Let both models write and compare h, z and p at every step: on their own texts, and on the dense model's.

    Args:
        dense: the base model
        target: a model with the same vocabulary, a checkpoint, drop:attn=3,5;mlp=7 or quant:int4-g128 on the dense model, or both joined by +
        out: run folder to write
        prompts: JSONL with a field prompt, or one prompt per line; default: the 15 shipped ones
        continuations: JSONL with prompt and continuation, a text or token ids, written by any engine; both models read these, teacher-forced only
        stream: leave both models on disk and read them a block at a time, with the same numbers; needs continuations; auto: if they do not fit into free memory
        chat: put each prompt into the model's chat template
        max_new_tokens: most decoding steps; a text ends earlier at an end-of-text token
        regime: free-running (each model reads its own text), teacher-forced (the target reads the dense one's), or both
        metric_temperature: temperature T of p = softmax(z / T) in the metrics
        temperature: sampling temperature; 0 is greedy
        top_k: sample from the k most likely tokens only; 0 is off
        top_p: sample from the most likely tokens of this total probability only
        ignore_eos: keep writing after an end-of-text token, as the paper's code does
        seed: seed of the sampling, the same draws for both models, and of the bootstrap
        batch_size: prompts per batch
        memory_mb: memory that the metrics may use, in MB
        ladder: GGUF types to place the KL among, such as q8_0,q4_k,q2_k, measured once on the dense model's texts; default: those measured before
        cache: keep the rungs of the ladder for the next call
        workers: processes that share the prompts, each with both models and a GPU of its own, or its share of the CPU's threads
        ray_address: address of a running Ray cluster, whose workers share the prompts instead; auto finds one, local starts one here
        dtype: auto is the checkpoint's own on an accelerator and float32 on a CPU
        device: a torch device, or gpus to spread the blocks over all of them; auto is cuda if there is one, else cpu
        revision: revision of a Hugging Face id (of the dense model)
        adapter: LoRA adapter to merge into the dense model, a folder or a Hugging Face id
        trust_remote_code: run code that comes with the model
        dequantise: load the packed weights of a quantised checkpoint as dense floats, so that they can be pruned
        resume: continue an interrupted run
        overwrite: replace an existing run folder

    Raises:
        UserError: invalid input, in one line; nothing is written.
    """
    from prunescope.jobs import generate as job

    return job.run(
        job.GenerateOptions(
            dense=dense, target=target, prompts=prompts, continuations=continuations, stream=stream, chat=chat, max_new_tokens=max_new_tokens, regime=regime,
            metric_temperature=metric_temperature, temperature=temperature, top_k=top_k, top_p=top_p, ignore_eos=ignore_eos,
            seed=seed, batch_size=batch_size, memory_mb=memory_mb, ladder=ladder, cache=cache,
            spread=SpreadOptions(workers, ray_address), loading=LoadOptions(dtype, device, revision, trust_remote_code, adapter, dequantise),
            output=OutputOptions(out, overwrite, resume),
        )
    )  # fmt: skip


def mcq(
    dense: Model,
    target: Model,
    *,
    out: str | None = None,
    questions: str | None = None,
    template: Literal["cue", "paper", "chat"] = "cue",
    shots: int = 0,
    subjects: str | None = None,
    limit: int | None = None,
    stream: bool | Literal["auto"] = "auto",
    metric_temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 8,
    memory_mb: int = 512,
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
) -> McqResult:
    """Ask both models multiple-choice questions: the whole vocabulary against the answer options, accuracy, flips.

    Args:
        dense: the base model
        target: a model with the same vocabulary, a checkpoint, drop:attn=3,5;mlp=7 or quant:int4-g128 on the dense model, or both joined by +
        out: run folder to write
        questions: JSONL with question, choices and answer, an MMLU CSV file, or a folder of them; default: the 72 shipped ones
        template: cue ends in "Answer:", paper is question and options only, chat is the model's chat template
        shots: solved examples before each question, from the folder's dev files
        subjects: subjects of an MMLU folder, comma-separated
        limit: use only the first N questions
        stream: leave both models on disk and read them a block at a time, with the same numbers; auto: if they do not fit into free memory
        metric_temperature: temperature T of p = softmax(z / T) in the metrics; accuracy does not depend on it
        seed: seed of the bootstrap
        batch_size: questions per batch
        memory_mb: memory that the metrics may use, in MB
        ladder: GGUF types to place the KL among, such as q8_0,q4_k,q2_k, measured once on the same questions; default: those measured before
        cache: keep the rungs of the ladder for the next call
        workers: processes that share the questions, each with both models and a GPU of its own, or its share of the CPU's threads
        ray_address: address of a running Ray cluster, whose workers share the questions instead; auto finds one, local starts one here
        dtype: auto is the checkpoint's own on an accelerator and float32 on a CPU
        device: a torch device, or gpus to spread the blocks over all of them; auto is cuda if there is one, else cpu
        revision: revision of a Hugging Face id (of the dense model)
        adapter: LoRA adapter to merge into the dense model, a folder or a Hugging Face id
        trust_remote_code: run code that comes with the model
        dequantise: load the packed weights of a quantised checkpoint as dense floats, so that they can be pruned
        resume: continue an interrupted run
        overwrite: replace an existing run folder

    Raises:
        UserError: invalid input, in one line; nothing is written.
    """
    from prunescope.jobs import mcq as job

    return job.run(
        job.McqOptions(
            dense=dense, target=target, questions=questions, template=template, shots=shots, subjects=subjects, stream=stream, limit=limit,
            metric_temperature=metric_temperature, seed=seed, batch_size=batch_size, memory_mb=memory_mb, ladder=ladder, cache=cache,
            spread=SpreadOptions(workers, ray_address), loading=LoadOptions(dtype, device, revision, trust_remote_code, adapter, dequantise), output=OutputOptions(out, overwrite, resume),
        )
    )  # fmt: skip


def divergence(
    dense: Model,
    target: Model,
    *,
    text: str,
    out: str | None = None,
    context: int = 512,
    chunks: int | None = None,
    scale: bool = True,
    stream: bool | Literal["auto"] = "auto",
    ladder: str | None = None,
    metric_temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 4,
    memory_mb: int = 512,
    workers: int = 1,
    ray_address: str | None = None,
    dtype: DType = "auto",
    device: str = "auto",
    revision: str | None = None,
    adapter: str | None = None,
    trust_remote_code: bool = False,
    dequantise: bool = False,
    cache: bool = True,
    resume: bool = False,
    overwrite: bool = False,
) -> DivergenceResult:
    """Compare both models over a text, token by token: llama.cpp's --kl-divergence table, without a file of logits.

    Args:
        dense: the base model
        target: a model with the same vocabulary, a checkpoint, drop:attn=3,5;mlp=7 or quant:int4-g128 on the dense model, or both joined by +
        text: UTF-8 text files, comma-separated; each is a separate slice
        out: run folder to write
        context: tokens of a chunk; the second half of each is scored
        chunks: use only the first N chunks of each file
        scale: also measure the dense model quantised to a ladder of types, and say which two the target lies between
        stream: leave both models on disk and read them a block at a time, with the same numbers; without the scale; auto: if they do not fit into free memory
        ladder: GGUF types of the ladder, comma-separated; default: q8_0 and q6_k to q2_k where libggml-python is installed, else q8_0 to q4_0
        metric_temperature: temperature T of p = softmax(z / T) in the metrics
        seed: seed of the bootstrap over chunks
        batch_size: chunks per batch
        memory_mb: memory that the metrics may use, in MB
        workers: processes that share the chunks, each with both models and a GPU of its own, or its share of the CPU's threads
        ray_address: address of a running Ray cluster, whose workers share the chunks instead; auto finds one, local starts one here
        dtype: auto is the checkpoint's own on an accelerator and float32 on a CPU
        device: a torch device, or gpus to spread the blocks over all of them; auto is cuda if there is one, else cpu
        revision: revision of a Hugging Face id (of the dense model)
        adapter: LoRA adapter to merge into the dense model, a folder or a Hugging Face id
        trust_remote_code: run code that comes with the model
        dequantise: load the packed weights of a quantised checkpoint as dense floats, so that they can be pruned
        cache: keep the ladder's measurements for the next call
        resume: continue an interrupted run
        overwrite: replace an existing run folder

    Raises:
        UserError: invalid input, in one line; nothing is written.
    """
    from prunescope.jobs import divergence as job

    return job.run(
        job.DivergenceOptions(
            dense=dense, target=target, text=text, context=context, chunks=chunks, scale=scale, stream=stream, ladder=ladder,
            metric_temperature=metric_temperature, seed=seed, batch_size=batch_size, memory_mb=memory_mb, cache=cache,
            spread=SpreadOptions(workers, ray_address), loading=LoadOptions(dtype, device, revision, trust_remote_code, adapter, dequantise), output=OutputOptions(out, overwrite, resume),
        )
    )  # fmt: skip


def retrieve(
    dense: Model,
    target: Model,
    *,
    out: str | None = None,
    corpus: str | None = None,
    queries: str | None = None,
    qrels: str | None = None,
    split: str = "test",
    pooling: Literal["mean", "last", "weighted-mean"] = "mean",
    instruction: str | None = None,
    append_eos: bool = False,
    max_length: int = 512,
    depth: int = 1000,
    recall_at: str = "10,100",
    seed: int = 0,
    batch_size: int = 16,
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
) -> RetrieveResult:
    """Search a corpus with the pooled hidden states of both models: nDCG@10, recall, MAP, agreement of the rankings.

    Args:
        dense: the base model, or an embedding model made of one (weights without an output head load too)
        target: a model with the same vocabulary, a checkpoint, drop:attn=3,5;mlp=7 or quant:int4-g128 on the dense model, or both joined by +
        out: run folder to write
        corpus: BEIR folder with corpus.jsonl, queries.jsonl and qrels/, or the corpus file alone; default: the shipped corpus
        queries: queries.jsonl, if not in the corpus folder
        qrels: tab-separated qrels file or a folder of them, if not in the corpus folder
        split: which qrels of the folder to use
        pooling: mean of all tokens, last token (E5-Mistral), or weighted-mean (SGPT, later tokens weigh more)
        instruction: task description; queries are read as Instruct: ... and Query: ... on two lines, passages unchanged
        append_eos: end every text in an end-of-text token, if the tokenizer does not
        max_length: tokens per text, special ones included; the rest is cut
        depth: passages kept per ranking; MAP is computed over them
        recall_at: cut-offs of recall, comma-separated
        seed: seed of the bootstrap
        batch_size: texts per batch
        workers: processes that share the passages, each with both models and a GPU of its own, or its share of the CPU's threads
        ray_address: address of a running Ray cluster, whose workers share the passages instead; auto finds one, local starts one here
        dtype: auto is the checkpoint's own on an accelerator and float32 on a CPU
        device: a torch device, or gpus to spread the blocks over all of them; auto is cuda if there is one, else cpu
        revision: revision of a Hugging Face id (of the dense model)
        adapter: LoRA adapter to merge into the dense model, a folder or a Hugging Face id
        trust_remote_code: run code that comes with the model
        dequantise: load the packed weights of a quantised checkpoint as dense floats, so that they can be pruned
        resume: continue an interrupted run
        overwrite: replace an existing run folder

    Raises:
        UserError: invalid input, in one line; nothing is written.
    """
    from prunescope.jobs import retrieve as job

    return job.run(
        job.RetrieveOptions(
            dense=dense, target=target, corpus=corpus, queries=queries, qrels=qrels, split=split, pooling=pooling,
            instruction=instruction, append_eos=append_eos, max_length=max_length, depth=depth, recall_at=recall_at, seed=seed,
            batch_size=batch_size, spread=SpreadOptions(workers, ray_address), loading=LoadOptions(dtype, device, revision, trust_remote_code, adapter, dequantise),
            output=OutputOptions(out, overwrite, resume),
        )
    )  # fmt: skip
