"""AdamW as the recipes use it; and Muon beside it, for training from nothing."""

from __future__ import annotations

from typing import Any

from torch.optim import AdamW, Muon, Optimizer


class FusedAdamW(AdamW):
    """AdamW in one kernel where torch has one, without weight decay unless asked for (as both papers)."""

    def __init__(
        self,
        params: list[dict[str, Any]],
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        """Set up.

        Args:
            params: Parameter groups with their learning rates.
            weight_decay: Of the groups that name none of their own.
            betas: Of the means of gradients and of their squares.
            eps: Added to the root.
        """
        devices = {parameter.device.type for group in params for parameter in group["params"]}
        super().__init__(params, betas=betas, eps=eps, weight_decay=weight_decay, fused=devices <= {"cpu", "cuda"})


class MuonAdamW(Optimizer):
    """Muon (torch.optim.Muon) on the parameter groups marked `hidden`, AdamW on all others.

    Muon steps along the nearest orthogonal matrix to the momentum, so that no direction of a matrix
    is left behind. Its steps are scaled to the size of AdamW's (`match_rms_adamw`), so the parts'
    learning rates mean the same for both. Costs ten to twenty small matrix products a matrix and
    step; wants whole matrices, not sharded ones.
    """

    def __init__(
        self,
        params: list[dict[str, Any]],
        weight_decay: float = 0.05,
        momentum: float = 0.9,
        betas: tuple[float, float] = (0.9, 0.95),
        ns_steps: int = 5,
    ) -> None:
        """Set up both.

        Args:
            params: Parameter groups with their learning rates; `hidden` marks those of matrices.
            weight_decay: Of the groups that name none of their own.
            momentum: Muon's.
            betas: AdamW's.
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
        """One state, and groups that are both this optimizer's and their part's."""
        first = 0
        for part in self.parts:
            last = first + len(part.param_groups)
            part.param_groups, part.state = self.param_groups[first:last], self.state
            first = last

    def step(self, closure: Any = None) -> Any:
        """Both parts' steps."""
        loss = closure() if closure is not None else None
        for part in self.parts:
            part.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore both."""
        super().load_state_dict(state_dict)
        self._share()
