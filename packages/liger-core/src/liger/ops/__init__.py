"""The ops, each usable alone on any model's tensors."""

from liger.ops.rms_norm import rms_norm

__all__ = ["rms_norm"]
