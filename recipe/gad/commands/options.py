"""Reading option values."""

import json
from typing import Any


def json_object(option: str, text: str) -> dict[str, Any]:
    """Value of an option that takes a JSON object.

    Raises:
        ValueError: the text is none.
    """
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ValueError(f"{option} {text!r}: expected a JSON object, such as '{{\"name\": 0.9}}'")
    return value
