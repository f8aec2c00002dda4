import sys

import numpy as np
import pytest
import torch
from PIL import Image

from ff_lightning import data
from ff_lightning.cli import main
from ff_lightning.commands.sheet import GAP, TEXT, contact_sheet


def test_sheet_from_the_command_line(tmp_path, image_folder, capsys):
    root = str(image_folder())
    out = str(tmp_path / "sheet.png")
    main(["sheet", "--data", "ImageFolder", "--data.root", root, "--data.classes", "[dog,0]", "--out", out, "--rows=2"])
    printed = capsys.readouterr().out.split()
    table = {printed[i]: printed[i + 1 : i + 4] for i in (0, 4, 8, 12)}
    assert table == {"class": ["train", "val", "test"], "dog": ["10"] * 3, "cat": ["10"] * 3, "sum": ["20"] * 3}
    assert Image.open(out).size == (8 * (64 + GAP) + GAP, 2 * (64 + TEXT + GAP) + GAP)


def test_sheet_shows_the_training_images_as_the_network_gets_them():
    module = data.FakeImages(image_size=64, batch_size=5)
    module.setup("fit")
    sheet = torch.from_numpy(np.array(contact_sheet(module, rows=1)))
    x = torch.cat([x for x, _ in list(module.train_dataloader())[:2]])
    for i in range(8):
        left = GAP + i * (64 + GAP)
        shown = sheet[GAP : GAP + 64, left : left + 64].permute(2, 0, 1)
        expected = (x[i] * 0.25 + 0.5) * 255
        assert (shown - expected).abs().max() <= 1


def test_a_data_set_that_is_not_there(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ff-lightning", "sheet", "--data", "ImageFolder", "--data.root", "nowhere"])
    with pytest.raises(SystemExit):
        main()
    assert "root='nowhere' must hold a folder 'train'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argument", "message"),
    [("--rows=0", "rows"), ("--out=nowhere/sheet.png", "out='nowhere/sheet.png': there is no folder 'nowhere'")],
)
def test_a_sheet_that_cannot_be_drawn(argument, message, capsys):
    with pytest.raises(SystemExit):
        main(["sheet", argument])
    assert message in capsys.readouterr().err
