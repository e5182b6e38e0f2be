"""Gradients and slow references, shared by the tests of clipping."""

import torch


SHAPES = [(), (1,), (3, 5), (0,), (2, 3, 4), (4, 1), (7,)]
LAYERS = ["final", "final", "layers.1", "layers.1", "layers.0", "layers.0", "embeddings"]


def random_gradients(
    scale: float = 1.0, dtype: torch.dtype = torch.float32, seed: int = 0, shapes: list[tuple[int, ...]] = SHAPES
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(shape, generator=generator) * scale).to(dtype) for shape in shapes]


def copies(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in tensors]


def all_equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    """Bit for bit, NaN too."""
    return all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(one, other, strict=True))


def norm_in_float64(tensors: list[torch.Tensor], norm_type: float = 2.0) -> float:
    flat = torch.cat([tensor.reshape(-1).double() for tensor in tensors])
    return float(torch.linalg.vector_norm(flat, norm_type)) if flat.numel() else 0.0


def gradients_of_norms(norms: list[float]) -> list[list[torch.Tensor]]:
    """One step's gradients for each norm, which float32 holds exactly: (3/5, 4/5) of powers of two would not."""
    return [[torch.tensor([norm]), torch.zeros(2, 2)] for norm in norms]
