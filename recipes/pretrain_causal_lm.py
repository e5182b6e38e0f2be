"""
Pretrains a small causal language model on real text.

    python recipes/pretrain_causal_lm.py                                # WikiText-2, 5 to 10 minutes on two cores
    python recipes/pretrain_causal_lm.py --max_steps 20                 # the same, to see that it runs
    python recipes/pretrain_causal_lm.py recipes/configs/pretrain_gpt2.yaml
    python recipes/pretrain_causal_lm.py --train_file my.jsonl --validation_file my_validation.jsonl
    python recipes/pretrain_causal_lm.py --dataset_name roneneldan/TinyStories --num_train_epochs 1 --bf16
    python recipes/pretrain_causal_lm.py --resume_from_checkpoint last  # continues the run in --output_dir
    python recipes/pretrain_causal_lm.py --attn sdpa                    # torch's attention, not the compiled one
    python recipes/pretrain_causal_lm.py --lr_find                      # which learning rate? 100 steps, no training

What --output_dir holds in the end: `model/` (weights, config and tokenizer: `AutoModelForCausalLM.from_pretrained`
loads it, and finetune_classifier.py takes it as --model_name_or_path), `results.json` (figures before and after,
samples, settings, versions, machine, data hashes), `training_curves.png`, and `checkpoint-N/`.
"""

import hashlib
import math
import re
import sys
from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.data import Subset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    EarlyStoppingCallback,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    SchedulerType,
    set_seed,
)

from hf_lmopt import LMOptArguments, LMOptTrainer
from hf_lmopt.arguments import parse_mapping
from hf_lmopt.attention.choice import AttentionChoice, autocast_dtype_of, build_skeleton, choose_attention
from hf_lmopt.checkpointing import new_directory, newest_complete_checkpoint, prepare_output_dir, write_json
from hf_lmopt.data import (
    PackedDocuments,
    build_tokenizer,
    check_packing,
    clean_wikitext,
    collate_packed,
    count_words,
    encode_documents,
)
from hf_lmopt.data.corpus import Corpus, load_hub_corpus, read_corpus
from hf_lmopt.data.documents import TXT_LAYOUTS
from hf_lmopt.lr_finder import LRFinder, find_learning_rate
from hf_lmopt.metrics.language_modeling import CorpusScore, score_corpus
from hf_lmopt.optim.explain import explain_implementation
from hf_lmopt.publishing import plot_training_curves, run_facts
from hf_lmopt.publishing.results import portable_path


WIKITEXT = Path(__file__).parent / "data" / "wikitext-2-raw-v1"
QUICK_CHECK_STEPS, QUICK_CHECK_DOCUMENTS = 100, 4
DEFAULT_MAX_STEPS = 2000
DEFAULT_OPTIMIZER = "muon"  # the least loss at every length of compare_optimizers.py
NEW_MODEL_OPTIONS = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "config_overrides")
REPORTED_SETTINGS = (
    "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "weight_decay", "decay_form", "optim",
    "optimizer", "optimizer_kwargs", "adam_beta1", "adam_beta2", "max_grad_norm", "clip_strategy", "layer_lr_decay",
    "lr_multipliers", "per_device_train_batch_size", "gradient_accumulation_steps", "bf16", "fp16",
    "gradient_checkpointing",
)  # fmt: skip


def option(default: Any, text: str) -> Any:
    """A field of a dataclass of arguments with its help text."""
    return field(default=default, metadata={"help": text})


