"""The version of liger-gemma; its only place."""

__version__ = "0.1.0"
