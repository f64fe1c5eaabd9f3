"""A client's update on the link: its trained tensors as coded differences, all else as it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from espalier.errors import WireError
from espalier.wire.payload import Layout, TensorSpec, Weights, fault_of

if TYPE_CHECKING:
    from espalier.wire.codec import Arrays, Codec

#: Section of the coded tensors in a reply's payload.
CODE = "code/"


class UpdateForm:
    """How one reply lies on the link: client and edge both derive it from what was sent.

    Only float32 tensors that the client had received are coded, as local − received; buffers
    (running statistics, counters) and the method's further tensors travel as they are.

    Parameters
    ----------
    returned : Layout
        The reply's tensors before coding.
    received : Layout
        What the client was sent.
    buffers : frozenset of str
        Tensors of the network that are not trained.
    codec : Codec or None
        None sends everything as it is.
    """

    def __init__(
        self, returned: Layout, received: Layout, buffers: frozenset[str], codec: Codec | None
    ) -> None:
        self._codec = codec
        self._returned = returned
        before = {t.name: t for t in received.tensors}

        def is_coded(t: TensorSpec) -> bool:
            trained = t.name.rpartition("/")[2] not in buffers
            return codec is not None and t.dtype == "float32" and trained and before.get(t.name) == t

        self.coded = Layout(tuple(t for t in returned.tensors if is_coded(t)))
        self.plain = Layout(tuple(t for t in returned.tensors if not is_coded(t)))
        code = codec.layout(self.coded).tensors if codec and self.coded.tensors else ()
        self.wire = Layout(
            (*self.plain.tensors, *(TensorSpec(CODE + t.name, t.dtype, t.shape) for t in code))
        )

    @property
    def names(self) -> tuple[str, ...]:
        """The reply's tensors before coding."""
        return self._returned.names

    def encode(
        self,
        arrays: Mapping[str, np.ndarray],
        received: Mapping[str, np.ndarray],
        rng: np.random.Generator,
    ) -> tuple[Weights, dict[str, np.ndarray]]:
        """Return the payload, and the tensors as its receiver will read them."""
        payload = self.payload(arrays, received, rng)
        if not self._codec or not self.coded.tensors:
            return payload, dict(arrays)
        return payload, self.decode(payload, received, "this client")

    def payload(
        self,
        arrays: Mapping[str, np.ndarray],
        received: Mapping[str, np.ndarray],
        rng: np.random.Generator,
    ) -> Weights:
        """Return the payload alone, for a sender who need not know what its receiver reads."""
        sent = Weights.blank(self.wire)
        into = sent.views()
        for name in self.plain.names:
            np.copyto(into[name], arrays[name], casting="no")
        if self._codec and self.coded.tensors:
            code = {n.removeprefix(CODE): v for n, v in into.items() if n.startswith(CODE)}
            self._encode(self._codec, arrays, received, rng, code)
        return sent.frozen()

    def _encode(
        self, codec: Codec, arrays: Arrays, received: Arrays, rng: np.random.Generator, into: Arrays
    ) -> None:
        """Code the differences, each in the memory of the one before where that can be: it is in the cache."""
        if not codec.by_tensor:
            differences = Weights.empty(self.coded).views()
            for name, difference in differences.items():
                np.subtract(arrays[name], received[name], out=difference)
            codec.encode(differences, rng, into)
            return
        block = np.empty(max(t.size for t in self.coded.tensors), np.float32)
        for tensor in self.coded.tensors:
            name, difference = tensor.name, block[: tensor.size].reshape(tensor.shape)
            np.subtract(arrays[name], received[name], out=difference)
            codec.encode({name: difference}, rng, {name: into[name]})

    def decode(
        self, payload: Weights, received: Mapping[str, np.ndarray], sender: str
    ) -> dict[str, np.ndarray]:
        """Return the reply's tensors by name; raises WireError where a code makes no sense."""
        views = payload.views()
        if not self._codec or not self.coded.tensors:
            return views
        coded = Weights.empty(self.coded).views()
        self._decode(views, received, sender, coded)
        return {n: coded[n] if n in coded else views[n] for n in self._returned.names}

    def whole(self, payload: Weights, received: Mapping[str, np.ndarray], sender: str) -> Weights:
        """Return the reply's tensors in buffers of their own; raises like :meth:`decode`."""
        views, found = payload.views(), Weights.empty(self._returned)
        into = found.views()
        self._decode(views, received, sender, {n: into[n] for n in self.coded.names})
        for name in self.plain.names:
            np.copyto(into[name], views[name], casting="no")
        return found

    def _decode(
        self,
        views: Mapping[str, np.ndarray],
        received: Mapping[str, np.ndarray],
        sender: str,
        into: Mapping[str, np.ndarray],
    ) -> None:
        """Write the coded tensors to `into`."""
        if not self._codec or not into:
            return
        code = {n.removeprefix(CODE): v for n, v in views.items() if n.startswith(CODE)}
        self._codec.decode(code, self.coded, sender, into)
        for name, array in into.items():
            array += received[name]
            if fault := fault_of(array):  # a small code may stand for large numbers
                raise WireError(sender, f"tensor {name!r} comes to {fault}")
