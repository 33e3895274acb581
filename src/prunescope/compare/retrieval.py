"""Two models search the same corpus: how good each is, how alike their rankings are, how far their embeddings moved.

Passages go by in chunks; of each only the best so far are kept for every query, so that a corpus of any size needs no more memory than
its tokens. Scores are cosines in float64, ties go to the passage that stands first. nDCG, recall and average precision are those of
trec_eval, through pytrec_eval.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from math import nan
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from prunescope.compare.context import Changed, switched
from prunescope.compare.embedding import Pooling, embed
from prunescope.compare.metrics import H_COLUMNS, compare_hidden
from prunescope.data.beir import Collection
from prunescope.errors import UserError
from prunescope.models.loaded import LoadedModel
from prunescope.progress import progress
from prunescope.runs.parts import resume_state, save_state
from prunescope.runs.summary import summarise
from prunescope.runs.workers import Compute, Workers, sharing
from prunescope.stats import mcnemar

__all__ = [
    "Ranking",
    "RetrievalRows",
    "measure",
    "read_rankings",
    "retrieval_rows",
    "retrieval_summary",
    "write_rankings",
]

Ranking = dict[str, list[tuple[str, float]]]  # query id -> (passage id, cosine), best first
SIDES = ("dense", "target")
TOP = 10  # of nDCG and of the overlap
FLOOR_COLUMNS = tuple(name for name in H_COLUMNS if name != "h_cos")
_CHUNK = 1024  # passages between two savings of what was found
_BEST = "part-best.npz"


# --- the best passages of every query ----------------------------------------------------------------------------------


class _Best:
    """The best ``depth`` passages of every query under one model, with the other model's cosine of the same passages."""

    def __init__(self, queries: int, depth: int) -> None:
        self.depth = depth
        self.score = np.empty((queries, 0))
        self.other = np.empty((queries, 0))
        self.passage = np.empty((queries, 0), np.int64)

    def add(self, score: np.ndarray, other: np.ndarray, passages: np.ndarray) -> None:
        """More candidates: cosines ``(queries, passages)`` under this and the other model, numbers ``(passages,)``."""
        score, other = np.concatenate([self.score, score], 1), np.concatenate([self.other, other], 1)
        numbers = np.broadcast_to(passages, (len(score), len(passages)))
        passage = np.concatenate([self.passage, numbers], 1)
        order = np.lexsort((passage, -score))[:, : self.depth]
        self.score, self.other, self.passage = (
            np.take_along_axis(values, order, 1) for values in (score, other, passage)
        )


@dataclass
class _State:
    """What is known after some chunks."""

    best: dict[str, _Best]
    moved: np.ndarray  # (passages, h columns), NaN where a passage has not gone by
    done: int = 0  # chunks

    def save(self, parts: Path) -> None:
        beside = parts / "part-best.tmp"
        arrays = {f"{side}_{name}": getattr(self.best[side], name) for side in SIDES for name in _ARRAYS}
        with beside.open("wb") as file:
            np.savez(file, moved=self.moved, done=self.done, **arrays)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(parts / _BEST)

    def load(self, parts: Path) -> None:
        """Go on from what was saved, if anything whole was."""
        try:
            with (parts / _BEST).open("rb") as file, np.load(file) as saved:
                arrays = {name: saved[name] for name in saved.files}
            for side in SIDES:
                for name in _ARRAYS:
                    setattr(self.best[side], name, arrays[f"{side}_{name}"])
            self.moved, self.done = arrays["moved"], int(arrays["done"])
        except (OSError, ValueError, KeyError, EOFError, BadZipFile):
            return


_ARRAYS = ("score", "other", "passage")


# --- embedding and searching -------------------------------------------------------------------------------------------


@dataclass
class RetrievalRows:
    """What `retrieval_rows` found."""

    table: pa.Table  # a row a query
    rankings: dict[str, Ranking] = field(repr=False)  # of "dense" and "target"
    moved: dict[str, np.ndarray] = field(repr=False)  # h columns of the passages' embeddings
    floor: dict[str, Any] = field(repr=False)


