"""The search of docs/search.md, on few images and for few epochs."""

import re
import runpy

import pytest

from tests.pages import ROOT, code


@pytest.mark.filterwarnings("ignore")
def test_a_search_stops_runs_that_fall_behind(tmp_path, monkeypatch, capsys):
    pytest.importorskip("optuna")
    pytest.importorskip("optuna_integration")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    ((_, text),) = code(ROOT / "docs/search.md", "python")
    changes = {
        '"--trainer.max_epochs=8"': '"--trainer.max_epochs=2", "--data.subset=400", "--trainer.accelerator=cpu"',
        "n_startup_trials=3": "n_startup_trials=1",
        "n_trials=20": "n_trials=2",
        '"lr", 1e-4, 1e-1': '"lr", *[(0.01, 0.02), (1e-9, 1e-8)][trial.number]',  # the second one learns nothing
    }
    for found, small in changes.items():
        assert text.count(found) == 1
        text = text.replace(found, small)
    (tmp_path / "search.py").write_text(text)
    study = runpy.run_path("search.py", run_name="__main__")["study"]
    done, stopped = study.trials
    assert (done.state.name, stopped.state.name) == ("COMPLETE", "PRUNED")
    assert len(stopped.intermediate_values) == 1, "it was stopped after its first epoch of two"
    assert study.best_value == done.value == done.intermediate_values[1]
    assert re.search(r"\{'lr': [\d.e-]+, 'granularity': '\w+'\} [\d.]+", capsys.readouterr().out)
