"""Checks of a received architecture description, for every family: arguments, and that the layers match."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from pydantic import BaseModel, ValidationError
from torch import Tensor, nn

_Arguments = TypeVar("_Arguments", bound=BaseModel)


def validated(kind: type[_Arguments], arguments: Mapping[str, Any], family: str) -> _Arguments:
    """Check constructor arguments against their model.

    Raises
    ------
    ValueError
        An argument is unknown, of another type or out of range; the message names family and argument.
    """
    try:
        return kind(**arguments)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in fault["loc"])
        place = f"argument {where!r}" if where else "arguments"
        raise ValueError(f"the {family}'s {place}: {fault['msg']}") from None


def verify_layers(
    model: nn.Module, run: Callable[[], Tensor], given: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    """Run a network on ``meta`` (shapes only, no arithmetic) to verify that its layers match.

    Parameters
    ----------
    model : nn.Module
        On ``meta``, with its described widths.
    run : callable
        One forward pass of it; returns its output.
    given, expected : tuple of int
        Shapes of the input and of the output it should have.

    Raises
    ------
    ValueError
        Two layers' widths contradict each other; the message names the layer reached.
    """
    reached = ""
    handles = []

    def note(path: str) -> Any:
        def hook(*_: object) -> None:
            nonlocal reached
            reached = path

        return hook

    for path, module in model.named_modules():
        if not any(module.children()):
            handles.append(module.register_forward_pre_hook(note(path)))
    try:
        with torch.no_grad():
            out = run()
    except (RuntimeError, ValueError, AssertionError) as error:
        reason = str(error).partition("\n")[0] or "its channels differ"
        raise ValueError(f"the layers do not match at {reached!r}: {reason}") from None
    finally:
        for handle in handles:
            handle.remove()
    if tuple(out.shape) != expected:
        raise ValueError(f"the network turns {list(given)} into {list(out.shape)}, not {list(expected)}")
