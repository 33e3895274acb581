"""`prunescope retrieve` from its options to a finished run."""

from __future__ import annotations

import hashlib
import time
from contextlib import nullcontext
from typing import Any

import numpy as np

from prunescope.commands import RetrieveResult
from prunescope.compare.embedding import Reading, tokens_of
from prunescope.compare.layerwise import run_key
from prunescope.compare.retrieval import (
    SIDES,
    TOP,
    RetrievalRows,
    read_rankings,
    retrieval_rows,
    retrieval_summary,
)
from prunescope.data.beir import Collection, read_collection
from prunescope.errors import UserError
from prunescope.jobs.generate import blaming, check_options, finished, open_pair
from prunescope.models.loaded import LoadedModel
from prunescope.report.figures.retrieval import show_retrieval
from prunescope.runs import folder as results
from prunescope.runs.provenance import describe_target, run_record

__all__ = ["run_retrieve"]

_SHOWN = 300  # characters of a passage in samples.jsonl


def run_retrieve(config: dict[str, Any]) -> RetrieveResult:
    """See `prunescope.retrieve`, whose options ``config`` holds."""
    started = time.monotonic()
    check_options(config)
    recall_at = _cutoffs(config["recall_at"], config["depth"])
    collection = read_collection(config["corpus"], config["queries"], config["qrels"], split=config["split"])
    pair = open_pair(config, headless=True)
    models = [pair.dense, *([pair.target] if isinstance(pair.target, LoadedModel) else [])]
    longest = min(config["max_length"], *(model.context or config["max_length"] for model in models))
    reading = Reading(config["pooling"], config["instruction"], config["append_eos"], longest)
    asked = {name: reading.query(text) for name, text in collection.queries.items()}
    queries, cut_queries = tokens_of(pair.dense, asked, reading, "query")
    passages, cut_passages = tokens_of(pair.dense, collection.passages, reading, "passage")
    digest = _digest(collection, queries, passages)
    settings = (reading, config["batch_size"], config["depth"], recall_at)
    key = run_key(pair.dense, pair.target, [], "retrieve", digest, settings)
    if run := finished(config, key):
        return RetrieveResult(run.info, run.table(), run.samples(), read_rankings(run.folder))
    out = config["out"]
    if out is not None:
        ranked = len(queries) * min(config["depth"], len(passages))
        results.require_space(out, ranked * 2 * 150 + len(passages) * 48 + 2**24)
    folder = (
        results.staged(out, overwrite=config["overwrite"], resume=config["resume"])
        if out is not None
        else nullcontext()
    )
    with folder as staging, blaming(pair):
        found = retrieval_rows(
            pair.dense, pair.target, collection, queries, passages, pooling=reading.pooling, batch_size=config["batch_size"],
            depth=config["depth"], recall_at=recall_at, parts=staging, key=key,
        )  # fmt: skip
        info = {
            **run_record("retrieve", config, pair.dense, describe_target(pair.dense, pair.target), started),
            "key": key,
            "queries": len(queries),
            "passages": len(passages),
            "judged_relevant": sum(map(collection.relevant, collection.queries)),
            "max_length": longest,
            "cut": {"queries": cut_queries, "passages": cut_passages},
            "noise_floor": found.floor,
            **retrieval_summary(found.table, found.moved, config["seed"]),
        }
        result = RetrieveResult(info, found.table, _samples(collection, found), found.rankings)
        if staging is not None:
            result._write(staging)
    show_retrieval(info)
    return result


def _cutoffs(text: str, depth: int) -> tuple[int, ...]:
    try:
        found = tuple(sorted({int(part) for part in str(text).split(",")}))
    except ValueError as error:
        raise UserError(f"--recall-at {text}: write whole numbers with commas between them, as 10,100") from error
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
