"""How fast this device computes: one short measurement a process, by which `level-choice=speed` ranks clients."""

from __future__ import annotations

import time
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

#: Rows of the square matrices that are multiplied: a processor's caches hold the small ones, and a GPU is
#: busy for longer with the large ones than a call takes.
_SIZE = {"cpu": 256}
_ACCELERATOR_SIZE = 2048
#: Seconds after which no further product is begun, and the most products.
_LIMIT, _PRODUCTS = 0.03, 16


@lru_cache(maxsize=8)
def measured_speed(place: torch.device) -> float:
    """Return 1e9 multiply-adds a second of float32 matrix products, measured in the first call of a process.

    The quickest of a few products counts: whatever else the machine does can only make one slower.

    Parameters
    ----------
    place : torch.device
        Where the device trains.
    """
    import torch

    size = _SIZE.get(place.type, _ACCELERATOR_SIZE)
    generator = torch.Generator().manual_seed(0)
    matrix = torch.rand((size, size), generator=generator).to(place)
    product = torch.empty_like(matrix)

    def seconds() -> float:
        start = time.perf_counter()
        torch.mm(matrix, matrix, out=product)
        if place.type != "cpu":
            torch.accelerator.synchronize(place)
        return time.perf_counter() - start

    seconds()  # loads the kernels
    end, quickest = time.perf_counter() + _LIMIT, float("inf")
    for _ in range(_PRODUCTS):
        quickest = min(quickest, seconds())
        if time.perf_counter() > end:
            break
    return size**3 / quickest / 1e9
