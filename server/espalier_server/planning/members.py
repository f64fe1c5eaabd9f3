"""The conditions under which a client is a member of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from espalier.errors import WireError
from espalier.methods.planning import Member
from espalier_proto import espalier_pb2 as pb


@dataclass(frozen=True)
class FrozenMember:
    """The properties of a client that must not change in a reproducible run: its edges and its data."""

    edges: tuple[str, ...]
    samples: int
    labels: tuple[float, ...]

    @classmethod
    def of(cls, member: Member) -> FrozenMember:
        """Return the properties of a member."""
        return cls(member.edges, member.samples, tuple(member.labels.tolist()))

    def difference(self, hello: pb.ClientHello) -> str:
        """Return how a hello differs from these properties, "" if it does not."""
        same = (self.samples, list(self.labels)) == (hello.samples, list(hello.histogram.counts))
        return "" if same else "its images or labels are not those it had when the run began"


def check_level(client: pb.ClientHello, smallest_level: float) -> None:
    """Check that a client can train one of the run's sub-models; a level of 0 is not set.

    Raises
    ------
    WireError
        The client's level is below the smallest of the run.
    """
    if 0 < client.level < smallest_level:
        raise WireError(
            client.name,
            f"its level {client.level:g} is below the smallest of levels ({smallest_level:g}); "
            "add a smaller one there or raise the client's --level",
        )


def check_reproducible(client: pb.ClientHello, frozen: Mapping[str, FrozenMember]) -> None:
    """Check that a client can participate in a reproducible run.

    Parameters
    ----------
    client : pb.ClientHello
        The client's hello.
    frozen : mapping of str to FrozenMember
        The members of the run by name; empty before it has begun.

    Raises
    ------
    WireError
        The client does not train on a CPU, joined after the run had begun, or has other data than before.
    """
    if client.facts.device != "cpu":
        raise WireError(
            client.name,
            f"it trains on {client.facts.device}, and reproducible=true is for CPUs; "
            "start it with --device cpu",
        )
    if not frozen:
        return
    if client.name not in frozen:
        raise WireError(
            client.name, "it joined after a reproducible run had begun; it waits for the next run"
        )
    if fault := frozen[client.name].difference(client):
        raise WireError(client.name, f"{fault}; restore its data, or start a new run")


def check_same_data_shape(client: pb.ClientHello, other: pb.ClientHello) -> None:
    """Check that two clients have the same classes and the same image shape.

    Raises
    ------
    WireError
        They do not; it names `client`.
    """
    if list(client.classes) != list(other.classes):
        raise WireError(
            client.name,
            f"its classes {list(client.classes)[:5]}… are not those of {other.name} "
            f"({list(other.classes)[:5]}…); give its data folders the same names",
        )
    if list(client.image_shape) != list(other.image_shape):
        raise WireError(
            client.name,
            f"its images are {list(client.image_shape)}, those of {other.name} "
            f"{list(other.image_shape)} (channels, height, width)",
        )