@dataclass
class RecipeArguments:
    """Data, model and evaluation."""

    dataset_name: str | None = option(None, "Dataset of the Hub, or a folder that `datasets` loads.")
    dataset_config_name: str | None = option(None, "Configuration of that dataset, such as wikitext-103-raw-v1.")
    train_file: str | None = option(None, "Own text: .txt, .jsonl, .csv (each also .gz) or .parquet.")
    validation_file: str | None = option(None, "Own validation text.")
    validation_percentage: float = option(
        5.0, "Share of documents, from the end, held out for validation where no validation text is given."
    )
    text_column: str = option("text", "Column or key of the text.")
    txt_layout: Literal[TXT_LAYOUTS] = option(  # type: ignore[valid-type]
        "auto",
        "What a document of a .txt file is. `auto`: an article where the file begins like WikiText, else the file.",
    )
    clean: bool = option(True, "Undo WikiText's ` @-@ `, ` @,@ ` and ` @.@ `.")

    tokenizer_name_or_path: str | None = option(None, "Tokenizer to use; by default that of the model, or a new BPE.")
    vocab_size: int = option(4096, "Tokens of a new byte-level BPE, trained on the training text.")
    tokenizer_cache_dir: str | None = option(None, "Where trained tokenizers are kept (default: under HF_HOME).")
    block_size: int = option(256, "Tokens per training sequence; documents are packed into such blocks.")

    model_name_or_path: str | None = option(None, "Model to continue training, in place of the five options below.")
    model_type: str = option("llama", "Architecture of a new model: llama, gpt2, opt, qwen3, mistral, ...")
    hidden_size: int = option(192, "Width of a new model.")
    num_hidden_layers: int = option(4, "Depth of a new model.")
    num_attention_heads: int = option(3, "Attention heads of a new model.")
    config_overrides: str | None = option(
        None,
        "Further fields of the new config, JSON or key=value,key=value. Unless given here, intermediate_size is "
        "3 * hidden_size and num_key_value_heads is num_attention_heads where the config has them, and the input and "
        "output embeddings are tied.",
    )
    attn: str = option(
        "auto",
        "Attention implementation: lmopt (compiled), sdpa, eager, ...; `auto` takes lmopt where it works, and what "
        "transformers takes by default elsewhere.",
    )

    embedding_lr_multiplier: float = option(
        10.0, "Learning-rate factor of the token embedding, unless --lr_multipliers has one; 1 for a trained model."
    )
    decay_ratio: float = option(0.8, "Last part of the steps in which warmup_stable_decay lets the rate fall to 0.")
    context_length: int | None = option(None, "Tokens in a window of the evaluation (default: block_size).")
    stride: int | None = option(None, "By how many tokens that window moves (default: half of context_length).")
    eval_documents: int | None = option(
        None,
        "Validation documents scored before and after, the first ones. Default: all, but 4 in a run of at most 100 "
        "steps, which is a check and no result. results.json says how many.",
    )
    eval_blocks: int = option(128, "Validation blocks scored during training: the curve, and early stopping.")
    prompts: list[str] = field(
        default_factory=lambda: ["The game was", "In the 19th century ,", " = "],
        metadata={"help": "Beginnings of the samples."},
    )
    max_new_tokens: int = option(60, "Length of a sample.")

    lr_find: bool = option(
        False, "A learning-rate range test in place of the training: prints a rate, writes lr_find.json and .png."
    )


@dataclass
class PretrainingArguments(LMOptArguments):
    """Optimisation: all of TrainingArguments and LMOptArguments, with defaults for a small model on a laptop."""

    output_dir: str = option("runs/pretrain_causal_lm", "Folder of the run; must not hold another one.")
    max_steps: int = option(DEFAULT_MAX_STEPS, "Optimizer steps. --num_train_epochs takes its place if given.")
    num_train_epochs: float = option(0.0, "Passes over the training text; 0 leaves it to --max_steps.")
    per_device_train_batch_size: int = option(4, "Blocks per micro-batch.")
    per_device_eval_batch_size: int = option(16, "Blocks or windows per batch of the evaluation.")
    optimizer: str | None = option(
        None, f"Optimizer by name; `hf-lmopt optimizers` lists them. {DEFAULT_OPTIMIZER}, unless --optim is given."
    )
    learning_rate: float = option(2e-3, "Peak learning rate.")
    lr_scheduler_type: str = option("warmup_stable_decay", "Schedule of the learning rate.")
    warmup_steps: float = option(0.05, "Steps of warm-up, or their share of all steps if below 1.")
    weight_decay: float = option(0.1, "Weight decay; --decay_form says which kind.")
    adam_beta2: float = option(0.98, "Decay of Adam's second moment.")
    logging_steps: float = option(50, "Steps between two lines of the log.")
    eval_strategy: str = option("steps", "When --eval_blocks are scored.")
    eval_steps: float | None = option(400, "Steps between two evaluations.")
    save_steps: float = option(400, "Steps between two checkpoints.")
    save_total_limit: int | None = option(2, "Checkpoints that are kept.")
    use_cpu: bool = option(not torch.accelerator.is_available(), "Train on the CPU; bf16 there needs it to be said.")
    dataloader_pin_memory: bool = option(torch.cuda.is_available(), "Page-locked batches, which only a GPU can use.")
    early_stopping_patience: int | None = option(
        None, "Stop after so many evaluations without a better one, and keep the best model."
    )

    def __post_init__(self) -> None:
        if self.num_train_epochs > 0:
            if self.max_steps not in (DEFAULT_MAX_STEPS, -1):
                raise ValueError(
                    f"num_train_epochs={self.num_train_epochs} and max_steps={self.max_steps} both say how long to "
                    "train. Only one can: leave one of them out."
                )
            self.max_steps = -1
        if self.optimizer is None and self.optim == type(self).__dataclass_fields__["optim"].default:
            self.optimizer = DEFAULT_OPTIMIZER
        if self.early_stopping_patience is not None:
            self.load_best_model_at_end, self.metric_for_best_model = True, "eval_loss"
        super().__post_init__()


class HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Shows defaults, and the commands at the top as they are written."""


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    recipe, args = parse_arguments(argv)
    prepare_output_dir(args.output_dir, resume=args.resume_from_checkpoint is not None or recipe.lr_find)
    checkpoint = find_checkpoint(args)

    corpus = load_corpus(recipe)
    set_seed(args.seed)
    tokenizer = load_tokenizer(recipe, corpus.train)
    skeleton = build_skeleton(AutoModelForCausalLM.from_config, load_config(recipe, tokenizer))
    attention = choose_attention(recipe.attn, skeleton, args.device.type, autocast_dtype_of(args))
    print(attention)
    model = load_model(recipe, tokenizer, attention.implementation)
    check_packing(model)
    blocks = {
        "train": pack(tokenizer, clean(recipe, corpus.train), recipe.block_size),
        "validation": pack(tokenizer, clean(recipe, corpus.validation), recipe.block_size),
    }
    trainer = build_trainer(recipe, args, model, tokenizer, blocks)
    if recipe.lr_find:
        find_learning_rate(LRFinder(trainer), ["python", sys.argv[0], *argv])
        return

    before = evaluate(recipe, trainer, corpus.validation, "Evaluation before training")
    outcome = train(trainer, checkpoint)
    after = evaluate(recipe, trainer, corpus.validation, "Evaluation after training")
    if trainer.is_world_process_zero():
        save(recipe, trainer, corpus, attention, before, after, outcome)


def parse_arguments(argv: list[str]) -> tuple[RecipeArguments, PretrainingArguments]:
    """Reads flags, or one YAML or JSON file, and refuses what contradicts itself."""
    parser = HfArgumentParser(
        (RecipeArguments, PretrainingArguments),
        usage="%(prog)s [options] | %(prog)s CONFIG.yaml",
        description=__doc__,
        formatter_class=HelpFormatter,
    )
    if len(argv) == 1 and argv[0].endswith((".yaml", ".yml")):
        recipe, args = parser.parse_yaml_file(argv[0])
    elif len(argv) == 1 and argv[0].endswith(".json"):
        recipe, args = parser.parse_json_file(argv[0])
    else:
        recipe, args = parser.parse_args_into_dataclasses(argv)
    check_options(recipe, args)
    return recipe, args


def check_options(recipe: RecipeArguments, args: PretrainingArguments) -> None:
    """Refuses two sources of the training text, and options that another option keeps from being read."""
    if recipe.dataset_name and recipe.train_file:
        raise ValueError(
            f"dataset_name={recipe.dataset_name!r} and train_file={recipe.train_file!r} both give the training text. "
            "Only one can: leave one of them out."
        )
    if recipe.lr_find and args.resume_from_checkpoint is not None:
        raise ValueError(
            f"lr_find and resume_from_checkpoint={args.resume_from_checkpoint!r} were both given. The range test "
            "resumes nothing: leave one of them out, or give the weights by model_name_or_path."
        )
    given_tokenizer = recipe.tokenizer_name_or_path or recipe.model_name_or_path
    unread = {
        "train_file is not given": () if recipe.train_file else ("validation_file",),
        "dataset_name is not given": () if recipe.dataset_name else ("dataset_config_name",),
        "model_name_or_path is given": NEW_MODEL_OPTIONS if recipe.model_name_or_path else (),
        "a tokenizer is given": ("vocab_size", "tokenizer_cache_dir") if given_tokenizer else (),
        f"lr_scheduler_type is {SchedulerType(args.lr_scheduler_type).value}": ()
        if has_stable_phase(args)
        else ("decay_ratio",),
    }
    for reason, names in unread.items():
        for name in names:
            if getattr(recipe, name) != getattr(RecipeArguments, name):
                raise ValueError(
                    f"{name}={getattr(recipe, name)!r} would not be read, because {reason}. Every option must count: "
                    f"leave {name} out, or change the other."
                )


def has_stable_phase(args: PretrainingArguments) -> bool:
    return args.lr_scheduler_type == SchedulerType.WARMUP_STABLE_DECAY


def find_checkpoint(args: PretrainingArguments) -> str | None:
    """The checkpoint to resume from: a path, or the newest complete one of the output folder for `last`."""
    if args.resume_from_checkpoint is None or args.resume_from_checkpoint.lower() not in ("last", "true"):
        return args.resume_from_checkpoint
    checkpoint = newest_complete_checkpoint(args.output_dir)
    if checkpoint is None:
        raise FileNotFoundError(
            f"output_dir={args.output_dir!r} holds no complete checkpoint, so there is nothing to resume. Give the "
            "folder of the earlier run, or leave --resume_from_checkpoint out."
        )
    return checkpoint


# ---- Text ----


def load_corpus(recipe: RecipeArguments) -> Corpus:
    """The raw documents of the chosen data set, of the own files, or of WikiText-2."""
    column, percentage = recipe.text_column, recipe.validation_percentage
    if recipe.dataset_name:
        return load_hub_corpus(recipe.dataset_name, recipe.dataset_config_name, column, percentage)
    files = [str(WIKITEXT / "train.txt.gz"), str(WIKITEXT / "validation.txt.gz")]
    if recipe.train_file:
        files = [file for file in (recipe.train_file, recipe.validation_file) if file]
    return read_corpus(files, column, recipe.txt_layout, percentage)


def clean(recipe: RecipeArguments, documents: list[str]) -> list[str]:
    return [clean_wikitext(document) for document in documents] if recipe.clean else documents


# ---- Tokens and model ----


def load_tokenizer(recipe: RecipeArguments, train_documents: list[str]) -> PreTrainedTokenizerBase:
    """The given tokenizer, that of the given model, or a new one of the training text."""
    name = recipe.tokenizer_name_or_path or recipe.model_name_or_path
    if name is None:
        return build_tokenizer(
            clean(recipe, train_documents), recipe.vocab_size, recipe.block_size, recipe.tokenizer_cache_dir
        )
    return AutoTokenizer.from_pretrained(name)


def separator_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token in front of every document: the one that begins a text, else the one that ends it."""
    for token_id in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return token_id
    raise ValueError(
        f"The tokenizer {tokenizer.name_or_path} has neither a bos nor an eos token. One of them goes in front of "
        "every document. Choose the tokenizer of a causal language model."
    )


