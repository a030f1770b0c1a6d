"""Models and tokenizers by folder or Hugging Face hub id."""

import re
from pathlib import Path
from typing import Any

from recipe.gad.run.findings import InputError

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def cached_model(repo: str) -> Path | None:
    """Folder of a hub model in the Hugging Face cache; None if it was never downloaded, or no model has such a name."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        file = try_to_load_from_cache(repo, "config.json")
    except HFValidationError:  # "./folder" and "a--b/c" match HUB_ID
        return None
    return Path(file).parent if isinstance(file, str) else None


def local_model(path: Any) -> Path | None:
    """Folder on this machine of a model given as a folder or a hub id; None if the model is not here."""
    if not isinstance(path, str):
        return None
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    return cached_model(path) if HUB_ID.fullmatch(path) else None


def load_tokenizer(name: str | Path, trust_remote_code: bool = False) -> Any:
    """Tokenizer of a model folder or hub id.

    Raises:
        InputError: there is no tokenizer, or it cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as problem:  # a broken tokenizer can raise anything
        reason = (str(problem).splitlines() or [type(problem).__name__])[0]
        raise InputError(
            f"the tokenizer in {name} cannot be loaded ({reason})",
            fix="copy or save it again, or name another folder or hub id",
        ) from None
