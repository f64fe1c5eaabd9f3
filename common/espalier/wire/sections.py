"""The payload of a message: named sections of tensors, carried as ArrayRecords with one flat Array per dtype."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np
from flwr.app import ArrayRecord

from espalier.errors import WireError
from espalier.flower.arrays import array_from_numpy, blank_array, numpy_view
from espalier.wire.payload import MAX_ELEMENTS, MAX_TENSORS, STORED_AS, Layout, Weights, read_buffers
from espalier_proto import espalier_pb2 as pb

#: Maximum number of sections of a payload; each peer's network and each client's forwarded tensors are one section.
MAX_SECTIONS = 10_000
#: Maximum length of a section's member, which is the name of a client or a number.
MAX_MEMBER = 64

_NAME = re.compile(r"[a-z][a-z0-9-]{0,31}")
#: Keys of the other records of a message; a section cannot use them.
_RESERVED = frozenset({"arrays", "config", "metrics", "espalier"})


class SectionId(NamedTuple):
    """Identifies one section of a payload.

    Attributes
    ----------
    name : str
        "model" for the network; other names are defined by the method that uses them.
    member : str
        Distinguishes sections of the same name, e.g. by a client's name or a cluster's number; empty if there is one.
    record : str
        Name of the ArrayRecord that holds the section; empty: the name of the section.
    """

    name: str
    member: str = ""
    record: str = ""

    def __str__(self) -> str:
        text = f"{self.name}[{self.member}]" if self.member else self.name
        return f"{text} in {self.record}" if self.record else text

    @property
    def key(self) -> str:
        """Key of its ArrayRecord in a message; Flower's strategies expect the model under "arrays"."""
        record = self.record or self.name
        return "arrays" if record == MODEL.name else record


MODEL = SectionId("model")
#: A client's gradient at the received network, in answers to inquiries and for DivFL's selection.
GRADIENT = SectionId("gradient")
#: Name of the sections with clients' own networks at the servers (co-distillation); the member is the client's name.
#: A plan describes these networks in `peers`.
PEER = "peer"

#: Arrays by tensor name, by section.
Sections = Mapping[SectionId, Mapping[str, np.ndarray]]
#: Layouts by section.
Layouts = Mapping[SectionId, Layout]


class Sectioned(Protocol):
    """A protobuf message that lists the sections of a payload."""

    @property
    def sections(self) -> Iterable[pb.Section]:
        """Its sections."""


