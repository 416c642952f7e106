"""The version of liger-llama; its only place."""

__version__ = "0.1.0"
