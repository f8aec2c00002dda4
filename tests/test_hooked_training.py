"""LocalNet and SFF on networks that run by their own forward."""

import copy
import re
from pathlib import Path

import lightning
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from ff_lightning import SFF, Backprop, LocalNet
from ff_lightning.local.chain import normalise
from ff_lightning.losses import IGNORED, NextTokenLoss, logsumexp_loss
from ff_lightning.tasks import NextToken
from ff_lightning.util.memory import saved_for_backward
from tests.test_hooks import IDS, IMAGES, MASK, TEXT, make, transformers

pytestmark = pytest.mark.filterwarnings("ignore:.*run behind the last block")
Y = torch.tensor([0, 1])


def local_net(name, **kwargs):
    model, inputs = make(name)
    if name == "vit":
        return LocalNet(model, 2, input_shape=IMAGES.shape[1:], **kwargs), IMAGES
    return LocalNet(model, 2, example=inputs, **kwargs), inputs


def gradients(net):
    found = {name: p.grad for name, p in net.named_parameters()}
    net.zero_grad()
    return found


def same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        assert (gradient is None) == (theirs[name] is None), name
        torch.testing.assert_close(gradient, theirs[name], msg=name)


def reference(net, inputs, y):
    """The local losses by plain hooks, with all graphs alive and a single backward."""
    losses = []
    mask = None if isinstance(inputs, torch.Tensor) else inputs["attention_mask"].bool()

    def hook(k):
        def cut(module, args, output):
            main = output if isinstance(output, torch.Tensor) else output[0]
            scores = net.heads[k](*[main.mT, mask] if mask is not None else [main.mT])
            losses.append(logsumexp_loss(scores, y))
            handed_on = normalise(main.detach(), net.norm, 2)
            return handed_on if isinstance(output, torch.Tensor) else (handed_on, *output[1:])

        return cut

    model = net.hooked.model
    handles = [model.get_submodule(b).register_forward_hook(hook(k)) for k, b in enumerate(net.hooked.borders)]
    model(inputs) if mask is None else model(**inputs)
    for handle in handles:
        handle.remove()
    return losses


@pytest.mark.parametrize("name", ["distilbert", "vit"])
def test_the_gradients_are_the_local_ones(name):
    """From one scalar, from the losses one after the other, and from updates: those of a plain reference."""
    net, inputs = local_net(name)
    net.eval()  # no dropout
    expected = reference(net, inputs, Y)
    sum(expected).backward()
    wanted = gradients(net)
    assert any(gradient is not None and gradient.any() for gradient in wanted.values())
    loss = net.loss(inputs, Y)
    torch.testing.assert_close(loss, sum(expected))
    loss.backward()
    same(gradients(net), wanted)
    for loss, one in zip(net.local_losses(inputs, Y), expected, strict=True):
        torch.testing.assert_close(loss, one)
        loss.backward()
    same(gradients(net), wanted)
    for k, update in enumerate(net.updates(inputs, Y)):
        assert update.units == (k,)
        update.loss.backward()
    same(gradients(net), wanted)


def test_memory():
    """The graph of one block is alive at a time: a quarter of what backpropagation keeps, for six blocks."""
    config = transformers.DistilBertConfig(vocab_size=20, dim=32, n_layers=6, n_heads=2, hidden_dim=64)
    model = transformers.DistilBertForSequenceClassification(config)
    net = LocalNet(model, 2, example=TEXT)
    with saved_for_backward(left_out=[*net.parameters(), *model.parameters()]) as local:
        net.loss(TEXT, Y).backward()
    with saved_for_backward(left_out=model.parameters()) as whole:
        F.cross_entropy(model(**TEXT).logits, Y).backward()
    assert local.peak < 0.25 * whole.peak


def test_what_is_masked_changes_nothing():
    """Neither other tokens under the mask nor more padding: goodness, loss and gradients stay."""
    net = local_net("distilbert")[0].eval()
    results = []
    longer = [F.pad(IDS, (0, 3), value=7), F.pad(MASK, (0, 3))]
    others = [torch.where(MASK == 0, 19, IDS), MASK]
    for ids, mask in ([IDS, MASK], others, longer):
        x = {"input_ids": ids, "attention_mask": mask}
        loss = net.loss(x, Y)
        loss.backward()
        results.append((net.goodness(x).detach(), loss.detach(), gradients(net)))
    for goodness, loss, found in results[1:]:
        torch.testing.assert_close(goodness, results[0][0])
        torch.testing.assert_close(loss, results[0][1])
        word = "word_embeddings.weight"
        same(
            {n: g for n, g in found.items() if word not in n}, {n: g for n, g in results[0][2].items() if word not in n}
        )


