"""Extends stock ``verl.experimental.agent_loop.single_turn_agent_loop``: a seed per sample for the Hugging Face
rollout, whole answers from vLLM, and no reward function for answers that D alone scores.

The Hugging Face replica batches requests as they arrive, so a shared random stream would give every run other samples.
A seed that depends only on step, row and sample makes runs repeatable and resumable.

A trainer that waits for all answers of a step (modes gad and sync) has no use for unfinished ones: see
vllm_async_server.py. This changes stock synchronous runs on vLLM too.

Stock verl sends every answer to a reward process. D's score replaces its result in training rows of GAD, so the loop
returns 0 and skips the round trip.
Goes when: the engines take a seed per sample and parameters from the configuration, and rewards can be switched off.
"""

import zlib
from typing import Any

from verl.experimental.agent_loop.agent_loop import AgentLoopOutput, register
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop as _StockSingleTurnAgentLoop


@register("single_turn_agent")
class SingleTurnAgentLoop(_StockSingleTurnAgentLoop):
    """Stock single-turn loop with a further sampling parameter for the rollout engine (hf: ``seed``, vllm:
    ``whole_answers``), and the reward of rows marked ``scored_by_discriminator`` (see recipe/gad/reward.py)."""

    async def run(self, sampling_params: dict[str, Any], **kwargs) -> AgentLoopOutput:
        if self.rollout_config.name == "hf":
            identity = (
                self.rollout_config.seed,
                int(kwargs["global_steps"]),
                [message["content"] for message in kwargs["raw_prompt"]],
                int(kwargs["index"]),  # the row of the data: a prompt may be in it twice
                int(kwargs["session_id"]),
            )
            sampling_params = {**sampling_params, "seed": zlib.crc32(repr(identity).encode())}
        elif self.rollout_config.name == "vllm" and self.config.trainer.v1.trainer_mode in ("gad", "sync"):
            sampling_params = {**sampling_params, "whole_answers": True}
        output = await super().run(sampling_params, **kwargs)
        if (kwargs.get("extra_info") or {}).get("scored_by_discriminator", False):
            output.reward_score = 0.0
        return output
