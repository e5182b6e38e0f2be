"""`hf-lmopt doctor` on this machine, and on models of which it sees the config alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_bert_classifier
from transformers import GemmaConfig

from hf_lmopt import build_extension, cuda_architectures, cuda_support, doctor
from hf_lmopt.attention.backends import find_extension
from hf_lmopt.build_extension import load_extension
from hf_lmopt.cli import main
from hf_lmopt.cuda_architectures import Card
from hf_lmopt.doctor import UnknownModel, examine


@pytest.fixture(scope="module", autouse=True)
def extension() -> build_extension.LoadedExtension:
    return load_extension()


def read(text: str) -> dict[str, str]:
    """The facts by their labels."""
    return {line[:15].strip(): line[16:] for line in text.splitlines() if line[15:16] == " "}


def test_the_machine_is_described_a_line_per_fact(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    facts, kernels = read(text), find_extension().kernels
    assert facts["extension"].endswith(str(load_extension().path))
    assert facts["capability"] == kernels.capability
    assert facts["threads"].startswith(f"{torch.get_num_threads()} of torch on ")
    assert facts["torch"] == f"{torch.__version__}, as needed (>=2.10)"
    assert "inside the tested range" in facts["transformers"]
    assert facts["cpu, float32"] == load_extension().cpu_capability
    assert facts["cpu, bfloat16"] == kernels.serving(torch.bfloat16)
    assert facts["cpu, float64"].startswith("none, since ")
    if not torch.cuda.is_available():
        assert facts["cuda, any type"].startswith("none, since ")
    assert facts[facts["cpu, float32"]].startswith("causal, windows, masks, ")
    assert text.splitlines()[-1].startswith("lmopt works: hf_lmopt.register_attention()")


def test_an_override_that_lowers_the_kernels_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if find_extension().kernels.best == "portable":
        pytest.skip("nothing is lower")
    monkeypatch.setenv("HF_LMOPT_CACHE", str(tmp_path))  # not built there: what would happen is told
    monkeypatch.setenv("HF_LMOPT_CPU_CAPABILITY", "portable")
    text, works = examine()
    assert works
    assert "which HF_LMOPT_CPU_CAPABILITY rules out" in read(text)["capability"]
    assert read(text)["cpu, bfloat16"] == "portable"
    assert "lmopt will work, once it is built" in text


def test_the_support_matrix_has_a_line_per_generation_and_says_what_was_not_run() -> None:
    facts = read(examine()[0])
    assert facts["CPU"] == "float32, bfloat16, float16; all features, forward and backward; tested"
    assert facts["Turing"] == "sm_75: float16; all features, forward and backward; checked at PTX level"
    for name in ("Ampere", "Ada", "Hopper", "Blackwell"):
        assert "bfloat16, float16" in facts[name]
        assert facts[name].endswith("checked at PTX level")


def pretend_cards(monkeypatch: pytest.MonkeyPatch, *cards: Card) -> None:
    for module in (doctor, cuda_architectures, cuda_support):
        monkeypatch.setattr(module, "cards_in_machine", lambda: cards)


def test_cards_nvcc_and_the_code_that_serves_them_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_LMOPT_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_LMOPT_CUDA_ARCHS", "75;80")
    pretend_cards(monkeypatch, Card("RTX 3090", 86), Card("H100", 90))
    for module in (doctor, build_extension):
        monkeypatch.setattr(module, "find_nvcc", lambda: Path("/cuda/bin/nvcc"))
    monkeypatch.setattr(doctor, "nvcc_release", lambda nvcc: "13.0")
    monkeypatch.setattr(build_extension, "_loaded", None)
    text, _ = examine()
    facts = read(text)
    assert facts["nvcc"] == "13.0: /cuda/bin/nvcc"
    assert facts["cuda part"] == "for sm_75, sm_80"
    assert "RTX 3090 (sm_86), which runs sm_80" in text
    assert "H100 (sm_90), which runs nothing compiled" in text
    assert " and nvcc, for sm_75, sm_80, into " in facts["extension"]


def test_without_nvcc_it_is_said_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_LMOPT_CACHE", str(tmp_path))
    pretend_cards(monkeypatch, Card("Tesla T4", 75))
    for module in (build_extension, cuda_support):
        monkeypatch.setattr(module, "torch_has_cuda", lambda: True)
    for module in (doctor, build_extension):
        monkeypatch.setattr(module, "find_nvcc", lambda: None)
    monkeypatch.setattr(build_extension, "_loaded", None)
    text, works = examine()
    facts = read(text)
    assert works
    assert facts["nvcc"].startswith("not found. Install NVIDIA's CUDA toolkit")
    assert facts["cuda part"].startswith("none: nvcc was not found, which compiles it. Install NVIDIA's CUDA toolkit")
    assert facts["card"] == "Tesla T4 (sm_75), which runs nothing compiled"


def test_versions_outside_the_range_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.__version__", "5.99.0")
    monkeypatch.setattr("torch.__version__", "2.9.1+cpu")
    facts = read(examine()[0])
    assert facts["transformers"].startswith("5.99.0, outside the tested range (")
    assert facts["torch"] == "2.9.1+cpu, not as needed (>=2.10)"


@pytest.mark.parametrize(
    ("model_type", "heads"),
    [
        ("qwen2", "32 of size 128"),
        ("gpt2", "12 of size 64"),
        ("mistral", "32 of size 128, 8 of keys and values"),
        ("t5", "8 of size 64"),
        ("deepseek_v3", "128 of size 192"),
        ("whisper", "6 of size 64"),
    ],
)
def test_a_model_type_is_examined_by_its_default_config(
    model_type: str, heads: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", model_type]) == 0
    facts = read(capsys.readouterr().out)
    assert facts["heads"] == heads
    assert facts["its kernels"] == f"{load_extension().cpu_capability}, in float32"


@pytest.mark.parametrize(
    ("model_type", "reason", "default"),
    [
        ("deberta-v2", "the attention layers of DebertaV2Model do not ask transformers", "eager"),
        ("git", "GitSelfAttention, a layer of this model, computes attention by itself", "eager"),
    ],
)
def test_a_model_that_would_ignore_it_gives_status_1_and_the_way_out(
    model_type: str, reason: str, default: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", model_type]) == 1
    text = capsys.readouterr().out
    assert "its kernels" not in read(text)
    assert text.splitlines()[-1].startswith(f"lmopt does not work: {reason}")
    assert text.splitlines()[-1].endswith(f'Use attn_implementation="{default}".')


def test_a_folder_needs_a_config_and_no_weights(tmp_path: Path) -> None:
    tiny_bert_classifier().config.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"architectures": ["BertForSequenceClassification"], "dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    text, works = examine(str(tmp_path))
    assert works
    facts = read(text)
    assert facts["model"] == "BertForSequenceClassification, sdpa by default"
    assert facts["heads"] == "2 of size 8"
    assert facts["its kernels"] == f"{find_extension().kernels.serving(torch.bfloat16)}, in bfloat16"


def test_a_model_in_float64_is_not_served(tmp_path: Path) -> None:
    GemmaConfig(num_hidden_layers=1, dtype="float64").save_pretrained(tmp_path)
    text, works = examine(str(tmp_path))
    assert not works
    assert 'and no float64. Use attn_implementation="sdpa".' in text.splitlines()[-1]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no/such-model", r"'no/such-model' has no config that could be read \(.*It must be .*Correct the name"),
        (
            "informer",
            r"'informer' cannot be built from its config \(ValueError: The `prediction_length`.*Give the folder",
        ),
    ],
)
def test_a_model_that_cannot_be_found_or_built_gives_status_2(
    name: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UnknownModel, match=message):
        examine(name)
    with pytest.raises(SystemExit) as ended:
        main(["doctor", name])
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"hf-lmopt doctor: '{name}' ")


def test_an_override_that_cannot_be_honoured_gives_status_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_LMOPT_CPU_CAPABILITY", "sse9")
    with pytest.raises(SystemExit) as ended:
        main(["doctor"])
    assert ended.value.code == 2
    assert "HF_LMOPT_CPU_CAPABILITY='sse9' cannot be used" in capsys.readouterr().err


def test_build_builds_what_is_not_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By a compiler that fails, which shows that it was called."""
    compiler = tmp_path / "compiler"
    compiler.write_text("#!/bin/sh\necho disk on fire >&2; exit 3\n")
    compiler.chmod(0o755)
    monkeypatch.setattr(build_extension, "_loaded", None)
    monkeypatch.setattr(build_extension, "_reason_unavailable", None)
    monkeypatch.setenv("HF_LMOPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", str(compiler))
    assert main(["doctor"]) == 0
    assert not (tmp_path / "cache").exists()
    capsys.readouterr()
    assert main(["doctor", "--build"]) == 1
    text = capsys.readouterr().out
    assert "disk on fire" in text
    assert text.splitlines()[-1].startswith("lmopt does not work: the extension is not there and cannot be built")
