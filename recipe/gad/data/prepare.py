"""``gad prepare``: data in any usual layout (recipe/gad/data/layouts.py) -> train.parquet and val.parquet.

Two prompts are the same if their roles and texts are equal after Unicode NFC and with every run of white space read as
one space; letter case counts. A 64-bit hash of this decides whether a prompt goes to training or to validation, so the
order of the rows, the rest of the data and the run do not matter. Only these hashes are kept in memory, about 80 bytes
per row.
"""

import itertools
import os
import shutil
import tempfile
import unicodedata
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from recipe.gad.data import VAL_FRACTION
from recipe.gad.data.layouts import Example, Message, Row, data_source_of, open_rejects, read_example, read_rows
from recipe.gad.data.tokenizers import TokenCounter, token_counter
from recipe.gad.run.atomic_io import alone_in, naming
from recipe.gad.run.data_file import BATCH_ROWS
from recipe.gad.run.findings import InputError
from recipe.gad.run.hub import load_tokenizer
from recipe.gad.run.progress import progress

TRAIN, VAL, REJECTS = "train.parquet", "val.parquet", "rejects.jsonl"
TEMPORARY = ".prepare."
"""How the names of temporary folders start."""
BATCH_CHARS = 1 << 22
"""A batch of rows is written when it holds this many characters, or BATCH_ROWS rows."""
SCHEMA = pa.schema(
    {
        "content": pa.list_(pa.struct({"role": pa.string(), "content": pa.string()})),
        "teacher_response": pa.string(),
        "data_source": pa.string(),
        "extra_info": pa.struct({"index": pa.int64()}),
    }
)
FEW_VAL_ROWS = 50
"""Below this, the measures of validation are mostly chance (recipe/gad/monitor/rules.py:memorizing_discriminator)."""
HASH_BYTES = 8
"""Length of a prompt's hash. Among 10 million prompts, the chance that two different ones share a hash is 3e-6."""


class Preset(NamedTuple):
    """A public data set that comes with its own split."""

    dataset: str
    train_split: str
    val_split: str


PRESETS = {"lmsys-gpt5": Preset("ytz20/LMSYS-Chat-GPT-5-Chat-Response", "train", "test")}
"""``lmsys-gpt5``: the paper's data, 200K LMSYS-Chat prompts answered by GPT-5-Chat (arXiv 2511.10643, section 4)."""


@dataclass
class OutputStats:
    """What went into one output file. Lengths are in tokens, and empty without a tokenizer."""

    rows: int = 0
    prompt_lengths: array = field(default_factory=lambda: array("I"))
    response_lengths: array = field(default_factory=lambda: array("I"))


@dataclass
class Prepared:
    """Counts over all rows that were read."""

    train: OutputStats = field(default_factory=OutputStats)
    val: OutputStats = field(default_factory=OutputStats)
    rows: int = 0
    rejected: int = 0
    duplicates: int = 0
    rows_with_dropped_turns: int = 0


