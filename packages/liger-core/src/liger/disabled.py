"""`LIGER_DISABLE=1` in the environment turns Liger off, to find out whether it is at fault. It is read once, at import.

`liger.apply` then swaps nothing, and the ops of `liger.ops`, `liger.nn` and `liger.losses` run their references.
"""

import os

DISABLED = os.environ.get("LIGER_DISABLE", "0") not in ("", "0")
