"""The pretraining recipe from the command line to the model folder, on a few hundred short documents."""

import importlib.util
import json
import random
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from hf_lmopt.checkpointing import file_sha256


ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "recipes" / "configs").glob("pretrain_*.yaml"))


def load_recipe():
    path = ROOT / "recipes" / "pretrain_causal_lm.py"
    spec = importlib.util.spec_from_file_location("pretrain_causal_lm", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["pretrain_causal_lm"] = module
    spec.loader.exec_module(module)
    return module


recipe = load_recipe()


@pytest.fixture(scope="module")
def text_files(tmp_path_factory):
    """Training and validation text in which one word follows from the one before."""
    folder, generator = tmp_path_factory.mktemp("text"), random.Random(0)
    for name, count in (("train", 150), ("validation", 6)):
        documents = []
        for _ in range(count):
            start = generator.randrange(10)
            documents.append(" ".join(f"word{(start + i) % 10}" for i in range(generator.randrange(3, 30))))
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
    return folder


@pytest.fixture
def run(text_files, tmp_path):
    """Runs the recipe with a tiny model; returns the folder of the run."""

    def start(*arguments, output_dir=tmp_path / "run", own_text=True, max_steps="8", new_model=True):
        small = ["--block_size", "32", "--max_new_tokens", "5", "--per_device_train_batch_size", "4"]
        small += ["--eval_steps", "4", "--save_steps", "4", "--logging_steps", "2"]
        if new_model:
            small += ["--hidden_size", "16", "--num_attention_heads", "2", "--num_hidden_layers", "2"]
            small += ["--vocab_size", "260", "--tokenizer_cache_dir", str(text_files / "tokenizers")]
        if max_steps:
            small += ["--max_steps", max_steps]
        if own_text:
            small += ["--train_file", str(text_files / "train.jsonl")]
            small += ["--validation_file", str(text_files / "validation.jsonl")]
        recipe.main([*small, "--output_dir", str(output_dir), *arguments])
        return output_dir

    return start


def read_results(folder):
    return json.loads((folder / "results.json").read_text())


def weights_of(folder):
    return AutoModelForCausalLM.from_pretrained(folder / "model").state_dict()


def test_a_run_leaves_a_model_its_tokenizer_curves_and_results(run, text_files, capsys):
    folder = run("--eval_documents", "5", "--max_steps", "40")
    model, tokenizer = (kind.from_pretrained(folder / "model") for kind in (AutoModelForCausalLM, AutoTokenizer))
    assert model.config.vocab_size == len(tokenizer) == 260
    assert (folder / "training_curves.png").stat().st_size > 10_000

    results = read_results(folder)
    assert results["validation_after"]["loss"] < 0.8 * results["validation_before"]["loss"]
    assert results["validation_after"]["num_documents"] == 5
    assert results["validation_documents_available"] == 6
    assert results["training"]["tokens"] == 40 * 4 * 32
    assert results["data_sha256"]["train.jsonl"] == file_sha256(text_files / "train.jsonl")
    assert [sample[: len(prompt)] for sample, prompt in zip(results["samples"], ["The game was"], strict=False)] == [
        "The game was"
    ]
    printed = capsys.readouterr().out
    assert "Evaluation before training" in printed
    assert f"{results['validation_after']['bits_per_byte']:.3f} bits per byte" in printed


def test_the_results_are_those_of_the_saved_model(run, text_files):
    folder = run()
    model, tokenizer = (kind.from_pretrained(folder / "model") for kind in (AutoModelForCausalLM, AutoTokenizer))
    texts = [json.loads(line)["text"] for line in (text_files / "validation.jsonl").read_text().splitlines()][:4]
    nats = num_tokens = 0
    for text in texts:
        ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
        for position in range(1, len(ids)):
            first = 0 if position <= 32 else position - 32
            with torch.no_grad():
                logits = model(torch.tensor([ids[first:position]])).logits[0, -1]
            nats -= logits.log_softmax(-1)[ids[position]].item()
        num_tokens += len(ids) - 1
    score = read_results(folder)["validation_after"]
    # Here every token has the longest context, in the recipe at least half of it.
    assert score["loss"] == pytest.approx(nats / num_tokens, rel=2e-3)
    assert score["num_bytes"] == sum(len(text.encode()) for text in texts)
    assert score["num_words"] == sum(len(text.split()) for text in texts)


def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(run, tmp_path):
    whole = run(output_dir=tmp_path / "whole")

    class Interrupt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 6:
                raise KeyboardInterrupt

    class InterruptedTrainer(recipe.LMOptTrainer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.add_callback(Interrupt())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "LMOptTrainer", InterruptedTrainer)
        with pytest.raises(
            SystemExit, match=r"Stopped at step 6; continue with --resume_from_checkpoint .*checkpoint-4"
        ):
            run(output_dir=tmp_path / "stopped")
    resumed = run("--resume_from_checkpoint", "last", output_dir=tmp_path / "stopped")

    for name, weight in weights_of(whole).items():
        assert torch.equal(weight, weights_of(resumed)[name]), name
    assert read_results(resumed)["validation_before"] == read_results(whole)["validation_before"]


def losses_of(folder, step):
    state = json.loads((folder / f"checkpoint-{step}" / "trainer_state.json").read_text())
    return [value for log in state["log_history"] for name, value in log.items() if name in ("loss", "eval_loss")]


@pytest.mark.parametrize(
    "options",
    [
        ["--config_overrides", "num_key_value_heads=1,initializer_range=0.3"],  # so that attention is not uniform
        [
            *("--model_type", "gpt2", "--gradient_checkpointing", "--gradient_accumulation_steps", "2"),
            *("--config_overrides", "attn_pdrop=0.0,embd_pdrop=0.0,resid_pdrop=0.0,initializer_range=0.3"),
        ],
    ],
    ids=["llama", "gpt2"],
)
def test_the_compiled_attention_has_the_losses_of_sdpa_on_packed_documents(run, tmp_path, options):
    losses = {}
    for name in ("lmopt", "sdpa"):
        settings = ["--attn", name, "--max_steps", "4", "--logging_steps", "1", "--optimizer", "adamw"]
        folder = run(*settings, *options, output_dir=tmp_path / name)
        losses[name] = losses_of(folder, 4)
        assert read_results(folder)["attention"]["implementation"] == name
    assert len(losses["lmopt"]) == 5
    assert losses["lmopt"] == pytest.approx(losses["sdpa"], abs=1e-5, rel=0)


def test_the_choice_of_attention_is_printed_and_recorded_with_its_reason(run, capsys):
    attention = read_results(run("--max_steps", "1"))["attention"]
    assert attention["implementation"] == "lmopt"
    assert f"Attention: lmopt, {attention['reason']}\n" in capsys.readouterr().out


def test_a_model_that_ignores_the_compiled_attention_is_refused_with_the_reason(run):
    with pytest.raises(ValueError, match=r"attn='lmopt' was asked for, but the attention layers of GPTJ.* do not ask"):
        run("--attn", "lmopt", "--model_type", "gptj", "--config_overrides", "rotary_dim=4")


def test_a_folder_with_another_run_is_refused_before_any_work(run, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "results.json").write_text("{}")
    with pytest.raises(FileExistsError, match="already holds another run"):
        run("--train_file", "nowhere.txt")
    assert (tmp_path / "run" / "results.json").read_text() == "{}"


def test_resuming_where_there_is_no_checkpoint_is_refused(run):
    with pytest.raises(FileNotFoundError, match="holds no complete checkpoint, so there is nothing to resume"):
        run("--resume_from_checkpoint", "last")


def test_a_gpt2_trains_with_layer_decay_accumulation_bf16_and_checkpointing(run):
    folder = run(
        *("--model_type", "gpt2", "--layer_lr_decay", "0.9", "--gradient_accumulation_steps", "2"),
        *("--bf16", "--gradient_checkpointing", "--lr_scheduler_type", "cosine", "--max_steps", "4"),
    )
    results = read_results(folder)
    assert results["model"]["type"] == "gpt2"
    assert results["training"]["tokens"] == 4 * 4 * 2 * 32
    assert results["settings"]["lr_scheduler_kwargs"] is None


def test_the_model_of_one_run_is_trained_on_by_another(run, tmp_path):
    first = run(output_dir=tmp_path / "first")
    more = ["--model_name_or_path", str(first / "model"), "--optimizer", "adamw", "--decay_form", "l2"]
    second = run(*more, output_dir=tmp_path / "second", new_model=False)
    before, after = read_results(second)["validation_before"], read_results(first)["validation_after"]
    assert before == pytest.approx(after)


def test_early_stopping_ends_a_run_that_gets_no_better_and_keeps_the_best(run):
    folder = run("--early_stopping_patience", "2", "--learning_rate", "1e-12", "--lr_scheduler_type", "constant",
                 "--max_steps", "40")  # fmt: skip
    assert read_results(folder)["training"]["steps"] < 40


def test_a_folder_that_datasets_loads_is_held_out_from_its_end(run, text_files, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (data / "train.jsonl").write_bytes((text_files / "train.jsonl").read_bytes())
    folder = run("--dataset_name", str(data), "--validation_percentage", "10", "--num_train_epochs", "0.5",
                 own_text=False, max_steps=None)  # fmt: skip
    results = read_results(folder)
    assert results["validation_documents_available"] == 15
    assert 1 < results["training"]["steps"] < 40
    assert results["dataset"] == "data"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset_name", "x"], r"dataset_name='x' and train_file=.* both give the training text"),
        (["--num_train_epochs", "2", "--max_steps", "5"], r"both say how long to train"),
        (["--dataset_config_name", "a"], r"dataset_config_name='a' would not be read, because dataset_name is not"),
        (["--model_name_or_path", "x"], r"hidden_size=16 would not be read, because model_name_or_path is given"),
        (["--tokenizer_name_or_path", "x"], r"vocab_size=260 would not be read, because a tokenizer is given"),
        (["--lr_scheduler_type", "cosine", "--decay_ratio", "0.3"], r"decay_ratio=0.3 would not be read.*is cosine"),
        (["--text_column", "body"], r"has no column 'body'. Its columns are 'text'"),
        (["--block_size", "5000"], r"fewer than block_size=5000"),
        (["--config_overrides", "widht=3"], r"A llama config has no field widht"),
        (["--context_length", "64", "--config_overrides", "max_position_embeddings=32"], r"Sequences of 64 tokens"),
        (["--config_overrides", "vocab_size=100"], r"The tokenizer has 260 tokens and the model 100 embeddings"),
        (["--model_type", "bloom"], r"bloom config has no field|BloomForCausalLM takes no position_ids"),
    ],
)
def test_options_that_cannot_work_are_refused_with_the_reason(run, arguments, message):
    with pytest.raises(ValueError, match=message):
        run(*arguments)


