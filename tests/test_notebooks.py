"""The cells of the notebooks run in order, with a single epoch, and come to what their text says."""

import json
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "notebooks"


def first_look(names):
    assert set(names["results"]) == {"SFF", "Backprop"}
    assert names["local"].peak < names["whole"].peak
    assert (names["goodness"].amax(0) > 0.2).sum() > 1, "the map is more than one column"


CLAIMS = {"first_look": first_look}


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.stem)
def test_cells_run_and_show_what_the_text_says(path, monkeypatch):
    claim = CLAIMS[path.stem]
    monkeypatch.setenv("MPLBACKEND", "agg")
    names = {"__name__": "__main__"}
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    for cell in cells:
        exec("".join(cell["source"]).replace("EPOCHS = 10", "EPOCHS = 1"), names)
    claim(names)
