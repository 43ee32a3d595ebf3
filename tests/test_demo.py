"""`latro demo`, shortened; the whole of it is slow."""

import json

import pytest

from latro.cli import main
from latro.demo import run as demo


def figures(path):
    found = json.loads(path.read_text())
    for name in ("before", "after", "sft_answers"):
        low, high = found[name]["interval"]
        assert 0 <= low <= found[name]["accuracy"] <= high <= 1
    return found


def test_a_short_demo(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "UPDATES", 12)
    monkeypatch.setattr(demo, "TEST_QUESTIONS", 64)
    folder, path = tmp_path / "run", tmp_path / "figures.json"
    for _ in range(2):  # the second begins anew
        assert main(["demo", "--output_dir", str(folder), "--json", str(path)]) == 0
    found = figures(path)
    assert found["before"]["n"] == 64
    assert found["gain"]["difference"] == pytest.approx(found["after"]["accuracy"] - found["before"]["accuracy"])
    said = capsys.readouterr().out
    assert "fine-tuned on answers" in said
    assert (folder / "report.html").is_file()
    assert len((folder / "metrics.jsonl").read_text().splitlines()) >= 1


def test_a_folder_of_other_things_is_left_alone(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("precious")
    assert main(["demo", "--output_dir", str(tmp_path)]) == 1
    assert "holds other things" in capsys.readouterr().err
    assert (tmp_path / "thesis.tex").read_text() == "precious"


@pytest.mark.slow
def test_the_whole_demo(tmp_path):
    path = tmp_path / "figures.json"
    assert main(["demo", "--output_dir", str(tmp_path / "run"), "--json", str(path)]) == 0
    found = figures(path)
    assert found["gain"]["low"] > 0.3
    assert found["over_sft"]["low"] > 0.3
