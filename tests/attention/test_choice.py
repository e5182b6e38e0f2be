"""`--attn auto` takes the compiled attention where it works, and says why not elsewhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_bert_classifier, tiny_gpt_oss, tiny_lora_classifier, tiny_xlnet_classifier
from transformers import AttentionInterface, AutoModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel, Wav2Vec2Config

from hf_lmopt.attention.choice import AttentionChoice, build_skeleton, choose_attention


CHOOSE_AND_EXAMINE = """
import json
from transformers import BertConfig, BertModel
from hf_lmopt.attention.choice import build_skeleton, choose_attention
from hf_lmopt.cli import main
skeleton = build_skeleton(BertModel, BertConfig(num_hidden_layers=1))
choice = choose_attention("auto", skeleton)
try:
    choose_attention("lmopt", skeleton)
except ValueError as error:
    refusal = str(error)
status = main(["doctor"])
print("---", json.dumps([choice.implementation, str(choice), refusal, status]))
"""


def build_llama_skeleton() -> PreTrainedModel:
    return build_skeleton(LlamaForCausalLM, LlamaConfig(num_hidden_layers=2))


@pytest.mark.parametrize("requested", ["auto", "lmopt"])
def test_lmopt_is_chosen_and_registered_where_it_works(requested: str) -> None:
    choice = choose_attention(requested, build_llama_skeleton())
    assert choice.implementation == "lmopt"
    assert "lmopt" in AttentionInterface().valid_keys()
    assert str(choice).startswith("Attention: lmopt, compiled for this processor (")


def test_other_names_are_taken_as_they_are() -> None:
    assert choose_attention("eager", build_llama_skeleton()) == AttentionChoice("eager", "as asked for")


@pytest.mark.parametrize(
    ("skeleton", "device_type", "default", "reason"),
    [
        (tiny_xlnet_classifier(), "cpu", "eager", "the attention layers of XLNetForSequenceClassification do not ask"),
        (tiny_bert_classifier(), "xpu", "sdpa", "the compiled attention runs on CPUs and on CUDA, and has no kernel"),
        (tiny_gpt_oss(), "xpu", "eager", "runs on CPUs and on CUDA"),
    ],
)
def test_elsewhere_the_models_default_is_chosen_and_lmopt_is_refused_for_the_same_reason(
    skeleton: PreTrainedModel, device_type: str, default: str, reason: str
) -> None:
    choice = choose_attention("auto", skeleton, device_type)
    assert choice.implementation == default
    assert choice.reason.startswith("not lmopt, since ")
    assert reason in choice.reason
    with pytest.raises(ValueError, match=f"attn='lmopt' was asked for, but .*{reason}.*use '{default}' or 'auto'"):
        choose_attention("lmopt", skeleton, device_type)


def test_a_model_inside_peft_is_asked_itself() -> None:
    assert choose_attention("auto", tiny_lora_classifier()).implementation == "lmopt"


def test_without_a_compiler_sdpa_is_chosen_and_doctor_and_refusal_say_what_to_install(tmp_path: Path) -> None:
    env = os.environ | {"CXX": "/nowhere/g++", "HF_LMOPT_CACHE": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", CHOOSE_AND_EXAMINE], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report, _, result = done.stdout.partition("---")
    implementation, line, refusal, status = json.loads(result)
    missing = "No C++ compiler: CXX='/nowhere/g++' cannot be run. "
    assert implementation == "sdpa"
    assert line.startswith(f"Attention: sdpa, not lmopt, since {missing}")
    assert "\n" not in line
    assert refusal.startswith(f"attn='lmopt' was asked for, but {missing}")
    assert status == 1
    assert f"extension       {missing}" in report
    assert "lmopt does not work: the extension is not there" in report
    assert not list(tmp_path.rglob("*.so"))


def test_a_skeleton_has_no_weights_and_leaves_config_and_random_state_alone() -> None:
    config = LlamaConfig(num_hidden_layers=2)
    skeleton = build_skeleton(LlamaForCausalLM, config)
    assert {parameter.device.type for parameter in skeleton.parameters()} == {"meta"}
    assert skeleton.config._attn_implementation == "sdpa"
    assert config._attn_implementation is None
    state = torch.get_rng_state()
    # Of a kind that draws a parameter on the CPU, whatever the device.
    build_skeleton(AutoModel.from_config, Wav2Vec2Config(num_hidden_layers=1))
    assert torch.equal(torch.get_rng_state(), state)
