"""What a test of an op or of an adapter needs: the error rule, the fixtures, and the adapters' conformance class."""

from liger.testing.error_rule import assert_as_exact_as

__all__ = ["assert_as_exact_as"]
