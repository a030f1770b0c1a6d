"""Checkpoints of GAD runs: which of them are complete, and which stage wrote a folder.

A run's output folder (trainer.default_local_dir) holds:

    global_step_N/{actor,critic}/huggingface/   weights, configuration and tokenizer
    global_step_N/gad_state.pt                  state of variants, such as gad.discriminator_lead
    global_step_N/metrics.json                  training metrics of step N, should its log line get lost
    global_step_N/data.pt                       verl writes it last
    global_step_N/checksums.json                sizes and checksums of these files
    latest_checkpointed_iteration.txt           the step from which trainer.resume_mode=auto resumes
    gad_stage.json                              the stage that owns the folder, and the models that the run started
                                                from

verl writes all but gad_*, metrics.json and checksums.json. Names, sizes and safetensors headers are read; the weights
are read only to compare checksums, before a hand-over and before a run resumes.

    python -m recipe.gad.run.checkpoint resolve DIR [--step N]     prints the checkpoint that the next stage starts from
    python -m recipe.gad.run.checkpoint student DIR                prints the folder of a run's newest complete student
"""

import argparse
import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from recipe.gad.run.atomic_io import read_object, write_atomically
from recipe.gad.run.checksums import damage
from recipe.gad.run.findings import InputError
from recipe.gad.run.hub import local_model

TRACKER = "latest_checkpointed_iteration.txt"
MARKER = "gad_stage.json"
DPO_STAGES = ("soda", "online_dpo")
WITHOUT_DISCRIMINATOR = ("seqkd", *DPO_STAGES)
"""Stages whose checkpoints hold no critic."""
ROLES = ("actor", "critic")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
HEAD_NAMES = re.compile(r"(^|\.)(score|classifier)\.weight$|(^|\.)v_head\.")
PEFT_PREFIX = "base_model."  # what verl saves of a model with LoRA
LORA_META = "lora_train_meta.json"  # rank and alpha, in the folder of a role with LoRA
SAMPLED_BLOCKS, SAMPLED_BLOCK = 16, 1 << 16
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format

# ---------------------------------------------------------------------- one Hugging Face folder


