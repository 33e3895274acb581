"""What commands print, as pictures: `make docs-screens`. Runs each of them on the bundled model at a small size and writes
docs/screens/NAME.svg, the terminal at 80 columns."""

from __future__ import annotations

import io
import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text

HERE = Path(__file__).parent
WIDTH, LINES = 80, 44  # columns, and lines of a picture; the middle of what is longer is left out
# In this order: later ones read what earlier ones wrote.
COMMANDS = {
    "drop": "drop smollm2-135m --target attn --n 8 --out smollm2-drop",
    "sparsify": "sparsify smollm2-135m --method wanda --sparsity 0.5 --samples 8 --seq-len 128 --out smollm2-50",
    "export": 'export smollm2-135m --for transformers --drop "attn=3,7" --out smollm2-export',
    "generate": "generate smollm2-135m ./smollm2-drop --prompts prompts.txt --chat --max-new-tokens 12 --out runs/text",
    "divergence": "divergence smollm2-135m ./smollm2-drop --text README.md --context 256 --chunks 2 --out runs/kl",
    "evaluate": "evaluate smollm2-135m ./smollm2-drop --tasks arithmetic-gen,arithmetic-mc --limit 10 --out runs/tasks",
    "sweep": "sweep smollm2-135m --target attn --n 8 --quant int8 --prompts prompts.txt --tasks arithmetic-gen,arithmetic-mc --limit 10 --out runs/sweep",
    "advise": "advise smollm2-135m --sweep runs/sweep --use maths --loss 0.1 --out runs/advice",
    "speed": "speed smollm2-135m ./smollm2-drop --batch-size 1 --length 32 --max-new-tokens 8 --repeats 3 --out runs/speed",
    "retrieve": "retrieve smollm2-135m ./smollm2-drop --out runs/search",
}
PROMPTS = ["Why is the sky blue?", "Name three uses of copper.", "What is 17 + 25?", "Write a line about the sea."]
INK = TerminalTheme(
    (255, 255, 255), (22, 24, 29),
    [(22, 24, 29), (168, 38, 26), (20, 104, 63), (138, 83, 0), (11, 92, 173), (120, 60, 140), (0, 110, 120), (90, 95, 105)],
    [(80, 85, 95), (168, 38, 26), (20, 104, 63), (138, 83, 0), (11, 92, 173), (120, 60, 140), (0, 110, 120), (22, 24, 29)],
)  # fmt: skip


def main(names: list[str]) -> int:
    (HERE / "screens").mkdir(exist_ok=True)
    program = Path(sys.executable).with_name("prunescope")
    folder = Path(os.environ.get("SCREENS") or tempfile.mkdtemp(prefix="prunescope-screens-"))
    (folder / "runs").mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text((HERE.parent / "README.md").read_text("utf-8"), "utf-8")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS), "utf-8")
    for name in names or COMMANDS:
        line = COMMANDS[name]
        environment = os.environ | {"COLUMNS": str(WIDTH), "FORCE_COLOR": "1"}
        done = subprocess.run(
            [program, *shlex.split(line), "--overwrite"], cwd=folder, env=environment, capture_output=True, text=True
        )
        if done.returncode:
            print(done.stderr, file=sys.stderr)
            return done.returncode
        said = [line for line in done.stderr.splitlines() if line.startswith("written: ")]
        (HERE / "screens" / f"{name}.svg").write_text(picture(f"prunescope {line}", done.stdout, said), "utf-8")
        print(f"docs/screens/{name}.svg", flush=True)
    return 0


def picture(command: str, printed: str, said: list[str]) -> str:
    """The terminal as SVG, with no font that a browser would fetch."""
    lines = [f"\x1b[1m$ {command}\x1b[0m", *printed.rstrip().splitlines(), *said]
    if len(lines) > LINES:
        keep = LINES // 2
        lines = [*lines[:keep], f"\x1b[2m... {len(lines) - 2 * keep} lines ...\x1b[0m", *lines[-keep:]]
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True)
    for line in lines:
        console.print(Text.from_ansi(line), soft_wrap=False, overflow="fold")
    form = re.sub(r"@font-face \{\{.*?\}\}\n", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
    form = form.replace("Fira Code, monospace", "'DejaVu Sans Mono', Menlo, Consolas, monospace")
    svg = console.export_svg(title="prunescope", theme=INK, code_format=form, unique_id="screen")
    if "http" in svg.replace("http://www.w3.org/2000/svg", "").replace("https://www.textualize.io", ""):
        raise RuntimeError("the picture would fetch something")
    return svg


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
