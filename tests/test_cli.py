"""The commands of `hf-lmopt`, as one types them."""

import json

import pytest

from hf_lmopt.cli import main


def test_report_names_the_page_that_it_wrote(tmp_path, capsys):
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": [{"step": 1, "loss": 2.0}]}))
    main(["report", str(tmp_path), "--output", str(tmp_path / "new" / "page.html")])
    assert capsys.readouterr().out == f"{tmp_path}/new/page.html (1 pictures beside it)\n"
    assert (tmp_path / "new" / "page.html").is_file()


@pytest.mark.parametrize("content", [None, "{"])
def test_report_ends_with_one_line_where_a_run_cannot_be_read(tmp_path, capsys, content):
    if content:
        (tmp_path / "trainer_state.json").write_text(content)
    with pytest.raises(SystemExit) as ended:
        main(["report", str(tmp_path)])
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("hf-lmopt report: ")
    assert printed.err.count("\n") == 1


def test_optimizers_and_clipping_strategies_are_listed(capsys):
    main(["optimizers"])
    assert "muon" in capsys.readouterr().out
    main(["clipping"])
    assert "quantile=0.1" in capsys.readouterr().out
