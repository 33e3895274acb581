"""vLLM by its own Python, until its input is closed: a line of JSON in, a line out. It imports nothing of prunescope, so that vLLM, which asks for an
older transformers, may live in an environment of its own.

Lines: `load` loads a folder and tells its bytes, `write` writes after prompts. The engine runs in this process: nothing but it is timed.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path[:] = [
    place for place in sys.path if Path(place) != Path(__file__).parent
]  # its transformers.py is not the library


class Worker:
    """One folder at a time."""

    engine: Any = None

    def load(self, folder: str, dtype: str, trust: bool, context: int, top: int, eager: bool) -> dict[str, Any]:
        """Bytes of the keys and values of one text of ``context`` tokens, and what class runs the folder."""
        from vllm import LLM

        if self.engine is not None:
            _close(self.engine)
        self.engine = engine = LLM(
            folder, dtype=dtype, trust_remote_code=trust, enforce_eager=eager, max_model_len=context, max_num_seqs=1,
            enable_prefix_caching=False, max_logprobs=max(top, 1), disable_log_stats=False, skip_tokenizer_init=True,
        )  # fmt: skip
        specs = engine.collective_rpc("get_kv_cache_spec")[0]
        settings = engine.llm_engine.vllm_config
        return {
            "cache_bytes": sum(spec.max_memory_usage_bytes(settings) for spec in specs.values()),
            "cache_dtype": str(next((spec.dtype for spec in specs.values()), "")).removeprefix("torch."),
            "attentions": len(specs),
            "architecture": settings.model_config.architecture,
        }

    def write(self, prompts: list[list[int]], steps: int, top: int) -> list[dict[str, Any]]:
        """Greedy tokens after each prompt of token ids, log-probabilities of the first one's candidates, and the engine's own times in seconds."""
        from vllm import SamplingParams

        how = SamplingParams(temperature=0, max_tokens=steps, ignore_eos=True, logprobs=top or None, detokenize=False)
        found = []
        for ids in prompts:
            done = self.engine.generate([{"prompt_token_ids": ids}], how, use_tqdm=False)[0]
            one, times = done.outputs[0], done.metrics
            first = {str(i): value.logprob for i, value in one.logprobs[0].items()} if top else {}
            found.append(
                {
                    "tokens": list(one.token_ids),
                    "first": first,
                    "prefill_s": times.first_token_ts - times.scheduled_ts,
                    "decode_s": times.last_token_ts - times.first_token_ts,
                }
            )
        return found


def _close(engine: Any) -> None:
    import gc

    engine.llm_engine.engine_core.shutdown()
    gc.collect()


def _main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the engine prints goes to the log
    worker = Worker()
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps(getattr(worker, asked.pop("do"))(**asked)), file=answers, flush=True)


if __name__ == "__main__":
    _main()
