"""Rollout with Hugging Face ``generate`` for machines without a GPU (``rollout.name=hf``).

It implements verl's replica interface, like vLLM and SGLang. Each replica has one server actor, which answers requests
of token ids with token ids, batches requests that arrive together, and gets new weights through Ray's object store
after every step. It runs on one node with tensor parallel size 1 and merged LoRA, and cannot abort a request.

With ``rollout.dtype=float64``, a sample depends only on its seed: the other requests in a batch change the numbers by
too little to change what is sampled.
"""

import asyncio
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from recipe.gad.run.findings import InputError
from recipe.gad.training.trajectory import stop_token_ids
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.config import HFModelConfig, RolloutConfig
from verl.workers.engine.fsdp.utils import unfuse_moe_params
from verl.workers.rollout.base import BaseRollout
from verl.workers.rollout.replica import RolloutReplica, TokenOutput

__all__ = ["HFReplica", "HFServer", "SeededSampling", "ServerAdapter"]


def _server_name(replica_rank: int) -> str:
    return f"hf_server_{replica_rank}"


class SeededSampling(LogitsProcessor):
    """Makes greedy search sample, with one random stream per row, and records the log-probabilities.

    argmax(log p + Gumbel noise) is distributed as p (Gumbel-max trick), so a row's sample depends on its own seed and
    not on the other rows.

    Args:
        seeds: one per row; None decodes greedily.
        vocab_size: ids from here on (padding of the embedding) are never chosen.
        warpers: temperature, top-k and top-p, applied after that.
    """

    def __init__(self, seeds: list[int] | None, vocab_size: int, warpers: Sequence[LogitsProcessor] = ()):
        self.generators = None if seeds is None else [torch.Generator().manual_seed(seed) for seed in seeds]
        self.vocab_size = vocab_size
        self.warpers = warpers
        self.log_probs: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Map scores (B, V) to scores whose argmax is the sample; append the samples' log-probabilities (B,)."""
        scores[:, self.vocab_size :] = -torch.inf
        for warper in self.warpers:
            scores = warper(input_ids, scores)
        log_probs = scores.log_softmax(dim=-1)
        noisy = log_probs
        if self.generators is not None:
            noise = torch.stack(
                [
                    torch.empty_like(row).exponential_(generator=g)
                    for row, g in zip(log_probs, self.generators, strict=True)
                ]
            )
            noisy = log_probs - noise.log()
        self.log_probs.append(log_probs.gather(-1, noisy.argmax(dim=-1, keepdim=True)).squeeze(-1))
        return noisy


@dataclass
class _Request:
    prompt_ids: list[int]
    seed: int
    settings: tuple[float, int, float, int]  # temperature, top_k, top_p, max_new_tokens; equal in a batch
    future: asyncio.Future = field(repr=False)


