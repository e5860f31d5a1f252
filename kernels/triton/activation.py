"""The activations on tiles in registers: value, derivative, and dropout.

`ACTIVATION` is a name of `fastenc.activation.ACTIVATIONS`; NaN and Inf go through as in PyTorch's own activations.
All arithmetic is fp32.
"""

import triton
import triton.language as tl

SAVES_PREACT = frozenset(("gelu", "gelu_tanh", "silu"))  # their derivative is of the value before the activation


@triton.jit
def tanh(z):
    """At most 2 ulp off: Cephes' tanhf, a polynomial near 0 and 1 - 2 / (exp(2|z|) + 1) elsewhere."""
    s = z * z
    p = (((s * -5.70498872745e-3 + 2.06390887954e-2) * s - 5.37397155531e-2) * s + 1.33314422036e-1) * s
    near = (p - 3.33332819422e-1) * s * z + z
    far = 1.0 - 2.0 / (tl.exp(tl.abs(z) * 2.0) + 1.0)
    return tl.where(tl.abs(z) < 0.625, near, tl.where(z < 0, -far, far))


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """ACTIVATION(z), elementwise, fp32."""
    tl.static_assert(
        (ACTIVATION == "identity")
        | (ACTIVATION == "relu")
        | (ACTIVATION == "leaky_relu")
        | (ACTIVATION == "sigmoid")
        | (ACTIVATION == "tanh")
        | (ACTIVATION == "gelu")
        | (ACTIVATION == "gelu_tanh")
        | (ACTIVATION == "silu"),
        "unknown activation",
    )
    if ACTIVATION == "relu":
        z = tl.where(z <= 0, 0.0, z)  # NaN stays NaN
    elif ACTIVATION == "leaky_relu":
        z = tl.where(z > 0, z, z * 0.01)
    elif ACTIVATION == "sigmoid":
        z = 1.0 / (tl.exp(-z) + 1.0)
    elif ACTIVATION == "tanh":
        z = tanh(z)
    elif ACTIVATION == "gelu":
        z = z * 0.5 * (tl.erf(z * 0.7071067811865476) + 1.0)
    elif ACTIVATION == "gelu_tanh":
        z = z * 0.5 * (tanh((z * z * z * 0.044715 + z) * 0.7978845608028654) + 1.0)
    elif ACTIVATION == "silu":
        z = z / (tl.exp(-z) + 1.0)
    return z


@triton.jit
def differentiate(grad, saved, ACTIVATION: tl.constexpr):
    """grad * ACTIVATION', elementwise, fp32; `saved` is the value before ACTIVATION if in SAVES_PREACT, else after."""
    if ACTIVATION == "relu":
        grad = tl.where(saved <= 0, 0.0, grad)  # passes where saved is NaN
    elif ACTIVATION == "leaky_relu":
        grad = tl.where(saved > 0, grad, grad * 0.01)
    elif ACTIVATION == "sigmoid":
        grad = grad * (1.0 - saved) * saved
    elif ACTIVATION == "tanh":
        grad = grad * (1.0 - saved * saved)
    elif ACTIVATION == "gelu":
        cdf = (tl.erf(saved * 0.7071067811865476) + 1.0) * 0.5
        grad = grad * (cdf + saved * tl.exp(saved * saved * -0.5) * 0.3989422804014327)
    elif ACTIVATION == "gelu_tanh":
        t = tanh((saved * saved * saved * 0.044715 + saved) * 0.7978845608028654)
        slope = (saved * saved * 0.134145 + 1.0) * 0.7978845608028654
        grad = grad * ((t + 1.0) * 0.5 + saved * 0.5 * (1.0 - t * t) * slope)
    elif ACTIVATION == "silu":
        sigmoid = 1.0 / (tl.exp(-saved) + 1.0)
        grad = grad * sigmoid * ((1.0 - sigmoid) * saved + 1.0)
    return grad


@triton.jit
def dropout_scale(seed_ptr, LAYER: tl.constexpr, rows, columns, width, P: tl.constexpr):
    """What dropout multiplies a tile of a layer's output with: 0 with probability P, else 1 / (1 - P).

    rows     [BLOCK_M]  int64
    columns  [BLOCK_N]  int32
    seed     [1]        int64; the Philox key is seed + LAYER, the counter row * width + column: the same numbers
                        wherever the tile lies and in both passes.
    """
    offsets = rows[:, None] * width + columns[None, :]
    drawn = tl.rand(tl.load(seed_ptr) + LAYER, offsets)
    return tl.where(drawn < P, 0.0, 1.0 / (1.0 - P))


@triton.jit
def differentiate_dropped(grad, saved, scale, ACTIVATION: tl.constexpr, P: tl.constexpr):
    """`differentiate` where dropout follows the activation and `saved` is the value after it, unless SAVES_PREACT."""
    if P > 0:
        grad = grad * scale
        if not (ACTIVATION == "gelu" or ACTIVATION == "gelu_tanh" or ACTIVATION == "silu"):
            saved = saved * (1.0 - P)  # where it was dropped grad is 0
    return differentiate(grad, saved, ACTIVATION)