def test_train_only():
    """The others are left as they are; what lies above the last trained block does not run."""
    net, inputs = local_net("distilbert")
    net.train_only([1])
    seen = []
    handle = net.hooked.model.distilbert.transformer.layer[2].register_forward_hook(lambda *_: seen.append(1))
    losses = list(net.local_losses(inputs, Y))
    assert not seen
    assert [loss.requires_grad for loss in losses] == [False, True]
    net.loss(inputs, Y).backward()
    assert {k for k in range(3) if any(p.grad is not None for p in net.block_parameters(k))} == {1}
    handle.remove()
    one, other = (next(net.local_goodness(inputs)) for _ in range(2))
    assert torch.equal(one, other), "block 0 is in eval mode, without dropout"
    assert net.blocks[0].training


def test_copies_and_weights():
    """A copy has a network of its own; a state dict takes the weights to another one, and to the original class."""
    net, inputs = local_net("distilbert")
    net.eval()
    twin = copy.deepcopy(net)
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert net(inputs).abs().sum() > 0
    assert not twin(inputs).abs().sum()
    twin.load_state_dict(net.state_dict())
    assert torch.equal(twin(inputs), net(inputs))
    other, _ = make("distilbert")
    missing = other.load_state_dict(net.backbone_state_dict(), strict=False)
    assert not missing.unexpected_keys
    assert {key.split(".")[0] for key in missing.missing_keys} == {"classifier", "pre_classifier"}


def test_what_such_a_network_cannot_do():
    net, inputs = local_net("distilbert")
    with pytest.raises(ValueError, match=r"reach=2: must be 1 for Distil.*parts of its own forward"):
        local_net("distilbert", reach=2)
    with pytest.raises(ValueError, match=r"^export .*DistilBertForSequenceClassification"):
        net.export()
    with pytest.raises(ValueError, match=r"^append "):
        net.append("top", nn.Linear(32, 32))
    with pytest.raises(ValueError, match=r"DistilBertForSequenceClassification: index out of range"):
        net({**inputs, "input_ids": IDS + 50})
    with pytest.warns(UserWarning, match="only the heads are compiled"):
        net.compile_blocks()


def test_bfloat16():
    """Under autocast, close to float32."""
    net, inputs = local_net("vit")
    net.loss(inputs, Y).backward()
    exact = gradients(net)
    with torch.autocast("cpu", torch.bfloat16):
        loss = net.loss(inputs, Y)
    loss.backward()
    rough = gradients(net)
    assert all(gradient.dtype == torch.float32 for gradient in rough.values())
    for k in range(3):
        one, other = (torch.cat([g.flatten() for n, g in of.items() if f"s.{k}." in n]) for of in (rough, exact))
        assert F.cosine_similarity(one, other, 0) > 0.98


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("marker", ["DistilBertConfig(", "GPT2Config("])
def test_the_code_of_the_docs(marker):
    text = (Path(__file__).parents[1] / "docs/networks.md").read_text()
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", text, flags=re.S) if marker in block]
    names = {}
    exec(code.replace(marker, f"{marker}n_embd=32, n_head=2, " if "GPT2" in marker else f"{marker}dim=24, "), names)
    assert len(getattr(names["model"], "net", names.get("net")).blocks) == 3


def test_float16_gradients_are_computed_at_the_scale_of_the_run():
    """They do not underflow: the scale is there in the backward of each block, and divided out but once."""
    net, inputs = local_net("vit")
    net.loss(inputs, Y).backward()
    exact = gradients(net)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    seen = []
    net.heads[0].classes.register_full_backward_hook(lambda module, to_input, arriving: seen.append(arriving[0].norm()))
    net.loss(inputs, Y)
    scaler.scale(net.loss(inputs, Y, scaler)).backward()
    torch.testing.assert_close(seen[1], 1024 * seen[0])
    same({name: gradient / 1024 for name, gradient in gradients(net).items()}, exact)


def causal_net():
    model, _ = make("gpt2")
    return LocalNet(model, 20, head="tokens", loss=NextTokenLoss(), example={"input_ids": IDS})


def test_a_language_model_does_not_see_what_comes():
    """Scores of a place depend on no later token, at any block."""
    net = causal_net().eval()
    changed = IDS.clone()
    changed[:, 4:] = 1
    one, other = net.goodness({"input_ids": IDS}), net.goodness({"input_ids": changed})
    assert one.shape == (3, 2, 7, 20)
    torch.testing.assert_close(one[:, :, :4], other[:, :, :4])
    assert not torch.allclose(one[:, :, 4:], other[:, :, 4:])