def safetensors_header(file: Path) -> dict[str, Any]:
    """Header of a safetensors file: name -> {dtype, shape, data_offsets}.

    Raises:
        ValueError: the file is truncated, longer than its header says, or not a safetensors file.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or 8 + length > size:
            raise ValueError(f"{file} is truncated: {size} bytes, its header alone needs {8 + length}")
        if length > MAX_HEADER_BYTES:
            raise ValueError(f"{file} is not a safetensors file")
        try:
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            expected = 8 + length + max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
            raise ValueError(f"{file} is not a safetensors file") from None
    if size != expected:
        what = "truncated" if size < expected else "too long"
        raise ValueError(f"{file} is {what}: {size} bytes, its header says {expected}")
    return header


def weight_map(path: Path) -> dict[str, str]:
    """Tensor name -> file name of a Hugging Face folder's safetensors weights.

    Raises:
        ValueError: the folder holds no weights, or the file that lists them cannot be read.
    """
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if single.exists():
        return dict.fromkeys(safetensors_header(single), single.name)
    if index.exists():
        listed = read_object(index).get("weight_map")
        if not isinstance(listed, dict):
            raise ValueError(f"{index} has no weight_map")
        return listed
    raise ValueError(f"{path} has neither {single.name} nor {index.name}")


def tensor_shapes(path: Path) -> dict[str, list[int]]:
    """Tensor name -> shape of a Hugging Face folder's safetensors weights; only headers are read.

    Raises:
        ValueError: the folder holds no weights, or a file is missing, truncated or not a safetensors file.
    """
    if problems := weight_problems(path):
        raise ValueError("; ".join(problems))
    names = sorted(set(weight_map(path).values()))
    return {tensor: entry["shape"] for name in names for tensor, entry in safetensors_header(path / name).items()}


def weight_problems(path: Path) -> list[str]:
    """Missing or truncated weight files of a Hugging Face folder, and names that from_pretrained does not know."""
    try:
        files = weight_map(path)
    except ValueError as error:
        return [str(error)]
    problems = []
    for name in sorted(set(files.values())):
        if not (path / name).is_file():
            problems.append(f"{path / name} is missing (named by model.safetensors.index.json)")
            continue
        try:
            absent = {tensor for tensor, file in files.items() if file == name} - set(safetensors_header(path / name))
        except ValueError as error:
            problems.append(str(error))
            continue
        if absent:
            problems.append(f"{path / name} lacks {min(absent)} (named by model.safetensors.index.json)")
    if any(name.startswith(PEFT_PREFIX) for name in files):
        problems.append(f"{path} holds LoRA weights under PEFT's names, which from_pretrained ignores (gad export)")
    return problems


def verify_hf_folder(path: str | Path) -> list[str]:
    """Problems of a Hugging Face folder that a checkpoint wrote: config, tokenizer, every weight file in full."""
    path = Path(path)
    if not path.is_dir():
        return [f"{path} is missing (actor and critic need hf_model in their checkpoint.save_contents)"]
    problems = []
    for file in [path / "config.json", *sorted(path.glob("tokenizer*.json"))]:
        try:
            read_object(file)
        except FileNotFoundError:
            problems.append(f"{file} is missing")
        except ValueError as error:
            problems.append(str(error))
    vocabularies = [path / name for name in TOKENIZER_FILES] + sorted(path.glob("*.tiktoken"))
    if not any(file.is_file() and file.stat().st_size for file in vocabularies):
        problems.append(f"{path} has no tokenizer (none of {', '.join(TOKENIZER_FILES)})")
    return problems + weight_problems(path)


def has_score_head(path: str | Path) -> bool:
    """True if the weights of a Hugging Face folder hold the head of a value model (score, classifier or v_head)."""
    try:
        return any(HEAD_NAMES.search(name) for name in weight_map(Path(path)))
    except ValueError:
        return False


# ---------------------------------------------------------------------- global_step_N


def step_folders(folder: str | Path) -> dict[int, Path]:
    """Step -> ``global_step_N`` folder, in the order of the steps."""
    found = {}
    for path in Path(folder).glob("global_step_*"):
        number = path.name.removeprefix("global_step_")
        if number.isascii() and number.isdigit() and path.is_dir():
            found[int(number)] = path
    return dict(sorted(found.items()))


def tracked_step(folder: str | Path) -> int | None:
    """The step at which the run of a folder is, from its tracker file; None if the file is missing or no number."""
    tracker = Path(folder) / TRACKER
    text = tracker.read_text(errors="replace").strip() if tracker.is_file() else ""
    return int(text) if text.isascii() and text.isdigit() else None


def current_steps(folder: str | Path) -> dict[int, Path]:
    """:func:`step_folders` up to the step at which the run is.

    A run that went back to an earlier checkpoint leaves later ones of another time line, which are named on stderr.
    """
    steps, now = step_folders(folder), tracked_step(folder)
    later = {step: path for step, path in steps.items() if now is not None and step > now}
    if later:
        print(f"skipped {_names(later)} of {folder}: {TRACKER} says that the run is at step {now}", file=sys.stderr)
    return {step: path for step, path in steps.items() if step not in later}


def role_folders(folder: Path, role: str) -> list[Path]:
    """Folders of a role that a path names: one per step of a run, newest first; one step's; or the path itself."""
    if folder.name == role and (folder / "huggingface").is_dir():
        return [folder]
    steps = [folder] if (folder / role).is_dir() else reversed(current_steps(folder).values())
    return [step / role for step in steps if (step / role).is_dir()]


def first_usable(
    folders: Iterable[Path], problems_of: Callable[[Path], list[str]], count: int = 1
) -> tuple[list[Path], list[str]]:
    """The first ``count`` folders without problems, or fewer, and one line of problems for each folder passed over.

    With ``count`` usable folders the lines are printed to stderr. With fewer, the caller turns them into its error.
    """
    usable: list[Path] = []
    skipped: list[str] = []
    for folder in folders:
        if problems := problems_of(folder):
            skipped.append("; ".join(problems))
            continue
        usable.append(folder)
        if len(usable) == count:
            for line in skipped:
                print(f"skipped {line}", file=sys.stderr)
            break
    return usable, skipped


def _names(steps: dict[int, Path]) -> str:
    names = [path.name for path in steps.values()]
    return ", ".join(names[:2] + ["..."] * (len(names) > 3) + names[2:][-1:])


def handover_problems(step_folder: Path) -> list[str]:
    """Why the next stage cannot start from a ``global_step_N`` folder; empty if it can."""
    actor, critic = (step_folder / role / "huggingface" for role in ("actor", "critic"))
    problems = verify_hf_folder(actor) + verify_hf_folder(critic)
    if not problems and not has_score_head(critic):
        problems.append(f"{critic} has no score head (no tensor score.weight): not a trained discriminator")
    if not (step_folder / "data.pt").is_file():
        problems.append(f"{step_folder / 'data.pt'} is missing (the save was cut off)")
    return problems or damage(step_folder, ROLES, huggingface=True, contents=True)


