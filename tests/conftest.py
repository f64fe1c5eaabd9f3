"""One Hypothesis profile for all tests: many of them share two cores, so a slow example proves nothing."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("espalier", deadline=None)
settings.load_profile("espalier")
