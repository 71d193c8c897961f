"""The catalogue's entries of the frozen family."""

from flax import nnx

from flax_customgrad.low_bit.frozen.frozen_linear import frozen_linear
from flax_customgrad.low_bit.frozen.int4_linear import Int4Linear
from flax_customgrad.low_bit.frozen.nf4_linear import NF4Linear
from flax_customgrad.low_bit.frozen.qlora_linear import QLoRALinear, qlora_linear
from flax_customgrad.registry.entry import Entry
from flax_customgrad.registry.examples import RANDOM_BIAS, made, normal

ENTRIES = (
    Entry(
        "NF4Linear",
        "frozen",
        NF4Linear,
        None,
        "exact",
        keeps="codes and scales of the kernel, 4.13 bits a weight",
        gain="a frozen kernel in 4 bits, dequantized twice; no input kept",
        source="arXiv:2305.14314",
        examples={
            "block remainder, two batch axes, bias trained": made(
                6, 4, block=4, train_bias=True, **RANDOM_BIAS, inputs=(lambda: normal(8, 2, 6),)
            ),
        },
        operations={frozen_linear: "block remainder, two batch axes, bias trained"},
        workloads={"4096x1024 to 1024": made(1024, 1024, inputs=(lambda: normal(4096, 1024),))},
    ),
    Entry(
        "Int4Linear",
        "frozen",
        Int4Linear,
        None,
        "exact",
        keeps="codes and scales of the kernel, 4.25 bits a weight",
        gain="a frozen kernel in 4 bits, dequantized twice; no input kept",
        examples={
            "zero points, odd, two batch axes": made(
                5, 3, block=2, symmetric=False, inputs=(lambda: normal(8, 2, 5),)
            ),
        },
        workloads={"4096x1024 to 1024": made(1024, 1024, inputs=(lambda: normal(4096, 1024),))},
    ),
    Entry(
        "QLoRALinear",
        "frozen",
        QLoRALinear,
        None,
        "exact",
        keeps="x, lora_a, lora_b, codes and scales of the kernel",
        gain="LoRA on a frozen kernel in 4 bits, with one backward that dequantizes again",
        source="arXiv:2305.14314",
        examples={
            "block remainder, rank 2, two batch axes, bias trained": made(
                6,
                4,
                lora_rank=2,
                alpha=3.0,
                block=4,
                train_bias=True,
                **RANDOM_BIAS,
                b_initializer=nnx.initializers.normal(),
                inputs=(lambda: normal(8, 2, 6),),
            ),
        },
        operations={qlora_linear: "block remainder, rank 2, two batch axes, bias trained"},
        workloads={
            "4096x1024 to 1024, rank 16": made(
                1024, 1024, lora_rank=16, inputs=(lambda: normal(4096, 1024),)
            ),
        },
    ),
)
