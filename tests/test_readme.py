"""The code of the README runs as it stands there, on small data."""

import re

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
