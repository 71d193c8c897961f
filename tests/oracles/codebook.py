"""Quantizers as vector-quantize-pytorch computes them, all in float32.

Not taken, because the library deviates from its formulas:

- the loss of a codebook that learns: it has one weight for both terms, and reports one of them;
- codes that no vector has, after a moving average: smoothing shrinks them, ours stay;
- the gradient of ResidualVQ's values, which arrives once for every codebook.

LFQ there takes the first feature for the highest bit, and bounds log p from below at 1e-5; the
temperature here leaves every probability above.
"""

from typing import Any

VERSIONS = {"vector-quantize-pytorch": "1.32.0"}

Z = [[0.3, -1.2, 0.7], [1.5, 0.4, -0.6], [0.6, -0.7, 1.3]]
CODES = [[0.5, -1.0, 1.0], [1.0, 0.5, -0.5], [-1.0, 0.5, 0.5], [3.0, -3.0, 3.0]]
COTANGENT = [[1.0, -0.5, 0.25], [-1.0, 0.5, 3.0], [1.5, 0.0, -1.0]]
KERNEL = [[1.0, 0.2, -0.3], [0.1, 0.8, -0.4], [-0.2, 0.3, 1.1]]


def values() -> dict[str, Any]:
    """Inputs and what comes of them, by name."""
    import torch
    import vector_quantize_pytorch as vqp

    codes, kernel, cotangent = map(torch.tensor, (CODES, KERNEL, COTANGENT))

    def applied(layer: Any, **kwargs: Any) -> dict[str, Any]:
        """Values, indices and loss of a batch of one, and the gradient of z and of parameters."""
        z = torch.tensor(Z, requires_grad=True)
        out, indices, *loss = layer(z[None], **kwargs)
        total = (out[0] * cotangent).sum() + sum(part.sum() for part in loss)
        gradients = torch.autograd.grad(total, [z, *layer.parameters()])
        found = {"values": out[0], "indices": indices[0], "dz": gradients[0]}
        found |= {"loss": loss[0]} if loss else {}
        found |= {"dkernel": gradients[1].T} if len(gradients) > 1 else {}
        return {name: value.tolist() for name, value in found.items()}

    def vector_quantize(**kwargs: Any) -> Any:
        layer = vqp.VectorQuantize(3, 4, commitment_weight=0.25, decay=0.9, **kwargs)
        for name in ("embed", "embed_avg"):
            getattr(layer._codebook, name).copy_(codes[None])
        return layer

    moving = vector_quantize(rotation_trick=True)
    rotation = applied(moving)
    book = moving._codebook
    residual = vqp.ResidualVQ(dim=3, codebook_size=4, num_quantizers=2, commitment_weight=0.25)
    for i, layer in enumerate(residual.layers):
        layer._codebook.embed.copy_(codes[None] / 2**i)
    parts = residual(torch.tensor(Z)[None].requires_grad_())
    sim = vqp.SimVQ(3, 4)
    with torch.no_grad():
        sim.frozen_codebook.copy_(codes)
        sim.code_transform.weight.copy_(kernel.T)
    lfq = vqp.LFQ(dim=3, commitment_loss_weight=0.25, entropy_loss_weight=0.5, diversity_gamma=0.7)
    return {
        "z": Z,
        "codes": CODES,
        "cotangent": COTANGENT,
        "kernel": KERNEL,
        "straight_through": {"dz": applied(vector_quantize(rotation_trick=False))["dz"]},
        "rotation": rotation,
        "moving_average": {
            "codebook": book.embed[0].tolist(),
            "counts": book.cluster_size[0].tolist(),
            "sums": book.embed_avg[0].tolist(),
        },
        "residual": {
            "values": parts[0][0].tolist(),
            "indices": parts[1][0].tolist(),
            "loss": parts[2].sum().item(),
        },
        "sim_vq": applied(sim),
        "fsq": applied(vqp.FSQ([5, 4, 8])),
        "lfq": applied(lfq, inv_temperature=0.5),
    }
