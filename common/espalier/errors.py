"""The errors a user sees: each says what is wrong, where, and how to mend it."""

from __future__ import annotations


class EspalierError(Exception):
    """A fault that a person can mend; the command line prints its text and exits with `exit_code`."""

    exit_code = 1


class ConfigError(EspalierError):
    """A setting is unknown, of the wrong type or out of range."""

    exit_code = 2


class DataError(EspalierError):
    """A data folder or data set cannot be used as given."""

    exit_code = 3


class AddressError(EspalierError):
    """An address does not parse or nobody answers there."""

    exit_code = 4


class StateError(EspalierError):
    """A state folder is in use, unwritable or damaged."""

    exit_code = 5


class WireError(EspalierError):
    """A received message is refused.

    Parameters
    ----------
    sender : str
        Name of the client or edge that sent it.
    fault : str
        What is wrong with it, in one sentence without a full stop.
    """

    exit_code = 6

    def __init__(self, sender: str, fault: str) -> None:
        super().__init__(f"message of {sender!r} refused: {fault}")
        self.sender = sender
        self.fault = fault


#: What a method's arithmetic raises over numbers that make no sense: ValueError where it looked, else the others.
UNSOUND = (ValueError, ArithmeticError, LookupError, TypeError)


def unsound(error: Exception) -> str:
    """Return what an `UNSOUND` error says of a message: its own words, and its kind where it was not foreseen."""
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
