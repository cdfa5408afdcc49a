import json

import pytest
import torch
from networks import NETWORKS, network, random_plan
from torch import nn

from obc_tools import LayerAxis, PruningPlan, find_groups, load_pruned, make_plan, prune, save_pruned, score_groups
from obc_tools.pruning.plan import PlanMismatchError


@pytest.mark.parametrize("name", NETWORKS)
def test_json_round_trip(name):
    plan = random_plan(name)[2]
    assert PruningPlan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize("name", NETWORKS)
def test_renumbered_groups_are_what_tracing_the_pruned_model_finds(name):
    model, images, plan = random_plan(name)
    assert plan.channels_removed > 0
    assert plan.pruned_groups() == find_groups(prune(model, plan), images)


@pytest.mark.parametrize("name", NETWORKS)
def test_two_plans_in_a_row_are_their_composition(name):
    model, images, first = random_plan(name, ratio=0.25)
    middle = prune(model, first)
    generator = torch.Generator().manual_seed(1)
    second = make_plan({g: torch.rand(g.width, generator=generator) for g in first.pruned_groups()}, ratio=0.3)
    assert second.channels_removed > 0
    twice, once = prune(middle, second), prune(model, first.then(second))
    assert all(torch.equal(value, once.state_dict()[key]) for key, value in twice.state_dict().items())


def test_selection_is_in_the_original_numbering():
    plan = random_plan("small_vgg")[2]
    kept = plan.kept_of(LayerAxis("7", "out"))
    positions = plan.selection(LayerAxis("11", "in"))
    assert positions == tuple(16 * channel + offset for channel in kept for offset in range(16))
    assert plan.selection(LayerAxis("13", "out")) == tuple(range(10))
    with pytest.raises(ValueError, match=r"unknown layer axis of this plan '9\.out'"):
        plan.selection(LayerAxis("9", "out"))


def test_bad_plans_are_refused():
    plan = random_plan("grouped")[2]
    groups = plan.groups

    def with_kept(index, kept):
        return (*plan.kept[:index], kept, *plan.kept[index + 1 :])

    cases = [
        ((), "no channel is kept"),
        ((0, 0, 4, 8), "must ascend"),
        ((0, 4, 8, 99), "kept channel 99 in a group of width 16"),
        ((0, 4, 8, 13), "its 4 blocks must keep the same positions"),
    ]
    for kept, message in cases:
        with pytest.raises(PlanMismatchError, match=message):
            PruningPlan(groups, with_kept(0, kept))
    with pytest.raises(PlanMismatchError, match="kept whole"):
        PruningPlan(groups, with_kept(3, (0, 1)))
    with pytest.raises(PlanMismatchError, match="is there twice"):
        PruningPlan((groups[0], groups[0]), (plan.kept[0], plan.kept[0]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.update(format=9), "plan format 9"),
        (lambda data: data["groups"][0].pop("width"), "not a pruning plan: KeyError"),
        (lambda data: data["groups"][0].update(kept=["0"]), "expected an integer"),
        (lambda data: data.update(groups=3), "not a pruning plan"),
    ],
)
def test_bad_json_is_refused(change, message):
    data = json.loads(random_plan("small_vgg")[2].to_json())
    change(data)
    with pytest.raises(PlanMismatchError, match=message):
        PruningPlan.from_json(json.dumps(data))
    with pytest.raises(PlanMismatchError, match="not a pruning plan"):
        PruningPlan.from_json("{")


def test_plans_that_do_not_fit_are_refused():
    model, _, plan = random_plan("small_vgg")
    with pytest.raises(PlanMismatchError, match="is not in this model"):
        plan.validate(network("residual")[0])
    with pytest.raises(PlanMismatchError, match="wide, here"):
        plan.validate(prune(model, plan))
    with pytest.raises(PlanMismatchError, match="in the second plan"):
        plan.then(plan)


