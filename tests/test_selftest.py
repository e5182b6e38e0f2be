"""`hf-lmopt selftest` on a CPU, on kernels with planted bugs, and on devices that are not there."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_lmopt.attention import attention, attention_reference
from hf_lmopt.cli import main
from hf_lmopt.selftest import attention_checks, device, model_check, optimizer_checks, run, sanitizer, speed_checks
from hf_lmopt.selftest.attention_cases import CASES, Case, build_arguments, find_visible, to_device
from hf_lmopt.selftest.contenders import OURS, build_contenders, flash_attn_attention
from hf_lmopt.selftest.report import Check, CheckFailed, CheckSkipped, carry_out
from hf_lmopt.selftest.roofline import BOTH, FORWARD, Roofline, count_bytes, count_flops


CPU = torch.device("cpu")
HALF = torch.bfloat16


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def keep_checks(monkeypatch: pytest.MonkeyPatch, *checks: Check) -> None:
    monkeypatch.setattr(run, "_build_checks", lambda device, is_quick: iter(checks))


# ---- The command ----


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, dict[str, Any]]:
    path = tmp_path_factory.mktemp("selftest") / "new" / "quick.json"
    return main(["selftest", "--device", "cpu", "--quick", "--output", str(path)]), read(path)


def test_everything_passes_on_the_cpu_and_is_in_one_file(quick: tuple[int, dict[str, Any]]) -> None:
    status, report = quick
    assert [check for check in report["checks"] if check["status"] != "passed"] == []
    assert status == 0
    assert report["is_complete"]
    assert report["has_passed"]
    assert {check["group"] for check in report["checks"]} == {
        "attention", "determinism", "refusals", "model", "optimizer",
    }  # fmt: skip
    assert report["device"] == {"type": "cpu"}
    assert report["extension"]["cpu_capability"] in ("portable", "avx2", "avx512")
    assert report["versions"]["torch"] == torch.__version__


def test_each_case_has_its_errors_beside_those_of_plain_pytorch(quick: tuple[int, dict[str, Any]]) -> None:
    (everything,) = (check for check in quick[1]["checks"] if check["name"] == "everything bfloat16")
    gradients = {f"{name}_gradient" for name in ("query", "key", "value", "bias", "sinks")}
    assert everything["figures"].keys() == {"output", "logsumexp"} | gradients
    for errors in everything["figures"].values():
        assert 0 < errors["error"] <= errors["allowed"]
        assert errors["plain_error"] > 0


def test_checks_have_names_of_their_own() -> None:
    for is_quick in (True, False):
        names = [(check.group, check.name) for check in run._build_checks(CPU, is_quick)]
        assert len(set(names)) == len(names)


def test_a_check_that_fails_or_crashes_does_not_stop_the_others_and_gives_status_1(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> dict[str, Any]:
        raise CheckFailed("off by one", {"error": 3.0})

    def crash() -> dict[str, Any]:
        raise ZeroDivisionError("nothing to divide by")

    def skip() -> dict[str, Any]:
        raise CheckSkipped("no tool")

    runs: dict[str, Callable[[], dict[str, Any]]] = {"a": fail, "b": crash, "c": skip, "d": lambda: {"seen": 1}}
    keep_checks(monkeypatch, *(Check("group", name, check) for name, check in runs.items()))
    path = tmp_path / "report.json"
    assert main(["selftest", "--device", "cpu", "--output", str(path)]) == 1
    report = read(path)
    assert [check["status"] for check in report["checks"]] == ["failed", "crashed", "skipped", "passed"]
    assert [check["figures"] for check in report["checks"]] == [{"error": 3.0}, {}, {}, {"seen": 1}]
    assert "nothing to divide by" in report["checks"][1]["message"]
    assert report["is_complete"]
    assert not report["has_passed"]
    printed = capsys.readouterr().out
    for text in (
        "off by one",
        "nothing to divide by",
        "no tool",
        "1 failed, 1 crashed, 1 skipped, 1 passed",
        "FAILED",
    ):
        assert text in printed


def test_a_skipped_check_is_no_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def skip() -> dict[str, Any]:
        raise CheckSkipped("no tool")

    keep_checks(monkeypatch, Check("group", "a", skip))
    assert main(["selftest", "--device", "cpu", "--output", str(tmp_path / "report.json")]) == 0


def test_a_lost_device_ends_the_run_and_leaves_what_is_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def crash() -> dict[str, Any]:
        monkeypatch.setattr(torch, "zeros", broken)  # as every call after a fault on a CUDA device
        return broken()

    def broken(*sizes: int, **options: Any) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    keep_checks(monkeypatch, Check("group", "a", dict), Check("group", "b", crash), Check("group", "c", dict))
    path = tmp_path / "report.json"
    assert main(["selftest", "--device", "cpu", "--output", str(path)]) == 1
    report = read(path)
    assert [check["status"] for check in report["checks"]] == ["passed", "crashed"]
    assert report["ended_early"] == "after group b: RuntimeError: CUDA error: an illegal memory access was encountered"
    assert not report["is_complete"]
    assert not report["has_passed"]


def test_what_is_known_is_in_the_file_when_the_process_is_killed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "report.json"

    def be_killed() -> dict[str, Any]:
        assert [check["name"] for check in read(path)["checks"]] == ["a"]
        raise KeyboardInterrupt

    keep_checks(monkeypatch, Check("group", "a", dict), Check("group", "b", be_killed))
    with pytest.raises(KeyboardInterrupt):
        main(["selftest", "--device", "cpu", "--output", str(path)])
    assert not read(path)["is_complete"]
    assert not read(path)["has_passed"]


# ---- Devices that are not there ----


def expect_refusal(capsys: pytest.CaptureFixture[str], *words: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["selftest", "--device", "cuda", "--output", "must_not_be_written.json"])
    assert ended.value.code == 1
    printed = capsys.readouterr().err
    for word in ("hf-lmopt selftest: device='cuda' was asked for", "It may be cuda or cpu.", "--device cpu", *words):
        assert word in printed
    assert not Path("must_not_be_written.json").exists()


def test_a_torch_without_cuda_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    expect_refusal(capsys, "a build without CUDA", "pytorch.org")


def test_a_machine_without_a_gpu_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    expect_refusal(capsys, "no CUDA device", "nvidia-smi")


def test_an_extension_without_code_for_the_card_is_refused_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        device, "why_no_backend", lambda device_type: "the extension has no CUDA part: nvcc is missing"
    )
    expect_refusal(capsys, "nvcc is missing", "hf-lmopt doctor")


def test_an_extension_that_cannot_be_built_is_refused_and_the_reason_is_in_the_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise run.ExtensionUnavailable("nvcc failed: line 3")

    monkeypatch.setattr(run, "load_extension", fail)
    path = tmp_path / "report.json"
    with pytest.raises(SystemExit) as ended:
        main(["selftest", "--device", "cpu", "--output", str(path)])
    assert ended.value.code == 1
    assert "nvcc failed: line 3" in capsys.readouterr().err
    assert read(path)["ended_early"] == "nvcc failed: line 3"
    assert not read(path)["has_passed"]


# ---- Planted bugs ----


def shift_window(**arguments: Any) -> tuple[Tensor, Tensor]:
    left, right = arguments.get("window", (None, None))
    return attention(**arguments | {"window": (left and left + 1, right)})


def forget_scale(**arguments: Any) -> tuple[Tensor, Tensor]:
    return attention(**{"scale": 1.0, **arguments})


def take_another_seed(**arguments: Any) -> tuple[Tensor, Tensor]:
    return attention(**arguments | {"dropout_seed": 1} if "dropout_seed" in arguments else arguments)


def forget_sinks_gradient(**arguments: Any) -> tuple[Tensor, Tensor]:
    output, logsumexp = attention(**arguments | {"sinks": arguments["sinks"].detach()})
    return output + 0 * arguments["sinks"].sum(), logsumexp


def repeat_bias_gradient(**arguments: Any) -> tuple[Tensor, Tensor]:
    return attention(
        **arguments | {"bias": arguments["bias"].detach() + 1.1 * (arguments["bias"] - arguments["bias"].detach())}
    )


def leave_nan_in_padding(**arguments: Any) -> tuple[Tensor, Tensor]:
    output, logsumexp = attention(**arguments)
    return output.masked_fill(logsumexp.isneginf()[..., None], torch.nan), logsumexp


def round_twice(**arguments: Any) -> tuple[Tensor, Tensor]:
    output, logsumexp = attention(**arguments)
    return output + output.detach().abs().max() * torch.finfo(output.dtype).eps, logsumexp


@pytest.mark.parametrize(
    ("bug", "case", "complaint"),
    [
        (shift_window, "window", "output: error"),
        (forget_scale, "dense", "output: error"),
        (take_another_seed, "dropout", "output: error"),
        (forget_sinks_gradient, "sinks", "sinks_gradient: error"),
        (repeat_bias_gradient, "bias_t5", "bias_gradient: error"),
        (leave_nan_in_padding, "padding_of_nan", "output has NaN"),
        (round_twice, "dense", "output: error"),
    ],
)
def test_a_bug_in_attention_is_caught(
    monkeypatch: pytest.MonkeyPatch, bug: Callable[..., Any], case: str, complaint: str
) -> None:
    attention_checks.check_case(case, HALF, CPU)
    monkeypatch.setattr(attention_checks, "attention", bug)
    with pytest.raises(CheckFailed, match=complaint):
        attention_checks.check_case(case, HALF, CPU)


def test_results_that_change_between_calls_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    factors = iter([1.0] * 3 + [1.0 + 2**-7] + [1.0] * 9)

    def wobble(**arguments: Any) -> tuple[Tensor, Tensor]:
        output, logsumexp = attention(**arguments)
        return output * next(factors), logsumexp

    monkeypatch.setattr(attention_checks, "attention", wobble)
    with pytest.raises(CheckFailed, match=r"output, .* had other bits"):
        attention_checks.check_repetition(HALF, CPU, attention_checks.QUICK_CROWDED_SHAPE)


def test_a_type_that_is_taken_without_kernels_is_caught() -> None:
    with pytest.raises(CheckFailed, match="float32 was taken"):
        attention_checks.check_refusal(torch.float32, CPU)


def test_a_fused_step_that_differs_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    take_steps = optimizer_checks._take_steps

    def forget_decay(*arguments: Any, **options: Any) -> list[Tensor]:
        if options["implementation"] == "fused":
            monkeypatch.setattr(optimizer_checks, "WEIGHT_DECAY", 0.09)
        else:
            monkeypatch.setattr(optimizer_checks, "WEIGHT_DECAY", 0.1)
        return take_steps(*arguments, **options)

    optimizer_checks.check_optimizer("adamw", torch.float32, CPU)
    monkeypatch.setattr(optimizer_checks, "_take_steps", forget_decay)
    with pytest.raises(CheckFailed, match="fused and foreach differ"):
        optimizer_checks.check_optimizer("adamw", torch.float32, CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["sgd", "lion", "mars"])
def test_fused_and_foreach_agree_in_each_type(name: str, dtype: torch.dtype) -> None:
    optimizer_checks.check_optimizer(name, dtype, CPU)


def test_a_bug_in_the_models_attention_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_lmopt.attention import transformers_bridge

    monkeypatch.setattr(
        transformers_bridge, "attention", lambda *args, **options: attention(*args, **options | {"scale": 0.1})
    )
    assert carry_out(Check("model", "llama", lambda: model_check.check_model(HALF, CPU)))["status"] == "failed"


# ---- Cases ----


@pytest.mark.parametrize("dtype", attention_checks.types_of(CPU))
@pytest.mark.parametrize("name", [name for name in CASES if CASES[name].shape[3] < 1000])
def test_the_cpu_passes_each_case(name: str, dtype: torch.dtype) -> None:
    attention_checks.check_case(name, dtype, CPU)


def test_what_is_padding_holds_nan_and_no_token_does() -> None:
    arguments = build_arguments(CASES["padding_of_nan"], torch.float32)
    visible = find_visible(arguments)
    assert torch.equal(arguments["query"].isnan().all(-1)[:, 0], ~visible.any(-1)[:, 0])
    assert torch.equal(arguments["key"].isnan().all(-1)[:, 0], ~visible.any(-2)[:, 0])
    assert arguments["value"].isnan().any()


def test_the_gradient_from_a_rounded_output_is_that_of_the_formula() -> None:
    arguments = build_arguments(Case((1, 1, 1, 5, 7, 16)), HALF)
    gradients = attention_checks.differentiate_from_output(arguments)
    query, key, value = (arguments[name].float() for name in ("query", "key", "value"))
    weights = torch.softmax(query @ key.mT / 4, -1)
    output = (weights @ value).to(HALF)
    upstream = attention_checks._draw_upstream(output, 1).float()
    delta = (upstream * output.float()).sum(-1, keepdim=True)
    expected = (weights * (upstream @ value.mT - delta)) @ key / 4
    torch.testing.assert_close(gradients["query_gradient"], expected.to(HALF), rtol=2**-7, atol=1e-6)


# ---- Speed ----


SMALL = Case((1, 4, 2, 32, 32, 16), {"is_causal": True})


def test_speed_is_measured_beside_what_takes_the_call_and_refusals_have_reasons(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(speed_checks, "cached_roofline", lambda dtype, device: Roofline(1e12, 1e10))
    monkeypatch.setattr(speed_checks, "CPU_SHORTENING", 1)
    for way in (FORWARD, BOTH):
        row = speed_checks.time_case(SMALL, HALF, CPU, way)
        assert {OURS, "sdpa_math"} <= row["milliseconds"].keys()
        assert "sdpa_efficient" in row["refusals"]
        assert row["tflops"] == pytest.approx(row["share_of_product"])
        assert row["share_of_roofline"] >= row["share_of_product"]


def test_a_call_that_ours_does_not_take_fails_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    contenders = build_contenders(build_arguments(SMALL, torch.float64))
    monkeypatch.setattr(speed_checks, "build_contenders", lambda arguments: contenders)
    with pytest.raises(CheckFailed, match="does not run: TypeError: query is of type"):
        speed_checks.time_case(SMALL, HALF, CPU, FORWARD)


def test_flops_and_bytes_are_those_of_what_is_seen() -> None:
    arguments = build_arguments(SMALL, HALF)
    pairs, size = 4 * 32 * 33 // 2, 2  # bytes
    assert count_flops(arguments, FORWARD) == 4 * pairs * 16
    assert count_flops(arguments, BOTH) == 14 * pairs * 16
    queries, keys = 4 * 32 * 16 * size, 2 * 32 * 16 * size
    assert count_bytes(arguments, FORWARD) == 2 * queries + 2 * keys
    assert count_bytes(arguments, BOTH) == 2 * queries + 2 * keys + (2 * keys + 3 * queries) + (queries + 2 * keys)


@pytest.mark.parametrize("name", ["causal", "window", "packed", "bias_t5", "grouped_heads"])
def test_contenders_compute_the_same(name: str) -> None:
    arguments = to_device(build_arguments(CASES[name], torch.float32), CPU)
    contenders = build_contenders(arguments)
    expected, _ = attention_reference(**arguments)
    torch.testing.assert_close(contenders["sdpa_math"].forward()(), expected)
    gradients = contenders["sdpa_math"].forward_and_backward()()
    assert [each.shape for each in gradients] == [arguments[each].shape for each in contenders[OURS].differentiable]


@pytest.mark.parametrize("name", ["causal", "window", "softcap", "packed"])
def test_flash_attn_gets_its_own_layout(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        assert options.pop("dropout_p") == 0
        window = tuple(None if side < 0 else side for side in options["window_size"])
        return attention_reference(
            *(each.transpose(1, 2) for each in (q, k, v)),
            scale=options["softmax_scale"],
            is_causal=options["causal"],
            window=window,
            softcap=options["softcap"] or None,
            **options.get("packed", {}),
        )[0].transpose(1, 2)

    def flash_attn_varlen_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        starts_q: Tensor,
        starts_k: Tensor,
        longest_q: int,
        longest_k: int,
        **options: Any,
    ) -> Tensor:
        packed = {"cu_seqlens_q": starts_q, "cu_seqlens_k": starts_k}
        return flash_attn_func(q[None], k[None], v[None], packed=packed, **options)[0]

    module = types.SimpleNamespace(flash_attn_func=flash_attn_func, flash_attn_varlen_func=flash_attn_varlen_func)
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    arguments = build_arguments(CASES[name], torch.float32)
    torch.testing.assert_close(flash_attn_attention(**arguments), attention_reference(**arguments)[0])


def test_flash_attn_is_not_asked_for_what_it_has_no_argument_for() -> None:
    with pytest.raises(Exception, match="no argument for bias"):
        flash_attn_attention(**build_arguments(CASES["bias_t5"], torch.float32))


# ---- compute-sanitizer ----

CLEAN = {
    "memcheck": "========= COMPUTE-SANITIZER\nselftest passed\n========= ERROR SUMMARY: 0 errors\n",
    "racecheck": "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n",
}


@pytest.mark.parametrize("tool", sanitizer.TOOLS)
def test_a_clean_summary_passes(tool: str) -> None:
    assert sanitizer.judge(tool, CLEAN[tool], 0)["errors"] == 0


@pytest.mark.parametrize(
    ("tool", "summary"),
    [
        ("memcheck", "========= ERROR SUMMARY: 1 error"),
        ("memcheck", "========= ERROR SUMMARY: 12 errors"),
        ("racecheck", "========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)"),
    ],
)
def test_what_the_sanitizer_finds_fails(tool: str, summary: str) -> None:
    with pytest.raises(CheckFailed, match="reports"):
        sanitizer.judge(tool, f"========= Invalid __global__ read\n{summary}\n", 0)


def test_a_selftest_that_fails_under_the_sanitizer_fails() -> None:
    with pytest.raises(CheckFailed, match="quick selftest under memcheck failed"):
        sanitizer.judge("memcheck", CLEAN["memcheck"], 1)


def test_a_sanitizer_that_does_not_work_here_is_skipped_with_what_it_said() -> None:
    with pytest.raises(CheckSkipped, match="needs a newer driver"):
        sanitizer.judge("memcheck", "========= Error: it needs a newer driver\n", 1)


def test_the_sanitizer_runs_a_quick_selftest_and_is_found_beside_nvcc(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = tmp_path / "compute-sanitizer"
    script.write_text(
        f'#!/bin/sh\necho "$PYTORCH_NO_CUDA_MEMORY_CACHING $@" > {tmp_path}/call\necho "ERROR SUMMARY: 0 errors"\n'
    )
    script.chmod(0o755)
    (tmp_path / "nvcc").touch(0o755)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setattr(sanitizer, "find_nvcc", lambda: tmp_path / "nvcc")
    sanitizer.check_under_sanitizer("memcheck")
    call = (tmp_path / "call").read_text()
    assert call.startswith("1 --tool memcheck ")
    assert f"{sys.executable} -m hf_lmopt.cli selftest --device cuda --quick --output " in call


def test_without_a_sanitizer_the_check_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sanitizer, "find_sanitizer", lambda: None)
    with pytest.raises(CheckSkipped, match="neither on the path nor beside nvcc"):
        sanitizer.check_under_sanitizer("racecheck")
