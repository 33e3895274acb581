"""Commands run in forked children that are killed: imported once, so that a moment costs what the command costs.

A process of its own, `python killing.py SOURCE`, since a process with threads cannot be forked safely. It reads a JSON line {"argv", "after"},
runs the command in a child, kills that ``after`` seconds from its start (null: never), and answers {"code", "seconds", "said"}; a killed child
has the code -9. With "unchecked" the child does not look at the free space first, so that a small disk fills while it writes. Figures are not drawn: they would take most of the time, and each is written as everything else is.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import pkgutil
import signal
import sys
import tempfile
import time


def serve() -> None:
    import torch

    torch.set_num_threads(1)
    import pyarrow as pa

    import prunescope.jobs
    from prunescope.cli import main
    from prunescope.runs.result import RunResult

    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    for module in pkgutil.iter_modules(prunescope.jobs.__path__):
        importlib.import_module(f"prunescope.jobs.{module.name}")
    RunResult.draw = lambda self, draw, folder: None  # type: ignore[method-assign]
    for line in sys.stdin:
        asked = json.loads(line)
        with tempfile.TemporaryFile("w+") as said:
            started = time.monotonic()
            child = os.fork()
            if child == 0:
                os.dup2(said.fileno(), 1)
                os.dup2(said.fileno(), 2)
                code = 1
                if asked["unchecked"]:
                    for module in [module for name, module in sys.modules.items() if name.startswith("prunescope")]:
                        if hasattr(module, "require_space"):
                            module.require_space = lambda *_: None
                with contextlib.suppress(BaseException):
                    code = main(asked["argv"])
                os._exit(code)
            if asked["after"] is not None:
                time.sleep(max(0.0, asked["after"] - (time.monotonic() - started)))
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            seconds = time.monotonic() - started
            said.seek(0)
            answer = {"code": os.waitstatus_to_exitcode(status), "seconds": seconds, "said": said.read()[-2000:]}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve()
