"""What checks, doctor and health rules find: one model, one set of levels, one printed form.

Checks and rules make findings with :func:`error`, :func:`warning` and :func:`note`. Whoever runs them adds their name.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from omegaconf import DictConfig

LEVELS = ("ok", "warning", "error")
"""From best to worst: worth knowing; likely to go wrong; the run cannot start, or has failed."""


@dataclass(frozen=True)
class Finding:
    """One line of a report; ``str`` gives it without its level and place."""

    level: str
    """One of :data:`LEVELS`."""

    where: str
    """Name of the check or rule, such as ``batches``."""

    what: str
    """What was found, in one sentence."""

    evidence: str = ""
    """Values found and expected, unless ``what`` already names them."""

    fix: str = ""
    """What the user can do."""

    def __str__(self) -> str:
        parts = [self.what, self.evidence, f"Fix: {self.fix}" if self.fix else ""]
        parts = [part for part in parts if part]
        return ". ".join([*(part.removesuffix(".") for part in parts[:-1]), *parts[-1:]])

    def about(self, subject: object) -> "Finding":
        """The same finding with ``subject: `` before its sentence."""
        return replace(self, what=f"{subject}: {self.what}")


Findings = Iterator[Finding]
Check = Callable[["DictConfig"], Findings]
"""A function named ``check_...``; the first line of its docstring says what holds if it finds nothing."""


def error(what: str, fix: str = "", evidence: str = "") -> Finding:
    """A finding that stops a run, or that says that a run has failed."""
    return Finding("error", "", what, evidence, fix)


def warning(what: str, fix: str = "", evidence: str = "") -> Finding:
    """A finding that does not stop a run."""
    return Finding("warning", "", what, evidence, fix)


def note(what: str, fix: str = "", evidence: str = "") -> Finding:
    """A finding about something that is as it should be."""
    return Finding("ok", "", what, evidence, fix)


def line(finding: Finding) -> str:
    """The form in which every command prints a finding: ``error   batches: what. evidence. Fix: fix``."""
    return f"{finding.level:8}{finding.where}: {one_line(finding)}"


class InputError(ValueError):
    """Input that the user must change; ``finding`` holds the sentence and the fix."""

    def __init__(self, what: str, fix: str = ""):
        super().__init__(what, fix)
        self.finding = error(what, fix)

    def __str__(self) -> str:
        return str(self.finding)


class ConfigError(ValueError):
    """A run that cannot start; ``errors`` and ``warnings`` hold the findings."""

    def __init__(self, errors: list[Finding], warnings: list[Finding] | None = None):
        super().__init__(errors, warnings)
        self.errors = errors
        self.warnings = warnings or []

    def __str__(self) -> str:
        return "this GAD run cannot start:\n" + "\n".join(f"- {finding}" for finding in self.errors)


def one_line(text: object) -> str:
    """``str(text)`` with every run of white space as one space, and shown as :func:`visible` does."""
    return visible(" ".join(str(text).split()))


def visible(text: str) -> str:
    """The text with control characters and half surrogate pairs as escapes, so that no terminal obeys them."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def either(values: Iterable[object]) -> str:
    """Alternatives as text: ``8 or 16``."""
    return " or ".join(map(str, values))
