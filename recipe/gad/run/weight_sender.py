"""Sends weights to the rollout engine, and gives up if the engine no longer takes them."""

from typing import Any

SECONDS = 600.0
"""Longest wait until the engine has taken a bucket of weights (512 MB unless configured otherwise)."""


def with_patience(sender: type, seconds: float = SECONDS) -> type:
    """A subclass of stock's ``BucketedWeightSender`` whose waits end.

    Stock waits until the receiver answers. After an exception in the engine's process, nobody does: the run hangs.

    Raises (at a send):
        TimeoutError: no answer within ``seconds``.
    """
    import zmq

    class PatientSender(sender):  # type: ignore[misc, valid-type]
        def _init_socket(self) -> None:
            super()._init_socket()
            self.socket.setsockopt(zmq.RCVTIMEO, round(1000 * seconds))
            self.socket.setsockopt(zmq.LINGER, 0)

        async def async_send_weights(self, weights: Any) -> None:
            try:
                await super().async_send_weights(weights)
            except zmq.Again:
                raise TimeoutError(
                    f"the rollout engine has not taken new weights for {seconds:g} s, since an exception has ended its "
                    "side; the run's log has it further up"
                ) from None

    return PatientSender