class HFServer:
    """Actor with one model: pads concurrent requests on the left and runs ``generate`` on the batch.

    Args:
        config: rollout configuration.
        model_config: model configuration (path, tokenizer, trust_remote_code).
    """

    BATCH_WINDOW = 0.02
    """A batch starts after this many seconds without a new request."""

    def __init__(self, config: RolloutConfig, model_config: HFModelConfig):
        self.config: RolloutConfig = omega_conf_to_dataclass(config)
        self.model_config: HFModelConfig = omega_conf_to_dataclass(model_config, dataclass_type=HFModelConfig)
        self.tokenizer = self.model_config.tokenizer
        self.model = AutoModelForCausalLM.from_pretrained(
            self.model_config.local_path,
            dtype=getattr(torch, self.config.dtype),
            attn_implementation="sdpa",
            experts_implementation="eager",  # grouped matrix products take no float64
            trust_remote_code=self.model_config.trust_remote_code,
        ).eval()
        # the folder's defaults (repetition penalty, minimum length, ...) would change the policy
        self.model.generation_config = GenerationConfig()
        self.vocab_size = max(self.tokenizer.get_vocab().values()) + 1
        self.stop_ids = sorted(stop_token_ids(self.tokenizer))
        self.global_steps: int | None = None
        self._queue: asyncio.Queue[_Request] = asyncio.Queue()
        self._loop_task: asyncio.Task | None = None

    # ------------------------------------------------------------------ requests

    async def generate(
        self, prompt_ids: list[int], sampling_params: dict[str, Any], request_id: str, **media: Any
    ) -> TokenOutput:
        """Sample one answer.

        Args:
            prompt_ids: token ids of the prompt.
            sampling_params: temperature, top_k, top_p, and optionally max_tokens and seed.
            request_id: unused.
            media: image, video or audio data, which must be None.

        Raises:
            ValueError: the request has media.
        """
        if any(value is not None for value in media.values()):
            raise InputError("rollout.name=hf serves text only", fix="use vllm or sglang for images, video and audio")
        budget = self.config.prompt_length + self.config.response_length - len(prompt_ids)
        max_tokens = int(sampling_params.get("max_tokens") or min(self.config.response_length, budget))
        settings = (
            float(sampling_params.get("temperature", 1.0)),
            int(sampling_params.get("top_k", -1)),
            float(sampling_params.get("top_p", 1.0)),
            max(max_tokens, 1),
        )
        if self._loop_task is None:
            self._loop_task = asyncio.create_task(self._serve())
        seed = int(sampling_params.get("seed", random.getrandbits(63)))
        request = _Request(list(prompt_ids), seed, settings, asyncio.get_running_loop().create_future())
        await self._queue.put(request)
        return await request.future

    async def _serve(self) -> None:
        while True:
            waiting = [await self._queue.get()]
            while True:
                try:
                    waiting.append(await asyncio.wait_for(self._queue.get(), timeout=self.BATCH_WINDOW))
                except asyncio.TimeoutError:
                    break
            by_settings: dict[tuple, list[_Request]] = {}
            for request in waiting:
                by_settings.setdefault(request.settings, []).append(request)
            for requests in by_settings.values():
                for start in range(0, len(requests), self.config.max_num_seqs):
                    await self._run(requests[start : start + self.config.max_num_seqs])

    async def _run(self, requests: list[_Request]) -> None:
        try:
            outputs = await asyncio.to_thread(self._generate, requests)
        except Exception as error:  # the server must survive a bad batch: every caller gets the error
            for request in requests:
                if not request.future.done():
                    request.future.set_exception(error)
            return
        for request, output in zip(requests, outputs, strict=True):
            if not request.future.done():  # the caller may have gone
                request.future.set_result(output)

    @torch.inference_mode()
    def _generate(self, requests: list[_Request]) -> list[TokenOutput]:
        temperature, top_k, top_p, max_tokens = requests[0].settings
        width = max(len(request.prompt_ids) for request in requests)
        pad_id = self.tokenizer.pad_token_id
        input_ids = torch.full((len(requests), width), pad_id)
        attention_mask = torch.zeros_like(input_ids)
        for row, request in enumerate(requests):
            input_ids[row, width - len(request.prompt_ids) :] = torch.tensor(request.prompt_ids)
            attention_mask[row, width - len(request.prompt_ids) :] = 1
        greedy = temperature == 0
        warpers: list[LogitsProcessor] = []
        if not greedy and temperature != 1.0:
            warpers.append(TemperatureLogitsWarper(temperature))
        if not greedy and top_k > 0:
            warpers.append(TopKLogitsWarper(top_k))
        if not greedy and top_p < 1.0:
            warpers.append(TopPLogitsWarper(top_p))
        seeds = None if greedy else [request.seed for request in requests]
        sampling = SeededSampling(seeds, self.vocab_size, warpers)
        sequences = self.model.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            logits_processor=LogitsProcessorList([sampling]),
            do_sample=False,
            max_new_tokens=max_tokens,
            eos_token_id=None if self.config.ignore_eos else self.stop_ids,
            pad_token_id=pad_id,
        )[:, width:]
        log_probs = torch.stack(sampling.log_probs, dim=-1)
        return [self._output(ids, row) for ids, row in zip(sequences.tolist(), log_probs.tolist(), strict=True)]

    def _output(self, ids: list[int], log_probs: list[float]) -> TokenOutput:
        """Cut a padded row after its first stop token."""
        length = len(ids)
        if not self.config.ignore_eos:
            length = next((i + 1 for i, token in enumerate(ids) if token in self.stop_ids), length)
        return TokenOutput(
            token_ids=ids[:length],
            log_probs=log_probs[:length],
            stop_reason="completed",
            extra_fields={"global_steps": self.global_steps},
        )

    # ------------------------------------------------------------------ weights and life cycle

    async def update_weights(self, weights: dict[str, torch.Tensor], global_steps: int | None) -> None:
        """Load the policy's weights, by name.

        transformers fuses the experts of a layer into one weight. verl's sender splits such a weight
        (``unfuse_moe_params``), so both sides are split here; a part shares memory with the weight.

        Raises:
            ValueError: a weight is missing or has another shape, or a name is unknown.
        """
        model_type = self.model.config.model_type
        own = dict(unfuse_moe_params(self.model.state_dict().items(), model_type))
        sent = dict(unfuse_moe_params(weights.items(), model_type))
        unknown = [name for name in sent if name not in own]
        given = {own[name].data_ptr() for name in sent if name in own}  # tied weights arrive under one name
        missing = [name for name in own if own[name].data_ptr() not in given]
        resized = [name for name, tensor in sent.items() if name in own and own[name].shape != tensor.shape]
        if missing or unknown or resized:
            raise InputError(
                f"weights do not fit the rollout model: missing {missing[:5]}, unknown {unknown[:5]}, of another shape "
                f"{resized[:5]}",
                fix="with LoRA, rollout.name=hf needs actor_rollout_ref.model.lora.merge=True",
            )
        for name, tensor in sent.items():
            own[name].copy_(tensor)
        self.global_steps = global_steps

    async def address(self) -> str:
        """Node address, for the log."""
        return ray.util.get_node_ip_address()

    async def _nothing(self, *args, **kwargs) -> None:
        """Do nothing: the model stays in main memory, and there is nothing to profile."""

    wake_up = sleep = abort_all_requests = resume_generation = _nothing
    clear_kv_cache = release_kv_cache = resume_kv_cache = start_profile = stop_profile = _nothing


