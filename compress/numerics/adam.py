"""Adam whose two moments are kept in bfloat16, rounded stochastically: half the memory of the usual state."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

AT_ONCE = 2**18  # weights of which float32 moments exist at a time: they stay in the cache


def stochastic_bfloat16(x: Tensor, noise: Tensor) -> Tensor:
    """Round x to one of its two neighbours in bfloat16, the nearer the likelier, so that the mean is x.

    x: float32, finite. noise: int32 of the same shape, uniform over [0, 2^16); it is added below the bits that stay.
    Nearest rounding would lose every change of a moment below 2^-9 of it.
    Gupta et al. 2015, arXiv:1502.02551; for bfloat16 training Zamirai et al. 2020, arXiv:2010.06192.

    >>> x = torch.tensor([1.0, 1.00390625])
    >>> stochastic_bfloat16(x, torch.tensor([65535, 32767], dtype=torch.int32)).tolist()
    [1.0, 1.0]
    >>> stochastic_bfloat16(x, torch.tensor([0, 32768], dtype=torch.int32)).tolist()
    [1.0, 1.0078125]
    """
    bits = (x.view(torch.int32) + noise).bitwise_and_(-(2**16))
    return bits.view(torch.float32).bfloat16()


class LeanAdam(torch.optim.Optimizer):
    """Adam (Kingma and Ba 2015, arXiv:1412.6980, without weight decay) with moments in bfloat16.

    Weights and updates are float32. The rounding noise of a step follows from `seed` and the step's number alone, so
    that a run may be taken up again from its moments. State per parameter, as `torch.optim.Adam` names it: step,
    exp_avg, exp_avg_sq.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], betas: tuple[float, float], seed: int, eps: float = 1e-8):
        super().__init__(groups, {"lr": 1e-3})
        self.betas, self.eps, self.seed = betas, eps, seed

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        noise: Tensor | None = None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.tensor(0.0)
                    state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.bfloat16)
                    state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.bfloat16)
                state["step"] += 1
                if noise is None:
                    noise = self._noise(int(state["step"]))
                self._update(parameter, state, group["lr"], noise)

    def _noise(self, step: int) -> Tensor:
        """Uniform 16-bit integers, (AT_ONCE,) int32; every chunk of weights uses the same, element by element."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        return torch.randint(2**16, (AT_ONCE,), generator=generator, dtype=torch.int32)

    def _update(self, parameter: Tensor, state: dict[str, Tensor], rate: float, noise: Tensor) -> None:
        step, (beta1, beta2) = float(state["step"]), self.betas
        width, scale = rate / (1 - beta1**step), (1 - beta2**step) ** -0.5
        assert parameter.grad is not None
        flat = (parameter.view(-1), parameter.grad.view(-1), state["exp_avg"].view(-1), state["exp_avg_sq"].view(-1))
        for weights, gradient, first, second in zip(*(torch.split(x, AT_ONCE) for x in flat), strict=True):
            drawn = noise[: len(weights)]
            mean = first.float().lerp_(gradient, 1 - beta1)
            square = second.float().mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            first.copy_(stochastic_bfloat16(mean, drawn))
            second.copy_(stochastic_bfloat16(square, drawn ^ 0xFFFF))
            weights.addcdiv_(mean, square.sqrt_().mul_(scale).add_(self.eps), value=-width)
