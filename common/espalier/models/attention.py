"""Self-attention over the pixels of an image, for U-Nets that are also trained on CPUs.

It is the function of diffusers' own processor (a test compares them). What differs is what
a step spends on it: torch's attention for a CPU takes longer over heads of 6 or 8 channels, of which the paper's
network has 32, than over heads of 16, and queries, keys and values each copied the pixels for themselves.
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn
from torch.nn import functional

#: Channels per head for which torch's CPU attention is fastest; heads of 4 to 12 take longer (AVX-512).
LANES = 16


class PixelAttention:
    """Multi-head self-attention over pixels with a residual connection: Ho et al. 2020, appendix B.

    A processor as diffusers' ``Attention.set_processor`` takes it: it computes, and the layer holds the weights.
    Every head is ``softmax(q k^T / sqrt(d)) v`` (Vaswani et al. 2017, eq. 1). On a CPU, heads of fewer than 16
    channels are filled up with zeros, which changes no product, and cut again.
    """

    def __call__(
        self,
        attention: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """Attend.

        Parameters
        ----------
        attention : diffusers' Attention
            The layer: its norm (a middle block with ``scale_shift`` has none), projections and number of heads.
        hidden_states : Tensor
            Images, [images, channels, height, width].
        encoder_hidden_states, attention_mask : None
            Not supported: U-Nets without a text encoder have none.
        temb : Tensor, optional
            The time embedding, which the layer's norm does not depend on.

        Returns
        -------
        Tensor
            Images of the same shape, contiguous.

        Raises
        ------
        ValueError
            Something other than the images' own pixels is to be attended to.
        """
        if encoder_hidden_states is not None or attention_mask is not None:
            raise ValueError("this network attends only to the pixels of its own image")
        images, channels, height, width = hidden_states.shape
        count = height * width
        flat = hidden_states.reshape(images, channels, count)
        normed = flat if attention.group_norm is None else attention.group_norm(flat)
        pixels = normed.transpose(1, 2).contiguous()  # once for the three projections
        query, key, value = (
            projection(pixels).view(images, count, attention.heads, -1)
            for projection in (attention.to_q, attention.to_k, attention.to_v)
        )
        attended = _heads(query, key, value).reshape(images, count, -1)
        projected = attention.to_out[1](attention.to_out[0](attended))
        # In the memory format of the images: with another one, a convolution copies its weights at every step.
        out = projected.transpose(1, 2).contiguous().view(images, channels, height, width) + hidden_states
        scale = attention.rescale_output_factor
        return cast(Tensor, out if scale == 1 else out / scale)


def _heads(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Compute attention in every head; tensors are [images, pixels, heads, channels of a head]."""
    width = query.shape[-1]
    if query.device.type == "cpu" and width < LANES:
        query, key, value = (functional.pad(part, (0, LANES - width)) for part in (query, key, value))
    query, key, value = (part.transpose(1, 2) for part in (query, key, value))
    attended = functional.scaled_dot_product_attention(query, key, value, scale=width**-0.5)
    return attended.transpose(1, 2)[..., :width]


def attend_to_pixels(model: nn.Module) -> None:
    """Set :class:`PixelAttention` as the processor of every attention layer of a UNet2DModel."""
    _set(model, PixelAttention())


def attend_as_diffusers(model: nn.Module) -> None:
    """Set diffusers' processor in every attention layer of a UNet2DModel; DepGraph can trace it."""
    from diffusers.models.attention_processor import AttnProcessor2_0

    _set(model, AttnProcessor2_0())


def _set(model: nn.Module, processor: Any) -> None:
    from diffusers.models.attention_processor import Attention

    for module in model.modules():
        if isinstance(module, Attention):
            module.set_processor(processor)
