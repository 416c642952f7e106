"""What the tests of several models that see images are given."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from liger.testing.tiny import batch


@pytest.fixture
def with_an_image(device) -> dict[str, Any]:
    """Two rows of text, each with an image of four tokens, whose number is 95, from sixteen patches."""
    inputs = batch(95, device)
    image = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    image[:, 2:6] = True
    return {
        "input_ids": inputs["input_ids"].masked_fill(image, 95),
        "labels": inputs["labels"].masked_fill(image, -100),
        "mm_token_type_ids": image.int(),
        "pixel_values": torch.randn(2 * 16, 3 * 2 * 2 * 2, generator=torch.Generator().manual_seed(2)).to(device),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * 2, device=device),
    }
