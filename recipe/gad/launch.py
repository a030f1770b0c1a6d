"""Starts a run: the trainer's imports and ``gad doctor`` go on side by side, since each takes seconds.

    python -m recipe.gad.launch -m verl.trainer.main_ppo --config-path PATH --config-name NAME KEY=VALUE ...

The trainer begins once the doctor has passed the run. Otherwise the process ends with the doctor's exit code.
"""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from importlib import import_module


def main(words: list[str]) -> None:
    """Run the module that ``words`` name after the doctor has checked what they configure.

    Args:
        words: the words after ``python`` that would start the trainer at once.

    Raises:
        SystemExit: the doctor refuses the run, or somebody has interrupted it.
    """
    _, module, _, _, *arguments = words
    try:
        with subprocess.Popen([sys.executable, "-m", "recipe.gad.cli", "doctor", "--brief", *arguments]) as doctor:

            def end(*_: object) -> None:  # SIGTERM reaches this process alone
                doctor.terminate()
                os._exit(128 + signal.SIGTERM)

            signal.signal(signal.SIGTERM, end)
            with suppress(ImportError):  # the doctor says more about a broken installation
                import_module(module)
    except KeyboardInterrupt:  # Ctrl-C reaches the doctor too
        sys.exit(130)
    if doctor.returncode:
        sys.exit(doctor.returncode if doctor.returncode > 0 else 128 - doctor.returncode)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.argv = [module, *words[2:]]
    import_module(module).main()


if __name__ == "__main__":
    main(sys.argv[1:])