def load_model(
    recipe: RecipeArguments, tokenizer: PreTrainedTokenizerBase, attn_implementation: str | None = None
) -> PreTrainedModel:
    """A model to continue, or a new one of the given sizes; refuses one that tokens or blocks do not fit."""
    config = load_config(recipe, tokenizer)
    if recipe.model_name_or_path:
        model = AutoModelForCausalLM.from_pretrained(
            recipe.model_name_or_path, config=config, dtype=torch.float32, attn_implementation=attn_implementation
        )
    else:
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation)
    vocab_size = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > vocab_size:
        raise ValueError(
            f"The tokenizer has {len(tokenizer)} tokens and the model {vocab_size} embeddings. Every token needs one. "
            "Use the model's own tokenizer, or a new model."
        )
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    needed = max(recipe.block_size, recipe.context_length or 0)
    if longest is not None and needed > longest:
        raise ValueError(
            f"Sequences of {needed} tokens were asked for, and the model takes {longest}. Lower --block_size or "
            "--context_length, or raise max_position_embeddings in --config_overrides of a new model."
        )
    return model


def load_config(recipe: RecipeArguments, tokenizer: PreTrainedTokenizerBase) -> Any:
    """The config of the model to continue, or of a new one."""
    if recipe.model_name_or_path:
        return AutoConfig.from_pretrained(recipe.model_name_or_path)
    return build_config(recipe, tokenizer)


