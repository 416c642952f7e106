"""Liger in Axolotl, as a plugin: the model that Axolotl has loaded is patched, its adapters included.

Put this file where Python finds it, and name its class in the YAML, as `config.yml` beside it does:

    PYTHONPATH=examples/axolotl axolotl train examples/axolotl/config.yml

Leave out `axolotl.integrations.liger.LigerPlugin`, which is another library. What Axolotl replaces itself, as its LoRA
kernels do with the MLPs (`lora_mlp_kernel`), stays as it is, and the log says so.

Axolotl 0.19.0 pins a transformers older than these packages take: install it with `pip install --no-deps`, and what it
imports beside it, as the environment `axolotl` in `hatch.toml` does.
"""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin
from axolotl.utils.logging import get_logger

import liger


class LigerPlugin(BasePlugin):  # type: ignore[misc]  # of an untyped class
    """Patches every model that Axolotl loads, a reference model too."""

    def post_model_load(self, cfg: Any, model: Any) -> None:
        """Run after Axolotl has resized the embeddings and put the adapters on: both make new modules."""
        get_logger("axolotl.liger").info(liger.apply(model))  # Axolotl shows its own loggers' INFO only
