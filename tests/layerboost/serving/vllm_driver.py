"""Runs under vLLM's own python: loads checkpoints one after the other, generates, and reports what vLLM kept.

    python vllm_driver.py JOBS.json RESULTS.json

Each job is {"model", "prompts", "new_tokens", "engine"}, and "abort" if requests are to be aborted in mid-stream.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # keeps the scheduler here, where its blocks are counted

import torch
from vllm import LLM, SamplingParams


def run(job: dict) -> dict:
    engine = {"dtype": "float32", "enforce_eager": True, "skip_tokenizer_init": True} | job["engine"]
    try:
        llm = LLM(job["model"], **engine)
    except Exception as error:  # the tests check the message that a user would read
        return {"error": f"{type(error).__name__}: {error}"}
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    pool = scheduler.kv_cache_manager.block_pool
    groups = scheduler.kv_cache_config.kv_cache_groups
    result = {
        "n_blocks": scheduler.kv_cache_config.num_blocks,
        "block_tokens": [group.kv_cache_spec.block_size for group in groups],
        "page_bytes": [group.kv_cache_spec.page_size_bytes for group in groups],
        "group_layers": [group.layer_names for group in groups],
        "free_blocks_before": pool.get_num_free_blocks(),
    }
    sampling = SamplingParams(
        temperature=0, max_tokens=job["new_tokens"], ignore_eos=True, logprobs=1, detokenize=False
    )
    if "abort" in job:
        result |= run_and_abort(llm.llm_engine, pool, sampling, job)
    else:
        prompts = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]
        outputs = [output.outputs[0] for output in llm.generate(prompts, sampling, use_tqdm=False)]
        result["tokens"] = [list(output.token_ids) for output in outputs]
        result["logprobs"] = [
            [choices[token].logprob for choices, token in zip(output.logprobs, output.token_ids, strict=True)]
            for output in outputs
        ]
    result["free_blocks_after"] = pool.get_num_free_blocks()
    return result


def run_and_abort(engine, pool, sampling: SamplingParams, job: dict) -> dict:
    """Adds all requests at once, and aborts those in job["abort"] after every request has got a token."""
    for number, prompt in enumerate(job["prompts"]):
        engine.add_request(str(number), {"prompt_token_ids": prompt}, sampling)
    started, finished, result = set(), {}, {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            started.add(output.request_id)
            if output.finished:
                finished[output.request_id] = list(output.outputs[0].token_ids)
        if "free_blocks_aborted" not in result and len(started) == len(job["prompts"]):
            result["free_blocks_running"] = pool.get_num_free_blocks()
            engine.abort_request([str(number) for number in job["abort"]])
            result["free_blocks_aborted"] = pool.get_num_free_blocks()
    return result | {"finished": finished}


def main() -> None:
    jobs, results = (Path(argument) for argument in sys.argv[1:])
    torch.set_num_threads(1)
    results.write_text(json.dumps([run(job) for job in json.loads(jobs.read_text())]))


if __name__ == "__main__":
    main()