def shard_counts(role_folder: Path) -> tuple[int, int]:
    """(FSDP model shards found, workers that saved them); (0, 0) for other formats."""
    names = [path.name for path in role_folder.glob("model_world_size_*_rank_*.pt")]
    return len(names), max((int(name.split("_")[3]) for name in names), default=0)


def resume_problems(step_folder: Path, has_critic: bool, contents: bool = False) -> list[str]:
    """Why verl cannot resume from a ``global_step_N`` folder; empty if it can.

    Args:
        contents: compare the checksums of the files as well, which reads them.
    """
    problems: list[str] = []
    roles = ROLES if has_critic else ROLES[:1]
    for role in roles:
        found, expected = shard_counts(step_folder / role)
        if not (step_folder / role).is_dir():
            problems.append(f"{step_folder / role} is missing")
        elif found < expected:
            problems.append(f"{step_folder / role} has {found} of {expected} model shards")
    if not (step_folder / "data.pt").is_file():
        problems.append(f"{step_folder / 'data.pt'} is missing")
    return problems or damage(step_folder, (*roles, "data.pt"), huggingface=False, contents=contents)


def check_workers(step_folder: Path, world_size: int) -> None:
    """Refuse a checkpoint that another number of workers saved: FSDP shards load only with as many.

    Raises:
        InputError: names both numbers, and the flags of a new run from the checkpoint's models.
    """
    saved_by = shard_counts(step_folder / "actor")[1]
    if saved_by and saved_by != world_size:
        flags = {"actor": "--model", "critic": "--reward_model"}
        models = [
            f"{flags[role]} {step_folder / role / 'huggingface'}" for role in ROLES if (step_folder / role).is_dir()
        ]
        raise InputError(
            f"{saved_by} workers saved {step_folder}, and only as many can resume it; this run has {world_size} "
            "(trainer.nnodes x trainer.n_gpus_per_node)",
            fix=f"run with {saved_by}, or start a new run from its models: in another --output_dir, with "
            f"{' '.join(models)} in place of --warmup_dir or --seqkd_dir; "
            "gad export writes a model whose folder is missing",
        )


def latest_complete_checkpoint(folder: str | Path, step: int | None = None) -> Path:
    """The checkpoint of a warmup (or GAD) folder that the next stage starts from.

    Args:
        folder: output folder of the earlier run.
        step: take ``global_step_{step}``; None: the newest complete one up to the step at which the run is (skipped
            ones are named on stderr).

    Raises:
        InputError: no checkpoint is complete, or the chosen one is not.
    """
    folder = Path(os.path.abspath(Path(folder).expanduser()))
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder", fix="pass the output folder of a finished warmup run")
    if (folder / "actor").is_dir():
        raise InputError(
            f"{folder} is one checkpoint, not a run's output folder",
            fix=f"pass {folder.parent} and the step {folder.name.removeprefix('global_step_')} (--resume_step)",
        )
    steps = current_steps(folder) if step is None else step_folders(folder)
    if step is not None and step not in steps:
        found = _names(steps) if steps else "no global_step_* folder"
        raise InputError(f"{folder} has no global_step_{step}; found {found}", fix="choose one of the steps found")
    usable, skipped = first_usable(reversed(steps.values()) if step is None else [steps[step]], handover_problems)
    if usable:
        return usable[0]
    if step is not None:
        raise InputError(f"step {step}: {skipped[0]}", fix="choose another step, or none for the newest complete one")
    contents = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
    found = "; ".join(skipped) if skipped else f"no global_step_* folder (found: {contents})"
    stage = _stage_or_none(folder)
    hint = f" (this folder is of a {stage} run, which has no discriminator)" if stage in WITHOUT_DISCRIMINATOR else ""
    raise InputError(
        f"{folder} holds no complete checkpoint{hint}: {found}",
        fix="pass the output folder of a finished warmup run (examples/gad/run_warmup.sh, with trainer.save_freq > 0 "
        "and hf_model in both checkpoint.save_contents)",
    )


