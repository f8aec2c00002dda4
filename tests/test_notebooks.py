"""The cells of the notebooks run in order, with a single epoch."""

import json
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "notebooks"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.stem)
def test_cells_run_and_end_with_less_kept_than_backprop(path, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")
    names = {"__name__": "__main__"}
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    for cell in cells:
        exec("".join(cell["source"]).replace("EPOCHS = 10", "EPOCHS = 1"), names)
    assert set(names["results"]) == {"SFF", "Backprop"}
    assert names["local"].peak < names["whole"].peak
