"""The one place for the arithmetic: pure functions of numpy arrays.

=================  ==========================================================================
`codes`            scale and zero point from a range, real values to codes and back, the bias
`integers`         fixed point: multipliers, rounding shifts, sums, means and products of codes
`operators`        every other operator: float64 inside, rounded once to float32
`windows`          convolution and pooling: exact sums over windows
=================  ==========================================================================

What an exported file means
---------------------------
This is the definition that the torch simulation and the `reference` engine both follow, bit for bit. An
engine such as ONNX Runtime may differ from it by one step of an output grid.

1. ``QuantizeLinear``: in float32, ``q = saturate(rint(x / S) + Z)``, where rint rounds half to even and
   saturate clamps to the whole range of the code's type (uint8: 0..255, int8: -128..127).
2. ``DequantizeLinear``: ``x = float32(q - Z) * S`` in float32.
3. ``Conv``, ``ConvTranspose``, ``Gemm``, ``MatMul`` whose two inputs come from DequantizeLinear (with
   nothing but copies between) are sums of integers::

       acc = sum (qx - Zx) (qw - Zw) + q_bias                          exact, and below 2^31 in magnitude
       y   = float32( float64(acc) * (float64(Sx) * float64(Sw[o])) )

   where q_bias is int32 with scale Sx Sw[o] and zero point 0. A float bias is added in float64 before the
   rounding to float32. Padding adds nothing to the sum: a padded code is Zx.
4. Operators that only copy or select values (max pool, reshape, concat of equal grids, ...) leave codes
   alone.
5. Every other operator takes float32 inputs, computes in float64, and rounds its result once to float32.

Fixed point (`integers`) is the arithmetic of an engine without floats; the QDQ files do not use it.

Source: B. Jacob et al., Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
Inference, 2018, arXiv 1712.05877; R. Krishnamoorthi, Quantizing deep convolutional networks for efficient
inference: a whitepaper, 2018, arXiv 1806.08342.
"""

from fewbit.numerics.codes import (
    affine_parameters,
    clamp_range,
    code_dtype,
    dequantize,
    fold_batch_norm,
    quantize,
    quantize_bias,
    round_up_to_power_of_two,
    sample_parameters,
    symmetric_scale,
)
from fewbit.numerics.integers import (
    accumulator_bound,
    add_codes,
    check_accumulator,
    mean_codes,
    multiply_by_quantized_multiplier,
    multiply_codes,
    multiply_matrices,
    quantized_multiplier,
    requantize,
    rounding_right_shift,
    saturating_doubling_high_multiply,
)
from fewbit.numerics.operators import (
    add,
    batch_norm,
    clip,
    divide,
    elu,
    erf,
    gelu,
    hard_sigmoid,
    hard_swish,
    layer_norm,
    leaky_relu,
    linear,
    local_response_norm,
    log_softmax,
    mean,
    mish,
    multiply,
    prelu,
    relu,
    rescale_accumulator,
    sigmoid,
    silu,
    softmax,
    softplus,
    subtract,
    tanh,
    window_weights,
)
from fewbit.numerics.windows import (
    average_pool,
    average_pool_codes,
    convolve,
    convolve_codes,
    convolve_floats,
    convolve_transposed,
    exact_float,
    max_pool,
    pooled_size,
)

__all__ = [
    "accumulator_bound",
    "add",
    "add_codes",
    "affine_parameters",
    "average_pool",
    "average_pool_codes",
    "batch_norm",
    "check_accumulator",
    "clamp_range",
    "clip",
    "code_dtype",
    "convolve",
    "convolve_codes",
    "convolve_floats",
    "convolve_transposed",
    "dequantize",
    "divide",
    "elu",
    "erf",
    "exact_float",
    "fold_batch_norm",
    "gelu",
    "hard_sigmoid",
    "hard_swish",
    "layer_norm",
    "leaky_relu",
    "linear",
    "local_response_norm",
    "log_softmax",
    "max_pool",
    "mean",
    "mean_codes",
    "mish",
    "multiply",
    "multiply_by_quantized_multiplier",
    "multiply_codes",
    "multiply_matrices",
    "pooled_size",
    "prelu",
    "quantize",
    "quantize_bias",
    "quantized_multiplier",
    "relu",
    "requantize",
    "rescale_accumulator",
    "round_up_to_power_of_two",
    "rounding_right_shift",
    "sample_parameters",
    "saturating_doubling_high_multiply",
    "sigmoid",
    "silu",
    "softmax",
    "softplus",
    "subtract",
    "symmetric_scale",
    "tanh",
    "window_weights",
]
