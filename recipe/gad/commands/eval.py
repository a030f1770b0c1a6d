"""``gad eval``: the options of recipe/gad/evaluation. The settings classes there hold the defaults."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from recipe.gad.commands.options import json_object, option_groups, starting, whole_numbers
from recipe.gad.evaluation.judge import CONCURRENCY, DEFAULT_EXTRA, JudgeSettings
from recipe.gad.evaluation.sampling import RUN_KEYS, Settings
from recipe.gad.run.two_sample import TwoSampleSettings

ANSWERS, VLLM = "Answers", "vLLM"
TWO_SAMPLE, JUDGE = "Two-sample test", "Judge"


def _recorded(name: str, setting: str, help: str) -> Any:
    """An option for a setting that a run records: not given, the run's value counts, else the default."""
    default = f"the run's, else {getattr(Settings, setting)}"
    return typer.Option(name, help=help, rich_help_panel=ANSWERS, show_default=default)


@dataclass(frozen=True)
class AnswerOptions:
    """How answers are sampled."""

    backend: Annotated[
        str | None,
        typer.Option(
            "--backend", help="vllm or hf.", rich_help_panel=ANSWERS, show_default="vllm if installed, with a GPU"
        ),
    ] = None
    temperature: Annotated[
        float | None, _recorded("--temperature", "temperature", "Sampling temperature; 0 is greedy.")
    ] = None
    max_prompt_length: Annotated[
        int | None,
        _recorded("--max_prompt_length", "max_prompt_length", "Rows with a longer prompt (in tokens) are dropped."),
    ] = None
    max_response_length: Annotated[
        int | None,
        _recorded(
            "--max_response_length",
            "max_response_length",
            "Answers of student and teacher are cut at this number of tokens.",
        ),
    ] = None
    n: Annotated[int, typer.Option("-n", "--n", help="Answers per prompt.", rich_help_panel=ANSWERS)] = Settings.n
    prompt_key: Annotated[str | None, _recorded("--prompt_key", "prompt_key", "Column with the prompt's messages.")] = (
        None
    )
    teacher_key: Annotated[
        str | None, _recorded("--teacher_key", "teacher_key", "Column with the teacher's answer.")
    ] = None
    chat_template_kwargs: Annotated[
        str | None,
        typer.Option(
            "--chat_template_kwargs",
            help="JSON object, as data.apply_chat_template_kwargs in training: '{\"enable_thinking\": false}'.",
            rich_help_panel=ANSWERS,
            show_default="the run's, else {}",
        ),
    ] = None

    def settings(self, model: str, val_files: list[str], seed: int) -> Settings:
        """The settings. An option wins over the run's record, and the record over the default."""
        from recipe.gad.evaluation.sampling import default_backend, recorded_settings

        given = {name: value for name in RUN_KEYS if (value := getattr(self, name)) is not None}
        if self.chat_template_kwargs is not None:
            given["chat_template_kwargs"] = json_object("--chat_template_kwargs", self.chat_template_kwargs)
        run, recorded = recorded_settings(model)
        if taken := {name: value for name, value in recorded.items() if name not in given}:
            print(f"from the configuration of {run}: {', '.join(f'{name} {value}' for name, value in taken.items())}")
        return Settings(
            model=model,
            val_files=tuple(val_files),
            backend=self.backend or default_backend(),
            n=self.n,
            seed=seed,
            **{**recorded, **given},
        )


@dataclass(frozen=True)
class VllmOptions:
    """What vLLM may use of the GPU; no influence on the distribution of the answers."""

    gpu_memory_utilization: Annotated[
        float, typer.Option("--gpu_memory_utilization", help="Share of the GPU's memory.", rich_help_panel=VLLM)
    ] = 0.9
    kv_cache_gib: Annotated[
        float | None,
        typer.Option(
            "--kv_cache_gib",
            min=0.1,
            help="Size of the KV cache in GiB, instead of what vLLM measures as free. Use it with a small "
            "--gpu_memory_utilization on a GPU that is also training.",
            rich_help_panel=VLLM,
        ),
    ] = None
    enforce_eager: Annotated[
        bool,
        typer.Option(
            "--enforce_eager", help="No CUDA graphs: starts sooner, decodes more slowly.", rich_help_panel=VLLM
        ),
    ] = False

    def arguments(self) -> dict[str, Any]:
        """Arguments of ``vllm.LLM``."""
        return {
            "gpu_memory_utilization": self.gpu_memory_utilization,
            "kv_cache_memory_bytes": None if self.kv_cache_gib is None else int(self.kv_cache_gib * 2**30),
            "enforce_eager": self.enforce_eager,
        }


