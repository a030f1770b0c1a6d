"""What a check finds, and how checks are run."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException


class ConfigError(ValueError):
    """A run that cannot work; ``errors`` and ``warnings`` hold the messages one by one."""

    def __init__(self, errors: list[str], warnings: list[str] | None = None):
        self.errors = errors
        self.warnings = warnings or []
        super().__init__(errors, warnings)

    def __str__(self) -> str:
        return "this GAD run cannot start:\n" + "\n".join(f"- {error}" for error in self.errors)


class Warn(str):
    """A message that does not stop the run."""


class Note(str):
    """A message about something that is as it should be."""


Messages = Iterator[str]
Check = Callable[[DictConfig], Messages]


class Finding(NamedTuple):
    """One line of a report."""

    level: str
    """``ok``, ``warning`` or ``error``."""

    check: str
    """Name of the check, such as ``batches``."""

    message: str


def run_checks(config: DictConfig, checks: Iterable[Check]) -> list[Finding]:
    """Findings of ``checks``, in their order; a check that finds nothing gives one of level ``ok``.

    Args:
        config: gad_trainer.yaml composed with overrides; left as it is.
        checks: functions named ``check_...``, whose docstring says in its first line what holds if they find nothing.
    """
    try:
        resolved: Any = OmegaConf.create(OmegaConf.to_container(config, resolve=True))
    except OmegaConfBaseException as error:
        return [Finding("error", "configuration", f"the configuration does not resolve: {one_line(error)}")]
    findings: list[Finding] = []
    for check in checks:
        messages: list[str] = []
        try:
            for message in check(resolved):
                messages.append(message)
        except ConfigError as error:
            messages.extend(error.errors)
        messages = messages or [Note((check.__doc__ or "").split("\n")[0])]
        name = check.__name__.removeprefix("check_")
        findings.extend(Finding(_level(message), name, message) for message in dict.fromkeys(messages))
    return findings


def _level(message: str) -> str:
    return "warning" if isinstance(message, Warn) else "ok" if isinstance(message, Note) else "error"


def one_line(error: object) -> str:
    return " ".join(str(error).split())
