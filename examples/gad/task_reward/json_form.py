"""A reward for the form of an answer: it must be JSON with exactly the keys that the task asks for."""

import json

KEYS = {"name", "city"}


def compute_score(solution_str: str, **_) -> float:
    """1 for a JSON object with the keys :data:`KEYS`, else 0 (verl's ``reward.custom_reward_function`` interface)."""
    try:
        answer = json.loads(solution_str)
    except ValueError:
        return 0.0
    return float(isinstance(answer, dict) and set(answer) == KEYS)
