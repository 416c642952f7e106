"""What a test of an op or of an adapter needs: the error rule, the fixtures, and the adapters' conformance class."""

import pytest

from liger.testing import plugin  # noqa: F401  # first: it decides how kernels run before any is defined

pytest.register_assert_rewrite(
    "liger.testing.contract", "liger.testing.parity", "liger.testing.error_rule"
)  # before they are imported

from liger.testing.contract import AdapterContract  # noqa: E402
from liger.testing.error_rule import assert_as_exact_as  # noqa: E402
from liger.testing.tiny import TINY  # noqa: E402

__all__ = ["TINY", "AdapterContract", "assert_as_exact_as"]