def test_a_language_model_learns():
    """Rows that count up: every block learns to tell the next token; perplexity comes near to 1."""
    torch.manual_seed(0)
    net, task = causal_net(), NextToken()
    task.num_classes = 20
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(60):
        ids = torch.randint(0, 12, (16, 1)) + torch.arange(8)
        loss = net.loss({"input_ids": ids}, ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    net.eval()
    ids = torch.arange(12)[:, None] + torch.arange(8)
    perplexity = task.metric("perplexity")
    scores = net({"input_ids": ids})
    perplexity.update(*task.for_metric(scores, ids))
    assert perplexity.compute() < 1.3
    assert task.figures(net.goodness({"input_ids": ids}), ids)["acc"].mean(-1).min() > 0.95


def test_next_token_loss():
    """As the shifted cross-entropy; ignored tokens do not count, and a batch of them costs nothing."""
    scores, ids = torch.randn(2, 5, 9), torch.randint(0, 9, (2, 5))
    ids[0, 3:] = IGNORED
    terms = [-scores[b, t].log_softmax(0)[ids[b, t + 1]] for b in range(2) for t in range(4) if ids[b, t + 1] >= 0]
    torch.testing.assert_close(NextTokenLoss()(scores, ids), torch.stack(terms).mean())
    assert NextTokenLoss()(scores, torch.full_like(ids, IGNORED)) == 0
    task = NextToken()
    task.num_classes = 9
    task.check(ids, 2)
    assert task.counted(ids).sum() == len(terms)
    wrong = {"9": torch.full_like(ids, 9), "float32": scores[:, :, 0], r"\(2,\)": ids[:, 0]}
    for says, target in wrong.items():
        with pytest.raises(ValueError, match=says):
            task.check(target, 2)


def texts(count=64):
    """A third token that tells the class; padding of three lengths."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 20, (count, 8), generator=generator)
    y = torch.arange(count) % 2
    ids[:, 2] = 1 + y
    lengths = 6 + torch.arange(count) % 3
    mask = (torch.arange(8) < lengths[:, None]).long()
    return [{"input_ids": i, "attention_mask": m, "labels": c} for i, m, c in zip(ids, mask, y, strict=True)]


def trainer(epochs=5):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return lightning.Trainer(max_epochs=epochs, accelerator="cpu", enable_checkpointing=False, **quiet)


def test_sff(tmp_path):
    """Batches as collators give them; both modes end with the same weights, and each block has learnt."""
    ended = []
    for mode in ("manual", "automatic"):
        lightning.seed_everything(1, verbose=False)
        kwargs = {"num_classes": 2, "input_shape": (8,), "vocabulary": 20, "lr": 3e-3, "lr_scheduler": "constant"}
        model = SFF(make("distilbert")[0], optimization=mode, **kwargs)
        run = trainer()
        run.fit(model, DataLoader(texts(), 16, shuffle=True), DataLoader(texts(), 16))
        assert all(run.callback_metrics[f"val/block{k:02d}_acc"] > 0.9 for k in range(3))
        ended.append({name: p.clone() for name, p in model.named_parameters()})
    assert all(torch.equal(p, ended[1][name]) for name, p in ended[0].items())
    run.save_checkpoint(tmp_path / "last.ckpt")
    again = SFF.load_from_checkpoint(tmp_path / "last.ckpt", backbone=make("distilbert")[0])
    inputs = next(iter(DataLoader(texts(), 16)))
    ours, theirs = model.eval().predict_step(inputs, 0), again.eval().predict_step(inputs, 0)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("norm", [None, "layer"])
def test_backprop(norm):
    """Beside SFF: the network with its own classifier, and the blocks with the norm that SFF trained them with."""
    lightning.seed_everything(1, verbose=False)
    model = Backprop(make("distilbert")[0], 2, (8,), norm=norm, vocabulary=20, lr=5e-3)
    trainer(epochs=10).fit(model, DataLoader(texts(), 16, shuffle=True))
    batch = next(iter(DataLoader(texts(), 64)))
    scores = model.eval().predict_step(batch, 0)
    assert (scores.argmax(1) == batch["labels"]).float().mean() > 0.9
    F.cross_entropy(scores, batch["labels"]).backward()
    assert all(p.grad is not None for p in model.net.parameters()), "gradients cross the borders"
