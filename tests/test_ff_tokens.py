"""Forward-Forward on token ids: the label is a token in front of the others."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from ff_lightning import FF, views
from ff_lightning.backbones import text
from ff_lightning.local.ffnet import FFNet
from tests.test_ff import network

WORDS, CLASSES, LENGTH = 12, 3, 6
IDS = WORDS + CLASSES + 1


class Words(nn.Module):
    """An embedding and two layers that mix positions; padding has no part in the mean."""

    def __init__(self):
        super().__init__()
        self.embed, self.first, self.second = nn.Embedding(IDS, 32), nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, ids, mask):
        x = self.embed(ids)
        for layer in (self.first, self.second):
            mean = (x * mask[:, :, None]).sum(1, keepdim=True) / mask.sum(1)[:, None, None]
            x = F.relu(layer(x + mean))
        return x


def net(**arguments):
    torch.manual_seed(0)
    backbone = text(CLASSES, IDS, LENGTH + 1, 16, 2, 2, dropout=0.0)
    return FFNet(backbone, CLASSES, (LENGTH,), **{"label": "token", "vocabulary": WORDS, "granularity": "block",
                                                  **arguments})  # fmt: skip


def texts(count=4, length=LENGTH):
    torch.manual_seed(1)
    return {"input_ids": torch.randint(WORDS, (count, length)), "attention_mask": torch.ones(count, length).bool()}


def test_the_label_is_an_id_behind_the_vocabulary_and_stands_in_front():
    ids = torch.tensor([[1, 2], [3, 4], [5, 6]])
    labels = torch.cat([F.one_hot(torch.tensor([0, 2]), 3).float(), torch.full((1, 3), 1 / 3)])
    assert views.label_token(ids, labels, WORDS).tolist() == [[12, 1, 2], [14, 3, 4], [15, 5, 6]]


@pytest.mark.parametrize("goodness", ["sum", "mean"])
def test_a_loss_is_that_of_the_features_of_tokens_that_are_no_padding(goodness):
    ff, batch, y = net(goodness=goodness, theta=0.5, peer=0), texts(), torch.tensor([0, 1, 2, 0])
    batch["attention_mask"][1, 3:] = batch["attention_mask"][3, 5:] = False
    torch.manual_seed(2)
    losses = list(ff.local_losses(batch, y))
    torch.manual_seed(2)
    labels = torch.cat([y, views.wrong_labels(y, CLASSES)])
    ids = torch.cat([WORDS + labels[:, None], batch["input_ids"].repeat(2, 1)], 1)
    mask = F.pad(batch["attention_mask"].repeat(2, 1), (1, 0), value=True)
    first, *_ = ff.blocks[0]((ids, mask))
    squares = (first.square() * mask[:, :, None]).sum((1, 2))
    size = 16 * mask.sum(1)
    logits = squares - 0.5 * size if goodness == "sum" else squares / size - 0.5
    positive = torch.cat([torch.ones(4), torch.zeros(4)])
    torch.testing.assert_close(losses[0], F.binary_cross_entropy_with_logits(logits, positive))


def test_padding_changes_neither_the_goodness_nor_the_readout():
    ff = net().eval()
    short = texts(length=4)
    padded = {name: F.pad(value, (0, 2)) for name, value in short.items()}
    torch.testing.assert_close(ff.goodness(padded), ff.goodness(short), atol=1e-3, rtol=0)  # sums of 112 squares
    torch.testing.assert_close(ff.states(padded), ff.states(short))


def test_a_block_that_ends_in_a_norm_is_named():
    with pytest.warns(UserWarning, match=r"blocks \['layers.1'\] end in a norm"):
        net()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FFNet(Words(), CLASSES, (LENGTH,), "token", vocabulary=WORDS)


def test_it_tells_texts_apart_by_their_words(make_trainer):
    torch.manual_seed(0)
    y = torch.arange(300) % CLASSES
    ids = torch.randint(CLASSES, WORDS, (300, LENGTH))
    ids[torch.arange(300), torch.randint(LENGTH, (300,))] = y  # one word says it
    loader = DataLoader(TensorDataset(ids, y), batch_size=30)
    model = FF(Words(), label="token", vocabulary=WORDS, num_classes=CLASSES, input_shape=(LENGTH,), goodness="mean",
               optimizer=torch.optim.AdamW, lr=0.01)  # fmt: skip
    trainer = make_trainer(max_epochs=20, limit_train_batches=1.0, limit_val_batches=1.0)
    trainer.fit(model, loader, loader)
    assert trainer.callback_metrics["val/acc"] > 0.9
    assert trainer.callback_metrics["val/readout_acc"] > 0.9


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: net(negatives="hybrid"), "negatives='hybrid' mixes two images"),
        (lambda: net(vocabulary=None), "label='token' and vocabulary=None"),
        (lambda: net(vocabulary=0), "vocabulary=0: must be at least 1"),
        (
            lambda: net(vocabulary=WORDS + 1),
            "makes 17 ids, those of the label behind the 13 others, and 7 of them in a",
        ),
        (
            lambda: FFNet(text(CLASSES, IDS, LENGTH, 16, 1, 2), CLASSES, (LENGTH,), "token", vocabulary=WORDS),
            "7 of them in a sample, which the network does not take: index out of range",
        ),
        (lambda: network().goodness((torch.zeros(2, 1, 8, 8), torch.zeros(2))), "takes one tensor"),
        (lambda: network(vocabulary=WORDS), "label='overlay' and vocabulary=12: token ids take 'token'"),
        (lambda: network(label="token", vocabulary=WORDS), r"label='token' is for token ids \(T,\).*\(1, 8, 8\)"),
        (
            lambda: FF(label="token", vocabulary=WORDS, num_classes=3, input_shape=(LENGTH,)),
            "label='token' needs a backbone for token ids, such as 'text'",
        ),
        (lambda: net().goodness({"input_ids": torch.full((2, 3), WORDS)}), "holds 12: vocabulary=12 allows 0 to 11"),
        (lambda: net().goodness({"input_ids": torch.zeros(2, LENGTH + 1).long()}), "must be of 6 ids or fewer"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