class HFReplica(RolloutReplica):
    """Starts one :class:`HFServer` actor next to the training workers (hybrid mode)."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.server_class = ray.remote(HFServer)

    async def launch_servers(self):
        if self.world_size != 1:
            raise InputError(
                f"rollout.name=hf runs in one process per replica, but tensor x data x pipeline parallel size is "
                f"{self.world_size}",
                fix="set actor_rollout_ref.rollout.tensor_model_parallel_size=1",
            )
        options = {"name": _server_name(self.replica_rank), "max_concurrency": self.max_concurrency, "num_cpus": 0}
        server = self.server_class.options(**options).remote(self.config, self.model_config)
        self.servers = [server]
        self._server_handle = server
        self._server_address = await server.address.remote()


class ServerAdapter(BaseRollout):
    """Trainer's side of the replica: sends the policy's weights to the server after every step."""

    def __init__(self, config, model_config, device_mesh, replica_rank: int = -1):
        super().__init__(config, model_config, device_mesh)
        self.replica_rank = int(os.environ["RANK"]) if replica_rank == -1 else replica_rank
        self._server: ray.actor.ActorHandle | None = None

    async def resume(self, tags: list[str]) -> None:
        """Nothing to resume: see :class:`HFServer`."""

    async def release(self) -> None:
        """Nothing to release: see :class:`HFServer`."""

    @torch.no_grad()
    async def update_weights(self, weights, global_steps: int | None = None, wire_format="named_tensors", **kwargs):
        """Send full tensors. Every rank must iterate over ``weights``, because gathering shards is collective."""
        if wire_format != "named_tensors":
            raise ValueError(f"rollout.name=hf takes full weights only, got wire_format={wire_format!r}")
        state = {name: tensor.detach().to("cpu", copy=True) for name, tensor in weights}
        if self._server is None:
            self._server = ray.get_actor(_server_name(self.replica_rank))
        await self._server.update_weights.remote(state, global_steps)