def build_config(recipe: RecipeArguments, tokenizer: PreTrainedTokenizerBase) -> Any:
    """The config of a new model, with the field names that transformers' configs share."""
    defaults = AutoConfig.for_model(recipe.model_type)
    fields = {
        "vocab_size": len(tokenizer),
        "hidden_size": recipe.hidden_size,
        "num_hidden_layers": recipe.num_hidden_layers,
        "num_attention_heads": recipe.num_attention_heads,
        "max_position_embeddings": max(recipe.block_size, recipe.context_length or 0),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": True,
    }
    if hasattr(defaults, "intermediate_size"):
        fields["intermediate_size"] = 3 * recipe.hidden_size
    if hasattr(defaults, "num_key_value_heads"):
        fields["num_key_value_heads"] = recipe.num_attention_heads
    fields |= parse_mapping("config_overrides", recipe.config_overrides) or {}
    if unknown := [name for name in fields if not hasattr(defaults, name)]:
        raise ValueError(
            f"A {recipe.model_type} config has no field {', '.join(unknown)}. A field that does not exist would "
            "change nothing. Look its names up in the documentation of transformers, or choose another --model_type."
        )
    return AutoConfig.for_model(recipe.model_type, **fields)


def pack(tokenizer: PreTrainedTokenizerBase, documents: list[str], block_size: int) -> PackedDocuments:
    return PackedDocuments(encode_documents(tokenizer, documents), separator_of(tokenizer), block_size)


# ---- Training and evaluation ----


