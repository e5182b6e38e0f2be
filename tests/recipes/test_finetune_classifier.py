"""The fine-tuning recipe from the command line to the model folder and its answers, on tiny models and files."""

import importlib.util
import json
import random
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from peft import AutoPeftModelForSequenceClassification
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
    BertTokenizer,
    DistilBertConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    XLNetConfig,
    XLNetModel,
)


ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "recipes" / "configs").glob("finetune_*.yaml"))
WORDS = ["good", "bad", "film", "plot", "the", "a", "cast", "music"]


def load_recipe():
    path = ROOT / "recipes" / "finetune_classifier.py"
    spec = importlib.util.spec_from_file_location("finetune_classifier", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["finetune_classifier"] = module
    spec.loader.exec_module(module)
    return module


recipe = load_recipe()


def sentence(generator, word):
    words = generator.choices(WORDS[2:], k=generator.randrange(2, 8))
    words.insert(generator.randrange(len(words)), word)
    return " ".join(words)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Sentences whose one word of judgement says the class, the score and one of the labels."""
    folder, generator = tmp_path_factory.mktemp("data"), random.Random(0)
    for split, count in (("train", 160), ("validation", 24), ("test", 24)):
        rows = []
        for _ in range(count):
            good = generator.random() < 0.5
            text = sentence(generator, WORDS[0] if good else WORDS[1])
            topics = ["good"] * good + ["film"] * ("film" in text)
            other = WORDS[0] if generator.random() < 0.5 else WORDS[1]
            row = {"text": text, "label": "positive" if good else "negative", "score": 2.0 if good else -1.0}
            row |= {"topics": topics, "other": other, "same": int(good == (other == "good"))}
            rows.append(json.dumps(row) + "\n")
        (folder / f"{split}.jsonl").write_text("".join(rows))
    return folder


@pytest.fixture(scope="module")
def encoder_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained(folder)
    torch.manual_seed(0)
    # nf4 stores blocks of 64 weights.
    size = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=len(words), max_position_embeddings=24, **size)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def decoder_model(tmp_path_factory):
    """As recipes/pretrain_causal_lm.py writes it: byte-level BPE, one special token, nothing for padding."""
    folder = tmp_path_factory.mktemp("llama")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([" ".join(WORDS)] * 5, trainer)
    end = "<|endoftext|>"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=end, eos_token=end).save_pretrained(folder)
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=tokenizer.get_vocab_size(), max_position_embeddings=64, **size)
    config.bos_token_id = config.eos_token_id = 0
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def run(data, encoder_model, tmp_path):
    """Runs the recipe on the small files; returns the folder of the run and its results."""

    def start(*arguments, output_dir=tmp_path / "run", model=encoder_model, epochs="3"):
        given = ["--model_name_or_path", str(model), "--output_dir", str(output_dir), "--num_train_epochs", epochs]
        for split in ("train", "validation", "test"):
            given += [f"--{split}_file", str(data / f"{split}.jsonl")]
        given += ["--learning_rate", "5e-3", "--per_device_train_batch_size", "8", "--disable_tqdm", "True"]
        recipe.main([*given, *arguments])
        return output_dir, json.loads((output_dir / "results.json").read_text())

    return start


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def encoder():
    return recipe.LabelEncoder("single_label_classification", ("negative", "positive"))


@torch.inference_mode()
def logits_of(model, tokenizer, texts, pairs=None):
    return model.eval()(**tokenizer(texts, pairs, padding=True, return_tensors="pt")).logits


def test_reported_accuracy_is_that_of_the_saved_model(run, data):
    folder, results = run()
    model = AutoModelForSequenceClassification.from_pretrained(folder / "model")
    rows = rows_of(data / "test.jsonl")
    ids = logits_of(model, AutoTokenizer.from_pretrained(folder / "model"), [row["text"] for row in rows]).argmax(-1)
    right = [model.config.id2label[int(i)] == row["label"] for i, row in zip(ids, rows, strict=True)]
    assert results["test"]["accuracy"] == sum(right) / len(rows) >= 0.9
    assert model.config.label2id == {"negative": 0, "positive": 1}
    assert sum(map(sum, results["test"]["confusion_matrix"])) == len(rows)
    assert len(results["test"]["f1_per_class"]) == 2
    assert results["settings"]["layer_lr_decay"] == 0.9
    assert results["settings"]["num_train_epochs"] == 3.0
    for picture in ("confusion_matrix.png", "training_curves.png"):
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")


def test_predict_prints_label_and_probability_without_training(run, data, capsys):
    folder, _ = run()
    before = sorted(folder.rglob("*"))
    capsys.readouterr()
    recipe.main(["--output_dir", str(folder), "--predict", "the good film", "a bad plot " * 30])
    good, bad = capsys.readouterr().out.splitlines()
    model = AutoModelForSequenceClassification.from_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    probability = logits_of(model, tokenizer, ["the good film"]).softmax(-1).max().item()
    assert good == f"positive {probability:.3f}  the good film"
    assert bad.startswith("negative ")
    assert sorted(folder.rglob("*")) == before


def test_predict_without_a_model_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no trained model.*Train first"):
        recipe.main(["--output_dir", str(tmp_path), "--predict", "x"])


def test_decoder_without_padding_token_is_fine_tuned(run, decoder_model):
    untrained, _ = recipe.build_model(recipe.RecipeArguments(model_name_or_path=str(decoder_model)), encoder())
    assert untrained.config.pad_token_id == 0
    folder, results = run("--per_device_eval_batch_size", "7", model=decoder_model)
    assert results["test"]["accuracy"] >= 0.9
    model = AutoModelForSequenceClassification.from_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    assert model.config.pad_token_id == tokenizer.pad_token_id == 0
    texts = ["good", "the music the music the bad film"]
    alone = torch.cat([logits_of(model, tokenizer, [text]) for text in texts])
    torch.testing.assert_close(logits_of(model, tokenizer, texts), alone, atol=1e-5, rtol=1e-4)


def copy_with_sharp_attention(folder, copy):
    """Without dropout, and with weights so large that attention is far from uniform."""
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text())
    config |= {name: 0.0 for name in config if "dropout" in name and config[name]}
    (copy / "config.json").write_text(json.dumps(config))
    weights = load_file(copy / "model.safetensors")
    large = {name: 10 * weight if weight.dim() == 2 else weight for name, weight in weights.items()}
    save_file(large, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_the_compiled_attention_has_the_losses_of_sdpa_on_padded_batches(
    run, encoder_model, decoder_model, tmp_path, kind
):
    model = copy_with_sharp_attention(encoder_model if kind == "encoder" else decoder_model, tmp_path / "model")
    losses = {}
    for name in ("lmopt", "sdpa"):
        # Neither sorted by length nor of one length: most rows are padded.
        settings = ["--attn", name, "--max_steps", "3", "--logging_steps", "1", "--train_sampling_strategy", "random"]
        settings += ["--eval_strategy", "steps", "--eval_steps", "3", "--save_strategy", "steps", "--save_steps", "3"]
        folder, results = run(*settings, "--learning_rate", "1e-3", output_dir=tmp_path / name, model=model)
        state = json.loads((folder / "checkpoint-3" / "trainer_state.json").read_text())
        losses[name] = [log.get("loss", log.get("eval_loss")) for log in state["log_history"]]
        assert results["attention"]["implementation"] == name
    assert len(losses["lmopt"]) == 4
    assert losses["lmopt"] == pytest.approx(losses["sdpa"], abs=1e-5, rel=0)


def test_the_choice_of_attention_is_printed_and_recorded_with_its_reason(run, encoder_model, tmp_path, capsys):
    _, results = run(epochs="0.1")
    assert results["attention"]["implementation"] == "lmopt"
    assert f"Attention: lmopt, {results['attention']['reason']}\n" in capsys.readouterr().out


def test_a_model_that_ignores_the_compiled_attention_trains_with_its_own_and_says_so(run, encoder_model, tmp_path):
    folder = tmp_path / "xlnet"
    torch.manual_seed(0)
    size = {"d_model": 32, "n_layer": 1, "n_head": 2, "d_inner": 32}
    XLNetModel(XLNetConfig(vocab_size=len(WORDS) + 5, pad_token_id=0, **size)).save_pretrained(folder)
    BertTokenizer.from_pretrained(encoder_model).save_pretrained(folder)
    _, results = run(model=folder, epochs="0.1")
    assert results["attention"]["implementation"] == "eager"
    assert "XLNetForSequenceClassification do not ask" in results["attention"]["reason"]
    with pytest.raises(ValueError, match="attn='lmopt' was asked for, but the attention layers of XLNet"):
        run("--attn", "lmopt", model=folder, output_dir=tmp_path / "refused")


def test_regression_learns_the_score(run, capsys):
    folder, results = run("--problem_type", "regression")
    assert results["test"]["pearson"] > 0.9
    assert results["test"]["mse"] < 1.0
    assert not (folder / "confusion_matrix.png").exists()
    capsys.readouterr()
    recipe.main(["--output_dir", str(folder), "--predict", "the good film", "a bad plot"])
    good, bad = (float(line.split()[0]) for line in capsys.readouterr().out.splitlines())
    assert good > 1 > 0 > bad


def test_several_labels_are_learnt_and_predicted_together(run, capsys):
    several = ("--problem_type", "multi_label_classification", "--label_column", "topics")
    folder, results = run(*several, epochs="4")
    assert results["labels"] == ["film", "good"]
    assert results["test"]["f1_macro"] > 0.7
    capsys.readouterr()
    recipe.main(["--output_dir", str(folder), "--predict", "the good film", "a bad plot"])
    both, none = capsys.readouterr().out.splitlines()
    assert both.startswith("film 0.")
    assert ", good 0." in both
    assert none.startswith("no label")


def test_sentence_pairs_reach_the_model_as_pairs(run, capsys):
    folder, results = run("--text_pair_column", "other", "--label_column", "same", epochs="1")
    assert results["labels"] == ["0", "1"]
    capsys.readouterr()
    recipe.main(["--output_dir", str(folder), "--predict", "good film", "--predict_pair", "bad"])
    model = AutoModelForSequenceClassification.from_pretrained(folder / "model")
    logits = logits_of(model, AutoTokenizer.from_pretrained(folder / "model"), ["good film"], ["bad"])
    assert f" {logits.softmax(-1).max().item():.3f}  good film" in capsys.readouterr().out
    with pytest.raises(ValueError, match="predict has 1 texts and predict_pair has 2"):
        recipe.main(["--output_dir", str(folder), "--predict", "a", "--predict_pair", "b", "c"])


@pytest.mark.parametrize("peft", ["lora", "qlora"])
def test_adapter_trains_with_its_head_and_loads_as_reported(run, data, encoder_model, capsys, peft):
    folder, results = run("--peft", peft, "--lora_plus_ratio", "4")
    assert results["model"]["trained"] < results["model"]["parameters"]
    weights = load_file(folder / "model" / "adapter_model.safetensors")
    assert all(value.abs().max() > 0 for name, value in weights.items() if "lora_B" in name)
    head = next(value for name, value in weights.items() if name.endswith("classifier.weight"))
    recipe.set_seed(42)
    untrained, _ = recipe.build_model(recipe.RecipeArguments(model_name_or_path=str(encoder_model)), encoder())
    assert (head - untrained.classifier.weight).abs().max() > 0.01
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(folder / "model", num_labels=2)
    torch.testing.assert_close(
        loaded.base_model.model.classifier.modules_to_save["default"].weight.cpu(),
        head,
    )
    kinds = {type(module).__name__ for module in recipe.load_trained_model(folder / "model")[0].modules()}
    assert ("Linear4bit" in kinds) == (peft == "qlora")
    rows = rows_of(data / "test.jsonl")
    capsys.readouterr()
    recipe.main(["--output_dir", str(folder), "--predict", *(row["text"] for row in rows)])
    answers = capsys.readouterr().out.splitlines()[-len(rows) :]
    right = sum(answer.startswith(row["label"]) for answer, row in zip(answers, rows, strict=True))
    assert right / len(rows) == pytest.approx(results["test"]["accuracy"])


def test_head_is_all_that_lies_outside_the_body():
    assert recipe.head_modules(DistilBertConfig(n_layers=1)) == ["pre_classifier", "classifier"]
    assert recipe.head_modules(LlamaConfig(num_hidden_layers=1)) == ["score"]


def test_balanced_loss_is_the_weighted_mean_over_examples():
    examples = [recipe.LabeledText("t", label) for label in "aaab"]
    encoder = recipe.fit_label_encoder(examples, "single_label_classification")
    balanced = recipe.RecipeArguments(class_weights="balanced")
    loss = recipe.build_weighted_loss(balanced, examples, encoder)

    class Outputs:
        logits = torch.randn(3, 2, dtype=torch.float64)

    # 4 examples, 2 classes: weights 4 / (2 * 3) and 4 / (2 * 1), whatever the micro-batch holds.
    log_probabilities = Outputs.logits.log_softmax(-1)
    expected = -(2 / 3 * log_probabilities[:2, 0].sum() + 2 * log_probabilities[2, 1]) / 3
    assert loss(Outputs, torch.tensor([0, 0, 1])).item() == pytest.approx(expected.item(), rel=1e-6)


def test_balanced_weights_find_the_rare_class(run, tmp_path, data):
    rows = rows_of(data / "train.jsonl")
    rare = [row for row in rows if row["label"] == "negative"][:8] + [r for r in rows if r["label"] == "positive"]
    (tmp_path / "rare.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rare))
    imbalanced = ("--train_file", str(tmp_path / "rare.jsonl"))
    _, plain = run(*imbalanced, output_dir=tmp_path / "plain")
    _, balanced = run(*imbalanced, "--class_weights", "balanced", output_dir=tmp_path / "balanced")
    assert balanced["test"]["recall_per_class"][0] > plain["test"]["recall_per_class"][0]


def test_balanced_weights_need_one_class_per_example(run):
    with pytest.raises(ValueError, match=r"class_weights='balanced' was given with problem_type='regression'"):
        run("--class_weights", "balanced", "--problem_type", "regression")


def test_second_run_in_a_folder_raises_and_resume_reaches_the_same_weights(run, tmp_path):
    keep = ("--save_total_limit", "9", "--load_best_model_at_end", "False")
    whole, _ = run(*keep, output_dir=tmp_path / "whole", epochs="2")
    parted, _ = run(*keep, output_dir=tmp_path / "parted", epochs="2")
    with pytest.raises(FileExistsError, match=r"already holds another run.*--resume_from_checkpoint"):
        run(output_dir=parted)
    for left in (parted / "checkpoint-40", parted / "model"):
        shutil.rmtree(left)
    run(*keep, "--resume_from_checkpoint", "last", output_dir=parted, epochs="2")
    reference = AutoModelForSequenceClassification.from_pretrained(whole / "model").state_dict()
    resumed = AutoModelForSequenceClassification.from_pretrained(parted / "model").state_dict()
    for name, value in reference.items():
        torch.testing.assert_close(resumed[name], value, rtol=0, atol=0, msg=name)


def test_resume_without_a_checkpoint_raises(run):
    with pytest.raises((FileNotFoundError, ValueError), match="checkpoint"):
        run("--resume_from_checkpoint", "last")


def test_without_validation_data_a_tenth_of_the_training_data_is_held_out(run, data, encoder_model, tmp_path, capsys):
    given = ["--model_name_or_path", str(encoder_model), "--train_file", str(data / "train.jsonl"), "--max_steps", "2"]
    recipe.main([*given, "--output_dir", str(tmp_path / "run"), "--disable_tqdm", "True"])
    printed = capsys.readouterr().out
    assert "train: 144 examples" in printed
    assert "validation: 16 examples" in printed
    assert "test" not in json.loads((tmp_path / "run" / "results.json").read_text())


def test_dataset_that_datasets_loads_is_taken_by_name(data, encoder_model, tmp_path, capsys):
    given = ["--model_name_or_path", str(encoder_model), "--dataset_name", str(data), "--max_steps", "2"]
    recipe.main([*given, "--output_dir", str(tmp_path / "run"), "--disable_tqdm", "True"])
    assert "train: 160 examples" in capsys.readouterr().out


BAD_INPUT = {
    "missing file": (["--train_file", "nowhere.csv"], FileNotFoundError, "nowhere.csv is not a file"),
    "wrong column": (["--text_column", "review"], ValueError, r"no column 'review'.*'text', 'label'"),
    "no score": (["--problem_type", "regression", "--label_column", "label"], ValueError, "no finite number"),
    "long text": (["--max_length", "4", "--on_long_text", "error"], ValueError, "are longer than 4 tokens"),
    "too long for the model": (["--max_length", "99"], ValueError, "The model takes 1 to 24 tokens"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_raises_before_training_and_leaves_no_run(run, tmp_path, case):
    arguments, error, message = BAD_INPUT[case]
    with pytest.raises(error, match=message):
        run(*arguments)
    assert not list((tmp_path / "run").glob("*"))


def test_test_file_without_train_file_raises(data):
    with pytest.raises(ValueError, match=r"without train_file"):
        recipe.main(["--test_file", str(data / "test.jsonl")])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configurations_parse_and_set_what_they_say(path):
    settings, args = recipe.parse_arguments([str(path)])
    for name, value in yaml.safe_load(path.read_text()).items():
        parsed = getattr(settings if hasattr(settings, name) else args, name)
        assert parsed == type(parsed)(value)


def test_json_configuration_and_flags_give_the_same_arguments(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"output_dir": "x", "learning_rate": 0.001, "peft": "lora"}))
    by_file = recipe.parse_arguments([str(tmp_path / "a.json")])
    by_flags = recipe.parse_arguments(["--output_dir", "x", "--learning_rate", "1e-3", "--peft", "lora"])
    assert by_file[0] == by_flags[0]
    assert by_file[1].to_dict() == by_flags[1].to_dict()


def test_help_shows_the_recipe_s_own_defaults(capsys):
    with pytest.raises(SystemExit):
        recipe.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "Peak learning rate of the head; LoRA wants about ten times as much. (default: 0.0001)" in text
    assert 'python recipes/finetune_classifier.py --predict "I love this movie!"' in text


def test_lr_find_suggests_a_rate_and_leaves_the_folder_free_for_the_run(data, encoder_model, tmp_path, run, capsys):
    folder = tmp_path / "run"
    given = ["--lr_find", "--model_name_or_path", str(encoder_model), "--output_dir", str(folder)]
    recipe.main([*given, "--train_file", str(data / "train.jsonl"), "--disable_tqdm", "True"])
    assert {path.name for path in folder.iterdir()} == {"lr_find.json", "lr_find.png"}
    found = json.loads((folder / "lr_find.json").read_text())
    assert 1e-5 < found["steepest"] < 1
    printed = capsys.readouterr().out
    assert f"steepest descent    {found['steepest']:.2g}   suggested" in printed
    assert printed.splitlines()[-1].endswith(f"--disable_tqdm True --learning_rate {found['steepest']:.2g}")

    _, results = run("--learning_rate", f"{found['steepest']:.2g}")
    assert results["test"]["accuracy"] >= 0.9


@pytest.mark.parametrize("other", [["--predict", "good"], ["--resume_from_checkpoint", "last"]])
def test_lr_find_and_what_it_would_not_do_exclude_each_other(other):
    with pytest.raises(ValueError, match=rf"lr_find and {other[0][2:]} were both given.*leave one of them out"):
        recipe.main(["--lr_find", *other])
