"""
Orthogonalisation of matrices by Newton-Schulz steps, the costly part of Muon (Jordan et al. 2024,
https://kellerjordan.github.io/posts/muon/).

    X <- X / max(norm(X), eps)
    X <- a X + (b A + c A A) X,    A = X X^T            `steps` times

No singular value decomposition: singular values come near 1, not to it (0.7 to 1.2 with Jordan's coefficients).
"""

from __future__ import annotations

import torch


# Maximal slope at zero for five steps.
JORDAN_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalize(
    matrices: torch.Tensor,
    coefficients: tuple[float, float, float] = JORDAN_COEFFICIENTS,
    steps: int = 5,
    eps: float = 1e-7,
) -> torch.Tensor:
    """
    Moves all singular values of each matrix near to 1 and keeps the singular vectors.

    Args:
        matrices (`torch.Tensor` of shape `[..., m, n]`):
            Matrices, each taken alone; equal shapes in one call are faster than one by one.
        coefficients (`tuple`, *optional*, defaults to `(3.4445, -4.7750, 2.0315)`):
            a, b and c of a step.
        steps (`int`, *optional*, defaults to `5`):
            Number of steps.
        eps (`float`, *optional*, defaults to `1e-7`):
            Least norm to divide by, so that zeros stay zeros.

    Returns:
        `torch.Tensor`: float64 for float64 input, else bfloat16.
    """
    X = matrices.mT if matrices.size(-2) > matrices.size(-1) else matrices
    X = X.reshape(-1, *X.shape[-2:])
    # A float64 norm, since squares of large gradients overflow float32.
    norm = torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True, dtype=torch.float64).clamp(min=eps)
    dtype = torch.float64 if X.dtype == torch.float64 else torch.float32
    X = X.to(dtype) / norm.to(dtype)
    if dtype != torch.float64:
        X = X.bfloat16()
    a, b, c = coefficients
    for _ in range(steps):
        A = X @ X.mT
        polynomial = torch.baddbmm(A, A, A, beta=b, alpha=c)
        X = torch.baddbmm(X, polynomial, X, beta=a)
    if matrices.size(-2) > matrices.size(-1):
        X = X.mT
    return X.reshape(matrices.shape)
