"""The version of liger-phi; its only place."""

__version__ = "0.1.0"
