"""The Python of every page runs as it stands there, on small data; OTHERS have their own tests."""

import inspect
import re
import sys

import lightning
import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from ff_lightning import SFF, LocalNet, data
from tests.conftest import make_trainer_in, small_net
from tests.pages import MYPACKAGE, PAGES, ROOT, code, name_of

SHAPE = {"num_classes": 10, "input_shape": (3, 32, 32)}
QUICK = "limit_train_batches=2, limit_val_batches=1, logger=False, enable_checkpointing=False, accelerator='cpu'"
OTHERS = ("README.md", "docs/data.md", "docs/extend.md", "docs/search.md")
SLOW = ("docs/journal.md", "docs/networks.md", "docs/performance.md")


def trained(folder, backbone="cnn", module=None, **settings):
    """A model after a step of training, and its checkpoint last.ckpt."""
    settings = {"num_classes": 10, "input_shape": (1, 8, 8), **settings}
    model, trainer = SFF(backbone=backbone, **settings), make_trainer_in(folder)(max_epochs=1, limit_train_batches=1)
    trainer.fit(model, module or data.Digits(batch_size=16))
    trainer.save_checkpoint("last.ckpt")
    return {"SFF": SFF, "model": model, "network": backbone, "trainer": trainer}


def for_training(folder):
    x, y, module = torch.randn(4, 3, 32, 32), torch.arange(4), data.FakeImages(batch_size=4)
    wide = nn.Sequential(nn.Conv2d(3, 512, 3, 4), nn.ReLU(), nn.Conv2d(512, 512, 1, 2), nn.ReLU())
    net = LocalNet(small_net(3), **SHAPE)
    return {
        **trained(folder, wide, module, **SHAPE),
        **{"net": net, "x": x, "y": y, "loader": torch.utils.data.DataLoader([*zip(x, y, strict=True)], 2)},
        **{"L": pl, "lightning": lightning, "torch": torch, "LocalNet": LocalNet, "data": module},
        "optimizers": [torch.optim.AdamW(net.block_parameters(k), lr=0.005) for k in range(len(net.blocks))],
        "optimizer": torch.optim.AdamW(net.parameters(), lr=0.005),
        "scaler": torch.amp.GradScaler("cpu"),
    }


def for_transfer(folder):
    network = small_net(3)
    torch.save(network.state_dict(), "mine.pt")
    return {"network": network, "data": data.FakeImages(batch_size=4)}


def for_trust(folder):
    (folder / "mypackage.py").write_text(MYPACKAGE)
    return trained(folder)


def for_use(folder):
    for name in ("a.jpg", "b.jpg"):
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(name)
    return trained(folder)


def for_exits(folder):
    module = data.Digits(batch_size=16)
    module.setup("fit")
    return {**trained(folder), "data": module, "x": torch.randn(4, 1, 8, 8)}


def for_results(folder):
    record = np.repeat([100, 105, 116, 999], 3)
    np.savez("beats.npz", x=np.zeros((12, 128), np.float32), y=record % 2, record=record)
    return {}


GIVEN = {
    "docs/results.md": for_results,
    "docs/training.md": for_training,
    "docs/transfer.md": for_transfer,
    "docs/trust.md": for_trust,
    "docs/use.md": for_use,
    "docs/methods/early_exit.md": for_exits,
}
"""What a page speaks of and does not make itself, by its name."""


def on_small_data(block):
    """A block with the few words changed that would make it train for long, need a device or reach a server."""
    block = re.sub(r"Trainer\((?=max_epochs)", f"Trainer({QUICK}, ", block)
    block = re.sub(r"max_epochs=\d+(?! \*)", "max_epochs=1", block).replace('autocast("cuda"', 'autocast("cpu"')
    block = re.sub(r"^push_to_hub\(.*\n", "", block, flags=re.M).replace("user/my-model", "my-model")
    return block.replace("Fabric()", 'Fabric(accelerator="cpu", devices=1)')


@pytest.fixture
def one_process(monkeypatch):
    """What `torchrun` tells the only process of a run."""
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}.items():
        monkeypatch.setenv(name, str(value))
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=pytest.mark.slow if name_of(page) in SLOW else [], id=name_of(page))
        for page in PAGES
        if [*code(page, "python")] and name_of(page) not in OTHERS
    ],
)
def test_python_runs(page, tmp_path, monkeypatch, one_process, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mypackage", raising=False)
    names = {}
    for line, block in code(page, "python"):
        if "transformers" in block:
            pytest.importorskip("transformers")
        names |= {"__name__": __name__, **GIVEN.get(name_of(page), lambda folder: {})(tmp_path)}
        exec(compile("\n" * (line - 1) + on_small_data(block), str(page), "exec"), names)
    if page.stem == "performance":
        rows = [[float(x) for x in row.split()] for row in capsys.readouterr().out.splitlines()]
        printed = torch.tensor([row for row in rows if len(row) == 2])
        row = [re.search(rf"^\| {name} \|.*?\|.*?\| ([\d.]+) \|", page.read_text(), flags=re.M)[1]
               for name in ("saved", "operations")]  # fmt: skip
        assert [f"{printed[:, 0].max():.3f}", f"{printed[:, 1].mean():.3f}"] == row, "the column of reach=3"
        kept = [f"{row[0]:.3f}" for row in rows if len(row) == 1]
        table = re.findall(
            r"^\| copies, width \|(.*)\|\n.*\n\| saved, small stem, 32 x 32 \|(.*)\|$", page.read_text(), flags=re.M
        )
        columns = dict(zip(*([cell.strip() for cell in line.split("|")] for line in table[0]), strict=True))
        of_network = re.search(r"^\| ResNet50 \|.*?\| ([\d.]+) \|", page.read_text(), flags=re.M)
        assert kept == [of_network[1], columns["2, 0.25"]]


def test_own_data_trains(make_trainer):
    class MyDataset(torch.utils.data.Dataset):
        def __init__(self, root, train):
            self.targets = [0, 1] * 20

        def __len__(self):
            return 40

        def __getitem__(self, i):
            return torch.zeros(3, 64, 64, dtype=torch.uint8), self.targets[i]

    names = {"MyDataset": MyDataset}
    (block,) = [block for _, block in code(ROOT / "docs/data.md", "python")]
    exec(block, names)
    module = names["MyImages"](batch_size=4, num_workers=0)
    trainer = make_trainer(fast_dev_run=True)
    trainer.fit(SFF(backbone=small_net(3, classes=2), num_classes=2, input_shape=(3, 64, 64)), module)
    assert trainer.global_step == 1


def test_every_argument_in_the_table_exists():
    table = re.findall(r"^\| (`[^|]+`) \|", (ROOT / "docs/methods/sff.md").read_text(), flags=re.M)
    named = {name for row in table for name in re.findall(r"`(\w+)`", row)}
    known = {name for cls in SFF.__mro__[:2] for name in inspect.signature(cls).parameters}
    assert named
    assert named <= known
