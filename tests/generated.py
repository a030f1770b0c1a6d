"""Settings of tests on input that hypothesis generates."""

import os

from hypothesis import HealthCheck, settings


def cases(few: int) -> settings:
    """``few`` cases in every suite, ``GAD_CASES`` times as many on demand; the same ones in every run."""
    return settings(
        max_examples=few * int(os.environ.get("GAD_CASES", 1)),
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
