"""Measures how fast this device computes, once per process; `level-choice=speed` ranks clients by it."""

from __future__ import annotations

import time
from functools import lru_cache
from typing import TYPE_CHECKING

from espalier import lazy

if TYPE_CHECKING:
    import torch
else:
    torch = lazy.load("torch")

#: Rows of the square matrices that are multiplied: small ones fit into a CPU's caches; large ones take a GPU longer
#: than the overhead of a call.
_CPU_SIZE, _ACCELERATOR_SIZE = 256, 2048
#: Seconds after which no further product is started, and the maximum number of products.
_MAX_SECONDS, _MAX_PRODUCTS = 0.03, 16


@lru_cache(maxsize=8)
def measured_speed(device: torch.device) -> float:
    """Return the speed of float32 matrix products in 1e9 multiply-adds per second; later calls return the first result.

    The fastest of a few products counts, as other work on the machine can only slow one down.

    Parameters
    ----------
    device : torch.device
        The device to measure.
    """
    size = _CPU_SIZE if device.type == "cpu" else _ACCELERATOR_SIZE
    generator = torch.Generator().manual_seed(0)
    matrix = torch.rand((size, size), generator=generator).to(device)
    product = torch.empty_like(matrix)

    def seconds() -> float:
        start = time.perf_counter()
        torch.mm(matrix, matrix, out=product)
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return time.perf_counter() - start

    seconds()  # warm-up: loads the kernels
    end, fastest = time.perf_counter() + _MAX_SECONDS, float("inf")
    for _ in range(_MAX_PRODUCTS):
        fastest = min(fastest, seconds())
        if time.perf_counter() > end:
            break
    return size**3 / fastest / 1e9
