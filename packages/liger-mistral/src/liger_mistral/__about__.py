"""The version of liger-mistral; its only place."""

__version__ = "0.1.0"
