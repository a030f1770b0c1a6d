"""Extends stock ``verl.utils.distributed``: on the CPU platform the process group is gloo alone.

Stock asks for "cpu:gloo,<device>:<backend>", which on the CPU platform names the device "cpu" twice and is refused.
Goes when: the stock string is right on a CPU.
"""

from verl.utils.device import get_device_name
from verl.utils.distributed import initialize_global_process_group_ray as _stock_initialize


def initialize_global_process_group_ray(timeout_second=None, backend=None):
    """Stock function with ``backend="gloo"`` as the default on the CPU platform."""
    if backend is None and get_device_name() == "cpu":
        backend = "gloo"
    _stock_initialize(timeout_second=timeout_second, backend=backend)
