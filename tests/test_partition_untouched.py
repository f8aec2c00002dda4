"""What a cut cannot do is said, and the network comes back as it was."""

import copy
import gc
import io
import random
import warnings
import weakref

import numpy as np
import pytest
import torch
from torch import nn

from ff_lightning import partition
from tests.test_partition_faults import GRANULARITIES, Net, X, assert_exact, conv, run


def test_a_second_name_for_what_is_changed_in_place():
    class Alias(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = conv(), conv()

        def forward(self, x):
            x = self.a(x)
            shortcut = x
            x += self.b(x.relu())
            return self.b(x) + shortcut

    for granularity in GRANULARITIES:
        assert_exact(lambda: Net(Alias()), granularity)


# What cannot be traced, and what is wrapped


class Length(Net):
    def forward(self, x):
        return super().forward(x) / len(x)


class Star(Net):
    def forward(self, *args, **kwargs):
        (x,) = args
        return super().forward(x)


class Assigns(Net):
    def forward(self, x):
        x[:, 0] = 0
        return super().forward(x)


class ManyArguments(Net):
    def forward(self, x, *, y):
        return super().forward(x) + y


class Accumulates(Net):
    def middle(self, x):
        out = torch.zeros(1, 4, 8, 8)
        out += self.part(x)
        return out


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Length, r"Length.forward cannot be traced \(.*len.*\).* at no granularity.*nn.Sequential"),
        (Assigns, r"Assigns.forward cannot be traced \(.*item assignment\)"),
        (ManyArguments, r"several inputs \['x', 'y'\]"),
        (Accumulates, r"changes a tensor that was made in forward"),
    ],
)
def test_what_cannot_be_traced_is_said_in_one_sentence(make, message):
    model = make(conv())
    with pytest.raises(ValueError, match=message) as info:
        partition(model, "block", X)
    assert len(str(info.value).splitlines()) == 1
    assert all(module.training for module in model.modules())


def test_any_signature_will_do_that_takes_one_batch():
    import functools

    def decorated(function):
        @functools.wraps(function)
        def wrapper(self, *args, **kwargs):
            kwargs.setdefault("scale", None)
            return function(self, *args, **kwargs)

        return wrapper

    class Decorated(Net):
        @decorated
        def forward(self, pixels=None, mask=None, scale=None, **kwargs):
            return super().forward(pixels)

    for make in (Star, Decorated):
        assert_exact(lambda make=make: make(conv()), "layer", count=3)


def test_wrapped_networks():
    x = torch.randn(2, 3, 8, 8)
    for wrap in (torch.compile, nn.DataParallel, lambda net: nn.DataParallel(torch.compile(net))):
        model = Net(conv()).eval()
        blocks = partition(wrap(model), "layer", X)
        assert [block.name for block in blocks] == ["stem", "part", "last"]
        assert torch.equal(run(blocks, x), model.features(x))
    with pytest.raises(ValueError, match="scripted network cannot be cut"):
        partition(torch.jit.script(nn.Sequential(conv(3), nn.ReLU())), "layer", X)
    compiled = Net(torch.compile(nn.Sequential(conv(), nn.ReLU()), backend="eager"))
    assert [block.name for block in partition(compiled, "layer", X)] == ["stem", "part", "last"]
    scripted = Net(torch.jit.script(nn.Sequential(conv(), nn.ReLU())))
    assert [block.name for block in partition(scripted, "layer", X)] == ["stem", "part", "last"]


def test_deeply_nested_modules():
    def nested(depth):
        inner = conv()
        for _ in range(depth):
            inner = nn.Sequential(inner)
        return Net(nn.Sequential(inner, conv()))

    assert [block.name for block in partition(nested(200), "layer", X)] == ["stem", "part.0", "part.1", "last"]


def test_untraceable_modules_stay_whole_and_are_found_at_once():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = conv()

        def forward(self, x):
            return self.conv(-x if x.sum() > 0 else x)

    class Counts(Odd):
        def forward(self, x):
            seen.append(1)
            return super().forward(x)

    seen = []
    model = Net(nn.Sequential(*(nn.Sequential(conv(), Counts()) for _ in range(10))))
    blocks = assert_exact(lambda: copy.deepcopy(model), "layer")
    assert len(blocks) == 22
    seen.clear()
    partition(model, "layer", X)
    assert len(seen) <= 10 * 12, "each module is traced and run a few times, not once for each other one"


# The user's network comes back as it was


class Stateful(Net):
    """Keeps what it sees, counts its calls, in its own forward and in that of a part."""

    def __init__(self):
        super().__init__(conv())
        self.calls, self.seen, self.cache = 0, [], {"x": None}
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def middle(self, x):
        self.calls += 1
        self.count += 1
        self.seen.append(x)
        self.cache["x"] = x
        self.feat = x
        return self.part(x)


def everything(model):
    """All that a network holds, to be compared."""
    buffer = io.BytesIO()
    torch.save([module.__dict__ for module in model.modules()], buffer)
    return buffer.getvalue()