class Payload(Mapping[SectionId, Weights]):
    """An ordered mapping of sections to tensors; sections of the same record share its buffers.

    Parameters
    ----------
    sections : mapping of SectionId to Weights
        The sections.
    records : mapping of str to ArrayRecord, optional
        The records whose memory the sections are views of, by key; they are sent without a copy.
    """

    def __init__(
        self, sections: Mapping[SectionId, Weights], records: Mapping[str, ArrayRecord] | None = None
    ) -> None:
        self._sections, self._records = dict(sections), records

    def __getitem__(self, section: SectionId) -> Weights:
        return self._sections[section]

    def __iter__(self) -> Iterator[SectionId]:
        return iter(self._sections)

    def __len__(self) -> int:
        return len(self._sections)

    @classmethod
    def of(cls, model: Weights) -> Payload:
        """Return a payload with the model as its only section."""
        return cls({MODEL: model})

    @classmethod
    def pack(cls, arrays: Sections) -> Payload:
        """Copy arrays into new buffers."""
        return cls({section: Weights.pack(tensors) for section, tensors in arrays.items()})

    @classmethod
    def fill(cls, layouts: Layouts, arrays: Sections) -> Payload:
        """Copy arrays into new buffers of given layouts."""
        return cls({s: Weights.fill(layout, arrays.get(s, {})) for s, layout in layouts.items()})

    @classmethod
    def blank(cls, layouts: Layouts) -> Payload:
        """Return zeros in the memory of the records to be sent; fill them, then call :meth:`frozen`."""
        buffers: dict[str, dict[str, np.ndarray]] = {}
        records: dict[str, ArrayRecord] = {}
        for key, members in grouped(layouts).items():
            made = {d: blank_array(STORED_AS[d], (n,)) for d, n in total_lengths(members.values()).items()}
            buffers[key] = {dtype: numbers for dtype, (_, numbers) in made.items()}
            records[key] = ArrayRecord({dtype: array for dtype, (array, _) in made.items()})
        return cls(_split(layouts, buffers, records), records)

    @cached_property
    def layouts(self) -> dict[SectionId, Layout]:
        """Layouts by section."""
        return {section: weights.layout for section, weights in self._sections.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(weights.nbytes for weights in self._sections.values())

    def views(self) -> dict[SectionId, dict[str, np.ndarray]]:
        """Return every tensor as a view, by section."""
        return {section: weights.views() for section, weights in self._sections.items()}

    def only(self, sections: Iterable[SectionId]) -> Payload:
        """Return some of the sections, without a copy; `self` if all are selected."""
        wanted = set(sections)
        chosen = {s: w for s, w in self._sections.items() if s in wanted}
        return self if len(chosen) == len(self._sections) else Payload(chosen)

    def replaced(self, sections: Mapping[SectionId, Weights]) -> Payload:
        """Return this payload with some sections replaced or added."""
        return Payload(self._sections | dict(sections))

    def to_records(self) -> dict[str, ArrayRecord]:
        """Return the ArrayRecords to send, by key; empty sections have none. Do not modify them."""
        if self._records is not None:
            return dict(self._records)
        records: dict[str, ArrayRecord] = {}
        for key, members in grouped(self.layouts).items():
            parts = [self._sections[section] for section in members]
            if len(parts) == 1:
                records[key] = parts[0].to_record()
                continue
            records[key] = ArrayRecord(
                {
                    dtype: array_from_numpy(
                        np.concatenate([p.buffers[dtype] for p in parts if dtype in p.buffers])
                    )
                    for dtype in total_lengths(members.values())
                }
            )
        return records

    def frozen(self) -> Payload:
        """Return the same values as read-only views of the records to send, so that only one copy is in memory."""
        if self._records is not None:
            for weights in self._sections.values():
                for buffer in weights.buffers.values():
                    buffer.flags.writeable = False
            return self
        records = self.to_records()
        buffers = {
            key: {dtype: numpy_view(array) for dtype, array in record.items()}
            for key, record in records.items()
        }
        return Payload(_split(self.layouts, buffers, records), records)

    @classmethod
    def read(cls, records: Mapping[str, ArrayRecord], layouts: Layouts, sender: str) -> Payload:
        """Read the ArrayRecords of a message; the sections are read-only views of the received bytes.

        Parameters
        ----------
        records : mapping of str to ArrayRecord
            All ArrayRecords of the message, by key.
        layouts : mapping of SectionId to Layout
            The expected sections.
        sender : str
            Name of the sender, for error messages.

        Raises
        ------
        WireError
            If a record or a buffer is missing or superfluous, is of another dtype, shape or length, or holds a value
            that `espalier.wire.payload.fault_of` rejects.
        """
        expected = grouped(layouts)
        if missing := expected.keys() - records.keys():
            raise WireError(sender, f"no record {min(missing)!r} in the message")
        # A plain Flower reply without tensors has an empty record.
        if extra := {key for key, record in records.items() if record} - expected.keys():
            raise WireError(sender, f"the record {min(extra)[:64]!r} was not asked for")
        buffers = {
            key: read_buffers(records[key], total_lengths(members.values()), sender)
            for key, members in expected.items()
        }
        payload = cls(_split(layouts, buffers, records), {key: records[key] for key in expected})
        for section, weights in payload.items():
            if fault := weights.not_finite():
                raise WireError(sender, _in_section(fault, section))
        return payload


# --- layouts -----------------------------------------------------------------------------------------


def grouped(layouts: Layouts) -> dict[str, dict[SectionId, Layout]]:
    """Group the sections that have tensors by the key of their record, in order."""
    found: dict[str, dict[SectionId, Layout]] = {}
    for section, layout in layouts.items():
        if layout.tensors:
            found.setdefault(section.key, {})[section] = layout
    return found


def total_lengths(layouts: Iterable[Layout]) -> dict[str, int]:
    """Return the number of elements per dtype of the sections of one record."""
    total: dict[str, int] = {}
    for layout in layouts:
        for dtype, length in layout.lengths.items():
            total[dtype] = total.get(dtype, 0) + length
    return total


def _split(
    layouts: Layouts, buffers: Mapping[str, Mapping[str, np.ndarray]], records: Mapping[str, ArrayRecord]
) -> dict[SectionId, Weights]:
    """Slice the buffers of the records into sections."""
    offsets: dict[tuple[str, str], int] = {}
    shared = {key: len(members) > 1 for key, members in grouped(layouts).items()}
    found = {}
    for section, layout in layouts.items():
        parts = {}
        for dtype, length in layout.lengths.items():
            buffer = (section.key, dtype)
            start = offsets.get(buffer, 0)
            offsets[buffer] = start + length
            parts[dtype] = buffers[section.key][dtype][start : start + length]
        alone = layout.tensors and not shared[section.key]
        found[section] = Weights(layout, parts, records[section.key] if alone else None)
    return found


def layouts_to_proto(layouts: Layouts) -> list[pb.Section]:
    """Return the protobuf form of layouts."""
    return [pb.Section(**section._asdict(), layout=layout.to_proto()) for section, layout in layouts.items()]


def layouts_from_proto(sections: Iterable[pb.Section], sender: str) -> dict[SectionId, Layout]:
    """Read and validate the list of sections of a message.

    Raises
    ------
    WireError
        If a section's name is invalid or repeated, a layout is invalid, or the total number of sections, tensors or
        elements is too large.
    """
    listed = list(sections)
    if len(listed) > MAX_SECTIONS:
        raise WireError(sender, f"a payload of {len(listed)} sections, more than {MAX_SECTIONS}")
    if (tensors := sum(len(s.layout.tensors) for s in listed)) > MAX_TENSORS:
        raise WireError(sender, f"a layout of {tensors} tensors, more than {MAX_TENSORS}")
    found: dict[SectionId, Layout] = {}
    for s in listed:
        section = SectionId(s.name, s.member, s.record)
        for text in (s.name, s.record or s.name):
            if not _NAME.fullmatch(text) or text in _RESERVED:
                raise WireError(sender, f"the invalid section or record name {text[:64]!r}")
        if len(s.member) > MAX_MEMBER or not s.member.isprintable():
            raise WireError(sender, f"a section {s.name!r} with the invalid member {s.member[:MAX_MEMBER]!r}")
        if section in found:
            raise WireError(sender, f"the section {section} is repeated")
        found[section] = Layout.from_proto(s.layout.tensors, sender)
    if sum(t.size for layout in found.values() for t in layout.tensors) > MAX_ELEMENTS:
        raise WireError(sender, f"a payload of more than {MAX_ELEMENTS} elements")
    return found


def difference(expected: Layouts, other: Layouts) -> str:
    """Return a short description of the first difference between sections and the expected ones, or ""."""
    if missing := [s for s, layout in expected.items() if s not in other and layout.tensors]:
        tensors = expected[missing[0]].tensors
        return _in_section(f"tensor {tensors[0].name!r} is missing ({len(tensors)} in all)", missing[0])
    if extra := [s for s, layout in other.items() if s not in expected and layout.tensors]:
        tensors = other[extra[0]].tensors
        return _in_section(f"tensor {tensors[0].name!r} was not asked for ({len(tensors)} in all)", extra[0])
    for section, layout in expected.items():
        if fault := layout.difference(other.get(section, Layout(()))):
            return _in_section(fault, section)
    order = [s for s, layout in expected.items() if layout.tensors]
    return "" if order == [s for s in other if other[s].tensors] else "the sections are in another order"


def _in_section(fault: str, section: SectionId) -> str:
    return fault if section == MODEL else f"section {section}: {fault}"
