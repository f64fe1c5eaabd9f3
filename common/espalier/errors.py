"""The errors that a user sees: each message says what is wrong, where, and the remedy."""

from __future__ import annotations


class EspalierError(Exception):
    """An error that a user can correct; the command line prints its message and exits with `exit_code`."""

    exit_code = 1


class ConfigError(EspalierError):
    """A setting is unknown, of the wrong type or out of range."""

    exit_code = 2


class DataError(EspalierError):
    """A data folder or data set cannot be used."""

    exit_code = 3


class AddressError(EspalierError):
    """An address does not parse, or no server answers there."""

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


#: Errors that a method raises for invalid values: ValueError from its checks, the others from its arithmetic.
UNSOUND = (ValueError, ArithmeticError, LookupError, TypeError)


def unsound(error: Exception) -> str:
    """Return the text of an `UNSOUND` error, with its type if it is not from a check."""
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
