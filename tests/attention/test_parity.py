"""
attn_implementation="lmopt" beside "eager", on tiny versions of every architecture of `attention_models.py`.

The exact result is eager's in float64. A batch has a full row, one padded left and one padded right; what is compared
is the output at tokens and the gradient of every weight.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from attention_models import DECODER, ENCODER, ENCODER_DECODER, MODELS, NUM_TOKENS, VOCAB_SIZE, Batch, build_table
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import create_chunked_causal_mask

import hf_lmopt


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
NUM_BATCHES = 2
EVERYWHERE = torch.tensor(True)
DOCUMENTS = (5, 1, 6)  # lengths of documents packed into one row
Results = dict[str, Tensor]


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    hf_lmopt.register_attention()


@pytest.fixture(autouse=True)
def softmax_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager's softmax asks for float32, which would round the exact result, and turn its masks into infinities."""
    softmax = nn.functional.softmax

    def wide_softmax(scores: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
        return softmax(scores, dim, dtype=torch.promote_types(scores.dtype, dtype or scores.dtype))

    monkeypatch.setattr(nn.functional, "softmax", wide_softmax)


def models(*kinds: str, where: Callable[[str], bool] = lambda name: True) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        "name", [name for name, model in MODELS.items() if (not kinds or model.kind in kinds) and where(name)]
    )


def run(model: PreTrainedModel, implementation: str, dtype: torch.dtype, calls: list[tuple[Batch, Tensor]]) -> Results:
    """Outputs at tokens, and the gradients of all weights for an upstream gradient that depends on their order."""
    model.to(dtype).set_attn_implementation(implementation)
    model.zero_grad()
    outputs: list[Tensor] = []
    for batch, is_token in calls:
        batch = {name: value.to(dtype) if value.is_floating_point() else value for name, value in batch.items()}
        result = model(**batch)
        output = (result.logits if "logits" in result else result.last_hidden_state)[is_token].flatten(0, -2)
        start = sum(map(len, outputs))
        order = torch.arange(start, start + len(output), dtype=torch.float64)[:, None] + torch.arange(output.shape[1])
        output.backward(torch.sin(order**2).to(dtype))
        outputs.append(output.detach().double())
    gradients = {name: p.grad.double().clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"output": torch.cat(outputs)} | gradients


def measure_errors(results: Results, exact: Results) -> tuple[float, float]:
    """
    Relative errors of the output and of the gradient, all parameters counting alike, but for those close to 0: the
    gradient of a key's bias cancels to 0, so its error has no size of its own.
    """
    assert results.keys() == exact.keys()
    output = (results["output"] - exact["output"]).norm() / exact["output"].norm()
    names = [name for name in exact if name != "output"]
    norms = torch.stack([exact[name].norm() for name in names])
    errors = torch.stack([(results[name] - exact[name]).norm() for name in names])
    return float(output), float((errors / norms.clamp(min=0.1 * norms.square().mean().sqrt())).square().mean().sqrt())


def check_within_twice_eagers_error(ours: Results, eagers: Results, exact: Results) -> None:
    for quantity, error, eagers_error in zip(
        ("output", "gradient"), measure_errors(ours, exact), measure_errors(eagers, exact), strict=True
    ):
        assert error <= 2 * eagers_error, f"{quantity}: relative error {error:.2g}, eager's {eagers_error:.2g}"


@DTYPES
@models()
def test_outputs_and_gradients_of_padded_batches_are_eagers(name: str, dtype: torch.dtype) -> None:
    model = MODELS[name].build().to(dtype)
    calls = [MODELS[name].build_batch(seed) for seed in range(NUM_BATCHES)]
    eagers = run(model, "eager", dtype, calls)
    ours = run(model, "lmopt", dtype, calls)
    check_within_twice_eagers_error(ours, eagers, run(model, "eager", torch.float64, calls))


@DTYPES
@models(where=lambda name: MODELS[name].can_pack)
def test_outputs_and_gradients_of_packed_documents_are_those_of_each_alone(name: str, dtype: torch.dtype) -> None:
    model = MODELS[name].build().to(dtype)
    alone, packed = [], []
    for seed in range(NUM_BATCHES):
        documents = [
            {"input_ids": input_ids, "position_ids": torch.arange(input_ids.shape[1])[None]}
            for input_ids in draw_tokens(1, seed).split(DOCUMENTS, dim=1)
        ]
        boundaries = torch.tensor([0, *DOCUMENTS]).cumsum(0).to(torch.int32)
        row = {key: torch.cat([document[key] for document in documents], dim=1) for key in documents[0]}
        alone += [(document, EVERYWHERE) for document in documents]
        packed.append((row | {"cu_seq_lens_q": boundaries, "cu_seq_lens_k": boundaries}, EVERYWHERE))
    eagers = run(model, "eager", dtype, alone)
    ours = run(model, "lmopt", dtype, packed)
    check_within_twice_eagers_error(ours, eagers, run(model, "eager", torch.float64, alone))


@models(DECODER, ENCODER_DECODER)
def test_generated_tokens_are_eagers(name: str) -> None:
    if name == "llama4_text" and "block_sequence_ids" not in signature(create_chunked_causal_mask).parameters:
        pytest.skip("This version of transformers cannot generate with it.")
    model = MODELS[name].build()
    batch, _ = MODELS[name].build_batch()
    num_rows = 2 if MODELS[name].kind == DECODER else 3  # tokens behind padding on the right continue padding
    batch = {key: value[:num_rows] for key, value in batch.items() if not key.startswith("decoder")}

    def generate(implementation: str, **settings: Any) -> Tensor:
        model.set_attn_implementation(implementation)
        return model.generate(**batch, do_sample=False, max_new_tokens=8, min_new_tokens=8, **settings)

    expected = generate("eager")
    assert torch.equal(generate("lmopt"), expected)
    assert torch.equal(generate("lmopt", use_cache=False), expected)
    assert torch.equal(generate("lmopt", cache_implementation="static", disable_compile=True), expected)


@models(DECODER)
def test_a_row_read_in_pieces_through_the_cache_gives_what_it_gives_at_once(name: str) -> None:
    """Pieces behind a cache need no mask if causality is aligned to the last key; windows end inside a piece."""
    model = MODELS[name].build()
    input_ids = draw_tokens(2, seed=0)
    with torch.no_grad():
        model.set_attn_implementation("eager")
        expected = model(input_ids).logits
        model.set_attn_implementation("lmopt")
        cache, logits = None, []
        for piece in input_ids.split((4, 3, 1, 4), dim=1):
            result = model(piece, past_key_values=cache, use_cache=True)
            cache = result.past_key_values
            logits.append(result.logits)
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, rtol=1e-4, atol=1e-4)


def draw_tokens(num_rows: int, seed: int) -> Tensor:
    return torch.randint(3, VOCAB_SIZE, (num_rows, NUM_TOKENS), generator=torch.Generator().manual_seed(seed))


def test_table_of_the_readme_lists_these_architectures() -> None:
    """Between two marks; `python tests/attention_models.py` prints it."""
    parts = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8").split("<!-- attention models -->")
    assert len(parts) == 3
    assert parts[1].strip() == build_table()


def test_at_least_thirty_architectures_are_compared() -> None:
    assert len(MODELS) >= 30
    assert {model.kind for model in MODELS.values()} == {DECODER, ENCODER, ENCODER_DECODER}
