"""Models and tokenizers by folder or Hugging Face hub id."""

import re
from pathlib import Path
from typing import Any

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def cached_model(repo: str) -> Path | None:
    """Folder of a hub model in the Hugging Face cache, None if it was not downloaded."""
    from huggingface_hub import try_to_load_from_cache

    file = try_to_load_from_cache(repo, "config.json")
    return Path(file).parent if isinstance(file, str) else None


def load_tokenizer(name: str | Path, trust_remote_code: bool = False) -> Any:
    """Tokenizer of a model folder or hub id.

    Raises:
        ValueError: there is none, or a broken one.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever a broken tokenizer raises
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"the tokenizer in {name} cannot be loaded ({reason}). Fix: copy or save it again, or name another folder "
            "or hub id"
        ) from None