def test_a_single_document_cannot_be_held_out(run, tmp_path):
    (tmp_path / "book.txt").write_text("one long book " * 200)
    with pytest.raises(ValueError, match=r"5.0 % of 1 documents cannot be held out.*txt_layout that splits"):
        run("--train_file", str(tmp_path / "book.txt"), own_text=False)


def test_a_validation_file_alone_is_refused(run, text_files):
    with pytest.raises(ValueError, match=r"validation_file=.* would not be read, because train_file is not given"):
        run("--validation_file", str(text_files / "validation.jsonl"), own_text=False)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_config_in_the_recipes_folder_is_read(config):
    options, args = recipe.parse_arguments([str(config)])
    assert args.output_dir.startswith("runs/")
    assert options.train_file is None


def test_the_default_run_trains_on_at_most_three_million_tokens():
    options, args = recipe.parse_arguments([])
    assert args.max_steps * args.per_device_train_batch_size * options.block_size <= 3_000_000


def test_help_shows_the_commands_and_the_recipes_own_defaults(capsys):
    with pytest.raises(SystemExit):
        recipe.parse_arguments(["--help"])
    printed = capsys.readouterr().out
    assert "python recipes/pretrain_causal_lm.py --max_steps 20 " in printed
    assert "Schedule of the learning rate. (default: warmup_stable_decay)" in " ".join(printed.split())


