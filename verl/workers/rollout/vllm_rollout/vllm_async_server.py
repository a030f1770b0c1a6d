"""Extends stock ``verl.workers.rollout.vllm_rollout.vllm_async_server``: two runs on one machine keep apart.

Weights reach the processes of vLLM over a socket in /tmp. Stock verl names it by Ray's job id, which every Ray cluster
counts from 1: two runs on one machine, each with a cluster of its own, read each other's messages and hang.
"""

import os

from recipe.gad.cluster import unique_job_id
from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMHttpServer as _StockVLLMHttpServer


class vLLMHttpServer(_StockVLLMHttpServer):
    """Stock server; its engine's processes, started later, inherit :func:`recipe.gad.cluster.unique_job_id`."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        os.environ["VERL_RAY_JOB_ID"] = unique_job_id()