def prepare_files(
    inputs: Sequence[str],
    out_dir: str | Path,
    *,
    val_inputs: Sequence[str] = (),
    val_fraction: float = VAL_FRACTION,
    prompt_key: str | None = None,
    teacher_key: str | None = None,
    data_source: str | None = None,
    keep_answers: bool = False,
    strict: bool = False,
    overwrite: bool = False,
    count_tokens: TokenCounter | None = None,
) -> Prepared:
    """Write ``train.parquet``, ``val.parquet`` and, if there are bad rows, ``rejects.jsonl`` to ``out_dir``.

    The parquet files have the columns content (list of {role, content}), teacher_response (text, or lists of texts if a
    row of the file has several answers), data_source and extra_info ({index}: row in the file). All files are renamed
    into place at the end.

    Args:
        inputs: sources for :func:`recipe.gad.data.layouts.read_rows`.
        out_dir: created if it does not exist.
        val_inputs: sources of the validation rows; their prompts are kept out of training. Without them,
            ``val_fraction`` splits ``inputs``.
        val_fraction: share of the prompts in [0, 1) that go to validation; 0 writes no validation file.
        prompt_key, teacher_key: columns, if the layout is not recognized.
        data_source: data source of all rows; by default that of the row, else the name of the row's source.
        keep_answers: keep different answers to one prompt; by default only its first row is kept.
        strict: stop at the first bad row.
        overwrite: replace existing outputs.
        count_tokens: measures the lengths; raises ValueError for a prompt that the student's template refuses.

    Raises:
        ValueError: an argument or a source is wrong, outputs exist, or a file would be empty. Nothing is written.
    """
    out_dir = Path(out_dir).expanduser()
    if not 0 <= val_fraction < 1:
        raise ValueError(f"val_fraction={val_fraction}: expected a number in [0, 1)")
    finals = [out_dir / name for name in (TRAIN, VAL, REJECTS)]
    with alone_in(out_dir, "gad prepare"), naming(out_dir), _temporary_folder(out_dir) as folder:
        existing = [str(path) for path in finals if path.exists()]
        if existing and not overwrite:
            raise InputError(
                f"{', '.join(existing)}: already there", fix="choose another --output_dir, or add --overwrite"
            )
        if folders := [str(path) for path in finals if path.is_dir()]:
            raise InputError(f"{', '.join(folders)}: a folder, expected a file", fix="choose another --output_dir")
        written = [Path(folder) / path.name for path in finals]
        result = Prepared()
        seen: set[int] = set()
        held_out: set[int] = set()
        val_below = 0.0 if val_inputs else val_fraction * 2 ** (8 * HASH_BYTES)
        with (
            _RowWriter(written[0], result.train) as train,
            _RowWriter(written[1], result.val) as val,
            open_rejects(written[2], strict) as rejects,
        ):
            # validation first, so that its prompts can be kept out of training
            for row, is_val in itertools.chain(_read_sources(val_inputs, True), _read_sources(inputs, False)):
                result.rows += 1
                try:
                    example = read_example(row, prompt_key, teacher_key)
                    lengths = (
                        [count_tokens(example.prompt, answer) for answer in example.answers] if count_tokens else []
                    )
                except ValueError as error:
                    rejects.add(row, str(error))
                    continue
                prompt = prompt_hash(example.prompt)
                identity = (
                    _hash("\0".join([f"{prompt} {example.answers[0]}", *example.answers[1:]]))
                    if keep_answers
                    else prompt
                )
                if identity in seen or (prompt in held_out and not is_val):
                    result.duplicates += 1
                    continue
                seen.add(identity)
                if is_val:
                    held_out.add(prompt)
                result.rows_with_dropped_turns += example.dropped_turns > 0
                writer = val if is_val or prompt < val_below else train
                writer.add(example, data_source or data_source_of(row), lengths)
        result.rejected = rejects.count
        _check_not_empty(result, val_wanted=bool(val_inputs) or val_fraction > 0)
        counts = (result.train.rows, result.val.rows, result.rejected)
        for new, final, count in zip(written, finals, counts, strict=True):
            if count:
                os.replace(new, final)
            else:
                final.unlink(missing_ok=True)
    return result


@contextmanager
def _temporary_folder(out_dir: Path) -> Iterator[str]:
    """A folder in ``out_dir`` that is removed at the end; those of killed runs are removed first."""
    for left_over in out_dir.glob(f"{TEMPORARY}*"):
        shutil.rmtree(left_over, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=out_dir) as folder:
        yield folder


def _read_sources(sources: Sequence[str], is_val: bool) -> Iterator[tuple[Row, bool]]:
    for source in sources:
        for row in progress(read_rows(source), desc=source, unit=" rows"):
            yield row, is_val


def _check_not_empty(result: Prepared, val_wanted: bool) -> None:
    if result.rows == 0:
        raise InputError("the inputs hold no row", fix="name files that are not empty")
    if result.train.rows == 0:
        raise InputError(
            f"no training row is left of {result.rows} rows ({result.rejected} rejected, {result.duplicates} "
            f"duplicates, {result.val.rows} for validation)",
            fix="read the reasons above, or name the columns with --prompt_key and --teacher_key",
        )
    if val_wanted and result.val.rows == 0:
        raise InputError(
            f"no row of {result.train.rows} went to validation",
            fix="choose a larger --val_fraction, name --val_inputs, or pass --val_fraction 0 for no validation file",
        )


def prompt_hash(messages: list[Message]) -> int:
    """64-bit hash of a prompt; prompts that differ only in white space and Unicode form share it."""
    texts = (unicodedata.normalize("NFC", text) for m in messages for text in (m["role"], m["content"]))
    return _hash("\0".join(" ".join(text.split()) for text in texts))


def _hash(text: str) -> int:
    return int.from_bytes(blake2b(text.encode("utf-8"), digest_size=HASH_BYTES).digest(), "big")