def test_plans_show_themselves():
    plan = random_plan("small_vgg")[2]
    assert f"{plan.channels_removed} of 60 channels removed" in repr(plan)
    assert list(plan.to_frame()["channels"]) == [8, 12, 16, 24, 10]
    assert "reaches the model" in str(plan) and "<table" in plan._repr_html_()


def test_channels_chosen_by_hand():
    model, images = network("grouped")
    groups = find_groups(model, images)
    plan = PruningPlan.whole(groups)
    group = next(g for g in groups if g.prunable and g.blocks > 1)
    size = group.width // group.blocks
    less = plan.choose(group, remove=[1])
    assert set(range(group.width)) - set(less.kept_of(group)) == set(range(1, group.width, size))
    assert less.choose(tuple(group.root), keep=[1 + size]) == plan
    assert less.choose(group, remove=[1]) == less
    with pytest.raises(PlanMismatchError, match=f"group {group.root}: channel 1 is to be kept and to be removed"):
        plan.choose(group, keep=[1], remove=[1 + size])
    with pytest.raises(PlanMismatchError, match=f"no channel {group.width} in a group of width {group.width}"):
        plan.choose(group, keep=[group.width])
    with pytest.raises(PlanMismatchError, match="no channel is kept"):
        plan.choose(group, remove=range(group.width))
    with pytest.raises(PlanMismatchError, match="kept whole"):
        plan.choose(next(g for g in groups if not g.prunable), remove=[0])


class Table(nn.Module):
    """A bare parameter of two axes between linear layers."""

    def __init__(self):
        super().__init__()
        self.first, self.table, self.last = nn.Linear(6, 4), nn.Parameter(torch.randn(7, 4)), nn.Linear(4, 3)

    def forward(self, x):
        return self.last((self.first(x)[:, None] * self.table).mean(1))


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(4, 1, 1))

    def forward(self, x):
        return x * self.gain


@pytest.mark.parametrize("scale", [lambda: nn.PReLU(4), Scale], ids=["PReLU", "bare parameter"])
def test_a_scale_that_is_left_with_one_channel_is_saved_and_scored_again(scale, tmp_path):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), scale(), nn.Conv2d(4, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model, x = nn.Sequential(*layers, nn.Linear(8, 3)).double().eval(), torch.randn(2, 3, 8, 8).double()
    plan = PruningPlan.whole(find_groups(model, x)).choose(("0", "out"), remove=[1, 2, 3])
    pruned = prune(model, plan)
    save_pruned(tmp_path / "saved", pruned, plan)
    assert torch.equal(load_pruned(tmp_path / "saved", model=model)(x), pruned(x))
    batches = [(torch.randn(8, 3, 8, 8).double(), torch.randint(0, 3, (8,))) for _ in range(2)]
    scores = score_groups(pruned, plan.pruned_groups(), "jacobian", batches)
    again = score_groups(pruned, find_groups(pruned, x), "jacobian", batches)
    wide = next(group for group in again if group.root == ("2", "out"))
    torch.testing.assert_close(scores[wide], again[wide], rtol=1e-10, atol=0)
    assert scores[next(iter(scores))].shape == (1,) and scores[next(iter(scores))].item() > 0


def test_axes_of_a_bare_parameter_stay_told_apart(tmp_path):
    """Left with one channel, its other axis would take the name: two stay, whatever asks for fewer."""
    torch.manual_seed(0)
    model, x = Table().eval(), torch.randn(5, 6)
    groups = find_groups(model, x)
    plan = make_plan(score_groups(model, groups, "l1"), ratio=0.9, scope="local")
    assert len(plan.kept_of(("first", "out"))) == 2
    save_pruned(tmp_path / "saved", prune(model, plan), plan)
    with pytest.raises(PlanMismatchError, match=r"group first.out: 1 channels are kept; at least 2 have to stay"):
        plan.choose(("first", "out"), keep=[0], remove=[1, 2, 3])
