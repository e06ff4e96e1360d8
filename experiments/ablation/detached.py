"""The router of the ablation's row "MoR detached": it learns from the balance loss alone."""

from torch import Tensor

from morsr.adapters import Router
from morsr.functional.routing import Routing


class Detached(Router):
    """Gates carry no gradient, so that no loss on the image reaches the router."""

    def forward(self, scores: Tensor, noise: Tensor | None = None) -> Routing:
        routing = super().forward(scores, noise)
        return routing._replace(gates=routing.gates.detach())
