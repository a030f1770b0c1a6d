"""``gad eval``: arguments of the evaluation; the work is in recipe/gad/{answers,evaluate,two_sample,judge}.py."""

import json
from pathlib import Path
from typing import Annotated

import typer

from recipe.gad.commands.options import json_object

DEFAULT_JUDGE_EXTRA = '{"temperature": 0}'
DEFAULT_JUDGE_CONCURRENCY = 16
JudgeModel = Annotated[
    str | None,
    typer.Option("--judge_model", help="Name of a judge model at an OpenAI-compatible API; its key: OPENAI_API_KEY."),
]
JudgeBaseUrl = Annotated[
    str | None,
    typer.Option("--judge_base_url", help="Address of that API. Default: OPENAI_BASE_URL, else OpenAI's own."),
]
JudgeExtra = Annotated[
    str,
    typer.Option("--judge_extra", help="JSON object of more fields for the judge's requests; reasoning models: '{}'."),
]
JudgeConcurrency = Annotated[int, typer.Option("--judge_concurrency", min=1, help="Requests to the judge at a time.")]

app = typer.Typer(invoke_without_command=True, rich_markup_mode="markdown")


@app.callback()
def evaluate(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Option("--model", help="Hugging Face folder or id, or a run: its folder (newest step) or global_step_N."),
    ] = None,
    val_files: Annotated[
        list[str] | None, typer.Option("--val_files", help="Validation data (.parquet, .json, .jsonl); repeatable.")
    ] = None,
    output_dir: Annotated[
        Path | None, typer.Option("--output_dir", help="Gets answers.jsonl, settings.json and scores.json.")
    ] = None,
    backend: Annotated[
        str | None, typer.Option(help="vllm or hf. Default: vllm if it is installed and there is a GPU.")
    ] = None,
    temperature: Annotated[float, typer.Option(help="Sampling temperature; 0 is greedy.")] = 0.8,
    max_prompt_length: Annotated[
        int, typer.Option("--max_prompt_length", help="Rows with a longer prompt (tokens) are dropped.")
    ] = 512,
    max_response_length: Annotated[
        int, typer.Option("--max_response_length", help="Answers of both sides are cut at this number of tokens.")
    ] = 256,
    n: Annotated[int, typer.Option("-n", "--n", help="Answers per prompt.")] = 1,
    seed: Annotated[int, typer.Option(help="Of sampling and of the bootstrap.")] = 0,
    prompt_key: Annotated[str, typer.Option("--prompt_key", help="Column with the prompt's messages.")] = "content",
    teacher_key: Annotated[
        str, typer.Option("--teacher_key", help="Column with the teacher's answer.")
    ] = "teacher_response",
    chat_template_kwargs: Annotated[
        str,
        typer.Option(
            "--chat_template_kwargs",
            help="JSON object, as data.apply_chat_template_kwargs in training: '{\"enable_thinking\": false}'.",
        ),
    ] = "{}",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace answers made with other settings.")] = False,
    gpu_memory_utilization: Annotated[
        float, typer.Option("--gpu_memory_utilization", help="vLLM: share of the GPU's memory.")
    ] = 0.9,
    kv_cache_gib: Annotated[
        float | None,
        typer.Option(
            "--kv_cache_gib",
            min=0.1,
            help="vLLM: GiB of its KV cache instead of measuring what is free, for a GPU that a training uses too; "
            "with a small --gpu_memory_utilization.",
        ),
    ] = None,
    enforce_eager: Annotated[
        bool, typer.Option("--enforce_eager", help="vLLM: no CUDA graphs; starts sooner, decodes slower.")
    ] = False,
    two_sample_model: Annotated[
        str | None,
        typer.Option(
            "--two_sample_model",
            help="Base model of the two-sample test's fresh discriminators; without it the test is left out. Use ONE "
            "base for all models compared: the evaluated model itself is not neutral.",
        ),
    ] = None,
    two_sample_seeds: Annotated[
        str, typer.Option("--two_sample_seeds", help="Seeds of the test, separated by commas.")
    ] = "0,1,2",
    two_sample_lr: Annotated[float, typer.Option("--two_sample_lr", help="Learning rate of the test.")] = 2e-5,
    two_sample_epochs: Annotated[int, typer.Option("--two_sample_epochs", help="Epochs of the test.")] = 3,
    two_sample_batch: Annotated[int, typer.Option("--two_sample_batch", help="Pairs of one optimizer step.")] = 8,
    judge_model: JudgeModel = None,
    judge_base_url: JudgeBaseUrl = None,
    judge_mode: Annotated[
        str,
        typer.Option(
            "--judge_mode",
            help="pairwise (student against teacher, in both orders), score (1-10 for each of the two) or both.",
        ),
    ] = "both",
    judge_extra: JudgeExtra = DEFAULT_JUDGE_EXTRA,
    judge_concurrency: JudgeConcurrency = DEFAULT_JUDGE_CONCURRENCY,
) -> None:
    """Sample answers of a model to validation prompts and measure how close they are to the teacher's.

    Prints ROUGE-L to the teacher, answer length, share of cut answers, distinct-1/2 and repetition with 95 %
    confidence intervals over prompts. With --two_sample_model also the two-sample test: the held-out accuracy of a
    fresh discriminator in telling the model's answers from the teacher's (0.5 = cannot be told apart). Answers made
    with the same settings are reused.

    Example: gad eval --model runs/gad --val_files val.parquet --output_dir eval/gad
    --two_sample_model HuggingFaceTB/SmolLM2-135M-Instruct
    """
    if context.invoked_subcommand is not None:
        return
    if model is None or not val_files or output_dir is None:
        given = {"--model": model, "--val_files": val_files, "--output_dir": output_dir}
        missing = ", ".join(name for name, value in given.items() if not value)
        raise ValueError(f"missing {missing}. Example: gad eval --model MODEL --val_files val.parquet --output_dir DIR")
    from recipe.gad.evaluation.judge import JudgeSettings, against, judge
    from recipe.gad.evaluation.sampling import Settings, default_backend, make_answers
    from recipe.gad.evaluation.scores import scores_table, text_section, update_scores
    from recipe.gad.evaluation.two_sample import TwoSampleSettings, run_two_sample_test
    from recipe.gad.openai_client import ChatClient

    settings = Settings(
        model=model,
        val_files=tuple(val_files),
        backend=backend or default_backend(),
        temperature=temperature,
        max_prompt_length=max_prompt_length,
        max_response_length=max_response_length,
        seed=seed,
        n=n,
        prompt_key=prompt_key,
        teacher_key=teacher_key,
        chat_template_kwargs=json_object("--chat_template_kwargs", chat_template_kwargs),
    )
    test = None
    if two_sample_model is not None:
        test = TwoSampleSettings(
            two_sample_model, _seeds(two_sample_seeds), two_sample_lr, two_sample_epochs, two_sample_batch
        )
    client = None
    if judge_model is not None:
        judge_settings = JudgeSettings(judge_model, judge_mode, json_object("--judge_extra", judge_extra))
        client = ChatClient(judge_base_url)
    vllm_options = {
        "gpu_memory_utilization": gpu_memory_utilization,
        "kv_cache_memory_bytes": None if kv_cache_gib is None else int(kv_cache_gib * 2**30),
        "enforce_eager": enforce_eager,
    }
    answers = make_answers(settings, output_dir, overwrite, vllm_options)
    scores = update_scores(output_dir, text=text_section(answers, seed))
    if test is not None:
        scores = update_scores(output_dir, two_sample=run_two_sample_test(answers, test))
    if client is not None:
        pairs = against(answers, [answer["teacher"] for answer in answers])
        verdicts = judge(pairs, client, judge_settings, output_dir, judge_concurrency, seed)
        scores = update_scores(output_dir, judge=verdicts)
    print(scores_table(scores))


