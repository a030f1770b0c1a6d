"""Extends stock ``verl.workers.rollout.vllm_rollout.vllm_async_server``: answers come out whole, as token ids, and two
runs on one machine keep apart.

Stock verl lets vLLM return every answer again with each token, turned into text, with an object per log-probability;
verl reads only the ids and numbers of the last output. ``sampling_params["whole_answers"]`` skips that work. It has to
be asked for: stock verl's asynchronous trainers wait for the first output before they interrupt an answer.

Weights reach the processes of vLLM over a socket in /tmp. Stock verl names it by Ray's job id, which every Ray cluster
counts from 1: two runs on one machine, each with its own cluster, read each other's messages and hang.
Goes when: the configuration passes vLLM's ``SamplingParams``, and the socket's name is unique on a machine.
"""

import os
from typing import Any

from vllm.sampling_params import RequestOutputKind

from recipe.gad.run.job_id import unique_job_id
from verl.workers.rollout.replica import TokenOutput
from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMHttpServer as _StockVLLMHttpServer

WHOLE_ANSWERS = {"output_kind": RequestOutputKind.FINAL_ONLY, "detokenize": False, "flat_logprobs": True}
"""vLLM's sampling parameters for one output per answer, without text, with log-probabilities in plain lists."""


class vLLMHttpServer(_StockVLLMHttpServer):
    """Stock server with :data:`WHOLE_ANSWERS` for requests that ask for it; the engine's processes, started later,
    inherit :func:`recipe.gad.run.job_id.unique_job_id`."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        os.environ["VERL_RAY_JOB_ID"] = unique_job_id()

    async def generate(
        self, prompt_ids: list[int], sampling_params: dict[str, Any], request_id: str, **kwargs
    ) -> TokenOutput:
        sampling_params = dict(sampling_params)
        if sampling_params.pop("whole_answers", False):
            sampling_params |= WHOLE_ANSWERS
        return await super().generate(prompt_ids, sampling_params, request_id, **kwargs)
