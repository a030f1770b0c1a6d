"""The discriminator's worker: ``gad.discriminator_ema`` (an average of its weights, which scores), LoRA, and
``gad.fresh_discriminator`` (others that are trained anew in validation)."""

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict
from torch.distributed.tensor import DTensor

from recipe.gad.run.two_sample import TwoSampleSettings
from recipe.gad.training import fresh
from recipe.gad.training.lora import add_adapters
from verl.single_controller.base.decorator import Dispatch, make_nd_compute_dataproto_dispatch_fn, register
from verl.utils.device import get_torch_device
from verl.workers.engine_workers import TrainingWorker

logger = logging.getLogger(__name__)


class DiscriminatorWorker(TrainingWorker):
    """The stock worker. After :meth:`start_average` it averages the weights of every optimizer step (FSDP2 only).

    With ``critic.model.lora_rank`` it builds adapters that fit a discriminator.
    average <- decay * average + (1 - decay) * weights. Every rank averages its own shards, in float32.
    """

    def __init__(self, config: Any):
        super().__init__(config)
        if self.model_config.lora_rank > 0:  # stock's adapters have the task of a language model
            seed = self.engine_config.seed
            self.engine._build_lora_module = partial(add_adapters, settings=self.model_config, seed=seed)
        self._decay = 0.0
        self._average: list[torch.Tensor] = []  # in the order of _shards; empty: there is no average
        self._own: list[torch.Tensor] = []  # D's own weights while the average is in their place

    def _shards(self) -> list[torch.Tensor]:
        """This rank's shards of the trained parameters; writing to them changes the model."""
        self.engine.module.reshard()  # after a forward pass the root keeps its whole parameters
        get_torch_device().synchronize()  # verl offloads without waiting for the copies
        trained = (parameter.detach() for parameter in self.engine.module.parameters() if parameter.requires_grad)
        return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in trained]

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def start_average(self, decay: float) -> None:
        """Average from now on, beginning with the weights of now; ``decay`` in (0, 1)."""
        self._decay = decay
        self._average = [shard.to(torch.float32, copy=True) for shard in self._shards()]

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def use_average(self, on: bool) -> None:
        """Put the average in the place of D's own weights, or those back, bit for bit. Do not train in between."""
        shards = self._shards()
        if on:
            self._own = [shard.clone() for shard in shards]
        for shard, source in zip(shards, self._average if on else self._own, strict=True):
            shard.copy_(source)
        if not on:
            self._own = []

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn(mesh_name="train"), blocking=False)
    def train_batch(self, data: TensorDict) -> TensorDict:
        """Stock: one optimizer step; and one of the average."""
        output = super().train_batch(data)
        if self._average:
            for average, shard in zip(self._average, self._shards(), strict=True):
                average.lerp_(shard.to(average), 1.0 - self._decay)
        return output

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def fresh_accuracies(self, pairs: Sequence[fresh.Pair], settings: TwoSampleSettings) -> list[float]:
        """Accuracies of fresh discriminators, one for each of this rank's share of the seeds; D stays as it is."""
        return fresh.accuracies(pairs, settings, settings.seeds[self.rank :: self.world_size])

    def _average_file(self, folder: str) -> Path:
        return Path(folder) / f"average_world_size_{self.world_size}_rank_{self.rank}.pt"

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def save_checkpoint(self, local_path, hdfs_path=None, global_step=0, max_ckpt_to_keep=None):
        """Stock, and the average beside the shards of D."""
        super().save_checkpoint(local_path, hdfs_path, global_step, max_ckpt_to_keep)
        if self._average:
            torch.save(self._average, self._average_file(local_path))

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def load_checkpoint(self, local_path, hdfs_path=None, del_local_after_load=False):
        """Stock, and the average. Without a saved one, it begins with the loaded weights."""
        file = self._average_file(local_path)
        saved = torch.load(file, weights_only=True) if self._average and file.is_file() else []
        super().load_checkpoint(local_path, hdfs_path, del_local_after_load)
        if not self._average:
            return
        if not saved:
            logger.warning("no %s: the average of D's weights begins with the loaded weights", file)
        for average, source in zip(self._average, saved or self._shards(), strict=True):
            average.copy_(source)
