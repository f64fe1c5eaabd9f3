"""The device that a `device` setting names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from espalier import lazy
from espalier.errors import ConfigError

if TYPE_CHECKING:
    import torch
else:
    torch = lazy.load("torch")


def resolve_device(setting: str) -> torch.device:
    """Return the device of a ``device`` setting; "auto" is CUDA, then MPS, then the CPU.

    Raises
    ------
    ConfigError
        If the setting is not a device, or one that this machine does not have.
    """
    if setting == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(setting)
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError("training is not supported there")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"device: {setting!r} cannot be used here ({reason}); use auto or cpu") from None
    return device
