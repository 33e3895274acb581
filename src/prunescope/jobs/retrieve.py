"""`prunescope retrieve`: search with the pooled hidden states of both models."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from prunescope.compare.context import run_key
from prunescope.compare.embedding import Pooling, Reading, tokens_of
from prunescope.compare.retrieval import SIDES, TOP, RetrievalRows, retrieval_rows, retrieval_summary
from prunescope.data.beir import Collection, read_collection
from prunescope.errors import UserError
from prunescope.jobs.options import LoadOptions, Model, Options, OutputOptions, SpreadOptions
from prunescope.jobs.pair import Pair, load_pair
from prunescope.report.terminal.comparing import show_retrieval
from prunescope.results import RetrieveResult
from prunescope.runs.provenance import run_record

__all__ = ["RetrieveOptions", "run"]

_SHOWN = 300  # characters of a passage in samples.jsonl


@dataclass(frozen=True)
class RetrieveOptions(Options):
    """See `prunescope.retrieve`."""

    dense: Model
    target: Model
    corpus: str | None
    queries: str | None
    qrels: str | None
    split: str
    pooling: Pooling
    instruction: str | None
    append_eos: bool
    max_length: int
    depth: int
    recall_at: str
    seed: int
    batch_size: int
    spread: SpreadOptions
    loading: LoadOptions
    output: OutputOptions


def run(options: RetrieveOptions) -> RetrieveResult:
    started = time.monotonic()
    options.check()
    recall_at = _cutoffs(options.recall_at, options.depth)
    collection = read_collection(options.corpus, options.queries, options.qrels, split=options.split)
    pair = Pair.load(options.dense, options.target, options.loading, headless=True)
    longest = min(options.max_length, *(model.context or options.max_length for model in pair.models))
    reading = Reading(options.pooling, options.instruction, options.append_eos, longest)
    asked = {name: reading.query(text) for name, text in collection.queries.items()}
    queries, cut_queries = tokens_of(pair.dense, asked, reading, "query")
    passages, cut_passages = tokens_of(pair.dense, collection.passages, reading, "passage")
    digest = _digest(collection, queries, passages)
    settings = (reading, options.batch_size, options.depth, recall_at)
    key = run_key(pair.dense, pair.target, [], "retrieve", digest, settings)
    if done := options.output.complete(key):
        options.output.say_complete()
        return RetrieveResult.of_run(done)
    ranked = len(queries) * min(options.depth, len(passages))
    options.output.require_space(ranked * 2 * 150 + len(passages) * 48 + 2**24)
    with (
        options.output.staged() as staging,
        pair.blaming(),
        options.spread.started(
            load_pair, [options.dense, options.target], options.loading, pair.dense, headless=True
        ) as workers,
    ):
        found = retrieval_rows(
            pair.dense, pair.pruned, collection, queries, passages, pooling=reading.pooling, batch_size=options.batch_size,
            depth=options.depth, recall_at=recall_at, parts=staging, key=key, workers=workers,
        )  # fmt: skip
        info = {
            **run_record("retrieve", options.config(), pair.dense.device, pair.describe(), started),
            "key": key,
            "queries": len(queries),
            "passages": len(passages),
            "judged_relevant": sum(map(collection.relevant, collection.queries)),
            "max_length": longest,
            "cut": {"queries": cut_queries, "passages": cut_passages},
            "noise_floor": found.floor,
            **retrieval_summary(found.table, found.moved, options.seed),
        }
        result = RetrieveResult(info, found.table, _samples(collection, found), found.rankings)
        if staging is not None:
            result.write(staging)
    show_retrieval(info)
    options.output.say_written()
    return result


def _cutoffs(text: str, depth: int) -> tuple[int, ...]:
    try:
        found = tuple(sorted({int(part) for part in str(text).split(",")}))
    except ValueError as error:
        raise UserError(f"--recall-at {text}: write comma-separated whole numbers, such as 10,100") from error
    if found[0] < 1 or found[-1] > depth:
        raise UserError(f"--recall-at {text}: cut-offs go from 1 to --depth, {depth}")
    return found


def _digest(collection: Collection, *tokens: list[list[int]]) -> str:
    """A hash of ids, judgements and tokens."""
    digest = hashlib.sha256(repr((list(collection.queries), collection.qrels)).encode())
    for name in collection.passages:
        digest.update(f"{name}\n".encode("utf-8", "surrogatepass"))
    for sequences in tokens:
        for sequence in sequences:
            digest.update(np.array([len(sequence), *sequence], np.int64).tobytes())
    return digest.hexdigest()


def _samples(collection: Collection, found: RetrievalRows) -> list[dict[str, Any]]:
    """What `samples.jsonl` holds of a query: what was judged, and the first ten of both models."""
    rows = []
    for number, (name, text) in enumerate(collection.queries.items()):
        tops = {side: [passage for passage, _ in found.rankings[side][name][:TOP]] for side in SIDES}
        shown = dict.fromkeys([*tops["dense"], *tops["target"], *collection.qrels[name]])
        rows.append(
            {
                "query": number,
                "id": name,
                "text": text,
                "judged": collection.qrels[name],
                **{f"top_{side}": tops[side] for side in SIDES},
                "passages": {passage: collection.passages[passage][:_SHOWN] for passage in shown},
            }
        )
    return rows