def test_the_network_comes_back_as_it_was():
    model = Stateful()
    model.part.eval()
    model.last.weight.requires_grad = False
    calls = []
    model.part.register_forward_hook(lambda *args: calls.append(args[2]))
    model.fc.register_forward_pre_hook(lambda *args: calls.append(args[1][0]))
    model._forward_hooks.clear()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state, numpy_state, python_state = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    with pytest.warns(UserWarning, match=r"whose forward sets 'cache', 'calls', .*'seen'.*: the blocks do not"):
        partition(model, "layer", X)
    assert (model.calls, model.seen, model.cache, int(model.count)) == (0, [], {"x": None}, 0)
    assert not hasattr(model, "feat")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [m.training for m in (model, model.part, model.last)] == [True, False, True]
    assert all(p.grad is None for p in model.parameters())
    assert not model.last.weight.requires_grad
    assert all(type(value) is torch.Tensor for value in calls), "hooks see tensors alone"
    assert torch.equal(torch.get_rng_state(), state)
    assert (np.random.get_state()[1] == numpy_state).all()
    assert random.getstate() == python_state
    model.part._forward_hooks.clear()
    model.fc._forward_pre_hooks.clear()
    torch.save(model, io.BytesIO())
    model(torch.randn(2, 3, 8, 8))
    assert (model.calls, len(model.seen), int(model.count)) == (1, 1, 1)


def test_counters_go_on_counting():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.calls = conv(), 0
            self.register_buffer("count", torch.zeros((), dtype=torch.long))

        def forward(self, x):
            self.calls += 1
            self.count += 1
            return self.conv(x)

    model = Net(Counts())
    blocks = partition(model, "layer", X)
    assert (model.part.calls, int(model.part.count)) == (0, 0), "tracing and the check do not count"
    run(blocks, X)
    assert (model.part.calls, int(model.part.count)) == (1, 1)


def test_a_counter_of_the_network_itself_that_counts_in_training():
    class Counts(Net):
        def middle(self, x):
            if self.training:
                self.count += 1
            return self.part(x)

    model = Counts(conv())
    model.register_buffer("count", torch.zeros((), dtype=torch.long))
    with pytest.warns(UserWarning, match="whose forward sets 'count': the blocks do not"):
        partition(model, "layer", X)
    model(torch.randn(2, 3, 8, 8))
    assert int(model.count) == 1


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
def test_checkpointing():
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(nn.Module):
        def __init__(self, reentrant):
            super().__init__()
            self.a, self.b, self.reentrant = conv(), conv(), reentrant

        def forward(self, x):
            return x + checkpoint(lambda y: self.b(self.a(y).relu()), x, use_reentrant=self.reentrant)

    assert_exact(lambda: Net(Checkpointed(False)), "layer", count=4)
    with pytest.raises(ValueError, match=r"its own unit does not reach 'part.a.weight', .* granularity='stage'"):
        partition(Net(Checkpointed(True)), "block", X)  # it gives none where its input is detached
    assert_exact(lambda: Net(Checkpointed(True)), "stage")


def test_hooks_of_a_divided_module():
    def make():
        return Net(nn.Sequential(conv(), nn.ReLU(), conv()))

    seen = []
    model = make()
    model.part.register_forward_hook(lambda *args: seen.append(args[2]))
    model.part.register_forward_pre_hook(lambda *args: seen.append(args[1][0]))
    with pytest.warns(UserWarning, match="borders run through 'part': the blocks do not run the forward hooks"):
        partition(model, "layer", X)
    assert all(type(value) is torch.Tensor for value in seen)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        partition(model, ["stem", "part"], X)
    changing = make()
    changing.part.register_forward_hook(lambda module, args, result: result * 2)
    with pytest.raises(
        ValueError, match="compute something else than Net does: borders run through 'part', so that its"
    ):
        partition(changing, "layer", X)


@pytest.mark.parametrize("wrong", ["example", "granularity", "forward"])
def test_a_failed_partition_leaves_no_trace(wrong):
    model = Stateful()
    model.part.eval()
    example, granularity = X, "layer"
    if wrong == "example":
        example = torch.zeros(1, 5, 8, 8)
    elif wrong == "granularity":
        granularity = ["nothing"]
    else:
        model = Length(conv()).train()
        model.part.eval()
    keys = set(model.__dict__)
    with pytest.raises(ValueError, match=r"does not pass|is not known|cannot be traced"):
        partition(model, granularity, example)
    assert [m.training for m in (model, model.part)] == [True, False]
    assert set(model.__dict__) == keys


def test_running_statistics_are_not_moved():
    model = Net(nn.Sequential(conv(), nn.BatchNorm2d(4), nn.utils.parametrizations.spectral_norm(conv())))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    partition(model, "layer", X)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_nothing_is_kept_of_a_network_that_is_gone():
    model = Net(nn.Sequential(conv(), nn.ReLU(), conv()))
    blocks = partition(model, "layer", X)
    alive = weakref.ref(model.stem.weight)
    del model, blocks
    gc.collect()
    assert alive() is None


def test_lazy_modules_take_their_shape_from_the_example():
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.ReLU(), nn.LazyConv2d(4, 3), nn.Flatten(), nn.LazyLinear(10))
    assert len(partition(model, "layer", X)) == 2