class _RowWriter:
    """Writes examples to a parquet file, a batch at a time, and counts them in ``stats``."""

    def __init__(self, path: Path, stats: OutputStats):
        self._path, self._stats = path, stats
        self._schema = SCHEMA
        self._parquet = pq.ParquetWriter(path, SCHEMA)
        self._batch: list[dict[str, Any]] = []
        self._chars = 0

    def add(self, example: Example, data_source: str, lengths: list[tuple[int, int]]) -> None:
        """``lengths``: of prompt and answer, for each answer; none without a tokenizer."""
        if len(example.answers) > 1 and self._schema is SCHEMA:
            self._begin_lists()
        self._batch.append(
            {
                "content": example.prompt,
                "teacher_response": example.answers[0] if self._schema is SCHEMA else example.answers,
                "data_source": data_source,
                "extra_info": {"index": self._stats.rows},
            }
        )
        self._stats.rows += 1
        self._stats.prompt_lengths.extend(prompt for prompt, _ in lengths[:1])
        self._stats.response_lengths.extend(answer for _, answer in lengths)
        self._chars += sum(map(len, example.answers)) + sum(len(message["content"]) for message in example.prompt)
        if len(self._batch) == BATCH_ROWS or self._chars >= BATCH_CHARS:
            self._write_batch()

    def _write_batch(self) -> None:
        self._parquet.write_table(pa.Table.from_pylist(self._batch, schema=self._schema))
        self._batch, self._chars = [], 0

    def _begin_lists(self) -> None:
        """From the first row with several answers on, every row of the file has a list, those before it included."""
        self._write_batch()
        self._parquet.close()
        single = self._path.rename(self._path.with_suffix(".single"))
        place = SCHEMA.get_field_index("teacher_response")
        self._schema = SCHEMA.set(place, pa.field("teacher_response", pa.list_(pa.string())))
        self._parquet = pq.ParquetWriter(self._path, self._schema)
        with pq.ParquetFile(single) as rows:
            for batch in rows.iter_batches(BATCH_ROWS):
                answers = batch.column(place)
                lists = pa.ListArray.from_arrays(pa.array(range(len(answers) + 1), pa.int32()), answers)
                columns = [lists if i == place else column for i, column in enumerate(batch.columns)]
                self._parquet.write_table(pa.Table.from_arrays(columns, schema=self._schema))
        single.unlink()

    def __enter__(self) -> "_RowWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self._write_batch()
        self._parquet.close()


# ---------------------------------------------------------------------------------------------------------- lengths


def student_token_counter(path: str) -> TokenCounter:
    """Token counter of a model folder or hub id.

    Raises:
        ValueError: the model has no tokenizer, or its tokenizer has no chat template.
    """
    tokenizer = load_tokenizer(path)
    if not tokenizer.chat_template:
        raise InputError(f"the tokenizer of {path} has no chat template", fix="name the folder of the student itself")
    return token_counter(tokenizer)


def default_lengths() -> tuple[int, int]:
    """(data.max_prompt_length, data.max_response_length) of the trainer's configuration, in tokens."""
    from omegaconf import OmegaConf

    data = OmegaConf.load(Path(__file__).parents[1] / "config" / "gad_trainer.yaml").data
    return data.max_prompt_length, data.max_response_length


def summary(result: Prepared, out_dir: str | Path, max_prompt_length: int, max_response_length: int) -> str:
    """What was written, what was left out, and the lengths in tokens, as lines of text."""
    out_dir = Path(out_dir)
    lines = [f"read        {result.rows:>9,} rows"]
    if result.rejected:
        lines.append(f"rejected    {result.rejected:>9,} rows; the reasons are in {out_dir / REJECTS}")
    if result.duplicates:
        dropped = f"{result.duplicates:>9,} rows dropped: an earlier row has the same prompt"
        lines.append(f"duplicates  {dropped} (--keep_answers keeps different answers)")
    if result.rows_with_dropped_turns:
        lines.append(f"shortened   {result.rows_with_dropped_turns:>9,} conversations: turns after the answer dropped")
    for name, stats in ((TRAIN, result.train), (VAL, result.val)):
        if stats.rows:
            few = name == VAL and stats.rows < FEW_VAL_ROWS
            hint = f"; fewer than {FEW_VAL_ROWS} say little: see --val_fraction" if few else ""
            lines.append(f"{name.partition('.')[0]:<11} {stats.rows:>9,} rows in {out_dir / name}{hint}")
    if not result.train.prompt_lengths:
        return "\n".join(lines)
    lines.append(f"{'tokens':<20} {'mean':>8} {'p50':>7} {'p95':>7} {'max':>7}  longer than the trainer's limit")
    for name, stats in (("train", result.train), ("val", result.val)):
        if stats.rows:
            prompts, answers = stats.prompt_lengths, stats.response_lengths
            lines.append(_length_line(f"{name} prompts", prompts, max_prompt_length, "dropped in training"))
            lines.append(_length_line(f"{name} answers", answers, max_response_length, "cut in training"))
    return "\n".join(lines)


def _length_line(name: str, values: array, limit: int, consequence: str) -> str:
    import numpy as np

    lengths = np.frombuffer(values, dtype=np.uint32)
    p50, p95 = np.percentile(lengths, [50, 95])
    over = (lengths > limit).mean()
    return (
        f"{name:<20} {lengths.mean():>8.1f} {p50:>7.0f} {p95:>7.0f} {lengths.max():>7}  "
        f"{over:.2%} longer than {limit}" + (f" ({consequence})" if over else "")
    )
