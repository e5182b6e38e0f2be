"""The report of a run: one page that needs nothing else, pictures of what was logged, and errors that help."""

import json
import re
import sys
import warnings
from html.parser import HTMLParser

import pytest
from trainer_cases import build_trainer
from transformers import Trainer, TrainingArguments

from hf_lmopt.pictures.theme import LIGHT, drawn_in
from hf_lmopt.publishing import report
from hf_lmopt.publishing.advice import advise
from hf_lmopt.publishing.panels import PANELS
from hf_lmopt.publishing.report import plot_training_curves, write_report
from hf_lmopt.publishing.run_history import RunHistory, RunStateError
from hf_lmopt.publishing.run_summary import key_facts, summarize


PNG = b"\x89PNG\r\n\x1a\n"
VOID_ELEMENTS = {"meta", "link", "img", "source"}

LOG_HISTORY = [
    {"step": 10, "loss": 5.0, "learning_rate": 1e-3, "lr/head": 1e-3, "lr/embeddings": 5e-4},
    {"step": 10, "grad_norm": 3.0, "grad_norm_clipped": 1.0},
    {"step": 10, "eval_loss": 4.9, "eval_runtime": 1.0},
    {"step": 20, "loss": 4.0, "learning_rate": 5e-4, "lr/head": 5e-4, "lr/embeddings": 2.5e-4},
    {"step": 20, "grad_norm": 0.5, "grad_norm_clipped": 0.5},
    {"step": 20, "train_runtime": 2.0, "train_loss": 4.5},
]
EVERY_FIGURE = [
    *LOG_HISTORY,
    {"step": 10, "clipped_steps": 10, "skipped_steps": 1, "clip_coefficient": 0.5, "noise_scale": 30.0},
    {"step": 10, "spike_guard/z_score": 2.0, "eval_accuracy": 0.5},
    *(
        {"step": step, **{f"health/{name}/{layer}": value for layer in ("embeddings", "model.layers.0", "head")}}
        for step in (10, 20)
        for name, value in (("grad_norm", 1.0), ("update_ratio", 0.0), ("zero_share", 0.5), ("nonfinite_share", 0.0))
    ),
]


