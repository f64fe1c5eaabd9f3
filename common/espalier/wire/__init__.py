"""Payload types, codecs and validation: everything that becomes or was a message."""
