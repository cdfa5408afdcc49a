"""Each group alone, with what comes before it replayed, against running every pruned network as a whole."""

import logging
from itertools import pairwise

import pandas as pd
import pytest
import torch
from networks import network
from torch import nn

from obc_tools import Task, cost, evaluate, load_model, make_plan, prune, score_groups, sensitivity
from obc_tools.comparing.compare import ComparisonError
from obc_tools.comparing.sensitivity import named_tensors, replay
from obc_tools.structure.groups import find_groups

RATIOS = (0.3, 0.6)


def outputs_of(model, batches):
    found = torch.cat([model(images) for images in batches])
    return {"size": found.square().mean().item(), "first": found.flatten()[0].item()}


TASK = Task("size", lambda model, images: model(images).square().mean(), outputs_of,
            directions={"size": "higher", "first": "lower"})  # fmt: skip
OPTIONS = {"ratios": RATIOS, "task": TASK, "progress": False}


class InPlace(nn.Module):
    """Two residual blocks that write into their inputs, and a shortcut that is used at the end."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.a, self.b = nn.Conv2d(6, 8, 3, padding=1), nn.Conv2d(8, 6, 3, padding=1)
        self.c, self.d = nn.Conv2d(6, 8, 3, padding=1), nn.Conv2d(8, 6, 3, padding=1)
        self.head = nn.Linear(12, 4)

    def forward(self, x):
        x = self.stem(x).relu_()
        first = x.mean((2, 3))
        x += self.b(self.a(x).relu_())
        x[:, :, 0] = 0
        out = self.d(self.c(x).relu_())
        out += x
        return self.head(torch.cat([first, out.mean((2, 3))], 1))


class Unseen(InPlace):
    """Computes in a way that is not seen from outside: by a function of autograd's own."""

    def forward(self, x):
        return super().forward(Doubled.apply(self.stem(x)).mean(1, keepdim=True).expand(-1, 3, -1, -1))


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(context, x):
        return 2 * x


def made(name):
    if name in ("in_place", "unseen"):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = {"in_place": InPlace, "unseen": Unseen}[name]().double().eval()
            return model, torch.randn(4, 3, 8, 8, dtype=torch.float64)
    return network(name)


NAMES = ("small_vgg", "mlp_layernorm", "residual", "grouped", "inverted", "concat", "upsampling", "shared")


@pytest.mark.parametrize("name", [*NAMES, "in_place", "unseen"])
def test_the_numbers_are_those_of_whole_passes(name):
    model, images = made(name)
    held_out = [images[:3], images[3:]]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    whole = sensitivity(model, images[:1], held_out, reuse=False, **OPTIONS)
    quick = sensitivity(model, images[:1], held_out, **OPTIONS)
    pd.testing.assert_frame_equal(quick.frame, whole.frame, rtol=1e-12, atol=1e-12)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert "forward" not in vars(model)


def test_each_row_is_one_group_pruned_by_hand():
    model, images = network("small_vgg")
    frame = sensitivity(model, images[:1], [images], **OPTIONS).frame
    groups = find_groups(model, images[:1])
    scores = score_groups(model, groups, "l2")
    prunable = [group for group in groups if group.prunable]
    assert list(frame["group"]) == ["", *(str(group.root) for group in prunable for _ in RATIOS)]
    for group, (_, row) in zip([g for g in prunable for _ in RATIOS], list(frame.iterrows())[1:], strict=True):
        alone = {g: scores[g] if g is group else torch.full_like(scores[g], 1e9) for g in groups}
        plan = make_plan(alone, channels=int(row["ratio"] * group.width + 1e-9))
        pruned = prune(model, plan)
        assert row["size"] == pytest.approx(evaluate(pruned, [images], task=TASK).values["size"], rel=1e-10)
        assert (row["macs"], row["params"]) == (cost(pruned, images[:1]).macs, cost(pruned, images[:1]).params)
        assert (row["removed"], row["channels"]) == (plan.channels_removed, group.width)


