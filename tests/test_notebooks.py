"""The cells of the notebooks run in order, and come to what their text says; first_look trains for a single epoch.

What is stored in them is shown on the site: it must be what the cells print and draw, but for the numbers.
"""

import contextlib
import io
import json
import re
from pathlib import Path

import pytest
from matplotlib import pyplot

FOLDER = Path(__file__).parents[1] / "notebooks"


def first_look(names):
    assert set(names["results"]) == {"SFF", "Backprop"}
    assert names["local"].peak < names["whole"].peak
    assert (names["goodness"].amax(0) > 0.2).sum() > 1, "the map is more than one column"


def own_network(names):
    assert names["tested"]["test/acc"] > 0.95
    of_files = sum(names["right"]) / len(names["right"])
    assert of_files == pytest.approx(names["tested"]["test/acc"]), "files and test agree"
    assert names["model"].unit_names == ["stem", "low", "down", "high"], "a residual connection is one block"


def finetune_transformer(names):
    figures, kept = names["figures"], names["kept"]
    assert kept["SFF"] < 0.35 * kept["backprop"]
    for method in ("SFF", "backprop"):
        assert min(figures[method, "pre-trained"]) > 0.7
    assert max(figures["backprop", "from scratch"]) < min(figures["backprop", "pre-trained"]), "pre-training helps"


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


CLAIMS = {claim.__name__: claim for claim in (early_exit, family, finetune_transformer, first_look, own_network)}
SLOW = {*CLAIMS} - {"first_look"}


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.stem, marks=pytest.mark.slow if path.stem in SLOW else [])
        for path in sorted(FOLDER.glob("*.ipynb"))
    ],
)
def test_cells_run_and_show_what_the_text_says(path):
    if path.stem == "finetune_transformer":
        pytest.importorskip("transformers")
    pyplot.switch_backend("agg")
    names = {"__name__": "__main__"}
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    for number, cell in enumerate(cells, 1):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec("".join(cell["source"]).replace("EPOCHS = 10", "EPOCHS = 1"), names)
        assert cell["execution_count"] == number, "was run from the top: python docs/notebooks.py"
        text, pictures = stored(cell)
        assert words(printed.getvalue()) == words(text), "what is stored is old: python docs/notebooks.py"
        assert len(pyplot.get_fignums()) == pictures
        assert not pictures or cell["metadata"]["alt"], "a picture is described"
        pyplot.close("all")
    CLAIMS[path.stem](names)


def stored(cell):
    """The text of the outputs, and the number of pictures."""
    texts, pictures = [], 0
    for output in cell["outputs"]:
        assert output["output_type"] in ("stream", "display_data"), "neither an error nor a value left over"
        data = {"text/plain": output.get("text"), **output.get("data", {})}
        if "image/png" in data:
            pictures += 1
        else:
            texts += data["text/plain"]
    return "".join(texts), pictures


def words(text):
    return re.findall(r"[a-zA-Z]+", text)
