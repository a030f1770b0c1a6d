"""Log-probabilities of packed tokens where neither flash-attn nor an NPU has a kernel for them.

To save memory, stock verl then loops over the first dimension of the logits in Python. A padded batch has its rows
there, but a packed one has single tokens. Here the loop takes chunks of tokens, with the same numbers and gradients.
"""

import torch

from verl.utils import torch_functional as stock

CHUNK = 256
"""Tokens at a time; at a vocabulary of 150,000 in float32, a chunk takes 150 MB."""


def logprobs_from_logits(logits: torch.Tensor, labels: torch.Tensor, inplace_backward: bool = True) -> torch.Tensor:
    """Stock ``logprobs_from_logits``, in chunks.

    Args:
        logits: (tokens, vocabulary), or (rows, tokens, vocabulary), which stock verl computes.
        labels: (tokens,) or (rows, tokens).
        inplace_backward: passed on to flash-attn's kernel.
    """
    if stock.FLAH_ATTN_CROSS_ENTROPY_LOSS_AVAILABLE or stock.NPU_CROSS_ENTROPY_LOSS_AVAILABLE or logits.dim() != 2:
        return stock.logprobs_from_logits(logits, labels, inplace_backward)
    chunks = zip(logits.split(CHUNK), labels.split(CHUNK), strict=True)
    return torch.cat([stock.logprobs_from_logits(part[None], ids[None])[0] for part, ids in chunks])
