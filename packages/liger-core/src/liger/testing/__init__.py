"""How an adapter tests itself, and an op: the conformance class, the error rule, the pytest plugin.

An adapter's package has in its pyproject.toml

    [tool.pytest.ini_options]
    addopts = "-p liger.testing.plugin"

and one class for each model, which inherits every test of the contract:

    from liger.testing import TINY, AdapterContract

    class TestGranite(AdapterContract):
        adapter = granite

        def config(self):
            return GraniteConfig(**TINY, logits_scaling=3.0)

What the adapter names must be on in that config. What it declines stands in `declines`, with the reason. When an
adapter fails, the closing lines say which, on which transformers, and in which tests.

An op's test compares with fp64: `assert_as_exact_as(ours, torch_own, exact)`, under the fixtures `device` and `path`.

Nothing of this is imported by `import liger`, and without the `-p` above pytest loads none of it.
"""

import pytest

from liger.testing import plugin  # noqa: F401  # first: it decides how kernels run before any is defined

pytest.register_assert_rewrite(
    "liger.testing.contract", "liger.testing.parity", "liger.testing.error_rule"
)  # before they are imported

from liger.testing.contract import AdapterContract  # noqa: E402
from liger.testing.error_rule import assert_as_exact_as  # noqa: E402
from liger.testing.tiny import TINY  # noqa: E402

__all__ = ["TINY", "AdapterContract", "assert_as_exact_as"]
