"""Liger: Triton kernels for training language models, and one line that puts them into a Hugging Face model.

    import liger
    patch = liger.apply(model)

The ops stand in `liger.ops`, as modules in `liger.nn`; `liger.testing` tests an adapter.
"""

import logging

from liger.__about__ import __version__
from liger.adapter import Adapter
from liger.discover import AdapterConflictError, NoAdapterError, VersionRangeError, adapters
from liger.patch import Patch, apply
from liger.verify import Verification, verify

logging.getLogger(__name__).addHandler(logging.NullHandler())

__all__ = [
    "Adapter",
    "AdapterConflictError",
    "NoAdapterError",
    "Patch",
    "Verification",
    "VersionRangeError",
    "__version__",
    "adapters",
    "apply",
    "verify",
]
