"""Groups of options, and options whose value is JSON or a list."""

import functools
import inspect
import json
import sys
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints


def option_groups(command: Callable[..., None]) -> Callable[..., None]:
    """Let a typer command take dataclasses: each of their fields becomes an option of the command line.

    Args:
        command: a function with annotated parameters. Where the annotation is a dataclass, its fields are annotated as
            typer parameters are, and have defaults.
    """
    parameters: list[inspect.Parameter] = []
    groups: dict[str, tuple[Any, list[str]]] = {}
    hints = get_type_hints(command, include_extras=True)
    for parameter in inspect.signature(command).parameters.values():
        kind = hints[parameter.name]
        if is_dataclass(kind):
            hints_of_kind = get_type_hints(kind, include_extras=True)
            options = {field.name: field.default for field in fields(kind)}
            groups[parameter.name] = (kind, list(options))
            parameters += [
                inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hints_of_kind[name])
                for name, default in options.items()
            ]
        else:
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=kind))

    @functools.wraps(command)
    def run(**values: Any) -> None:
        made = {name: kind(**{o: values.pop(o) for o in options}) for name, (kind, options) in groups.items()}
        command(**values, **made)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def json_object(option: str, text: str) -> dict[str, Any]:
    """Value of an option that takes a JSON object.

    Raises:
        ValueError: the text is not a JSON object.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ValueError(f"{option} {text!r}: expected a JSON object, such as '{{\"name\": 0.9}}'")
    return value


def whole_numbers(option: str, text: str) -> tuple[int, ...]:
    """Value of an option that takes whole numbers separated by commas; repeated ones count once.

    Raises:
        ValueError: the text is not such a list.
    """
    try:
        return tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise ValueError(f"{option} {text!r}: expected whole numbers separated by commas") from None


def starting(text: str) -> None:
    """Say on stderr what a slow command does first: loading its libraries alone takes seconds."""
    print(f"{text} ...", file=sys.stderr, flush=True)
