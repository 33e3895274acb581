"""Calibration tokens: a text, a Hugging Face data set, text that the dense model samples itself, or traces: what it answers to prompts."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunescope.cache import remembered
from prunescope.data.jsonl import holds_rows, read_rows, read_text
from prunescope.data.traces import padded, write_traces
from prunescope.errors import UserError, first_line
from prunescope.models.generating import Sampling, continue_texts
from prunescope.models.hub import one_try
from prunescope.models.loaded import LoadedModel
from prunescope.progress import console, progress

__all__ = ["SELF", "Calibration", "calibration_tokens", "is_sampled", "perplexity_tokens"]

SELF = "self"
TRACES = "traces"
_HUB: dict[str, tuple[str, dict[str, Any]]] = {  # short name -> (id, keyword arguments of load_dataset)
    "c4": ("allenai/c4", {"data_files": {"train": "en/c4-train.00000-of-01024.json.gz"}}),
    "wikitext2": ("Salesforce/wikitext", {"name": "wikitext-2-raw-v1"}),
}
_DEFAULTS = {"self": (32, 256), "text": (128, 2048)}  # samples, length


@dataclass(frozen=True)
class Calibration:
    """Calibration tokens ``(samples, length)`` int64 on the CPU, and where they come from.

    ``counts`` has their shape and is True where the dense model wrote the token; None where all tokens count. What pads a trace on its right
    does not count, and no token of a causal model sees it.
    """

    tokens: Tensor
    source: str
    seed: int
    counts: Tensor | None = None
    written: dict[str, Any] | None = None  # how traces were written

    def predicting(self) -> Tensor:
        """``(samples, length)`` bool: the places whose logits predict a token that counts. Of a divergence these count."""
        found = torch.zeros(self.tokens.shape, dtype=torch.bool)
        found[:, :-1] = True if self.counts is None else self.counts[:, 1:]
        return found

    def used(self) -> Tensor | None:
        """``(samples, length)`` bool: the places whose states decide what the model writes, None for all: those that predict a counted
        token, and those of counted tokens, which every later token reads. Of scores and Gram matrices these count: a prompt's own
        states are another's words, and there are often more of them."""
        return None if self.counts is None else self.counts | self.predicting()

    def gathered(self) -> Tensor | None:
        """As `used`, and the first place of every sample: of Gram matrices these count. In many models all later tokens attend to the first one,
        whose activations are hundreds of times theirs (Sun et al., arXiv 2402.17762); weights that are fitted without it lose it.
        """
        found = self.used()
        if found is not None:
            found[:, 0] = True
        return found

    def describe(self) -> dict[str, Any]:
        samples, length = self.tokens.shape
        content = self.tokens.numpy().tobytes() + (b"" if self.counts is None else self.counts.numpy().tobytes())
        digest = hashlib.sha256(content).hexdigest()
        return {
            "source": self.source,
            "samples": samples,
            "seq_len": length,
            "seed": self.seed,
            "tokens_sha256": digest,
            **({} if self.written is None else {"traces": self.written}),
        }


def is_sampled(source: str) -> bool:
    """Whether the model itself writes this calibration text: ``self``, or traces."""
    return source == SELF or source.partition(":")[0] == TRACES


