"""The version, shared by both packages and the wheel."""

__version__ = "0.1.0"
