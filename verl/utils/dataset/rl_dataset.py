"""Extends stock ``verl.utils.dataset.rl_dataset``: ``RLHFDataset`` loads the teacher's answer beside the prompt.

The answer has to be read, checked, tokenized and cut once, with the prompts. Active when ``data.teacher_key`` names a
column (recipe/gad/config/gad_trainer.yaml does); without the key the class is the stock one, row for row.
Goes when: ``data.custom_cls`` is enough for the users of this project.
"""

import datasets
import torch

from recipe.gad.run.data_file import NO_SOURCE, check_data_file, find_teacher
from recipe.gad.training import trajectory as teacher
from recipe.gad.training.answers import ANSWERS, answer_columns, answers_of_rows, has_several
from recipe.gad.training.trajectory import TEACHER_IDS, TEACHER_TEXT
from verl.utils.dataset.rl_dataset import RLHFDataset as _StockRLHFDataset

__all__ = ["RLHFDataset"]

LENGTH = "teacher_response_length"  # uncut; a column while answers are tokenized


class RLHFDataset(_StockRLHFDataset):
    """Stock dataset plus, in every row, ``teacher_response`` (text) and ``teacher_response_ids`` (token ids): of the
    first answer, if rows have several (recipe/gad/training/answers.py).

    The ids end the way a rollout ends: with the end-of-turn token, unless cut at ``data.max_response_length``, which
    follows ``data.truncation`` (error | left | right). Rows without reward data get the teacher's text as
    ``reward_model.ground_truth``, which validation compares with.

    Raises:
        ValueError: a row has no usable teacher answer or prompt (file and row are named), or an answer is too long and
            ``data.truncation`` is "error".
    """

    def _read_files_and_tokenize(self):
        self.teacher_key = self.config.get("teacher_key", None)
        if self.teacher_key is not None:
            for path in self.data_files:
                check_data_file(path, prompt_key=self.prompt_key, teacher_key=self.teacher_key)
        super()._read_files_and_tokenize()

    def maybe_filter_out_long_prompts(self, dataframe: datasets.Dataset = None):
        """Stock filter of long prompts; then the teacher's answers of the rows that stay are tokenized."""
        dataframe = super().maybe_filter_out_long_prompts(dataframe)
        return dataframe if self.teacher_key is None else self._tokenize_teacher(dataframe)

    def _tokenize_teacher(self, dataframe: datasets.Dataset) -> datasets.Dataset:
        if len(dataframe) == 0:
            raise ValueError(
                f"no row of {', '.join(self.data_files)} is left: every prompt is longer than "
                f"data.max_prompt_length={self.max_prompt_length}, or the chat template refuses it (see above)"
            )
        max_length = self.config.get("max_response_length", 512)
        stop_ids = teacher.stop_token_ids(self.tokenizer)
        end_ids = teacher.end_of_turn_ids(self.tokenizer, stop_ids, self.apply_chat_template_kwargs)
        tokenizer, key, files, truncation = self.tokenizer, self.teacher_key, list(self.data_files), self.truncation
        several = has_several(dataframe, key)

        def tokenize(rows: dict[str, list]) -> dict[str, list]:
            answers = answers_of_rows(rows, key)
            texts = [text for row in answers for _, text in row]
            uncut = teacher.tokenize_teacher(tokenizer, texts, end_ids)
            ids = []
            for text, answer in zip(texts, uncut, strict=True):
                try:
                    ids.append(teacher.cut_teacher(answer, max_length, truncation))
                except ValueError as error:
                    raise ValueError(f"{find_teacher(files, key, text)}: {error}") from None
            if several:
                return answer_columns(answers, ids, LENGTH, uncut)
            return {TEACHER_TEXT: texts, TEACHER_IDS: ids, LENGTH: [len(answer) for answer in uncut]}

        num_proc = self.num_workers if len(dataframe) > 10_000 else None
        options = {"batched": True, "load_from_cache_file": False, "desc": "Tokenizing teacher answers"}
        taken = [name for name in (TEACHER_IDS, ANSWERS, LENGTH) if name in dataframe.column_names and name not in key]
        dataframe = dataframe.remove_columns(taken).map(tokenize, num_proc=num_proc, **options)
        lengths = torch.tensor([n for row in dataframe[LENGTH][:] for n in row] if several else dataframe[LENGTH][:])
        n_cut = int((lengths > max_length).sum())
        print(
            f"teacher answers: {len(lengths)}, mean {lengths.float().mean():.1f} tokens, longest {int(lengths.max())}; "
            f"{n_cut} longer than data.max_response_length={max_length}, cut by data.truncation={truncation}"
        )
        return dataframe.remove_columns(LENGTH)

    def __getitem__(self, item):
        row = super().__getitem__(item)
        if self.teacher_key is not None:
            row.pop(ANSWERS, None)
            row["index"] = item  # stock verl takes it from extra_info, where it may be missing or the same for all rows
            if row.get("reward_model") is None:
                row["reward_model"] = {"style": "teacher", "ground_truth": row[TEACHER_TEXT]}
            if row.get("data_source") is None:
                row["data_source"] = NO_SOURCE
        return row

    def teacher_tensors(self, item: int) -> dict[str, torch.Tensor]:
        """teacher_input_ids, teacher_attention_mask, teacher_position_ids of row ``item``, (prompt + answer,) each."""
        row = self[item]
        prompt_ids = teacher.build_prompt_ids(self.tokenizer, row["raw_prompt"], self.apply_chat_template_kwargs)
        return teacher.teacher_tensors(torch.tensor(prompt_ids), torch.tensor(row[TEACHER_IDS]))
