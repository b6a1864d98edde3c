"""Muon for matrices, AdamW for the rest (embeddings, head, norms, router), as one optimiser with one learning-rate knob."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def orthogonalise(matrix: Tensor, steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrix, roughly: five quintic Newton-Schulz steps (Jordan et al., Muon, 2024)."""
    x = matrix.bfloat16()
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x if wide else x.mT).to(matrix.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal: for hidden matrices `[..., out, in]` (leading dimensions are a batch of matrices)."""

    def __init__(self, parameters: list[nn.Parameter], lr: float = 0.02, momentum: float = 0.95) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closures here
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                buffer = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                buffer.lerp_(parameter.grad, 1 - group["momentum"])
                update = orthogonalise(parameter.grad.lerp(buffer, group["momentum"]))
                scale = max(1.0, parameter.shape[-2] / parameter.shape[-1]) ** 0.5
                parameter.mul_(1 - group["lr"] * 0.01).add_(update, alpha=-group["lr"] * scale)


def build(network: nn.Module) -> list[torch.optim.Optimizer]:
    """The optimisers of a network; each group remembers its own base rate in `base`."""
    matrices, tables, small = [], [], []
    for name, parameter in network.named_parameters():
        if "embed" in name or "lm_head" in name:
            tables.append(parameter)
        elif parameter.ndim >= 2 and not name.endswith("mlp.gate"):
            matrices.append(parameter)
        else:
            small.append(parameter)
    adam = torch.optim.AdamW(
        [{"params": tables, "lr": 0.006}, {"params": small, "lr": 0.003}],
        betas=(0.9, 0.98),
        eps=1e-10,
        weight_decay=0.0,
    )
    optimisers: list[torch.optim.Optimizer] = [Muon(matrices), adam]
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["base"] = group["lr"]
    return optimisers


def set_rate(optimisers: list[torch.optim.Optimizer], factor: float) -> None:
    """Set every group's rate to its base times `factor`."""
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["lr"] = group["base"] * factor
