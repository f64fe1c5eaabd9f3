from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from espalier.models.arrays import load_arrays, model_arrays, to_array, to_tensor


def test_bfloat16_travels_as_its_bits() -> None:
    tensor = torch.tensor([1.0, -2.5, 3.140625], dtype=torch.bfloat16)
    array = to_array(tensor)
    # 1.0 is 0x3f80, -2.5 is 0xc020: the upper halves of their float32 forms.
    assert array.dtype == np.uint16
    assert array[:2].tolist() == [0x3F80, 0xC020]
    assert torch.equal(to_tensor(array, "bfloat16"), tensor)


def test_received_bytes_are_copied_and_a_models_own_are_not() -> None:
    received = np.frombuffer(np.arange(3, dtype=np.float32).tobytes(), dtype=np.float32)
    to_tensor(received).add_(1)
    assert received.tolist() == [0, 1, 2]
    model = nn.Linear(2, 1)
    model_arrays(model)["weight"][:] = 7
    assert model.weight.tolist() == [[7, 7]]


def test_arrays_load_into_a_model_of_their_shapes_only() -> None:
    model = nn.Linear(2, 1)
    arrays = {"weight": np.array([[1.0, 2.0]]), "bias": np.array([3.0])}
    load_arrays(model, arrays)
    assert model(torch.ones(1, 2)).item() == 6
    assert model.weight.dtype == torch.float32
    with pytest.raises(ValueError, match="'bias' is missing"):
        load_arrays(model, {"weight": arrays["weight"]})
    with pytest.raises(ValueError, match="'more' is not part"):
        load_arrays(model, arrays | {"more": arrays["bias"]})
    with pytest.raises(ValueError, match=r"'bias' has shape \[2\], expected \[1\]"):
        load_arrays(model, arrays | {"bias": np.zeros(2)})
