"""The codecs by name: the settings that choose them, and the factory that creates them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from espalier.config.fields import SettingsGroup
from espalier.config.run_settings import RunSettings
from espalier.wire.codec import BFloat16, Codec, Float16, Whole
from espalier.wire.compression import QSGD, TopK


class CodecSettings(SettingsGroup):
    """How updates, models sent down and edge reports are encoded."""

    codec: Literal["auto", "none", "fp16", "bf16", "qsgd", "top-k"] = Field(
        default="auto", description="encoding of clients' updates; auto: the method's"
    )
    downlink: Literal["none", "fp16", "bf16"] = Field(
        default="none",
        description="encoding of the network's tensors on their way down, to edges and clients",
    )
    edge_codec: Literal["none", "fp16", "bf16", "qsgd", "top-k"] = Field(
        default="none", description="encoding of the network's tensors in edges' reports to the cloud"
    )


def create_codec(settings: RunSettings, name: str = "") -> Codec:
    """Return the codec of a run.

    Parameters
    ----------
    settings : RunSettings
        The run's settings, including those of the codec (`QSGD.Settings`, `TopK.Settings`).
    name : str, optional
        The codec that the method uses for ``codec=auto``; by default the value of the setting.

    Raises
    ------
    ValueError
        If there is no codec of that name; "auto" is not a codec.
    """
    name = name or settings.of(CodecSettings).codec
    if name == "qsgd":
        s = settings.of(QSGD.Settings)
        return QSGD(s.codec_levels, per_tensor=s.codec_norm == "tensor")
    if name == "top-k":
        return TopK(settings.of(TopK.Settings).codec_keep)
    plain: dict[str, type[Codec]] = {c.name: c for c in (Whole, Float16, BFloat16)}
    if name not in plain:
        raise ValueError(f"there is no codec {name!r}; the method chooses one for codec=auto")
    return plain[name]()
