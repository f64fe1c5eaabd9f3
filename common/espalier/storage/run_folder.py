"""Names of files in the folder of a run that several packages read."""

from __future__ import annotations

REPORT_FILE = "report.json"
"""What a run measured, as JSON."""
