"""A method of one's own, as a user would write it: Hinton's Forward-Forward with the label in the first pixels."""

from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F

from ff_lightning import LocalLearner, Update
from ff_lightning.losses import threshold_loss


class Hinton(LocalLearner):
    def __init__(self, widths: tuple[int, ...] = (64, 64), theta: float = 1.0, **kwargs):
        super().__init__(**kwargs)
        sizes = [torch.Size(self.input_shape).numel(), *widths]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.theta = theta
        self.set_units({f"layer{k}": [layer] for k, layer in enumerate(self.layers)})

    def overlay(self, x, labels):
        x = x.flatten(1).clone()
        x[:, : self.num_classes] = F.one_hot(labels, self.num_classes) * x.abs().amax()
        return x

    def goodness(self, layer, x):
        h = layer(F.rms_norm(x, x.shape[1:])).relu()
        return h, h.square().mean(1)

    def local_updates(self, batch):
        (x,), y = self.inputs_and_target(batch)
        wrong = (y + torch.randint_like(y, 1, self.num_classes)) % self.num_classes
        h = self.overlay(torch.cat([x, x]), torch.cat([y, wrong]))
        for k, layer in enumerate(self.layers):
            h, goodness = self.goodness(layer, h.detach())
            positive, negative = goodness.chunk(2)
            loss = threshold_loss(positive, negative, self.theta)
            yield Update((k,), loss, (loss.detach(),))

    def scores(self, x):
        columns = []
        for label in range(self.num_classes):
            h, of_layers = self.overlay(x, torch.full((len(x),), label, device=x.device)), []
            for layer in self.layers:
                h, goodness = self.goodness(layer, h)
                of_layers.append(goodness)
            columns.append(torch.stack(of_layers))
        return torch.stack(columns, -1)


class Focal(nn.Module):
    def __init__(self, gamma: float = 2.0):
        super().__init__()
        self.gamma = gamma

    def forward(self, scores, target):
        losses = F.cross_entropy(scores, target, reduction="none")
        return ((1 - torch.exp(-losses)) ** self.gamma * losses).mean()
