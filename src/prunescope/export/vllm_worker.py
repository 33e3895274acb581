"""vLLM by its own Python: folder and prompts in as JSON, greedy tokens and log-probabilities out. It imports nothing of prunescope, so that vLLM,
which asks for an older transformers, may live in an environment of its own."""

import json
import os
import sys
from pathlib import Path

sys.path[:] = [
    place for place in sys.path if Path(place) != Path(__file__).parent
]  # its transformers.py is not the library


def _main() -> None:
    asked = json.loads(sys.stdin.read())
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the engine prints goes to the log
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found,unused-ignore]

    engine = LLM(
        asked["folder"], dtype=asked["dtype"], trust_remote_code=asked["trust"], enforce_eager=True, max_model_len=asked["context"],
        max_num_seqs=1, enable_prefix_caching=False, max_logprobs=asked["top"],
    )  # fmt: skip
    how = SamplingParams(temperature=0, max_tokens=asked["steps"], ignore_eos=True, logprobs=asked["top"], detokenize=False)  # fmt: skip
    found = []
    for ids in asked["prompts"]:
        one = engine.generate([{"prompt_token_ids": ids}], how)[0].outputs[0]
        first = {str(i): value.logprob for i, value in one.logprobs[0].items()}
        found.append({"tokens": list(one.token_ids), "first": first})
    print(json.dumps(found), file=answers, flush=True)


if __name__ == "__main__":
    _main()
