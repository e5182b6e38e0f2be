"""The mixin in front of TRL's SFTTrainer, which computes its own loss per token."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from accumulation_cases import KeepGradients, shifted_cross_entropy
from datasets import Dataset
from tiny_models import VOCAB_SIZE, tiny_llama
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_lmopt import LMOptArgumentsMixin, LMOptMixin


trl = pytest.importorskip("trl")


@dataclass
class SFTArguments(LMOptArgumentsMixin, trl.SFTConfig):
    """As a user writes it."""


class SFTTrainer(LMOptMixin, trl.SFTTrainer):
    """As a user writes it."""


def word_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, VOCAB_SIZE)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", bos_token="<s>")


def gradient(tmp_path: Path, batch_size: int, accumulation_steps: int) -> tuple[torch.Tensor, dict[str, Any]]:
    rows = [{"text": " ".join(f"w{3 + (7 * i + j * j) % 60}" for j in range(2 + i))} for i in range(8)]
    keep = KeepGradients()
    args = SFTArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation_steps,
        num_train_epochs=1,
        learning_rate=0.0,
        max_grad_norm=0.0,
        layer_lr_decay=0.9,
        logging_steps=1,
        bf16=False,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    model = tiny_llama().float()
    trainer = SFTTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=word_tokenizer(),
        callbacks=[keep],
    )
    trainer.train()
    return keep.gradients[0], next(entry for entry in trainer.state.log_history if "loss" in entry)


def test_sft_trainer_has_the_gradient_of_the_mean_for_every_split(tmp_path: Path) -> None:
    whole, log = gradient(tmp_path, 8, 1)
    assert log["lr/head"] == 0
    model = tiny_llama().double()
    total, count = torch.zeros((), dtype=torch.float64), 0
    for i in range(8):
        tokens = torch.tensor([[*(3 + (7 * i + j * j) % 60 for j in range(2 + i)), 2]])
        loss, items = shifted_cross_entropy(model(input_ids=tokens).logits, tokens)
        total, count = total + loss, count + items
    (total / count).backward()
    by_hand = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
    assert log["loss"] == pytest.approx(total.item() / count, rel=1e-5)
    assert float((whole - by_hand).norm() / by_hand.norm()) < 1e-5
    for split in ((2, 4), (1, 8), (3, 3)):
        part, part_log = gradient(tmp_path, *split)
        assert float((part - whole).norm() / whole.norm()) < 1e-6
        assert part_log["loss"] == pytest.approx(log["loss"], rel=1e-5)
