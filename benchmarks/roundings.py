"""What summing dW over chunks in bf16 costs in exactness where labels are like text's, simulated on a CPU.

`python -m benchmarks.roundings`, in minutes. Labels follow Zipf's law; the logits are its logarithms, with noise, and
with something more at the label for a model that knows it. As on a GPU, a chunk's product is rounded before it is
added.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from liger.ops.linear_chunks import FREQUENT, UPDATES

_HIDDEN = 16
_AT_ONCE = 256  # rows


def _dlogits(labels: Tensor, log_often: Tensor, known: float) -> Tensor:
    """(rows, classes): the gradient of the sum of the losses, in bf16."""
    z = log_often + 1.5 * torch.randn(len(labels), len(log_often))
    label = labels[:, None]
    z.scatter_add_(-1, label, known * torch.rand(label.shape))
    p = z.softmax(-1)
    return p.scatter_add_(-1, label, torch.full(label.shape, -1.0)).bfloat16()


def errors(rows: int, classes: int, known: float, exponent: float) -> tuple[float, float]:
    """dW's error as a multiple of one product's: all of it summed in bf16, and the frequent classes in fp32."""
    often = torch.arange(1, classes + 1).double() ** -exponent
    labels = torch.multinomial(often, rows, replacement=True)
    x = torch.randn(rows, _HIDDEN).bfloat16()
    frequent = labels.bincount(minlength=classes).topk(FREQUENT).indices
    exact, total = torch.zeros(classes, _HIDDEN, dtype=torch.float64), torch.zeros(classes, _HIDDEN).bfloat16()
    for chunk in torch.arange(rows).chunk(UPDATES):
        product = torch.zeros(classes, _HIDDEN, dtype=torch.float64)
        for part in chunk.split(_AT_ONCE):
            product += (_dlogits(labels[part], often.log().float(), known).float().T @ x[part].float()).double()
        exact += product
        total += product.bfloat16()

    def error(dw: Tensor) -> float:
        return ((dw - exact).norm() / exact.norm()).item()

    one = error(exact.bfloat16())
    mixed = total.clone()
    mixed[frequent] = exact[frequent].bfloat16()
    return error(total) / one, error(mixed) / one


def main() -> None:
    """Print one line for each size and kind of model."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roundings", description=__doc__)
    parser.add_argument("--rows", type=int, nargs="*", default=[8192, 16384])
    parser.add_argument("--classes", type=int, default=128256)
    given = parser.parse_args()
    torch.manual_seed(0)
    print(f"rows×classes  Zipf's exponent  known  {UPDATES} chunks in bf16  {FREQUENT} classes of it in fp32")
    for rows in given.rows:
        for known, exponent in ((0.0, 1.0), (8.0, 1.0), (8.0, 1.2)):
            in_bf16, mixed = errors(rows, given.classes, known, exponent)
            print(f"{rows}×{given.classes}  {exponent}  {known}  {in_bf16:.2f}  {mixed:.2f}", flush=True)


if __name__ == "__main__":
    main()
