"""Helpers of terms that use the base loss's forward pass: captured values, running means, checks of the network."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from espalier import lazy, models
from espalier.training.objectives import TrainingError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from torch.utils.hooks import RemovableHandle
else:
    torch = lazy.load("torch")


class ForwardCapture:
    """Captures a module's input or output in a forward pass that another term runs."""

    def __init__(self) -> None:
        self._hook: RemovableHandle | None = None
        self._value: Any = None

    def attach(self, module: nn.Module, *, inputs: bool = False) -> None:
        """Capture the output, or the first input, of a module's next forward passes."""
        self.release()

        def capture(hooked: nn.Module, arguments: tuple[Any, ...], output: Any = None) -> None:
            # A deep copy of the module has the hook, too.
            if hooked is module:
                self._value = arguments[0] if inputs else output

        if inputs:
            self._hook = module.register_forward_pre_hook(capture)
        else:
            self._hook = module.register_forward_hook(capture)

    def take(self) -> Any:
        """Return the captured value and drop it."""
        if self._value is None:
            raise RuntimeError("this term must come after the base loss in the sum")
        value, self._value = self._value, None
        return value

    def release(self) -> None:
        """Remove the hook."""
        if self._hook is not None:
            self._hook.remove()
        self._hook = self._value = None


class RunningMean:
    """The mean of a term's values over a round; it synchronises with the device once, at the end."""

    def __init__(self) -> None:
        self._total: Tensor | None = None
        self._count = 0

    def add(self, value: Tensor) -> None:
        """Add a batch's value; ignored while gradients are disabled."""
        if torch.is_grad_enabled():
            value = value.detach().double()
            self._total = value if self._total is None else self._total + value
            self._count += 1

    def report(self, name: str) -> dict[str, float]:
        """Return the mean under a name; empty without values."""
        return {} if self._total is None else {name: float(self._total) / self._count}


def require_classifier(model: nn.Module, method: str) -> models.Classifier:
    """Return the model typed as a classifier; raises TrainingError for a U-Net."""
    if isinstance(model, models.Classifier):
        return model
    raise TrainingError(f"{method} is for classifiers; a {type(model).__name__} has no classes")


def single_output(output: Tensor | list[Tensor], method: str) -> Tensor:
    """Return a network's logits in float32; raises TrainingError for a list of outputs."""
    if isinstance(output, torch.Tensor):
        return output.float()
    raise TrainingError(
        f"{method} needs networks with a single output; choose a model without exits or members"
    )


def require_exits(model: nn.Module) -> models.ExitNetwork:
    """Return the model typed as a network with exits; raises TrainingError for others."""
    if not isinstance(model, models.ExitNetwork):
        raise TrainingError("this method trains networks with exits; set model=depth-cnn or depth-resnet18")
    return model
