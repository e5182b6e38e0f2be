"""
Orthogonalisation of matrices by Newton-Schulz steps, the costly part of Muon (Jordan et al. 2024,
https://kellerjordan.github.io/posts/muon/).

    X <- X / max(norm(X), eps)
    X <- a X + (b A + c A A) X,    A = X X^T            in every step

Two routes: plain torch, on every device (in bfloat16, or in float32 on a CPU that has no bfloat16 products); and an
operator of the compiled extension, on a CPU that has them, which computes half of each symmetric product.
[`explain_route`] tells which is taken. Both work under `torch.compile`. No singular value decomposition: singular
values come near 1, not to it (0.7 to 1.2 with Jordan's coefficients).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch

from ..build_extension import ExtensionUnavailable, load_extension


Triple = tuple[float, float, float]

# Greatest slope at zero, at the price of singular values that wander about 1.
JORDAN_COEFFICIENTS: Triple = (3.4445, -4.7750, 2.0315)

_POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
)
_POLAR_EXPRESS_SAFETY = 1.01  # keeps singular values that rounding lifts above 1 from growing
# Best polynomial of each step for singular values in [1e-3, 1] (Amsel et al. 2025, https://arxiv.org/abs/2505.16932,
# Implementation 1); beyond the last one there is nothing left to gain in bfloat16.
POLAR_EXPRESS_COEFFICIENTS: tuple[Triple, ...] = tuple(
    (a / _POLAR_EXPRESS_SAFETY, b / _POLAR_EXPRESS_SAFETY**3, c / _POLAR_EXPRESS_SAFETY**5)
    for a, b, c in _POLAR_EXPRESS
)

COMPILED_TYPES = (torch.float32, torch.bfloat16, torch.float16)


@torch.no_grad()
def orthogonalize(
    matrices: torch.Tensor,
    coefficients: Triple | Sequence[Triple] | str = JORDAN_COEFFICIENTS,
    steps: int = 5,
    eps: float = 1e-7,
) -> torch.Tensor:
    """
    Moves all singular values of each matrix near to 1 and keeps the singular vectors.

    Equal to what `torch.optim.Muon` does matrix by matrix, to rounding in bfloat16. The compiled route is the more
    exact one: it rounds a product once, and its diagonal not at all. The result carries no gradient.

    Args:
        matrices (`torch.Tensor` of shape `[..., m, n]`):
            Matrices of real floating-point numbers, each taken alone. Equal shapes in one call are faster than one by
            one.
        coefficients (`tuple`, `Sequence[tuple]` or `str`, *optional*, defaults to `(3.4445, -4.7750, 2.0315)`):
            a, b and c of every step; or one triple for each step; or `"polar_express"` for those of Amsel et al. 2025
            (https://arxiv.org/abs/2505.16932), for up to 7 steps.
        steps (`int`, *optional*, defaults to `5`):
            Number of steps.
        eps (`float`, *optional*, defaults to `1e-7`):
            Least Frobenius norm to divide by, so that zeros stay zeros.

    Returns:
        `torch.Tensor` of shape `[..., m, n]`: float64 for float64 input, else bfloat16.

    Raises:
        ValueError: if the input has fewer than two dimensions or no real floating-point type, or if coefficients and
            steps do not go together.
    """
    if matrices.dim() < 2 or not matrices.is_floating_point():
        raise ValueError(
            f"matrices have shape {list(matrices.shape)} and type {matrices.dtype}. At least two dimensions and a "
            "floating-point type are needed: reshape or convert them."
        )
    triples = expand_coefficients(coefficients, steps)
    if matrices.numel() == 0:
        return matrices.to(_result_dtype(matrices), copy=True)
    batch = matrices.reshape(-1, *matrices.shape[-2:])
    if _why_not_compiled(type(matrices) is torch.Tensor, matrices.device.type, matrices.dtype) is None:
        flat = [value for triple in triples for value in triple]
        result = torch.ops.lmopt.newton_schulz(batch.contiguous(), flat, eps)
    else:
        result = _iterate(batch, triples, eps)
    return result.reshape(matrices.shape)


def explain_route(matrices: torch.Tensor) -> str:
    """
    Tells which route [`orthogonalize`] takes for a tensor, and why.

    Args:
        matrices (`torch.Tensor`):
            A tensor of the type and on the device in question; its values do not matter.

    Returns:
        `str`: `"compiled (avx512_bf16)"`, or `"torch in bfloat16, since ..."` with the reason.
    """
    reason = _why_not_compiled(type(matrices) is torch.Tensor, matrices.device.type, matrices.dtype)
    if reason is None:
        return "compiled (avx512_bf16)"
    dtype = _product_dtype(matrices.device.type, matrices.dtype)
    return f"torch in {str(dtype).removeprefix('torch.')}, since {reason}"


def _iterate(batch: torch.Tensor, triples: Sequence[Triple], eps: float) -> torch.Tensor:
    """The route in plain torch, `[batch, m, n]`."""
    is_tall = batch.size(-2) > batch.size(-1)
    X = batch.mT if is_tall else batch
    X = X.double() if X.dtype == torch.float64 else X.float()
    # First by the largest element, so that the squares of large gradients do not overflow.
    largest = torch.linalg.vector_norm(X, math.inf, dim=(-2, -1), keepdim=True).clamp(min=torch.finfo(X.dtype).tiny)
    X = X / largest
    norm = torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True)
    X = (X / torch.maximum(norm, eps / largest)).to(_product_dtype(batch.device.type, batch.dtype))
    for a, b, c in triples:
        A = X @ X.mT
        polynomial = torch.baddbmm(A, A, A, beta=b, alpha=c)
        X = torch.baddbmm(X, polynomial, X, beta=a)
    return (X.mT if is_tall else X).to(_result_dtype(batch))


def _result_dtype(matrices: torch.Tensor) -> torch.dtype:
    return torch.float64 if matrices.dtype == torch.float64 else torch.bfloat16


# torch.compile asks such a function while it traces, and takes the answer as a constant.
@torch.compiler.assume_constant_result
def _product_dtype(device_type: str, dtype: torch.dtype) -> torch.dtype:
    """The type that the plain route multiplies in."""
    if dtype == torch.float64:
        return dtype
    # A CPU without bfloat16 products emulates them: 25 times slower than float32 (AVX2), or 1.4 times (AVX-512).
    is_emulated = device_type == "cpu" and not getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()
    return torch.float32 if is_emulated else torch.bfloat16


def expand_coefficients(coefficients: Triple | Sequence[Triple] | str, steps: int) -> list[Triple]:
    """
    One triple per step; see [`orthogonalize`].

    Raises:
        ValueError: if coefficients and steps do not go together.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise ValueError(f"steps={steps!r} is no number of steps. Use an integer from 0 on, such as 5.")
    if isinstance(coefficients, str):
        if coefficients != "polar_express" or steps > len(POLAR_EXPRESS_COEFFICIENTS):
            raise ValueError(
                f"coefficients={coefficients!r} with steps={steps} is unknown. By name there is 'polar_express', for "
                f"up to {len(POLAR_EXPRESS_COEFFICIENTS)} steps. Use it so, or give numbers."
            )
        return list(POLAR_EXPRESS_COEFFICIENTS[:steps])
    values: Sequence[Any] = tuple(coefficients)
    if len(values) == 3 and not any(isinstance(value, Sequence) for value in values):
        values = [values] * steps
    if len(values) != steps or any(len(triple) != 3 for triple in values):
        raise ValueError(
            f"coefficients={coefficients!r} do not fit steps={steps}. Give one triple (a, b, c), or a triple for each "
            "step."
        )
    return [(float(a), float(b), float(c)) for a, b, c in values]


@torch.compiler.assume_constant_result
def _why_not_compiled(is_plain: bool, device_type: str, dtype: torch.dtype) -> str | None:
    """Why the compiled route cannot be taken; `None` if it can."""
    if device_type != "cpu":
        return f"the compiled route runs on the CPU, and the matrices are on {device_type}"
    if dtype not in COMPILED_TYPES:
        return f"the compiled route takes float32, bfloat16 and float16, and the matrices are {dtype}"
    if not is_plain:
        return "the compiled route takes plain tensors"
    return _why_no_operator()


@functools.cache
def _why_no_operator() -> str | None:
    """Why the operator cannot run in this process."""
    try:
        load_extension()
    except ExtensionUnavailable as error:
        return str(error)
    if not torch.ops.lmopt.cpu_has_avx512_bf16():
        return "the compiled route needs a processor with AVX512_BF16, and HF_LMOPT_CPU_CAPABILITY not below it"
    _register_fake()
    return None


@functools.cache
def _register_fake() -> None:
    """Tells `torch.compile` what the operator returns."""
    torch.library.register_fake("lmopt::newton_schulz", _fake_newton_schulz)


def _fake_newton_schulz(matrices: torch.Tensor, coefficients: Sequence[float], eps: float) -> torch.Tensor:
    return torch.empty_like(matrices, dtype=torch.bfloat16)
