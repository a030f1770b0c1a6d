"""Extends stock ``verl.workers.rollout.vllm_rollout.vllm_rollout``: the sending end of the socket for weights has a
name that no other run on the machine uses (why: see vllm_async_server.py, its receiving end), and its waits end.
Goes when: the socket's name is unique on a machine, and the sender notices that the receiver has failed.
"""

import ray

from recipe.gad.run.job_id import unique_job_id
from recipe.gad.run.weight_sender import with_patience
from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import BucketedWeightSender as _StockSender
from verl.workers.rollout.vllm_rollout.vllm_rollout import ServerAdapter as _StockServerAdapter

BucketedWeightSender = with_patience(_StockSender)


class ServerAdapter(_StockServerAdapter):
    """Stock adapter; its socket is named by :func:`recipe.gad.run.job_id.unique_job_id` instead of Ray's job id."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        stock_id = f"-{ray.get_runtime_context().get_job_id()}-"
        if self.zmq_handle.count(stock_id) != 1:
            raise ValueError(
                f"the socket for weights is named {self.zmq_handle!r}, expected {stock_id!r} in it once: another verl "
                "than this project was written for. Fix: compare with the output of python scripts/show_delta.py"
            )
        self.zmq_handle = self.zmq_handle.replace(stock_id, f"-{unique_job_id()}-")
