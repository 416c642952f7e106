"""How far a step's loss and gradients are from those of the stock model, and how far rounding moves stock's own.

In bf16, through dozens of layers, two equally exact computations lie percents apart; how many depends on the model. So
it is measured on the model itself, as Monte Carlo arithmetic does: stock's step runs again while some modules' outputs,
and the gradients that come back into them, are multiplied by 1 + ε r, with r from {−1, 0, 1} at random, which is
another rounding of each element. What this moves a gradient by is stock's own rounding. Kernels that round as well as
the code that they stand for stay at 0.2 to 0.6 of it in nearly every gradient of the families' models, in fp32,
bf16 and fp16; single numbers, where luck decides, now and then above 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

_DRAWS = 3  # the largest of three: of a single number one alone may be near 0
_LOSS_SCALE = 1024.0  # exact in every dtype; keeps gradients in fp16 from underflowing


class Yardstick:
    """A step of the stock model: its loss and gradients, kept in host memory, and what rounding does to each.

    Attributes:
        names: of the loss and of each trainable parameter's gradient.
        rounding: for each, the distance from stock to stock rounded otherwise.
        unreached: the modules among `nudged` that a step never calls.
    """

    def __init__(self, model: nn.Module, inputs: Mapping[str, Any], nudged: Iterable[nn.Module], seed: int) -> None:
        """Take the steps. The model must be stock now; the outputs of `nudged` are rounded otherwise.

        Raises:
            ValueError: the outputs of the model hold no loss.
            FloatingPointError: its loss or a gradient is not finite.
        """
        self._model, self._inputs, nudged = model, inputs, set(nudged)
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._parameters = list(parameters.values())
        self.names = ["the loss", *(f"the gradient of {name}" for name in parameters)]
        self._stock = [None if value is None else value.cpu() for value in self._step()]
        for name, value in zip(self.names, self._stock, strict=True):
            if value is not None and not value.isfinite().all():
                raise FloatingPointError(f"{name} is not finite without any kernel")
        nudge = _Nudge(seed)
        hooks = [module.register_forward_hook(nudge) for module in nudged]
        try:
            draws = [self.distances() for _ in range(_DRAWS)]
        finally:
            for hook in hooks:
                hook.remove()
        least = [torch.finfo(torch.float32 if value is None else value.dtype).eps for value in self._stock]
        self.rounding = [max(of_one) for of_one in zip(*draws, least, strict=True)]
        self.unreached = nudged - nudge.reached

    def distances(self) -> list[float]:
        """‖now − stock‖ / ‖stock‖ of the loss and each gradient of a step; inf where one of the two has none."""
        step, distances = self._step(), []
        for stock in self._stock:
            now = step.pop(0)  # and let go of it before the next one's temporaries
            if now is None or stock is None:
                distances.append(0.0 if now is stock else float("inf"))
                continue
            stock = stock.to(now.device)
            dtype = torch.promote_types(now.dtype, torch.float32)
            distance = torch.linalg.vector_norm(now - stock, dtype=dtype)
            relative = (distance / (torch.linalg.vector_norm(stock, dtype=dtype).item() or 1.0)).item()
            distances.append(relative if relative == relative else float("inf"))
        return distances

    def _step(self) -> list[Tensor | None]:
        """The loss and the gradients. No `.grad` is touched, and the random states are what they were before."""
        devices = {p.device for p in self._model.parameters() if p.device.index is not None}
        kind = next((device.type for device in devices), "cuda")
        forked = torch.random.fork_rng([device.index for device in devices], device_type=kind)
        with torch.inference_mode(False), torch.enable_grad(), forked:
            output = self._model(**self._inputs)
            loss = output.get("loss") if isinstance(output, Mapping) else output[0]
            if not isinstance(loss, Tensor) or loss.dim():
                raise ValueError(f"{type(self._model).__name__} returned no loss for {', '.join(self._inputs)}")
            if not loss.requires_grad:
                return [loss, *(None for _ in self._parameters)]
            gradients = torch.autograd.grad(loss * _LOSS_SCALE, self._parameters, allow_unused=True)
        return [loss.detach(), *gradients]


class _Nudge:
    """A forward hook that multiplies what a module returns, and the gradient that comes back, by 1 + ε r."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.generators: dict[torch.device, torch.Generator] = {}
        self.reached: set[nn.Module] = set()

    def __call__(self, module: nn.Module, _: Any, output: Any) -> Any:
        self.reached.add(module)
        return (self._round(output[0]), *output[1:]) if isinstance(output, tuple) else self._round(output)

    def _round(self, y: Tensor) -> Tensor:
        if y.device not in self.generators:  # not the global one, whose numbers are for dropout
            self.generators[y.device] = torch.Generator(y.device).manual_seed(self.seed)
        r = torch.randint(-1, 2, y.shape, dtype=torch.int8, device=y.device, generator=self.generators[y.device])
        return y * (1 + torch.finfo(y.dtype).eps * r.to(y.dtype))