def test_what_comes_before_the_group_runs_once():
    """Of n layers in a row and r ratios, layer i is run for the groups up to its own, not for those after it."""
    seen = []

    class Noted(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is torch.conv2d:
                seen.append(args[1].shape)
            return func(*args, **(kwargs or {}))

    with torch.random.fork_rng():
        torch.manual_seed(0)
        widths = [3, 5, 6, 7, 8]
        layers = [nn.Conv2d(a, b, 1) for a, b in pairwise(widths)]
        model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * 4, 2)).double().eval()
    images = torch.randn(2, 3, 2, 2, dtype=torch.float64)
    counts = {}
    for reuse in (False, True):
        seen.clear()
        with Noted():
            sensitivity(model, images[:1], [images], reuse=reuse, **OPTIONS)
        counts[reuse] = len(seen)
    # Four layers, each a group at two ratios; with reuse, layers 0 to i - 1 are left out at group i, but for the one
    # that the pass before did not reach.
    assert counts[False] - counts[True] == sum(2 * i - (i > 0) for i in range(4))


def test_a_pass_that_cannot_be_replayed_is_run_as_a_whole(caplog):
    model, images = made("unseen")
    with caplog.at_level(logging.INFO, "obc_tools"):
        sensitivity(model, images[:1], [images], **OPTIONS)
    assert "what comes before the group is run again" in caplog.text


def test_a_pass_that_begins_otherwise_is_not_taken_for_the_same():
    model, images = made("in_place")
    starts, parting = {}, [model.head.weight]
    with torch.no_grad():
        first = replay(starts, model, parting, lambda net: outputs_of(net, [images]))
        assert starts
        model.stem.padding = (0, 0)
        changed = replay(starts, model, parting, lambda net: outputs_of(net, [images]))
        assert changed == outputs_of(model, [images]) != first
    assert named_tensors(model).keys() == dict(model.named_parameters()).keys()


def test_attention_and_a_zoo_network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vit = load_model("timm:test_vit", num_classes=3, img_size=32, patch_size=16).double().eval()
        images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    options = OPTIONS | {"ratios": (0.5,)}
    whole = sensitivity(vit, images[:1], [images], reuse=False, **options)
    quick = sensitivity(vit, images[:1], [images], **options)
    pd.testing.assert_frame_equal(quick.frame, whole.frame, rtol=1e-10)


def test_a_table_a_heat_map_and_which_way_is_worse():
    model, images = network("small_vgg")
    found = sensitivity(model, images[:1], [images], **OPTIONS)
    frame, lost = found.to_frame(), found.lost()
    assert lost.iloc[0, 0] == pytest.approx(frame["size"][0] - frame["size"][1])
    assert found.lost("first").iloc[0, 0] == pytest.approx(frame["first"][1] - frame["first"][0])
    figure = found.plot()
    assert figure.data[0].z.shape == lost.shape and list(figure.data[0].x) == ["30", "60"]
    assert list(figure.data[0].y) == list(lost.index) == list(dict.fromkeys(frame["group"][1:]))
    assert lost.index[0] in repr(found) and "<table" in found._repr_html_()
    with pytest.raises(ComparisonError, match="'speed' was not measured; there are size, first"):
        found.plot("speed")


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"ratios": ()}, r"ratios=\(\): expected shares of a group's channels in \(0, 1\)"),
        ({"ratios": (0.5, 1)}, r"ratios=\(0.5, 1\): expected shares"),
        ({"steps": 3}, "unknown setting 'steps'; known are "),
        ({"ignore": "*"}, "nothing can be pruned: "),
        ({"criterion": "jacobian"}, "batches"),
    ],
)
def test_bad_input(asked, said):
    model, images = network("small_vgg")
    with pytest.raises(ValueError, match=said):
        sensitivity(model, images[:1], [images], **OPTIONS | asked)
    with pytest.raises(ValueError, match="held_out: a list_iterator can be gone through only once"):
        sensitivity(model, images[:1], iter([images]), **OPTIONS)
