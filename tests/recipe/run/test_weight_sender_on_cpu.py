"""recipe/gad/run/weight_sender.py on stock's sender and receiver, over a real socket."""

import asyncio
import importlib.util
import subprocess
import sys
import threading
from multiprocessing import shared_memory
from pathlib import Path

import pytest
import torch
import zmq

import verl
from recipe.gad.run.weight_sender import with_patience

MIB = 1024 * 1024
WEIGHTS = [("a", torch.arange(MIB // 8).float()), ("b", torch.ones(MIB // 8)), ("c", torch.zeros(MIB // 4))]
"""Half, half and all of a bucket of 1 MiB."""


@pytest.fixture(scope="module")
def stock():
    """The stock module; its package cannot be imported without vLLM."""
    folder = Path(verl.__path__[-1]) if len(verl.__path__) > 1 else Path(verl.__file__).parent
    file = folder / "workers/rollout/vllm_rollout/bucketed_weight_transfer.py"
    spec = importlib.util.spec_from_file_location("bucketed_weight_transfer", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def send(stock, handle: str, seconds: float) -> None:
    sender = with_patience(stock.BucketedWeightSender, seconds)(handle, bucket_size_mb=1, use_shm=True)
    asyncio.run(sender.async_send_weights(iter(WEIGHTS)))


def test_weights_arrive(stock, tmp_path):
    handle, found = f"ipc://{tmp_path}/weights", {}
    receiver = stock.BucketedWeightReceiver(handle, device=torch.device("cpu"), use_shm=True)

    def take(weights, is_last):
        found.update((name, tensor.clone()) for name, tensor in weights)

    thread = threading.Thread(target=receiver.receive_weights, kwargs={"on_bucket_received": take})
    thread.start()
    send(stock, handle, seconds=30)
    thread.join(30)
    assert list(found) == ["a", "b", "c"] and all(torch.equal(found[name], tensor) for name, tensor in WEIGHTS)


def test_a_receiver_that_has_failed_is_not_waited_for(stock, tmp_path):
    """It takes the first bucket and then nothing, as after an exception while it loads the weights."""
    handle = f"ipc://{tmp_path}/weights"

    def fail():
        socket = zmq.Context.instance().socket(zmq.REP)
        socket.connect(handle)
        shared_memory.SharedMemory(name=socket.recv_pyobj()["name"]).close()
        socket.send(b"")
        socket.recv_pyobj()
        socket.close(linger=0)

    thread = threading.Thread(target=fail)
    thread.start()
    with pytest.raises(TimeoutError, match="not taken new weights for 0.5 s"):
        send(stock, handle, seconds=0.5)
    thread.join(30)


def test_stock_code_takes_the_sender_that_gives_up():
    """With what stock's package asks of vLLM at its import, which no CPU test has."""
    code = """
import importlib.metadata as metadata, inspect, sys, types
real = metadata.version
metadata.version = lambda name: "0.24.0" if name == "vllm" else real(name)
import verl
sys.modules["verl.third_party.vllm"] = types.SimpleNamespace(VLLM_SLEEP_LEVEL=2)
from verl.workers.rollout.vllm_rollout.vllm_rollout import ServerAdapter
print(inspect.unwrap(ServerAdapter.update_weights).__globals__["BucketedWeightSender"].__name__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.split()[-1:] == ["PatientSender"], done.stderr