def actor_folder(model: str) -> str:
    """Hugging Face folder of the student that ``model`` names; a hub id (OWNER/NAME) is returned unchanged.

    OWNER/NAME counts as a path if OWNER is a folder with runs.

    Args:
        model: a Hugging Face folder, or of a run: its output folder (the newest complete actor), ``global_step_N``,
            or ``global_step_N/actor``.

    Raises:
        InputError: the folder holds no complete actor.
    """
    folder = Path(os.path.abspath(Path(model).expanduser()))
    if not folder.is_dir():
        path_like = len(Path(model).parts) != 2 or model.startswith((".", "~", "/"))
        if path_like or any(folder.parent.glob(f"*/{MARKER}")):
            raise InputError(f"{model}: no such folder", fix="pass a Hugging Face folder or id, or a run's folder")
        return model
    if (folder / "config.json").is_file():
        problems = weight_problems(folder) if any(folder.glob("*.safetensors*")) else []
        if problems := problems or damage(folder, None, huggingface=False, contents=True):
            raise InputError(f"{model} cannot be loaded: {'; '.join(problems)}", fix="copy or save it again")
        return str(folder)
    usable, skipped = first_usable(role_folders(folder, "actor"), lambda actor: verify_hf_folder(actor / "huggingface"))
    if usable:
        return str(usable[0] / "huggingface")
    raise InputError(
        f"{model} holds no model: no config.json, and no complete actor ({'; '.join(skipped) or 'none at all'})",
        fix="pass a Hugging Face folder or id, or a run's output folder",
    )


# ---------------------------------------------------------------------- whose folder is it


def _marker(folder: str | Path) -> dict[str, Any] | None:
    """What a run has written about itself into its folder; None if no run has claimed it.

    Raises:
        InputError: the marker file cannot be read.
    """
    file = Path(folder) / MARKER
    if not file.exists():
        return None
    try:
        marker = read_object(file)
        return {**marker, "stage": str(marker["stage"])}
    except (ValueError, KeyError):
        fix = 'write {"stage": "warmup"} (or seqkd, gad) into it'
        raise InputError(f"{file} cannot be read", fix) from None


def stage_of(folder: str | Path) -> str | None:
    """Stage whose run owns the folder; None if no run has claimed it.

    Raises:
        InputError: the marker file cannot be read.
    """
    marker = _marker(folder)
    return None if marker is None else marker["stage"]


def _stage_or_none(folder: Path) -> str | None:
    try:
        return stage_of(folder)
    except InputError:
        return None


def claim_folder(folder: str | Path, stage: str, models: dict[str, str] | None = None) -> None:
    """Write the marker file, atomically: from now on the folder belongs to a run of ``stage``.

    Args:
        models: role -> folder or hub id of the model that the run starts from; recorded with its content.

    Raises:
        InputError: the folder holds another run's checkpoints.
    """
    check_folder(folder, stage, resume=False)
    started = {role: {"path": path, "content": model_content(path)} for role, path in (models or {}).items()}
    write_atomically(Path(folder) / MARKER, json.dumps({"stage": stage, "models": started}, indent=1))


