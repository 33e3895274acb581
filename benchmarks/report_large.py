"""CPU seconds and peak memory of `prunescope report` on a layerwise run folder of a given size.

    python benchmarks/report_large.py RUN [--gb 1]

The rows of RUN are repeated as further prompts, each number off by a random share of a thousandth, until the table has that size on disk.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from sparsify_memory import run


def enlarge(source: Path, out: Path, size: float) -> int:
    """Write the larger run folder; gives its rows."""
    table = pq.read_table(source / "layerwise.parquet")
    info = json.loads((source / "run.json").read_text("utf-8"))
    samples = [json.loads(line) for line in (source / "samples.jsonl").read_text("utf-8").split("\n") if line]
    prompts, copies, generator = len(samples), 0, np.random.default_rng(0)
    out.mkdir()
    path = out / "layerwise.parquet"
    with pq.ParquetWriter(path, table.schema, compression="none", use_dictionary=["sublayer"]) as writer:
        while path.stat().st_size < size:
            columns = {}
            for field in table.schema:
                values = table[field.name]
                if pa.types.is_floating(field.type):
                    values = pa.array(values.to_numpy() * (1 + 1e-3 * generator.random(len(table))), field.type)
                elif field.name == "prompt":
                    values = pa.array(values.to_numpy() + prompts * copies, field.type)
                columns[field.name] = values
            writer.write_table(pa.table(columns, schema=table.schema))
            copies += 1
    info["prompts"] = info["prompts"] * copies
    (out / "run.json").write_text(json.dumps(info), "utf-8")
    (out / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples * copies), "utf-8")
    return copies * len(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run")
    parser.add_argument("--gb", type=float, default=1.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "large"
        rows = enlarge(Path(options.run), folder, options.gb * 1e9)
        before = os.times()
        peak, _ = run(["report", str(folder), "--out", str(Path(place) / "page.html")])
        after = os.times()
        seconds = after.children_user + after.children_system - before.children_user - before.children_system
        page = (Path(place) / "page.html").stat().st_size
        size = (folder / "layerwise.parquet").stat().st_size
        print(f"{size / 1e9:.2f} GB, {rows} rows: {seconds:.1f} s of a core, peak {peak / 1e9:.2f} GB, page {page / 1e6:.1f} MB")  # fmt: skip


if __name__ == "__main__":
    main()
