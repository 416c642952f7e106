"""The version of liger-qwen; its only place."""

__version__ = "0.1.0"
