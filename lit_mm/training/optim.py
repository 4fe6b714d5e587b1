"""AdamW as the recipes use it, and Muon for training from scratch."""

from __future__ import annotations

from typing import Any

from torch.optim import AdamW, Muon, Optimizer


class FusedAdamW(AdamW):
    """AdamW, fused on CPUs and CUDA; no weight decay by default, as in both papers."""

    def __init__(
        self,
        params: list[dict[str, Any]],
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        """Create the optimizer.

        Args:
            params: Parameter groups with their learning rates.
            weight_decay: Weight decay of groups without their own.
            betas: Decay rates of the mean gradient and the mean squared gradient.
            eps: Added to the denominator for numerical stability.
        """
        devices = {parameter.device.type for group in params for parameter in group["params"]}
        super().__init__(params, betas=betas, eps=eps, weight_decay=weight_decay, fused=devices <= {"cpu", "cuda"})


class MuonAdamW(Optimizer):
    """Muon (torch.optim.Muon) on the parameter groups marked `hidden`, AdamW on all others.

    Muon's update of a matrix is the nearest orthogonal matrix to its momentum. It is scaled to the size
    of AdamW's updates (`match_rms_adamw`), so that learning rates mean the same for both. It costs ten
    to twenty matrix products per matrix and step, and does not work on sharded matrices.
    """

    def __init__(
        self,
        params: list[dict[str, Any]],
        weight_decay: float = 0.05,
        momentum: float = 0.9,
        betas: tuple[float, float] = (0.9, 0.95),
        ns_steps: int = 5,
    ) -> None:
        """Create both optimizers.

        Args:
            params: Parameter groups with their learning rates; `hidden` marks those with matrices.
            weight_decay: Weight decay of groups without their own.
            momentum: Momentum of Muon.
            betas: Decay rates of AdamW.
            ns_steps: Newton-Schulz iterations of Muon's orthogonalization.
        """
        hidden = [group for group in params if group.get("hidden")]
        others = [group for group in params if not group.get("hidden")]
        muon: dict[str, Any] = {"momentum": momentum, "ns_steps": ns_steps, "adjust_lr_fn": "match_rms_adamw"}
        adamw: dict[str, Any] = {"betas": betas, "fused": True}
        choices = [(Muon, hidden, muon), (AdamW, others, adamw)]
        self.parts: list[Optimizer] = [
            kind(groups, weight_decay=weight_decay, **options) for kind, groups, options in choices if groups
        ]
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Let both optimizers use this one's parameter groups and state."""
        first = 0
        for part in self.parts:
            last = first + len(part.param_groups)
            part.param_groups, part.state = self.param_groups[first:last], self.state
            first = last

    def step(self, closure: Any = None) -> Any:
        """Step both optimizers."""
        loss = closure() if closure is not None else None
        for part in self.parts:
            part.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore both optimizers."""
        super().load_state_dict(state_dict)
        self._share()
