"""What a run's first process does as soon as Ray has started."""

import functools
import threading
from collections.abc import Callable
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from recipe.gad.run.config import resolved


def after_ray_starts(function: Callable[[], None]) -> None:
    """Call ``function`` at the end of each ``ray.init`` of this process."""
    import ray

    start = ray.init

    @functools.wraps(start)
    def init(*args: Any, **kwargs: Any) -> Any:
        context = start(*args, **kwargs)
        function()
        return context

    ray.init = init


class StartQueue(Callback):
    """Hydra callback (``hydra.callbacks`` of gad_trainer.yaml): the processes of TransferQueue start while the
    trainer's process imports its libraries. Stock code starts them afterwards; where it finds a queue it takes that."""

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        if config.trainer.v1.trainer_mode == "gad":
            settings = resolved(config.transfer_queue)
            settings.enable = True  # as stock code sets it
            after_ray_starts(lambda: threading.Thread(target=start_queue, args=(settings,), daemon=True).start())


def start_queue(settings: DictConfig) -> None:
    """Start the queue of a run, or leave no part of it, so that stock code's own start says what is wrong."""
    import ray
    import transfer_queue as tq

    if ray.util.client.ray.is_connected():
        return  # at ray://..., the queue's sockets may be out of reach
    try:
        tq.init(settings)
    except BaseException:
        tq.close()
        raise
