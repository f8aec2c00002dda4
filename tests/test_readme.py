"""The code of the README runs as it stands there, on small data."""

import csv
import re

import pytest
import torch

from ff_lightning import SFF, data
from tests import pages
from tests.conftest import small_net
from tests.test_data import write_cifar

README = (pages.ROOT / "README.md").read_text()


def code(marker):
    (found,) = [block for _, block in pages.code(pages.ROOT / "README.md", "python") if marker in block]
    return found


def test_plug_in(tmp_path, served, monkeypatch):
    monkeypatch.chdir(tmp_path)
    reader, _ = write_cifar(*served, fine=False)
    monkeypatch.setattr(data.CIFAR10, "reader", reader)
    names = {}
    exec(code("L.Trainer(").replace("max_epochs=30", "fast_dev_run=True, accelerator='cpu'"), names)
    assert names["trainer"].global_step == 1
    assert names["model"].net.blocks[1].body.state_dict().keys() <= names["network"].state_dict().keys()


def test_load_a_trained_model(make_trainer, digits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = make_trainer(max_epochs=1)
    trainer.fit(SFF(backbone=small_net(), num_classes=10, input_shape=(1, 8, 8)), digits)
    trainer.save_checkpoint("last.ckpt")
    names = {"SFF": SFF, "network": small_net(), "images": torch.randn(4, 1, 8, 8)}
    exec(code("load_from_checkpoint"), names)
    assert names["classes"].shape == (4,)


def test_plain_loop():
    images = torch.randn(4, 3, 32, 32)
    names = {"network": small_net(3), "images": images, "loader": [(images, torch.arange(4))] * 2}
    before = [p.clone() for p in names["network"][:4].parameters()]
    exec(code("net.loss(x, y).backward()"), names)
    assert names["classes"].shape == (4,)
    assert all(not torch.equal(p, q) for p, q in zip(before, names["network"][:4].parameters(), strict=True))


def test_look_at_the_cut(capsys):
    exec(code("from ff_lightning import partition"), {"network": small_net(3)})
    assert len(capsys.readouterr().out.splitlines()) == 5


def test_sections_that_others_rely_on():
    for section in ("## First run", "## Tests"):
        body = README.split(section)[1]
        command = re.search(r"```bash\n(.*?)```", body, flags=re.S)[1]
        assert len(command.strip().splitlines()) == 1


def test_it_is_read_in_one_go():
    assert len(README.splitlines()) <= 200


RESULTS = [*csv.DictReader((pages.ROOT / "docs/results.csv").open())]


def rows_of_table(head):
    """The cells of the table of the README whose first line begins with these."""
    _, _, *rows = README[README.index(head) :].split("\n\n")[0].splitlines()
    return [[cell.strip(" *") for cell in row.strip("| ").split(" | ")] for row in rows]


def test_every_accuracy_of_the_readme_is_a_row_of_the_csv_file():
    rows = rows_of_table("| data, network | SFF | backpropagation |")
    assert rows
    for of_what, *cells in rows:
        for method, cell in zip(("SFF", "Backprop"), cells, strict=True):
            same = {
                f"{row['mean']} ± {row['spread']}"
                for row in RESULTS
                if row["method"] == method and of_what.startswith(row["data"]) and f"`{row['network']}`" in of_what
            }
            assert cell in same | {"not run"}, of_what


def test_every_cost_of_the_readme_is_a_row_of_the_csv_file():
    rows = rows_of_table("| | kept for backward, 10 / 1000 classes |")
    assert rows
    for of_what, *cells in rows:
        words = set(re.findall(r"[\w-]+", of_what)) - {"backprop", "the", "default"}
        for metric, cell in zip(("kept for backward", "operations", "time"), cells, strict=True):
            for classes, figure in zip((10, 1000), cell.split(" / "), strict=cell != "not run"):
                same = {
                    row["mean"]
                    for row in RESULTS
                    if row["metric"].startswith(metric)
                    and row["setting"].endswith(f" {classes} classes")
                    and words <= set(re.findall(r"[\w-]+", f"{row['method']} {row['setting']}"))
                }
                assert figure in same | {"not run"}, (of_what, metric)


@pytest.mark.parametrize("page", ["README.md", "docs/results.md", "docs/transfer.md"])
def test_every_mean_with_its_spread_is_in_the_csv_file(page):
    found = re.findall(r"([\d.]+) ± ([\d.]+)", (pages.ROOT / page).read_text())
    assert found
    assert {*found} <= {(row["mean"], row["spread"]) for row in RESULTS}