def build_trainer(
    recipe: RecipeArguments,
    args: PretrainingArguments,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    blocks: dict[str, PackedDocuments],
) -> LMOptTrainer:
    validation = blocks["validation"]
    count = min(recipe.eval_blocks, len(validation))
    patience = args.early_stopping_patience
    args.lr_multipliers = with_embedding_multiplier(
        recipe, model, parse_mapping("lr_multipliers", args.lr_multipliers)
    )
    trainer = LMOptTrainer(
        model=model,
        args=args,
        train_dataset=blocks["train"],
        # Evenly spread, so that the curve does not depend on one article.
        eval_dataset=Subset(validation, [index * len(validation) // count for index in range(count)]),
        data_collator=collate_packed,
        processing_class=tokenizer,
        callbacks=[EarlyStoppingCallback(patience)] if patience is not None else None,
    )
    if has_stable_phase(args):
        defaults = {"num_decay_steps": round(recipe.decay_ratio * count_steps(trainer)), "decay_type": "linear"}
        args.lr_scheduler_kwargs = defaults | (args.lr_scheduler_kwargs or {})
    return trainer


def with_embedding_multiplier(
    recipe: RecipeArguments, model: PreTrainedModel, lr_multipliers: dict[str, float] | None
) -> dict[str, float]:
    """Most rows of the embedding are in few batches, so they need longer steps; patterns of the user come first."""
    embedding = model.get_input_embeddings().weight
    name = next(name for name, parameter in model.named_parameters() if parameter is embedding)
    lr_multipliers = lr_multipliers or {}
    if recipe.embedding_lr_multiplier == 1 or any(re.search(pattern, name) for pattern in lr_multipliers):
        return lr_multipliers
    return {**lr_multipliers, f"^{re.escape(name)}$": recipe.embedding_lr_multiplier}


def count_steps(trainer: LMOptTrainer) -> int:
    """Optimizer steps of the whole training."""
    args = trainer.args
    if args.max_steps > 0:
        return args.max_steps
    steps_per_epoch = math.ceil(len(trainer.get_train_dataloader()) / args.gradient_accumulation_steps)
    return math.ceil(steps_per_epoch * args.num_train_epochs)


def train(trainer: LMOptTrainer, checkpoint: str | None) -> dict[str, float]:
    """Trains; Ctrl-C ends the script with the command that continues."""
    try:
        return trainer.train(resume_from_checkpoint=checkpoint).metrics
    except KeyboardInterrupt:
        newest = newest_complete_checkpoint(trainer.args.output_dir)
        advice = f"continue with --resume_from_checkpoint {newest}" if newest else "no checkpoint was written yet"
        sys.exit(f"Stopped at step {trainer.state.global_step}; {advice}.")


def evaluate(recipe: RecipeArguments, trainer: LMOptTrainer, raw_documents: list[str], title: str) -> CorpusScore:
    """Scores the validation documents exactly, in the precision of the weights."""
    limit = recipe.eval_documents
    if limit is None and count_steps(trainer) <= QUICK_CHECK_STEPS:
        limit = QUICK_CHECK_DOCUMENTS
    raw_documents = raw_documents[:limit]
    documents = clean(recipe, raw_documents)
    score = score_corpus(
        trainer.model,
        encode_documents(trainer.processing_class, documents),
        separator_of(trainer.processing_class),
        num_words=sum(map(count_words, raw_documents)),
        num_bytes=sum(len(document.encode()) for document in documents),
        context_length=recipe.context_length or recipe.block_size,
        stride=recipe.stride,
        batch_size=trainer.args.per_device_eval_batch_size,
        description=title,
    )
    print(
        f"{title}: {score.bits_per_byte:.3f} bits per byte, perplexity {score.perplexity_per_token:.1f} per token "
        f"and {score.perplexity_per_word:.1f} per word, loss {score.loss:.3f} nats per token "
        f"({score.num_documents} documents, context {score.context_length}, stride {score.stride})"
    )
    return score


# ---- What the run leaves ----


def generate_samples(recipe: RecipeArguments, trainer: LMOptTrainer) -> list[str]:
    """One continuation per prompt, drawn from the 50 likeliest tokens at temperature 0.8."""
    model, tokenizer = trainer.model, trainer.processing_class
    samples = []
    set_seed(trainer.args.seed)
    for prompt in recipe.prompts:
        ids = [separator_of(tokenizer), *encode_documents(tokenizer, [prompt])[0]]
        output = model.generate(
            torch.tensor([ids], device=model.device),
            max_new_tokens=recipe.max_new_tokens,
            do_sample=True,
            top_k=50,
            temperature=0.8,
            pad_token_id=separator_of(tokenizer),
            use_cache=True,
        )
        samples.append(tokenizer.decode(output[0, 1:], skip_special_tokens=True))
    return samples


def save(
    recipe: RecipeArguments,
    trainer: LMOptTrainer,
    corpus: Corpus,
    attention: AttentionChoice,
    before: CorpusScore,
    after: CorpusScore,
    outcome: dict[str, float],
) -> None:
    """Writes samples, model, curves, and last of all the results: a folder with results.json is complete."""
    args, folder = trainer.args, Path(trainer.args.output_dir)
    samples = generate_samples(recipe, trainer)
    print("\n\n".join(samples))
    with new_directory(folder / "model") as unfinished:
        trainer.model.save_pretrained(unfinished)
        trainer.processing_class.save_pretrained(unfinished)
    plot_training_curves(trainer.state.log_history, folder / "training_curves.png")
    tokens_per_step = args.train_batch_size * args.world_size * args.gradient_accumulation_steps * recipe.block_size
    results = {
        "task": "causal language modeling",
        "dataset": portable_name(recipe.dataset_name) if recipe.dataset_name else portable_path(corpus.files[0]),
        "validation_before": before.to_dict(),
        "validation_after": after.to_dict(),
        "validation_documents_available": len(corpus.validation),
        "training": {
            "steps": trainer.state.global_step,
            "tokens_per_step": tokens_per_step,
            "tokens": trainer.state.global_step * tokens_per_step,
            "loss": outcome["train_loss"],
            "seconds": outcome["train_runtime"],
        },
        "model": {"type": trainer.model.config.model_type, "parameters": trainer.model.num_parameters()},
        "samples": samples,
        "settings": {name: getattr(args, name) for name in REPORTED_SETTINGS},
        "attention": asdict(attention),
        "optimizer_implementation": explain_implementation(trainer.optimizer.optimizer),
        "text_sha256": {"train": text_sha256(corpus.train), "validation": text_sha256(corpus.validation)},
        **run_facts(args.seed, corpus.files),
    }
    write_json(folder / "results.json", results)
    print(f"Wrote {folder}/model, results.json and training_curves.png.")


def portable_name(dataset_name: str) -> str:
    """The name on the Hub, or a local folder without the folders of this machine."""
    return portable_path(dataset_name) if Path(dataset_name).exists() else dataset_name


def text_sha256(documents: list[str]) -> str:
    """Hash of the raw documents, wherever they came from."""
    return hashlib.sha256("\0".join(documents).encode()).hexdigest()


if __name__ == "__main__":
    main()
