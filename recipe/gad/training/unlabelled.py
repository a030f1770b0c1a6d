"""``gad.unlabelled_files``: prompts without a teacher answer, for which D's scores alone train the policy."""

import uuid
from collections.abc import Iterator
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf
from tensordict import TensorDict
from torch.utils.data import Dataset
from torchdata.stateful_dataloader import StatefulDataLoader

from recipe.gad.run.config import files_of
from recipe.gad.run.data_file import UNLABELLED
from recipe.gad.run.findings import InputError
from recipe.gad.training.trajectory import TEACHER_IDS, TEACHER_TEXT
from verl.trainer.ppo.utils import create_rl_dataset, create_rl_sampler
from verl.utils import tensordict_utils as tu
from verl.utils.dataset.rl_dataset import collate_fn


class UnlabelledDataset(Dataset):
    """A prompt dataset whose rows have the fields of rows with a teacher answer; the answer is a filler."""

    def __init__(self, prompts: Dataset, eos_token_id: int):
        self.prompts, self.eos_token_id = prompts, eos_token_id

    def __len__(self) -> int:
        return len(self.prompts)  # type: ignore[arg-type]

    def __getitem__(self, item: int) -> dict[str, Any]:
        answer = {TEACHER_TEXT: "", TEACHER_IDS: [self.eos_token_id]}
        reward = {"reward_model": {"style": "teacher", "ground_truth": ""}, "data_source": UNLABELLED}
        return {**self.prompts[item], **answer, **reward}


class UnlabelledPrompts:
    """An endless stream of ``count`` prompts per step; :meth:`load_state_dict` continues where a run has stopped."""

    def __init__(self, config: DictConfig, count: int, tokenizer: Any, processor: Any):
        data = OmegaConf.merge(config.data, {"teacher_key": None})
        files = files_of(config.gad.unlabelled_files)
        prompts = create_rl_dataset(files, data, tokenizer, processor)
        if len(prompts) < count:
            raise InputError(
                f"gad.unlabelled_files has {len(prompts)} prompts of at most data.max_prompt_length="
                f"{data.max_prompt_length} tokens, and a step takes {count}",
                fix="add prompts, or lower gad.unlabelled_ratio",
            )
        dataset = UnlabelledDataset(prompts, tokenizer.eos_token_id)
        self._loader = StatefulDataLoader(
            dataset=dataset,
            batch_size=count,
            num_workers=data.dataloader_num_workers,
            drop_last=True,
            collate_fn=collate_fn,
            sampler=create_rl_sampler(data, dataset),
        )
        self._batches: Iterator[dict] | None = None
        self.state_dict, self.load_state_dict = self._loader.state_dict, self._loader.load_state_dict

    def next(self) -> TensorDict:
        """Prompts of the next step, with a fresh uid each."""
        batch = next(self._batches, None) if self._batches is not None else None
        if batch is None:  # the first step, or the end of an epoch
            self._batches = iter(self._loader)
            batch = next(self._batches)
        batch["uid"] = np.array([str(uuid.uuid4()) for _ in batch["raw_prompt"]], dtype=object)
        return tu.get_tensordict(batch)


def join(labelled: TensorDict, unlabelled: TensorDict) -> TensorDict:
    """One batch of both, the labelled rows first, with the fields that both have."""
    fields = [key for key in labelled.keys() if key in unlabelled.keys()]
    return tu.concat_tensordict([labelled.select(*fields), unlabelled.select(*fields)])
