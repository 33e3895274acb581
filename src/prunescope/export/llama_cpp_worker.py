"""The process that llama.cpp runs in, until its input is closed. Started by `prunescope.export.llama_cpp_engine`, which gets the server's address."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

__all__: list[str] = []


def _server(settings: dict[str, Any]) -> Any:
    import xllamacpp as engine

    options = engine.CommonParams()
    options.model.path = settings["file"]
    options.n_ctx, options.n_parallel, options.warmup = settings["context"], 1, False
    options.verbosity = 4  # the size of the key/value cache is in the log alone
    options.cpuparams.n_threads = options.cpuparams_batch.n_threads = settings["threads"]
    options.cache_type_k = options.cache_type_v = getattr(engine.ggml_type, f"GGML_TYPE_{settings['cache']}")
    if settings["exact"]:  # the fused attention rounds: 0.005 of a log-probability
        options.flash_attn_type = engine.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return engine.Server(options)


def _main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the engine prints goes to the log
    server = _server(json.loads(sys.argv[1]))
    print(server.listening_address, file=answers, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    _main()
