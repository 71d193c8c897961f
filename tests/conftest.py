"""Eight CPU devices, so that meshes are real, set before JAX looks for any.

LLVM optimizes nothing: the programs of the tests are small and many, and a third of the time went
into code that runs once. What XLA fuses and how much memory it takes is decided before LLVM.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
)