@dataclass(frozen=True)
class TwoSampleOptions:
    """Whether there is a two-sample test, and how its discriminators are trained."""

    two_sample_model: Annotated[
        str | None,
        typer.Option(
            "--two_sample_model",
            help="Base model of the test's fresh discriminators; without it there is no test. Use ONE base for all "
            "models that you compare, and not the evaluated model, which is not neutral.",
            rich_help_panel=TWO_SAMPLE,
        ),
    ] = None
    two_sample_seeds: Annotated[
        str, typer.Option("--two_sample_seeds", help="Seeds, separated by commas.", rich_help_panel=TWO_SAMPLE)
    ] = ",".join(map(str, TwoSampleSettings.seeds))
    two_sample_lr: Annotated[
        float, typer.Option("--two_sample_lr", help="Learning rate.", rich_help_panel=TWO_SAMPLE)
    ] = TwoSampleSettings.lr
    two_sample_epochs: Annotated[
        int, typer.Option("--two_sample_epochs", help="Epochs.", rich_help_panel=TWO_SAMPLE)
    ] = TwoSampleSettings.epochs
    two_sample_batch: Annotated[
        int, typer.Option("--two_sample_batch", help="Pairs per optimizer step.", rich_help_panel=TWO_SAMPLE)
    ] = TwoSampleSettings.batch_pairs

    def settings(self) -> TwoSampleSettings | None:
        """The settings; None: no test."""
        if self.two_sample_model is None:
            return None
        seeds = whole_numbers("--two_sample_seeds", self.two_sample_seeds)
        return TwoSampleSettings(
            self.two_sample_model, seeds, self.two_sample_lr, self.two_sample_epochs, self.two_sample_batch
        )


@dataclass(frozen=True)
class JudgeOptions:
    """Who judges, if anyone, and where."""

    judge_model: Annotated[
        str | None,
        typer.Option(
            "--judge_model",
            help="Name of a judge model at an OpenAI-compatible API; its key: OPENAI_API_KEY.",
            rich_help_panel=JUDGE,
        ),
    ] = None
    judge_base_url: Annotated[
        str | None,
        typer.Option(
            "--judge_base_url",
            help="Address of that API.",
            rich_help_panel=JUDGE,
            show_default="OPENAI_BASE_URL, else OpenAI's own",
        ),
    ] = None
    judge_extra: Annotated[
        str,
        typer.Option(
            "--judge_extra",
            help="JSON object with more fields for the judge's requests; '{}' for reasoning models.",
            rich_help_panel=JUDGE,
        ),
    ] = json.dumps(DEFAULT_EXTRA)
    judge_concurrency: Annotated[
        int, typer.Option("--judge_concurrency", min=1, help="Requests at a time.", rich_help_panel=JUDGE)
    ] = CONCURRENCY

    def settings(self, mode: str) -> JudgeSettings | None:
        """The settings; None: no judge."""
        if self.judge_model is None:
            return None
        return JudgeSettings(self.judge_model, mode, json_object("--judge_extra", self.judge_extra))


app = typer.Typer(invoke_without_command=True, rich_markup_mode="markdown")


