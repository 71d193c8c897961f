"""Trains a small language model on several processes, which write one checkpoint together.

    python docs/guides/several_processes.py --processes 2 --checkpoint /tmp/model

starts two processes on this machine, which share four simulated devices, and

    python docs/guides/several_processes.py --processes 1 --restore /tmp/model

goes on with one. On a cluster that JAX knows, start it once for each process, without --processes:

    srun --nodes=2 --ntasks-per-node=8 python several_processes.py --checkpoint /shared/model
"""

import argparse
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import flax_customgrad as fcg

SIMULATED_DEVICES = 4
ROWS, LENGTH, CLASSES, FEATURES = 16, 9, 64, 32


class LanguageModel(nnx.Module):
    def __init__(self, *, rngs):
        self.embed = fcg.Embed(CLASSES, FEATURES, rngs=rngs)
        self.norm = fcg.RMSNorm(FEATURES, rngs=rngs)
        self.attention = fcg.MultiHeadAttention(4, FEATURES, decode=False, rngs=rngs)
        self.gated = fcg.SwiGLU(FEATURES, 2 * FEATURES, rngs=rngs)
        self.down = fcg.Linear(2 * FEATURES, FEATURES, rngs=rngs)

    def loss(self, tokens):
        x = self.embed(tokens[:, :-1])
        x = x + self.attention(self.norm(x), is_causal=True)
        x = x + self.down(self.gated(x))
        return fcg.linear_cross_entropy(x, self.embed, tokens[:, 1:])


def sharded_model(mesh):
    """A model whose matrices are split over all devices of all processes."""
    model = LanguageModel(rngs=nnx.Rngs(0))
    for _, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        rest = (None,) * (variable.ndim - 1)
        spec = P("data", *rest) if variable.shape[0] % mesh.size == 0 and rest else P()
        # Each process has the whole array here, and keeps what its own devices hold.
        variable.set_value(jax.device_put(variable[...], NamedSharding(mesh, spec)))
    return model


def batch(mesh):
    """Rows of tokens, of which each process makes its own."""
    own = ROWS // jax.process_count()
    first = own * jax.process_index()
    rows = [
        np.random.default_rng(n).integers(0, CLASSES, LENGTH) for n in range(first, first + own)
    ]
    return jax.make_array_from_process_local_data(NamedSharding(mesh, P("data")), np.stack(rows))


@nnx.jit
def step(model, tokens):
    loss, grads = nnx.value_and_grad(lambda model: model.loss(tokens))(model)
    params = nnx.state(model, nnx.Param)
    nnx.update(model, jax.tree.map(lambda p, g: p - 0.5 * g, params, grads))
    return loss


def train(mesh, steps, *, restore=None, checkpoint=None):
    """The losses of some steps, from a checkpoint or from the start."""
    model, tokens = sharded_model(mesh), batch(mesh)
    with ocp.StandardCheckpointer() as checkpointer:
        if restore is not None:
            # As many processes as there are now, however many wrote it.
            nnx.update(model, checkpointer.restore(restore, nnx.state(model)))
        losses = [float(step(model, tokens)) for _ in range(steps)]
        if checkpoint is not None:
            checkpointer.save(checkpoint, nnx.state(model))  # every process writes what it holds
    return losses


def start(processes):
    """Starts this program as several processes, which find each other at a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    devices = f"--xla_force_host_platform_device_count={SIMULATED_DEVICES // processes}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": devices}
    command = [sys.executable, *sys.argv, "--coordinator", address, "--process"]
    started = [
        subprocess.Popen([*command, str(process)], env=environment) for process in range(processes)
    ]
    return max(process.wait() for process in started)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--processes", type=int, choices=[1, 2, 4], help="how many to start here")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--checkpoint", type=Path, help="a folder to write, which is new")
    parser.add_argument("--restore", type=Path, help="a folder to begin with")
    parser.add_argument("--coordinator", help=argparse.SUPPRESS)
    parser.add_argument("--process", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.processes is not None and args.process is None:
        sys.exit(start(args.processes))
    # On a cluster JAX finds all three by itself.
    jax.distributed.initialize(args.coordinator, args.processes, args.process)
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    folders = {
        name: folder.resolve()
        for name in ("restore", "checkpoint")
        if (folder := getattr(args, name)) is not None
    }
    losses = train(mesh, args.steps, **folders)
    if jax.process_index() == 0:
        print(f"processes: {jax.process_count()}, devices: {jax.device_count()}")
        print("losses:", *(f"{loss:.6f}" for loss in losses))


if __name__ == "__main__":
    main()