def model_content(path: str) -> str | None:
    """Hash of a model's configuration, and of names, sizes and a sample of the bytes of its weights.

    A training step changes nearly every weight, so 16 blocks of 64 KiB of each file tell two checkpoints apart.

    Returns:
        16 hexadecimal digits; None if the model is not on this machine.
    """
    folder = local_model(path)
    if folder is None:
        return None
    digest = hashlib.sha256()
    for file in sorted(file for pattern in ("config.json", "*.safetensors", "*.bin") for file in folder.glob(pattern)):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as stream:
            for i in range(SAMPLED_BLOCKS):
                stream.seek(max(0, size - SAMPLED_BLOCK) * i // (SAMPLED_BLOCKS - 1))
                digest.update(stream.read(SAMPLED_BLOCK))
    return digest.hexdigest()[:16]


def check_models_of_run(folder: str | Path, models: dict[str, str]) -> None:
    """Refuse to resume with other models than those that the run of ``folder`` started from.

    Actor and discriminator come from the checkpoint, but the reference of the KL is loaded anew from the actor's path.

    Raises:
        InputError: names both models.
    """
    recorded = (_marker(folder) or {}).get("models", {})
    for role, path in models.items():
        if (first := recorded.get(role)) is None:
            continue
        content = model_content(path)
        if content != first["content"] if content and first["content"] else path != first["path"]:
            raise InputError(
                f"the run in {folder} started from the {role} {first['path']} (content {first['content']}), and this "
                f"command names {path} (content {content}): a resumed run would change its KL reference or its model",
                fix="name the first one (for a warmup's checkpoint N: --warmup_dir DIR --resume_step N), or start a "
                "new run in another trainer.default_local_dir (--output_dir)",
            )


def verify_contents(step_folder: Path, stage: str) -> None:
    """Compare what a run of ``stage`` is about to resume from with the checksums of its save.

    Raises:
        InputError: names the damaged files, and the checkpoint before.
    """
    has_critic = stage not in WITHOUT_DISCRIMINATOR
    if problems := resume_problems(step_folder, has_critic, contents=True):
        folder, step = step_folder.parent, int(step_folder.name.removeprefix("global_step_"))
        before = [n for n, path in step_folders(folder).items() if n < step and not resume_problems(path, has_critic)]
        fix = f"delete {folder / TRACKER} to start the run from the beginning"
        if before:
            fix = f"write {before[-1]} into {folder / TRACKER} to resume from global_step_{before[-1]}"
        raise InputError(f"{step_folder} is damaged: {'; '.join(problems)}", fix)


def check_folder(folder: str | Path, stage: str, resume: bool = True, world_size: int | None = None) -> None:
    """Refuse an output folder in which a run of ``stage`` would resume from or overwrite the wrong checkpoint.

    Args:
        folder: trainer.default_local_dir; need not exist.
        stage: a value of gad.stage.
        resume: the run resumes from the newest checkpoint (trainer.resume_mode=auto), so that one must be complete.
        world_size: workers of this run; FSDP shards load only with as many workers as saved them.

    Raises:
        InputError: names the file and the fix.
    """
    folder = Path(folder)
    if not folder.exists():
        return
    if not folder.is_dir():
        raise InputError(f"{folder} is a file, expected a folder", fix="set trainer.default_local_dir to another path")
    steps = step_folders(folder)
    owner = stage_of(folder)
    new_folder = "set trainer.default_local_dir (--output_dir) to a new folder"
    if steps and owner is None:
        raise InputError(
            f"{folder} holds checkpoints ({_names(steps)}) of an unknown run: it has no {MARKER}",
            fix=f'{new_folder}; or, if a {stage} run wrote them, write {{"stage": "{stage}"}} into {folder / MARKER}',
        )
    if steps and owner != stage:
        raise InputError(
            f"{folder} holds checkpoints ({_names(steps)}) of stage {owner}, and this run is of stage {stage}: "
            "it would resume or overwrite them",
            fix=new_folder,
        )
    if resume:
        _check_tracker(folder, steps, stage not in WITHOUT_DISCRIMINATOR, world_size)


def _check_tracker(folder: Path, steps: dict[int, Path], has_critic: bool, world_size: int | None) -> None:
    """The tracker file must name a checkpoint that can be resumed: stock verl starts anew if its folder is missing."""
    tracker = folder / TRACKER
    usable = {step for step, path in steps.items() if not resume_problems(path, has_critic)}
    if usable:
        fix = f"write {max(usable)} into {tracker} to resume from {steps[max(usable)].name}"
    else:
        fix = f"delete {tracker} to start this run from the beginning"
    if not tracker.exists():
        if usable:
            raise InputError(f"{folder} holds {_names(steps)} but no {TRACKER}: verl would overwrite them", fix)
        return
    text = tracker.read_text(errors="replace").strip()
    if not (text.isascii() and text.isdigit()):
        raise InputError(f"{tracker} holds {text!r}, expected the number of a step", fix)
    step = int(text)
    if step not in steps:
        raise InputError(f"{tracker} names step {step}, but {folder / f'global_step_{step}'} is missing", fix)
    if problems := resume_problems(steps[step], has_critic):
        raise InputError(f"{tracker} names step {step}, which is not complete: {'; '.join(problems)}", fix)
    if world_size:
        check_workers(steps[step], world_size)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code, 2 on errors."""
    parser = argparse.ArgumentParser(
        prog="python -m recipe.gad.run.checkpoint", description=(__doc__ or "").split("\n")[0]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    resolve = commands.add_parser("resolve", help="print the checkpoint that the next stage starts from")
    resolve.add_argument("folder", metavar="DIR", help="output folder of a warmup run")
    resolve.add_argument("--step", type=int, help="take global_step_N (default: the newest complete one)")
    student = commands.add_parser("student", help="print the folder of the newest complete student")
    student.add_argument("folder", metavar="DIR", help="output folder of a run")
    options = parser.parse_args(arguments)
    try:
        if options.command == "student":
            if not Path(options.folder).is_dir():  # no hub id, which actor_folder would take
                raise InputError(f"{options.folder}: no such folder", fix="pass the output folder of run_seqkd.sh")
            print(actor_folder(options.folder))
        else:
            print(latest_complete_checkpoint(options.folder, options.step))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
