"""The straight-through Gumbel-softmax as torch computes it, and ReinMax as its authors do.

torch's hard sample is y_hard - y_soft + y_soft, which rounds: ours is compared with its nearest
whole numbers. It has no gradient for the temperature, which is a float there. ReinMax returns
softmax(logits) beside the sample, whose gradient is not taken here.
"""

from typing import Any

VERSIONS = {"torch": "2.13.0", "reinmax": "0.1.0"}

LOGITS = [[0.3, -1.2, 2.0], [1.5, 1.4, -0.6]]
COTANGENT = [[1.0, -0.5, 0.25], [-1.0, 0.5, 3.0]]
TEMPERATURES = [0.3, 1.7]
SEED = 3


def values() -> dict[str, Any]:
    """Inputs and what comes of them, by name."""
    import torch

    logits = torch.tensor(LOGITS, dtype=torch.float64, requires_grad=True)
    cotangent = torch.tensor(COTANGENT, dtype=torch.float64)

    def applied(function: Any, *args: Any) -> dict[str, Any]:
        torch.manual_seed(SEED)
        y = function(logits, *args)
        (dlogits,) = torch.autograd.grad(y, logits, cotangent)
        return {"y": y.tolist(), "dlogits": dlogits.tolist()}

    def reinmax(logits: Any, temperature: float) -> Any:
        import reinmax

        return reinmax.reinmax(logits, temperature)[0]

    gumbel_softmax = torch.nn.functional.gumbel_softmax
    torch.manual_seed(SEED)
    return {
        "logits": LOGITS,
        "cotangent": COTANGENT,
        # How gumbel_softmax draws its noise, which it does not return.
        "noise": (-torch.empty_like(logits).exponential_().log()).tolist(),
        "soft": {str(tau): applied(gumbel_softmax, tau, False) for tau in TEMPERATURES[1:]},
        "hard": {str(tau): applied(gumbel_softmax, tau, True) for tau in TEMPERATURES},
        "reinmax": {str(tau): applied(reinmax, tau) for tau in TEMPERATURES},
    }
