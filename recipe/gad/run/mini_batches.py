"""The actor's mini-batch for ``run_gad.sh --ppo_mini_batches N``: data.train_batch_size / N prompts.

python -m recipe.gad.run.mini_batches N [hydra.key=value ...]    print it
"""

import sys

from omegaconf import DictConfig

from recipe.gad.run.config import compose_config, integer
from recipe.gad.run.findings import InputError, either


def mini_batch_size(config: DictConfig, parts: str) -> int:
    """Prompts of one optimizer step of the actor, of which a batch has ``parts``.

    Raises:
        InputError: ``parts`` is no whole number of at least 1, or does not divide data.train_batch_size.
    """
    batch, key = integer(config, "data.train_batch_size"), "--ppo_mini_batches"
    if not (parts.isascii() and parts.isdigit() and int(parts)):
        raise InputError(f"{key} {parts}: expected a whole number of at least 1", fix=f"{key} 2")
    if batch % int(parts):
        divisors = [n for n in range(1, batch + 1) if batch % n == 0]
        near = sorted(sorted(divisors, key=lambda n: abs(n - int(parts)))[:2])
        raise InputError(f"{key} {parts} does not divide data.train_batch_size={batch}", fix=f"{key} {either(near)}")
    return batch // int(parts)


def main(arguments: list[str]) -> int:
    """Run the command line; returns the exit code, 2 on errors."""
    try:
        parts, *overrides = arguments
        print(mini_batch_size(compose_config(overrides), parts))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
