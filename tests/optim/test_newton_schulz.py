"""Both routes against the same steps in float64; as exact as torch's own function, matrix by matrix, at the least."""

from collections.abc import Iterator

import pytest
import torch
from torch.optim._muon import _zeropower_via_newtonschulz

from hf_lmopt.build_extension import ExtensionUnavailable
from hf_lmopt.optim import newton_schulz
from hf_lmopt.optim.newton_schulz import (
    JORDAN_COEFFICIENTS,
    POLAR_EXPRESS_COEFFICIENTS,
    explain_route,
    orthogonalize,
)


STEPS, EPS = 5, 1e-7
DTYPES = ("bfloat16", "float32")
SHAPES = [(1, 1), (1, 7), (5, 3), (16, 17), (64, 64), (65, 130), (200, 333), (333, 200), (130, 65), (48, 1000)]


def no_extension() -> None:
    raise ExtensionUnavailable("none in this test")


@pytest.fixture(params=["chosen", "torch"])
def route(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The route that this machine takes, and the plain one."""
    newton_schulz._why_no_operator.cache_clear()
    if request.param == "torch":
        monkeypatch.setattr(newton_schulz, "load_extension", no_extension)
    yield request.param
    newton_schulz._why_no_operator.cache_clear()


def iterate_in_float64(matrices: torch.Tensor, triples: list[tuple[float, float, float]]) -> torch.Tensor:
    X = matrices.double()
    X = X / X.norm(dim=(-2, -1), keepdim=True).clamp(min=EPS)
    for a, b, c in triples:
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    return X


def iterate_as_torch(matrices: torch.Tensor) -> torch.Tensor:
    return torch.stack([_zeropower_via_newtonschulz(one, JORDAN_COEFFICIENTS, STEPS, EPS) for one in matrices])


def error_of(result: torch.Tensor, expected: torch.Tensor) -> float:
    return float((result.double() - expected).norm() / expected.norm())


def with_singular_values(singular_values: torch.Tensor, m: int, n: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.randn(size, m, generator=generator, dtype=torch.float64) for size in (m, n))
    return (torch.linalg.qr(left)[0] * singular_values @ torch.linalg.qr(right)[0].T).float()


def hard_matrices(m: int, n: int) -> dict[str, torch.Tensor]:
    """Spectra of which bfloat16 loses a part."""
    index = torch.arange(m, dtype=torch.float64)
    generator = torch.Generator().manual_seed(2)
    thin = torch.randn(m, 4, generator=generator) @ torch.randn(4, n, generator=generator)
    return {
        "rank one": torch.ones(m, 1) @ torch.randn(1, n, generator=generator),
        "rank four": thin,
        "rank four and noise": thin + 0.01 * torch.randn(m, n, generator=generator),
        "one dominates": with_singular_values(torch.where(index == 0, 1.0, 1e-3), m, n),
        "one dominates by less": with_singular_values(torch.where(index == 0, 1.0, 1e-2), m, n),
        "geometric": with_singular_values(10 ** (-4 * index / m), m, n),
        "harmonic": with_singular_values(1 / (1 + index), m, n),
        "large mean": torch.rand(m, n, generator=generator),
    }


@pytest.mark.parametrize("num_matrices", [1, 5])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_is_at_most_twice_that_of_torch(route: str, shape: tuple[int, int], num_matrices: int) -> None:
    matrices = torch.randn(num_matrices, *shape, generator=torch.Generator().manual_seed(num_matrices))
    result = orthogonalize(matrices)
    assert result.dtype == torch.bfloat16
    assert result.shape == matrices.shape
    expected = iterate_in_float64(matrices, [JORDAN_COEFFICIENTS] * STEPS)
    assert error_of(result, expected) <= 2 * error_of(iterate_as_torch(matrices), expected)


@pytest.mark.parametrize("name", hard_matrices(4, 4))
@pytest.mark.parametrize("shape", [(96, 96), (96, 400), (400, 96)], ids=str)
def test_error_is_at_most_twice_that_of_torch_for_hard_spectra(route: str, shape: tuple[int, int], name: str) -> None:
    matrix = hard_matrices(min(shape), max(shape))[name]
    matrices = (matrix.T if shape[0] > shape[1] else matrix)[None]
    expected = iterate_in_float64(matrices, [JORDAN_COEFFICIENTS] * STEPS)
    result = orthogonalize(matrices)
    assert error_of(result, expected) <= 2 * error_of(iterate_as_torch(matrices), expected)


@pytest.mark.parametrize("shape", [(64, 64), (130, 65), (96, 400)], ids=str)
def test_compiled_route_is_more_exact_than_torch(shape: tuple[int, int]) -> None:
    matrices = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    if not explain_route(matrices).startswith("compiled"):
        pytest.skip(explain_route(matrices))
    expected = iterate_in_float64(matrices, [JORDAN_COEFFICIENTS] * STEPS)
    assert error_of(orthogonalize(matrices), expected) < 0.8 * error_of(iterate_as_torch(matrices), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(33, 90), (90, 33)], ids=str)
def test_half_precision_input_is_as_exact(route: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    matrices = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = iterate_in_float64(matrices, [JORDAN_COEFFICIENTS] * STEPS)
    assert error_of(orthogonalize(matrices), expected) <= 2 * error_of(iterate_as_torch(matrices), expected)


def test_float64_is_computed_in_float64() -> None:
    matrices = torch.randn(3, 20, 31, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    result = orthogonalize(matrices)
    assert result.dtype == torch.float64
    assert error_of(result, iterate_in_float64(matrices, [JORDAN_COEFFICIENTS] * STEPS)) < 1e-12


@pytest.mark.parametrize("scale", [1e-6, 1e6, 1e20, 5e37])
def test_scale_does_not_matter(route: str, scale: float) -> None:
    matrices = torch.randn(2, 20, 30, generator=torch.Generator().manual_seed(0))
    expected = iterate_in_float64(matrices, [JORDAN_COEFFICIENTS] * STEPS)
    assert error_of(orthogonalize(matrices * scale), expected) < 0.02


def test_matrices_below_eps_stay_small(route: str) -> None:
    matrices = 1e-20 * torch.randn(2, 20, 30, generator=torch.Generator().manual_seed(0))
    expected = iterate_in_float64(matrices, [JORDAN_COEFFICIENTS] * STEPS)
    assert expected.abs().max() < 1e-9
    assert error_of(orthogonalize(matrices), expected) < 0.02


def test_zeros_give_zeros_beside_other_matrices(route: str) -> None:
    matrices = torch.randn(3, 10, 40, generator=torch.Generator().manual_seed(0))
    matrices[1] = 0
    result = orthogonalize(matrices)
    assert result.isfinite().all()
    assert not result[1].any()
    assert torch.equal(result[0], orthogonalize(matrices[:1])[0])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_fill_their_matrix_and_no_other(route: str, bad: float) -> None:
    matrices = torch.randn(3, 40, 17, generator=torch.Generator().manual_seed(0))
    matrices[1, 39, 3] = bad
    result = orthogonalize(matrices)
    assert result[1].isnan().all()
    assert result[0].isfinite().all()
    assert result[2].isfinite().all()


def test_any_layout_gives_the_same_and_input_is_untouched(route: str) -> None:
    whole = torch.randn(2, 3, 30, 80, generator=torch.Generator().manual_seed(0))
    before = whole.clone()
    expected = orthogonalize(whole.reshape(6, 30, 80)).reshape(2, 3, 30, 80)
    assert torch.equal(orthogonalize(whole), expected)
    assert torch.equal(orthogonalize(whole[:, 1]), expected[:, 1])
    assert torch.equal(orthogonalize(whole[1, 2]), expected[1, 2])
    assert torch.equal(orthogonalize(whole.mT.contiguous().mT), expected)
    view = whole[..., 5:70:2]
    assert torch.equal(orthogonalize(view), orthogonalize(view.contiguous()))
    assert torch.equal(whole, before)


def test_cpu_without_bfloat16_products_computes_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(newton_schulz, "_why_no_operator", lambda: "none in this test")
    matrices = torch.randn(2, 60, 30, generator=torch.Generator().manual_seed(0))
    result = orthogonalize(matrices)
    assert result.dtype == torch.bfloat16
    assert explain_route(matrices) == "torch in float32, since none in this test"
    # Only the rounding of the result is left.
    assert error_of(result, iterate_in_float64(matrices.mT, [JORDAN_COEFFICIENTS] * STEPS).mT) < 2**-8


def test_result_carries_no_gradient(route: str) -> None:
    assert not orthogonalize(torch.randn(3, 4, requires_grad=True)).requires_grad


def test_empty_tensors_stay_empty(route: str) -> None:
    for shape in [(0, 3, 4), (2, 0, 4), (0, 0)]:
        result = orthogonalize(torch.zeros(shape))
        assert result.shape == shape
        assert result.dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(1, 400, 400), (5, 64, 64), (3, 40, 200), (1, 900, 200)], ids=str)
def test_number_of_threads_does_not_change_a_bit(shape: tuple[int, ...]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    if not explain_route(matrices).startswith("compiled"):
        pytest.skip(explain_route(matrices))
    num_threads = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(orthogonalize(matrices))
    finally:
        torch.set_num_threads(num_threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("shape", [(30, 30), (30, 100)], ids=str)
@pytest.mark.parametrize("steps", [0, 1, 2, 3, 4, 7])
def test_each_step_may_have_its_own_coefficients(route: str, shape: tuple[int, int], steps: int) -> None:
    matrices = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    triples = list(POLAR_EXPRESS_COEFFICIENTS[:steps])
    expected = iterate_in_float64(matrices, triples)
    assert error_of(orthogonalize(matrices, triples, steps), expected) < 0.04
    assert torch.equal(orthogonalize(matrices, "polar_express", steps), orthogonalize(matrices, triples, steps))


def test_polar_express_reaches_orthogonal_rows() -> None:
    matrices = torch.randn(4, 50, 200, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    singular_values = torch.linalg.svdvals(orthogonalize(matrices, "polar_express", 7))
    assert (singular_values - 1).abs().max() < 1e-3


def test_compiled_code_gives_the_same_without_graph_breaks(route: str) -> None:
    torch.compiler.reset()
    matrices = torch.randn(2, 20, 50, generator=torch.Generator().manual_seed(0))
    expected = iterate_in_float64(matrices, [JORDAN_COEFFICIENTS] * STEPS)
    result = torch.compile(orthogonalize, fullgraph=True, backend="aot_eager")(matrices)
    assert error_of(result, expected) < 0.02


def test_route_is_explained(route: str) -> None:
    assert "torch.float64" in explain_route(torch.zeros(2, 2, dtype=torch.float64))
    assert "on meta" in explain_route(torch.zeros(2, 2, device="meta"))
    if route == "torch":
        assert explain_route(torch.zeros(2, 2)) in [f"torch in {dtype}, since none in this test" for dtype in DTYPES]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"matrices": torch.zeros(3)}, r"shape \[3\].*two dimensions.*reshape"),
        ({"matrices": torch.zeros(3, 3, dtype=torch.int32)}, r"int32.*floating-point.*convert"),
        ({"steps": -1}, r"steps=-1.*integer from 0"),
        ({"steps": 2.5}, r"steps=2.5.*integer from 0"),
        ({"steps": "5"}, r"steps='5'.*integer from 0"),
        ({"coefficients": (1.0, 2.0)}, r"do not fit steps=5.*Give one triple"),
        ({"coefficients": [JORDAN_COEFFICIENTS] * 4}, r"do not fit steps=5.*Give one triple"),
        ({"coefficients": "jordan"}, r"'jordan' with steps=5.*'polar_express'"),
        ({"coefficients": "polar_express", "steps": 8}, r"steps=8.*up to 7"),
    ],
)
def test_bad_input_is_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        orthogonalize(**{"matrices": torch.zeros(3, 3), **arguments})
