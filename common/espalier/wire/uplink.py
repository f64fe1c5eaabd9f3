"""Encoding of replies from clients and edges: trained tensors as coded differences, all others unchanged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from espalier.errors import WireError
from espalier.wire.payload import Layout, TensorSpec, Weights, fault_of
from espalier.wire.sections import Layouts, Payload, SectionId, Sections

if TYPE_CHECKING:
    from espalier.wire.codec import Codec

#: Section of the coded tensors.
CODE = SectionId("code")

#: A tensor of a payload: its section and its name there.
Key = tuple[SectionId, str]


class UplinkEncoding:
    """The encoding of one reply; sender and receiver both derive it from the payload that was sent down.

    Only float32 tensors that the client has received are coded, as the difference local − received. Buffers
    (running statistics, counters) and the method's other tensors are sent unchanged. The codec encodes the coded
    tensors of all sections as one update, so a norm or a threshold covers all of them.

    Parameters
    ----------
    returned : mapping of SectionId to Layout
        The reply's sections before coding.
    received : mapping of SectionId to Layout
        The sections that were sent to the client.
    buffers : frozenset of str
        Tensors of the network that are not trained.
    codec : Codec or None
        None: all tensors are sent unchanged.
    """

    def __init__(
        self, returned: Layouts, received: Layouts, buffers: frozenset[str], codec: Codec | None
    ) -> None:
        self._codec = codec
        self._returned = {s: layout for s, layout in returned.items() if layout.tensors}

        def is_coded(section: SectionId, t: TensorSpec) -> bool:
            if codec is None or t.dtype != "float32" or t.name in buffers or section not in received:
                return False
            return received[section].get(t.name) == t

        coded: dict[str, tuple[Key, TensorSpec]] = {}
        plain: dict[SectionId, Layout] = {}
        for section, layout in self._returned.items():
            rest = []
            for t in layout.tensors:
                if not is_coded(section, t):
                    rest.append(t)
                    continue
                # A label that is unique within the code; `_keys` maps it back to section and name.
                label = t.name
                while label in coded:
                    label += f" of {section}"
                coded[label] = ((section, t.name), TensorSpec(label, t.dtype, t.shape))
            if rest:
                plain[section] = Layout(tuple(rest))
        self.plain = plain
        self.coded = Layout(tuple(spec for _, spec in coded.values()))
        self._keys = {label: key for label, (key, _) in coded.items()}
        code = {CODE: codec.layout(self.coded)} if codec and coded else {}
        self.wire: dict[SectionId, Layout] = {**plain, **code}

    @property
    def keys(self) -> list[Key]:
        """The reply's tensors before coding, in order."""
        return [(section, name) for section, layout in self._returned.items() for name in layout.names]

    def encode(
        self, arrays: Sections, received: Sections, rng: np.random.Generator
    ) -> tuple[Payload, dict[SectionId, dict[str, np.ndarray]]]:
        """Return the payload, and the tensors as the receiver will decode them."""
        payload = self.payload(arrays, received, rng)
        if not self._keys:
            return payload, {section: dict(tensors) for section, tensors in arrays.items()}
        return payload, self.decode(payload, received, "this client")

    def payload(self, arrays: Sections, received: Sections, rng: np.random.Generator) -> Payload:
        """Return only the payload, for a sender that does not need the decoded tensors."""
        sent = Payload.blank(self.wire)
        into = sent.views()
        for section, layout in self.plain.items():
            for name in layout.names:
                np.copyto(into[section][name], arrays[section][name], casting="no")
        if self._codec and self._keys:
            self._encode(self._codec, arrays, received, rng, into[CODE])
        return sent.frozen()

    def _encode(
        self,
        codec: Codec,
        arrays: Sections,
        received: Sections,
        rng: np.random.Generator,
        into: Mapping[str, np.ndarray],
    ) -> None:
        """Encode the differences; for a codec that works per tensor in one buffer, which stays in cache."""
        if not codec.by_tensor:
            differences = Weights.empty(self.coded).views()
            for label, difference in differences.items():
                section, name = self._keys[label]
                np.subtract(arrays[section][name], received[section][name], out=difference)
            codec.encode(differences, rng, into)
            return
        block = np.empty(max(t.size for t in self.coded.tensors), np.float32)
        for tensor in self.coded.tensors:
            label, difference = tensor.name, block[: tensor.size].reshape(tensor.shape)
            section, name = self._keys[label]
            np.subtract(arrays[section][name], received[section][name], out=difference)
            codec.encode({label: difference}, rng, {label: into[label]})

    def decode(
        self, payload: Payload, received: Sections, sender: str
    ) -> dict[SectionId, dict[str, np.ndarray]]:
        """Return the reply's tensors by section; raises WireError if a code is invalid."""
        views = payload.views()
        if not self._keys:
            return views
        coded = Weights.empty(self.coded).views()
        self._decode(views[CODE], received, sender, coded)
        found = {s: {n: views[s][n] for n in layout.names} for s, layout in self.plain.items()}
        for label, (section, name) in self._keys.items():
            found.setdefault(section, {})[name] = coded[label]
        return {
            section: {name: found[section][name] for name in layout.names}
            for section, layout in self._returned.items()
        }

    def whole(self, payload: Payload, received: Sections, sender: str) -> Payload:
        """Return the decoded sections in newly allocated buffers; raises like :meth:`decode`."""
        views = payload.views()
        found = {section: Weights.empty(layout) for section, layout in self._returned.items()}
        into = {section: weights.views() for section, weights in found.items()}
        coded = {label: into[s][n] for label, (s, n) in self._keys.items()}
        self._decode(views.get(CODE, {}), received, sender, coded)
        for section, layout in self.plain.items():
            for name in layout.names:
                np.copyto(into[section][name], views[section][name], casting="no")
        return Payload(found)

    def _decode(
        self,
        code: Mapping[str, np.ndarray],
        received: Sections,
        sender: str,
        into: Mapping[str, np.ndarray],
    ) -> None:
        """Decode the coded tensors into `into`, by label."""
        if self._codec and into:
            self._codec.decode(code, self.coded, sender, into)
        for label, array in into.items():
            section, name = self._keys[label]
            array += received[section][name]
            if fault := fault_of(array):  # valid codes may decode to values that are too large
                raise WireError(sender, f"tensor {name!r} decodes to {fault}")