def calibration_tokens(
    loaded: LoadedModel,
    source: str = SELF,
    *,
    samples: int | None = None,
    seq_len: int | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    cache: Path | None = None,
    sampler: Callable[[], LoadedModel] | None = None,
) -> Calibration:
    """Tokens to calibrate on.

    Args:
        source: ``self`` (sampled by the model at temperature 1 from its start token, Williams et al. 2024, so that no data set is
            needed), ``traces:FILE`` (what it answers to the prompts of one or several files with commas between them; ``traces`` alone: it
            writes the prompts too), a text, JSON or JSONL file (field ``text``), or a Hugging Face data set (``c4``, ``wikitext2`` or an id
            with a column ``text``).
        samples, seq_len: by default 128 x 2048 from a text and 32 x 256 where the model samples, never past the model's context. Of traces,
            ``seq_len`` is the number of new tokens at most, and a prompt comes on top.
        seed: of the sampling, or of the choice of windows from a text. Windows do not overlap; if a text has fewer than
            asked for, all of them are taken and it is said.
        batch_size: texts that the model writes at a time, by default as many as `texts_at_a_time` says.
        cache: folder in which self-sampled tokens are kept; None keeps none.
        sampler: gives the model that samples, where ``loaded`` cannot run; only called if tokens must be sampled.
    Raises:
        UserError: no such source, or a text shorter than one sample.
    """
    default_samples, default_length = _DEFAULTS["self" if is_sampled(source) else "text"]
    samples = default_samples if samples is None else samples
    traces = is_sampled(source) and source != SELF
    context = loaded.context and (loaded.context // 2 if traces else loaded.context)  # half is left to prompts
    length = min(default_length, context or default_length) if seq_len is None else seq_len
    if samples < 1 or length < 2:
        raise UserError(f"--samples {samples} --seq-len {length}: at least one sample of two tokens is needed")
    if loaded.context and length > loaded.context:
        raise UserError(
            f"--seq-len {length} is longer than the model's context of {loaded.context} tokens; choose at most that"
        )
    if traces:
        files = [name.strip() for name in source.partition(":")[2].split(",") if name.strip()]
        found = write_traces(
            sampler() if sampler else loaded, files, samples=samples, new_tokens=length, seed=seed, batch_size=batch_size, cache=cache
        )  # fmt: skip
        if not any(row.continuation for row in found.rows):
            raise UserError(f"calibration {source}: the model wrote nothing; give other prompts or more --samples")
        tokens, counts = padded([(row.prompt, row.continuation) for row in found.rows])
        return Calibration(tokens, source, seed, counts, found.describe())
    if source == SELF:
        key: dict[str, Any] = {
            "what": "self-sampled tokens 1",
            "model": loaded.identity,
            "dtype": str(loaded.dtype),
            "dropped": str(loaded.dropped),
        }
        key |= {"samples": samples, "length": length, "seed": seed}
        tokens = remembered(
            cache if loaded.pinned else None,
            key,
            lambda: _sample_self(sampler() if sampler else loaded, samples, length, seed, batch_size),
        )
        return Calibration(torch.tensor(tokens), source, seed)
    wanted = samples * length * 2  # some to choose from
    stream = _token_stream(loaded, _texts(source), wanted, source)
    windows = len(stream) // length
    if windows == 0:
        raise UserError(
            f"calibration text {source} has {len(stream)} tokens, shorter than one sample of {length}; give a longer text or --seq-len {len(stream)}"
        )
    if windows < samples:
        console.print(
            f"calibration text {source}: {windows} windows of {length} tokens, fewer than the {samples} asked for; all are used",
            markup=False,
        )
    order = torch.randperm(windows, generator=torch.Generator().manual_seed(seed))[:samples].sort().values
    return Calibration(torch.tensor(stream[: windows * length]).view(windows, length)[order], source, seed)


def perplexity_tokens(
    loaded: LoadedModel, source: str, *, length: int | None = None, windows: int | None = None
) -> Tensor:
    """A text cut into windows that do not overlap, as perplexity is usually measured: ``(windows, length)`` int64.

    The text is tokenised in one piece (rows of JSON are joined by blank lines), with the tokenizer's start token; what does not fill the
    last window is left out.

    Args:
        length: by default 2048 or the model's context, whichever is shorter; a text shorter than that is one window.
        windows: take only the first so many.
    Raises:
        UserError: no such file, or fewer than two tokens.
    """
    path = Path(source).expanduser()
    if not path.is_file():
        raise UserError(f"perplexity file {source}: no such file; give a text, JSON or JSONL file")
    text = "\n\n".join(_file_texts(path, "perplexity"))
    ids = loaded.tokenizer(text, verbose=False)["input_ids"]
    if length is not None and length < 2:
        raise UserError(f"--seq-len {length}: perplexity needs windows of at least two tokens")
    length = min(length or 2048, loaded.context or 2048, len(ids))
    if length < 2:
        raise UserError(f"perplexity file {source} has {len(ids)} tokens; at least two are needed")
    count = min(len(ids) // length, windows or len(ids))
    return torch.tensor(ids[: count * length]).view(count, length)


def _sample_self(loaded: LoadedModel, samples: int, length: int, seed: int, batch_size: int | None) -> list[list[int]]:
    tokenizer = loaded.tokenizer
    start = next(
        (t for t in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) if t is not None), None
    )
    if start is None:
        raise UserError(
            f"{loaded.ref} has no start or end token to sample text from; give a text with --calibration FILE"
        )
    with progress(f"sampling {samples} x {length} calibration tokens from the model", samples) as advance:
        texts = continue_texts(
            loaded,
            [[start]] * samples,
            length - 1,
            batch_size=batch_size,
            sampling=Sampling(1.0, seed=seed),
            stop=False,
            advance=advance,
        )
    return [[start, *text] for text in texts]


def _token_stream(loaded: LoadedModel, texts: Iterator[str], wanted: int, source: str) -> list[int]:
    stream: list[int] = []
    between = [loaded.tokenizer.eos_token_id] if loaded.tokenizer.eos_token_id is not None else []
    for text in texts:
        if text.strip():
            stream += loaded.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] + between
        if len(stream) >= wanted:
            break
    if not stream:
        raise UserError(f"calibration text {source} is empty; give a text with at least one sample")
    return stream


def _texts(source: str) -> Iterator[str]:
    path = Path(source).expanduser()
    if path.is_file():
        yield from _file_texts(path)
        return
    if path.suffix == ".txt" or holds_rows(path) or source.startswith((".", "/", "~")):
        raise UserError(
            f"calibration file {source}: no such file; give a text, JSON or JSONL file, a data set id, or {SELF}"
        )
    yield from _hub_texts(source)


def _file_texts(path: Path, what: str = "calibration") -> Iterator[str]:
    form = "give a text, JSON or JSONL file in UTF-8"
    if not holds_rows(path):
        yield read_text(path, f"{what} file", form)
        return
    for place, row in read_rows(path, f"{what} file", form):
        text = row.get("text") if isinstance(row, dict) else row
        if not isinstance(text, str):
            raise UserError(f"{what} file {place}: no text; JSON rows need a field 'text'")
        yield text


def _hub_texts(name: str) -> Iterator[str]:
    import datasets

    dataset_id, options = _HUB.get(name, (name, {}))
    try:
        with one_try():
            rows: Any = iter(datasets.load_dataset(dataset_id, split="train", streaming=True, **options))
            first = list(islice(rows, 1))
        for row in chain(first, rows):
            if "text" not in row:
                raise UserError(
                    f"calibration data set {name} has no column 'text' but {', '.join(row)}; save its texts as JSONL and give that file"
                )
            yield row["text"]
    except UserError:
        raise
    except Exception as error:  # the hub, the network and the data set's format each have exceptions of their own
        raise UserError(
            f"calibration data set {name} cannot be read: {type(error).__name__}: {first_line(error)}; check the id and the network, or give a file, or {SELF}"
        ) from error
