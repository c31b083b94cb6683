"""The one exception of the video tool: what the user gave cannot be done, and why."""

from __future__ import annotations


class VideoError(Exception):
    """Input or output that cannot be handled, said in one line that names the file or option."""