@app.command()
def compare(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR", help="Output folders of gad eval.")],
    output: Annotated[Path | None, typer.Option(help="Write the comparison as JSON.")] = None,
    judge_model: JudgeModel = None,
    judge_base_url: JudgeBaseUrl = None,
    judge_extra: JudgeExtra = DEFAULT_JUDGE_EXTRA,
    judge_concurrency: JudgeConcurrency = DEFAULT_JUDGE_CONCURRENCY,
    seed: Annotated[int, typer.Option(help="Of the bootstrap over the judge's verdicts.")] = 0,
) -> None:
    """One table of several evaluated models: same validation data, same settings.

    With --judge_model the answers of every model are judged against those of the first one, pair by pair.

    Example: gad eval compare eval/seqkd eval/gad --output compare.json
    """
    from recipe.gad.evaluation.judge import JudgeSettings
    from recipe.gad.evaluation.scores import add_differences, comparison_table, judge_against_first
    from recipe.gad.evaluation.scores import compare as compare_folders
    from recipe.gad.run.atomic_io import write_atomically

    comparison = compare_folders(folders)
    add_differences(comparison, seed)
    if judge_model is not None:
        judge_settings = JudgeSettings(judge_model, "pairwise", json_object("--judge_extra", judge_extra))
        judge_against_first(comparison, judge_settings, judge_base_url, judge_concurrency, seed)
    if output is not None:
        write_atomically(output, json.dumps(comparison, indent=2) + "\n")
    print(comparison_table(comparison))


def _seeds(text: str) -> tuple[int, ...]:
    try:
        return tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise ValueError(f"--two_sample_seeds {text!r}: expected whole numbers separated by commas") from None