def retrieval_rows(
    dense: LoadedModel,
    target: Changed,
    collection: Collection,
    queries: Sequence[Sequence[int]],
    passages: Sequence[Sequence[int]],
    *,
    pooling: Pooling = "mean",
    batch_size: int = 16,
    depth: int = 1000,
    recall_at: Sequence[int] = (10, 100),
    parts: Path | None = None,
    key: str = "",
    workers: Workers | None = None,
) -> RetrievalRows:
    """Rank the passages for every query under both models and compare.

    Args:
        queries, passages: token ids, in the order of ``collection``.
        depth: passages that a ranking keeps; average precision counts what is in it.
        recall_at: cut-offs of recall, none above ``depth``.
        parts, key: folder for what an interrupted run has found, and what it must have been made from.
        workers: who share the passages, 1,024 at a time, each with both models of its own; None embeds all here.
    Raises:
        UserError: parts of another run, or no pytrec_eval.
        FloatingPointError: an embedding that is not finite.
    """
    other = target if isinstance(target, LoadedModel) else dense
    same_width = dense.anatomy.hidden_size == other.anatomy.hidden_size
    make = partial(_embedder, pooling=pooling, batch_size=batch_size)
    both = make(dense, target)
    names, ids = list(collection.queries), list(collection.passages)
    order = sorted(range(len(passages)), key=lambda i: (-len(passages[i]), i))
    state = _State({side: _Best(len(names), depth) for side in SIDES}, np.full((len(ids), len(H_COLUMNS)), np.nan))
    if resume_state(parts, key) is None:
        save_state(parts, key, [])
    elif parts is not None:
        state.load(parts)
    with progress(f"{len(names)} queries, {len(ids)} passages", 2 * (len(names) + len(ids))) as advance:
        asked = [vectors.to(dense.device) for vectors in map(torch.from_numpy, both(queries))]
        units = [_unit(vectors) for vectors in asked]
        advance(2 * (len(names) + min(state.done * _CHUNK, len(order))))
        chunks = [np.array(order[i : i + _CHUNK]) for i in range(state.done * _CHUNK, len(order), _CHUNK)]
        early: dict[int, Any] = {}  # of the workers' chunks, those whose turn has not come

        def take(chosen: np.ndarray, vectors: Any) -> None:
            found = [torch.from_numpy(np.require(one, requirements="W")).to(dense.device) for one in vectors]
            scores = [(unit @ _unit(one).T).cpu().numpy() for unit, one in zip(units, found, strict=True)]
            for row, name in enumerate(
                names
            ):  # a passage with the query's own id is the query itself (BEIR leaves it out)
                for one in scores:
                    one[row, [ids[i] == name for i in chosen]] = -np.inf
            state.best["dense"].add(scores[0], scores[1], chosen)
            state.best["target"].add(scores[1], scores[0], chosen)
            if same_width:
                columns = compare_hidden(*found)
                state.moved[chosen] = np.stack([columns[name].cpu().numpy() for name in H_COLUMNS], 1)
            state.done += 1
            if parts is not None:
                state.save(parts)
            advance(2 * len(chosen))

        begun = state.done

        def done(place: int, vectors: Any) -> None:
            early[place] = vectors
            while (turn := state.done - begun) in early:
                take(chunks[turn], early.pop(turn))

        sharing(workers, make)([[passages[i] for i in chosen] for chosen in chunks], both, done)
    moved = compare_hidden(*asked) if same_width else {}
    rankings = {side: _ranking(state.best[side], names, ids) for side in SIDES}
    floor = _noise_floor(dense, queries, pooling)
    table = _table(collection, rankings, state.best["dense"], moved, floor, recall_at)
    return RetrievalRows(table, rankings, dict(zip(H_COLUMNS, state.moved.T, strict=True)), floor)