@app.callback()
@option_groups
def evaluate(
    context: typer.Context,
    answer_options: AnswerOptions,
    vllm_options: VllmOptions,
    two_sample_options: TwoSampleOptions,
    judge_options: JudgeOptions,
    model: Annotated[
        str | None,
        typer.Option("--model", help="Hugging Face folder or id, or a run: its folder (newest step) or global_step_N."),
    ] = None,
    val_files: Annotated[
        list[str] | None, typer.Option("--val_files", help="Validation data (.parquet, .json, .jsonl); repeatable.")
    ] = None,
    output_dir: Annotated[
        Path | None, typer.Option("--output_dir", help="Folder for answers.jsonl, settings.json and scores.json.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of sampling and of the bootstrap.")] = Settings.seed,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace answers that were made with other settings.")
    ] = False,
    judge_mode: Annotated[
        str,
        typer.Option(
            "--judge_mode",
            help="pairwise (student against teacher, in both orders), score (1-10 for each of the two) or both.",
            rich_help_panel=JUDGE,
        ),
    ] = JudgeSettings.mode,
) -> None:
    """Sample a model's answers to validation prompts and measure how close they are to the teacher's.

    Prints ROUGE-L to the teacher, answer length, share of cut answers, distinct-1/2 and repetition with 95 %
    confidence intervals over prompts. With --two_sample_model it also runs the two-sample test: the held-out accuracy
    of a fresh discriminator in telling the model's answers from the teacher's. At 0.5 it cannot tell them apart; p is
    the two-sided p-value of 0.5. Answers made with the same settings are reused. If the model is a run, lengths,
    temperature and columns are those of its configuration, unless you give them.

    Example: gad eval --model runs/gad --val_files val.parquet --output_dir eval/gad
    --two_sample_model HuggingFaceTB/SmolLM2-135M-Instruct
    """
    if context.invoked_subcommand is not None:
        return
    if model is None or not val_files or output_dir is None:
        needed = {"--model": model, "--val_files": val_files, "--output_dir": output_dir}
        missing = ", ".join(name for name, value in needed.items() if not value)
        raise ValueError(f"missing {missing}. Example: gad eval --model MODEL --val_files val.parquet --output_dir DIR")
    starting(f"evaluating {model}; the libraries load for some seconds")
    from recipe.gad.evaluation.judge import against, judge
    from recipe.gad.evaluation.sampling import make_answers
    from recipe.gad.evaluation.scores import scores_table, text_section, update_scores
    from recipe.gad.evaluation.two_sample import run_two_sample_test
    from recipe.gad.openai_client import ChatClient
    from recipe.gad.run.atomic_io import alone_in

    settings = answer_options.settings(model, val_files, seed)
    test, judge_settings = two_sample_options.settings(), judge_options.settings(judge_mode)
    client = None if judge_settings is None else ChatClient(judge_options.judge_base_url)
    with alone_in(output_dir, "gad eval"):
        answers = make_answers(settings, output_dir, overwrite, vllm_options.arguments())
        scores = update_scores(output_dir, text=text_section(answers, seed))
        if test is not None:
            scores = update_scores(output_dir, two_sample=run_two_sample_test(answers, test))
        if judge_settings is not None and client is not None:
            pairs = against(answers, [answer["teacher"] for answer in answers])
            verdicts = judge(pairs, client, judge_settings, output_dir, judge_options.judge_concurrency, seed)
            scores = update_scores(output_dir, judge=verdicts)
    print(scores_table(scores))


@app.command()
@option_groups
def compare(
    judge_options: JudgeOptions,
    folders: Annotated[list[Path], typer.Argument(metavar="DIR", help="Output folders of gad eval.")],
    output: Annotated[Path | None, typer.Option("--output", help="Write the comparison as JSON.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the bootstrap and of the permutations.")] = Settings.seed,
    as_json: Annotated[bool, typer.Option("--json", help="Print what --output writes instead of the table.")] = False,
) -> None:
    """Print one table of several evaluated models: same validation data, same settings.

    Every model is compared with the first one on the same prompts, in ROUGE-L and in the two-sample test: the
    difference, its 95 % interval, and the p-value of no difference. With --judge_model a judge also compares its
    answers with those of the first, pair by pair.

    Example: gad eval compare eval/seqkd eval/gad --output compare.json
    """
    from recipe.gad.evaluation.scores import (
        add_differences,
        check_scores,
        comparison_table,
        is_comparison,
        judge_against_first,
    )
    from recipe.gad.evaluation.scores import compare as compare_folders
    from recipe.gad.run.atomic_io import check_output, write_atomically

    if output is not None:
        check_output(output, is_comparison)
    comparison = compare_folders(folders)
    check_scores(comparison)
    add_differences(comparison, seed)
    if (settings := judge_options.settings("pairwise")) is not None:
        judge_against_first(comparison, settings, judge_options.judge_base_url, judge_options.judge_concurrency, seed)
    text = json.dumps(comparison, indent=2)
    if output is not None:
        write_atomically(output, text + "\n")
    print(text if as_json else comparison_table(comparison))
