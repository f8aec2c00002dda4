"""The cells of the notebooks run in order, and come to what their text says; first_look trains for a single epoch."""

import json
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "notebooks"


def first_look(names):
    assert set(names["results"]) == {"SFF", "Backprop"}
    assert names["local"].peak < names["whole"].peak
    assert (names["goodness"].amax(0) > 0.2).sum() > 1, "the map is more than one column"


def family(names):
    rows = names["rows"]
    assert set(rows) == {"Backprop", "SFF", "FF", "SCFF", "PFF"}
    for name, least in {"Backprop": 0.9, "SFF": 0.9, "FF": 0.8, "PFF": 0.75}.items():
        assert rows[name]["untrained"]["answer"] < 0.4 < least < rows[name]["trained"]["answer"], name
    assert rows["SCFF"]["trained"]["answer"] is None
    untrained, trained = (rows["SCFF"][when]["probe"] for when in ("untrained", "trained"))
    assert untrained < trained > 0.9, "a read-out finds more than in untrained weights"
    assert all(images.shape == (6, 1, 8, 8) and images.std(0).mean() > 0.01 for images in names["drawn"])


def early_exit(names):
    cost, accuracy = names["curve"][0.8]
    assert cost <= 0.75, "a quarter of the multiply-adds is saved"
    assert accuracy >= names["depths"][-1][1] - 0.01 > 0.9
    costs = [cost for cost, _ in names["curve"].values()]
    assert costs == sorted(costs, reverse=True), "the more leave, the less it costs"


CLAIMS = {"early_exit": early_exit, "family": family, "first_look": first_look}
SLOW = {"early_exit", "family"}


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.stem, marks=pytest.mark.slow if path.stem in SLOW else [])
        for path in sorted(FOLDER.glob("*.ipynb"))
    ],
)
def test_cells_run_and_show_what_the_text_says(path, monkeypatch):
    claim = CLAIMS[path.stem]
    monkeypatch.setenv("MPLBACKEND", "agg")
    names = {"__name__": "__main__"}
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    for cell in cells:
        exec("".join(cell["source"]).replace("EPOCHS = 10", "EPOCHS = 1"), names)
    claim(names)