def _embedder(dense: LoadedModel, target: Changed, *, pooling: Pooling, batch_size: int) -> Compute:
    """Token sequences -> the vectors of both models, ``(texts, d)`` each."""

    def both(sequences: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
        ours = embed(dense, sequences, pooling, batch_size)
        with switched(dense, target) as model:
            return ours.cpu().numpy(), embed(model, sequences, pooling, batch_size).cpu().numpy()

    return both


def _unit(vectors: Tensor) -> Tensor:
    return torch.nn.functional.normalize(vectors.double(), dim=-1)


def _ranking(best: _Best, names: Sequence[str], ids: Sequence[str]) -> Ranking:
    return {
        name: [
            (ids[passage], float(score))
            for passage, score in zip(best.passage[row], best.score[row], strict=True)
            if score > -np.inf
        ]
        for row, name in enumerate(names)
    }


def _noise_floor(dense: LoadedModel, queries: Sequence[Sequence[int]], pooling: Pooling) -> dict[str, Any]:
    """The dense model against itself: the two shortest and the two longest queries in a padded batch against each alone."""
    by_length = sorted(queries, key=len)
    few = by_length if len(by_length) < 4 else [*by_length[:2], *by_length[-2:]]
    few = few * 2 if len(few) == 1 else few
    columns = compare_hidden(embed(dense, few, pooling, 1), embed(dense, few, pooling, len(few)))
    return {
        "dtype": str(dense.dtype).removeprefix("torch."),
        "queries": len(few),
        "way": "in a padded batch against alone",
        "floor": {name: columns[name].abs().max().item() for name in FLOOR_COLUMNS},
    }


# --- measures ----------------------------------------------------------------------------------------------------------


def measure(
    qrels: dict[str, dict[str, int]], ranking: Ranking, recall_at: Sequence[int] = (10, 100)
) -> dict[str, dict[str, float]]:
    """Per query ``ndcg_10``, ``ap``, ``rr`` and ``recall_K``, as trec_eval counts them.

    nDCG has the gain ``grade`` (not 2^grade - 1) and the discount log2(rank + 1). trec_eval would sort by score in its own way; it is given
    ranks, so that its order is ours.

    Raises:
        UserError: pytrec_eval is not installed.
    """
    try:
        from pytrec_eval import RelevanceEvaluator
    except ImportError as error:
        raise UserError("retrieve needs pytrec_eval; install it with: pip install pytrec-eval-terrier") from error
    wanted = {f"ndcg_cut.{TOP}", "map", "recip_rank", f"recall.{','.join(map(str, recall_at))}"}
    run = {
        query: {passage: float(len(found) - rank) for rank, (passage, _) in enumerate(found)}
        for query, found in ranking.items()
    }
    scored = RelevanceEvaluator(qrels, wanted).evaluate(run)
    names = {f"ndcg_{TOP}": f"ndcg_cut_{TOP}", "ap": "map", "rr": "recip_rank"}
    names |= {f"recall_{k}": f"recall_{k}" for k in recall_at}
    return {
        # a query that ranks nothing is unknown to trec_eval, and earns nothing
        query: {name: float(scored.get(query, {}).get(theirs, 0.0)) for name, theirs in names.items()}
        for query in ranking
    }


def _table(
    collection: Collection,
    rankings: dict[str, Ranking],
    best: _Best,
    moved: dict[str, Tensor],
    floor: dict[str, Any],
    recall_at: Sequence[int],
) -> pa.Table:
    from scipy.stats import kendalltau

    measured = {side: measure(collection.qrels, rankings[side], recall_at) for side in SIDES}
    rows: list[dict[str, Any]] = []
    for number, name in enumerate(collection.queries):
        row: dict[str, Any] = {"query": number, "id": name, "relevant": collection.relevant(name)}
        for column, value in measured["dense"][name].items():
            theirs = measured["target"][name][column]
            row |= {f"{column}_dense": value, f"{column}_target": theirs, f"{column}_diff": theirs - value}
        tops = [[passage for passage, _ in rankings[side][name][:TOP]] for side in SIDES]
        known = best.score[number] > -np.inf
        constant = known.sum() < 2
        tau = None if constant else kendalltau(best.score[number][known], best.other[number][known]).statistic
        row |= {
            "kendall": None if tau is None or np.isnan(tau) else round(float(tau), 12),
            f"overlap_{TOP}": len(set(tops[0]) & set(tops[1])) / max(1, len(tops[0])),
            "top1_same": float(tops[0][:1] == tops[1][:1]),
        }
        for column in H_COLUMNS:
            row[column] = float(moved[column][number]) if moved else nan
        row["h_under_floor"] = row["h_cos_dev"] <= floor["floor"]["h_cos_dev"]
        rows.append(row)
    ints = {"query": pa.int32(), "relevant": pa.int32(), "id": pa.string(), "h_under_floor": pa.bool_()}
    return pa.Table.from_pylist(rows, pa.schema([(name, ints.get(name, pa.float64())) for name in rows[0]]))


def retrieval_summary(table: pa.Table, moved: dict[str, np.ndarray], seed: int) -> dict[str, Any]:
    """The parts of run.json that say what was found.

    Args:
        table: rows of `retrieval_rows`.
        moved: h columns of the passages.
        seed: of the bootstrap over queries.
    """
    named = table.rename_columns(["prompt" if name == "query" else name for name in table.column_names])
    scores = [name.removesuffix("_diff") for name in table.column_names if name.endswith("_diff")]
    columns = [f"{score}_{side}" for score in scores for side in (*SIDES, "diff")]
    spaces = {"h": H_COLUMNS, "retrieval": [*columns, "kendall", f"overlap_{TOP}", "top1_same"]}
    summary = summarise(named, spaces, seed=seed)
    measures = {}
    for score in scores:
        change = table[f"{score}_diff"].to_numpy()
        better, worse = int((change > 0).sum()), int((change < 0).sum())
        found = {side: summary["retrieval"][f"{score}_{side}"] for side in (*SIDES, "diff")}
        measures[score] = {
            **{side: found[side]["mean"] for side in SIDES},
            **{f"ci95_{side}": found[side]["ci95"] for side in SIDES},
            "diff": found["diff"]["mean"],
            "diff_ci95": found["diff"]["ci95"],
            "better": better,
            "worse": worse,
            "same": len(change) - better - worse,
            "sign_test_p": mcnemar(worse, better),
        }
    known = {name: values[np.isfinite(values)] for name, values in moved.items()}
    return {
        "summary": summary,
        "measures": measures,
        "passages_moved": {
            name: {"mean": float(values.mean()), "median": float(np.median(values)), "max": float(values.max())}
            for name, values in known.items()
            if len(values)
        },
    }


# --- run files ---------------------------------------------------------------------------------------------------------


def write_rankings(folder: Path, rankings: dict[str, Ranking]) -> None:
    """Write ``rankings/dense.run`` and ``rankings/target.run`` in trec_eval's form: query Q0 passage rank score name."""
    (folder / "rankings").mkdir(exist_ok=True)
    for side, ranking in rankings.items():
        with (folder / "rankings" / f"{side}.run").open("w", encoding="utf-8") as file:
            for query, found in ranking.items():
                for rank, (passage, score) in enumerate(found, 1):
                    file.write(f"{query} Q0 {passage} {rank} {score!r} {side}\n")


def read_rankings(folder: Path) -> dict[str, Ranking]:
    """The rankings of a run folder. Raises UserError if they are damaged."""
    rankings: dict[str, Ranking] = {}
    for side in SIDES:
        path = folder / "rankings" / f"{side}.run"
        ranking: Ranking = {}
        try:
            for line in path.read_text("utf-8").splitlines():
                query, _, passage, _, score, _ = line.split()
                ranking.setdefault(query, []).append((passage, float(score)))
        except (OSError, ValueError) as error:
            raise UserError(
                f"{path} cannot be read ({error}); the run folder is damaged, run retrieve again"
            ) from error
        rankings[side] = ranking
    return rankings