def test_the_default_optimizer_is_muon(run):
    assert read_results(run())["settings"]["optimizer"] == "muon"


def test_an_optim_that_is_given_takes_the_place_of_the_default_optimizer(run):
    settings = read_results(run("--optim", "sgd"))["settings"]
    assert (settings["optimizer"], settings["optim"]) == (None, "sgd")
    with pytest.raises(ValueError, match="both name an optimizer"):
        run("--optim", "sgd", "--optimizer", "lion")


def test_lr_find_suggests_a_rate_and_leaves_the_folder_free_for_the_run(run, capsys):
    folder = run("--lr_find", "--optimizer", "adamw", "--learning_rate", "0.5")
    assert {path.name for path in folder.iterdir()} == {"lr_find.json", "lr_find.png"}
    found = json.loads((folder / "lr_find.json").read_text())
    assert 1e-4 < found["steepest"] < 1
    printed = capsys.readouterr().out
    assert f"steepest descent    {found['steepest']:.2g}   suggested" in printed
    command = printed.splitlines()[-1]
    assert command.startswith("Next: python ")
    assert command.endswith(f"--learning_rate {found['steepest']:.2g}")
    assert "--lr_find" not in command
    assert "Evaluation before training" not in printed

    results = read_results(run("--learning_rate", f"{found['steepest']:.2g}"))
    assert results["settings"]["learning_rate"] == float(f"{found['steepest']:.2g}")
    run("--lr_find")  # beside a finished run, which it leaves alone
    assert read_results(folder) == results


def test_lr_find_and_a_resumed_run_exclude_each_other(run):
    with pytest.raises(ValueError, match=r"lr_find and resume_from_checkpoint='last' were both given.*leave one"):
        run("--lr_find", "--resume_from_checkpoint", "last")