class Page(HTMLParser):
    """Checks that elements are closed in order, and keeps them with their attributes, and the text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.text = [], [], ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID_ELEMENTS:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def write_state(folder, log_history, **state):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": log_history, **state}, sort_keys=True))
    return folder


def page_of(folder):
    return Page((folder / "report.html").read_text(encoding="utf-8"))


# ---- The page ----


@pytest.fixture(scope="module")
def full_report(tmp_path_factory):
    """The folder of a run with all figures, and the files of its report."""
    run = write_state(tmp_path_factory.mktemp("full") / "run", EVERY_FIGURE)
    return run, write_report(run)


def test_every_panel_is_drawn_embedded_and_beside_the_page(full_report):
    run, written = full_report
    names = [f"report_{panel.name}.png" for panel in PANELS]
    assert [path.name for path in written] == ["report.html", *names]
    assert {path.name for path in run.iterdir()} == {"trainer_state.json", "report.html", *names}
    assert all(path.read_bytes().startswith(PNG) for path in written[1:])
    page = page_of(run)
    assert [figure["id"] for figure in page.all("figure")] == [panel.name for panel in PANELS]
    assert all(image["src"].startswith("data:image/png;base64,") and image["alt"] for image in page.all("img"))
    assert "Not logged" not in page.text


def test_the_page_fetches_and_runs_nothing(full_report):
    page = page_of(full_report[0])
    links = [value for _, attributes in page.elements for key, value in attributes.items() if key in ("src", "href")]
    links += [source["srcset"] for source in page.all("source")]
    assert links
    assert all(link.startswith("data:") for link in links)
    assert page.all("script") == []
    assert not [key for _, attributes in page.elements for key in attributes if key.startswith("on")]
    assert re.findall(r"url\(|@import", full_report[1][0].read_text(encoding="utf-8")) == []


def test_each_picture_has_a_light_and_a_dark_version_and_print_is_light(tmp_path):
    write_report(write_state(tmp_path, LOG_HISTORY))
    page = page_of(tmp_path)
    assert {source["media"] for source in page.all("source")} == {"screen and (prefers-color-scheme: dark)"}
    pairs = list(zip(page.all("source"), page.all("img"), strict=True))
    assert pairs
    assert all(dark["srcset"] != light["src"] for dark, light in pairs)


def test_panels_without_figures_are_named_with_what_would_fill_them(tmp_path):
    written = write_report(write_state(tmp_path, [{"step": 1, "loss": 2.0}]))
    assert [path.name for path in written] == ["report.html", "report_loss.png"]
    text = page_of(tmp_path).text
    assert "Gradient norm by layer; Update over weight by layer" in text
    assert "from the callback GradientHealth()." in text
    assert "Gradient noise scale: from the callback GradientNoiseScale() with LMOptTrainer." in text


def test_text_of_the_file_is_escaped(tmp_path):
    tag = "<script>alert('x')</script>"
    entries = [{"step": 1, f"lr/{tag}": 1.0, f"eval_{tag}": 1.0, f"health/grad_norm/{tag}": 0.0, "eval_loss": 1.0}]
    entries += [{"step": step, f"eval_{tag}_loss": float(step), f"eval_{tag}_runtime": 1.0} for step in (1, 2, 3)]
    facts = {"trial_name": tag, "best_metric": tag, "max_steps": tag, "best_model_checkpoint": tag}
    write_report(write_state(tmp_path / "<b>'run", entries, **facts, stateful_callbacks={tag: {}}))
    page = page_of(tmp_path / "<b>'run")
    assert page.all("script") == page.all("b") == []
    assert page.text.count(tag) >= 4
    assert "<b>'run" in page.text


def test_advice_stands_on_the_page_with_its_evidence(tmp_path):
    losses = [3.0] * 10 + [9.0] * 10
    entries = [{"step": step + 1, "loss": loss} for step, loss in enumerate(losses)]
    write_report(write_state(tmp_path, entries))
    page = page_of(tmp_path)
    assert "Problem. The training loss rose from 3 around step 2 to 9 at the end (step 20)." in page.text
    assert "advice problem" in [attributes.get("class") for attributes in page.all("div")]


@pytest.mark.parametrize("log_history", [[], LOG_HISTORY])
def test_nothing_stands_out_in_a_short_or_empty_run(tmp_path, log_history):
    write_report(write_state(tmp_path, log_history))
    assert "Nothing stands out" in page_of(tmp_path).text


def test_facts_are_those_of_the_state_without_folders_of_the_machine(tmp_path):
    state = {"global_step": 20, "max_steps": 40, "epoch": 0.5, "best_model_checkpoint": "/home/ada/run/checkpoint-10"}
    write_report(write_state(tmp_path / "my run", LOG_HISTORY, **state))
    text = page_of(tmp_path / "my run").text
    assert "20 of 40 steps; training loss from 5 to 4; eval_loss 4.9." in text
    assert "checkpoint-10" in text
    assert "ada" not in text
    assert str(tmp_path) not in text


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), -1.0, 0.0, 1e-300, 1e300])
def test_any_number_can_be_drawn_and_summarized(value):
    keys = {key for entry in EVERY_FIGURE for key in entry} - {"step"}
    history = RunHistory({"log_history": [{"step": step, **dict.fromkeys(keys, value)} for step in (1, 1, 2)]})
    for panel in PANELS:
        with drawn_in(LIGHT), warnings.catch_warnings():
            warnings.simplefilter("error")
            panel.figure(panel.select(history), LIGHT).draw_without_rendering()
    advise(history)
    assert summarize(history).startswith("2 steps; training loss from")
    assert key_facts(history)


# ---- Where it reads and writes ----


def test_the_state_in_the_newest_complete_checkpoint_is_read_where_the_run_has_none(tmp_path):
    write_state(tmp_path / "checkpoint-20", [{"step": 20, "loss": 2.0}])
    write_state(tmp_path / "checkpoint-3", [{"step": 3, "loss": 3.0}])
    (tmp_path / "checkpoint-30").mkdir()
    (tmp_path / "checkpoint-30" / "trainer_state.json").write_text("{")
    write_report(tmp_path)
    assert "from checkpoint-20/trainer_state.json alone" in page_of(tmp_path).text


def test_a_report_is_replaced_with_all_its_pictures(tmp_path):
    output = tmp_path / "reports" / "one.html"
    write_report(write_state(tmp_path / "a", LOG_HISTORY), output)
    write_report(write_state(tmp_path / "b", [{"step": 1, "loss": 1.0}]), output)
    assert sorted(path.name for path in output.parent.iterdir()) == ["one.html", "one_loss.png"]
    assert "<title>b - training report</title>" in output.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["report.html", "report_loss.png"])
def test_a_file_that_is_no_report_is_not_replaced(tmp_path, name):
    run = write_state(tmp_path, LOG_HISTORY)
    (run / name).write_text("mine")
    with pytest.raises(FileExistsError, match=rf"{name} is there and is no report.*move it away.*--output"):
        write_report(run)
    assert (run / name).read_text() == "mine"
    assert {path.name for path in run.iterdir()} == {"trainer_state.json", name}


def test_a_failure_leaves_the_earlier_report(tmp_path, monkeypatch):
    run = write_state(tmp_path, LOG_HISTORY)
    write_report(run)
    before = {path: path.read_bytes() for path in run.iterdir()}
    monkeypatch.setattr(report, "report_page", lambda **parts: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_report(run)
    assert before == {path: path.read_bytes() for path in run.iterdir()}


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (None, FileNotFoundError, r"holds no trainer_state.json.*let the Trainer save a checkpoint"),
        ("{", RunStateError, r"not readable as JSON.*give a complete checkpoint"),
        (b"\xff\xfe", RunStateError, r"not readable as JSON"),
        ("[]", RunStateError, r"has no log_history.*give the folder of a run"),
        ('{"log_history": 3}', RunStateError, r"has no log_history"),
    ],
)
def test_a_state_that_is_missing_or_unreadable_is_told_with_what_to_do(tmp_path, content, error, message):
    if content is not None:
        data = content if isinstance(content, bytes) else content.encode()
        (tmp_path / "trainer_state.json").write_bytes(data)
    with pytest.raises(error, match=message):
        write_report(tmp_path)


def test_a_run_must_be_a_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no folder .*nowhere'.*Give the output_dir"):
        write_report(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match=r"is a file.*give the output_dir"):
        write_report(tmp_path / "file")


@pytest.mark.parametrize("is_stock", [False, True])
def test_a_run_of_a_trainer_can_be_reported(tmp_path, is_stock):
    stock = {"trainer_class": Trainer, "arguments_class": TrainingArguments} if is_stock else {"layer_lr_decay": 0.9}
    build_trainer(tmp_path, save_strategy="steps", save_steps=4, **stock).train()
    names = {path.name for path in write_report(tmp_path)}
    expected = {"report.html", "report_loss.png", "report_learning_rate.png", "report_gradient_norm.png"}
    assert names == (expected if is_stock else expected | {"report_clip_rate.png"})
    assert "4 of 4 steps" in page_of(tmp_path).text


# ---- The picture of a card ----


@pytest.fixture
def panels(monkeypatch):
    """The figures that are drawn next."""
    drawn = []
    new_figure = report.new_figure

    def remember(*size):
        drawn.append(new_figure(*size))
        return drawn[-1]

    monkeypatch.setattr(report, "new_figure", remember)
    return lambda: drawn[-1].axes


def lines_of(axes):
    return {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in axes.lines}


def test_the_three_panels_show_loss_rates_by_layer_and_norms(panels, tmp_path):
    plot_training_curves(LOG_HISTORY, tmp_path / "new" / "curves.png")
    loss, rate, norm = panels()
    assert lines_of(loss) == {"training": [(10, 5.0), (20, 4.0)], "validation": [(10, 4.9)]}
    assert lines_of(rate) == {"head": [(10, 1e-3), (20, 5e-4)], "embeddings": [(10, 5e-4), (20, 2.5e-4)]}
    assert lines_of(norm) == {"before the clip": [(10, 3.0), (20, 0.5)], "after it": [(10, 1.0), (20, 0.5)]}
    assert [axes.get_legend() is not None for axes in panels()] == [True] * 3


def test_layers_are_drawn_from_the_input_to_the_head_whatever_their_order_in_the_file(panels, tmp_path):
    layers = ("embeddings", "model.layers.2", "model.layers.10", "final", "head")
    plot_training_curves([{"step": 1, **{f"lr/{layer}": 1.0 for layer in sorted(layers)}}], tmp_path / "curves.png")
    assert tuple(lines_of(panels()[1])) == layers


def test_a_long_noisy_loss_is_drawn_under_its_moving_average(panels, tmp_path):
    plot_training_curves([{"step": step, "loss": step % 2} for step in range(1000)], tmp_path / "curves.png")
    lines = lines_of(panels()[0])
    assert len(lines["_training"]) == 1000
    assert {round(value, 6) for _, value in lines["training"]} <= {0.48, 0.5, 0.52}


def test_one_picture_is_written_and_nothing_beside_it(tmp_path):
    plot_training_curves(LOG_HISTORY, tmp_path / "curves.png")
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]
    assert (tmp_path / "curves.png").read_bytes()[:8] == PNG


def test_a_stock_trainer_has_one_learning_rate_and_a_missing_series_is_said(panels, tmp_path):
    plot_training_curves([{"step": 1, "loss": 2.0, "learning_rate": 1e-3}], tmp_path / "curves.png")
    _, rate, norm = panels()
    assert lines_of(rate) == {"all layers": [(1, 1e-3)]}
    assert [text.get_text() for text in norm.texts] == ["nothing logged"]


def test_infinite_and_zero_norms_can_be_drawn(tmp_path):
    norms = [0.0, float("inf"), float("nan"), 1.0]
    plot_training_curves([{"step": i, "grad_norm": norm} for i, norm in enumerate(norms)], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_without_matplotlib_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    run = write_state(tmp_path, LOG_HISTORY)
    for write in (lambda: plot_training_curves(LOG_HISTORY, tmp_path / "curves.png"), lambda: write_report(run)):
        with pytest.raises(ImportError, match=r"pip install 'hf-lmopt\[recipes\]'"):
            write()
    assert [path.name for path in tmp_path.iterdir()] == ["trainer_state.json"]
