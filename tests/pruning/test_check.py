import copy
import math
import operator
from dataclasses import replace

import pytest
import timm
import torch
import torchvision
from networks import NETWORKS, network, random_plan
from torch import nn
from torch.nn import functional as F

from obc_tools import Cost, PruningPlan, check_plan, cost, cost_model, find_groups, make_plan, prune, prune_to
from obc_tools.pruning.check import CANNOT_TELL, WRONG, Check, CheckError, Finding, ProofError, prove, relative_error
from obc_tools.pruning.equivalent import EquivalentModel
from obc_tools.pruning.masking import Masking
from obc_tools.pruning.plan import PlanMismatchError
from obc_tools.structure.layers import LayerAxis

NAMES = ("pruned = masked", "EP = naive", "merge = EP, maps disturbed", "disturbed maps change the output")


@pytest.mark.parametrize("name", [*NETWORKS, "mlp_layernorm"])
def test_right_plans_pass(name):
    model, images, plan = random_plan(name)
    check = check_plan(model, plan, images)
    assert check.ok and check.effect > 0.01
    assert [finding.name for finding in check.findings] == [*NAMES, "costs predicted = counted"]
    assert all(check.error_of(name) < 1e-12 for name in NAMES[:3])
    assert check.error_of(NAMES[3]) > 1e-3
    check.raise_if_failed()


def test_the_model_is_left_alone():
    model, images, plan = random_plan("residual")
    model.float().train().bn1.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert check_plan(model, plan, images.float()).ok
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.training and not model.bn1.training and model.conv1.weight.dtype == torch.float32
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_single_precision_is_an_option():
    model, images, plan = random_plan("grouped")
    seen = set()
    model.float().register_forward_pre_hook(lambda module, args: seen.add(args[0].dtype))
    assert check_plan(model, plan, images.float(), dtype=None, tolerance=1e-4).ok
    assert seen == {torch.float32}


class ChannelsLast(nn.Module):
    """Calls a norm with the channels of an image last."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        return self.norm(x.movedim(1, -1)).movedim(-1, 1)


NORMS = {
    "LayerNorm2d of torchvision": lambda: torchvision.models.convnext.LayerNorm2d(8),
    "LayerNorm2d of timm": lambda: timm.layers.LayerNorm2d(8),
    "GroupNorm": lambda: nn.GroupNorm(2, 8),
    "GroupNorm1": lambda: timm.layers.GroupNorm1(8),
    "GroupNormAct": lambda: timm.layers.GroupNormAct(8, num_groups=2),
    "LayerNorm2d without weights": lambda: timm.layers.LayerNorm2d(8, affine=False),
    "LayerNorm without weights": lambda: ChannelsLast(nn.LayerNorm(8, elementwise_affine=False)),
    "RMSNorm without weights": lambda: ChannelsLast(nn.RMSNorm(8, elementwise_affine=False)),
}


@pytest.mark.parametrize("name", NORMS)
def test_norms_over_channels_see_the_kept_ones_only(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), NORMS[name](), nn.Conv2d(8, 4, 1)).double()
    for parameter in model[1].parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    images = torch.randn(2, 3, 4, 4).double()
    groups = find_groups(model, images)
    plan = PruningPlan(groups, tuple((0, 2, 3, 4, 6, 7) if g.prunable else tuple(range(g.width)) for g in groups))
    check = check_plan(model, plan, images)
    assert plan.channels_removed == 2 and check.ok, check


class Shift(nn.Module):
    """Adds what it holds in a buffer and has no parameters."""

    def __init__(self):
        super().__init__()
        self.register_buffer("shift", torch.randn(8, 1, 1))

    def forward(self, x):
        return x + self.shift


def test_channels_in_the_buffer_of_a_module_without_parameters_pass():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), Shift(), nn.ReLU(), nn.Conv2d(8, 4, 1)).double()
    images = torch.randn(2, 3, 4, 4).double()
    groups = find_groups(model, images)
    plan = PruningPlan(groups, tuple((0, 2, 3) if g.prunable else tuple(range(g.width)) for g in groups))
    check = check_plan(model, plan, images)
    assert "1.shift" in {member.axis.layer for group in groups for member in group.members} and check.ok, check


@pytest.mark.parametrize("kind", [timm.layers.StdConv2d, timm.layers.ScaledStdConv2d])
@pytest.mark.parametrize("groups", [1, 2])
def test_weights_are_standardised_over_the_kept_inputs_only(kind, groups):
    torch.manual_seed(0)
    layers = kind(3, 8, 1, bias=True), nn.ReLU(), kind(8, 12, 3, groups=groups, bias=True), nn.ReLU(), kind(12, 4, 1)
    model, images = nn.Sequential(*layers).double(), torch.randn(2, 3, 6, 6).double()
    groups = find_groups(model, images)
    plan = PruningPlan(groups, ((0, 2, 4, 6), (0, 1, 3, 6, 7, 9), tuple(range(4))))
    check = check_plan(model, plan, images)
    assert check.ok and check.error_of("pruned = masked") < 1e-12, check


def mutated(plan, axis, positions):
    """Return the plan with other positions in one member of one of its groups."""
    groups = tuple(
        replace(
            group,
            members=tuple(
                replace(m, positions=tuple(positions(m.positions))) if m.axis == axis else m for m in group.members
            ),
        )
        for group in plan.groups
    )
    assert groups != plan.groups
    return PruningPlan(groups, plan.kept)


COUPLINGS = {
    "a consumer's inputs reversed": ("residual", ("conv3", "in"), lambda p: p[::-1]),
    "a consumer's inputs rotated": ("concat", ("last", "in"), lambda p: (*p[1:], p[0])),
    "a norm rotated": ("residual", ("bn2", "out"), lambda p: (*p[1:], p[0])),
    "one branch of a sum rotated": ("residual", ("project.0", "out"), lambda p: (*p[1:], p[0])),
    "a depthwise convolution reversed": ("inverted", ("depthwise.0", "out"), lambda p: p[::-1]),
    "a flattened axis rotated": ("small_vgg", ("11", "in"), lambda p: (*p[16:], *p[:16])),
    "a transposed convolution reversed": ("upsampling", ("up", "in"), lambda p: p[::-1]),
    "one position of a layer norm swapped": ("mlp_layernorm", ("2", "out"), lambda p: (*p[-1:], *p[1:-1], p[0])),
}


@pytest.mark.parametrize("wrong", COUPLINGS)
def test_a_wrong_coupling_shows(wrong):
    name, axis, positions = COUPLINGS[wrong]
    model, images, plan = random_plan(name)
    check = check_plan(model, mutated(plan, axis, positions), images)
    assert not check.ok and check.error_of("pruned = masked") > 1e-3
    with pytest.raises(CheckError, match=r"pruned = masked: .*, must be at most 1e-06"):
        check.raise_if_failed()


def test_a_missing_consumer_shows():
    model, images, plan = random_plan("residual")
    groups = tuple(replace(g, members=tuple(m for m in g.members if m.axis != ("conv2", "in"))) for g in plan.groups)
    check = check_plan(model, PruningPlan(groups, plan.kept), images)
    assert not check.ok and check.error_of("pruned = masked") == math.inf and math.isnan(check.effect)
    with pytest.raises(CheckError, match="pruned = masked: RuntimeError: .*channels"):
        check.raise_if_failed()


def test_a_merge_that_differs_shows(monkeypatch):
    merge = EquivalentModel.merge

    def wrong(self):
        merged = merge(self)
        with torch.no_grad():
            merged.conv3.weight[0] *= 1.01
        return merged

    monkeypatch.setattr(EquivalentModel, "merge", wrong)
    model, images, plan = random_plan("residual")
    check = check_plan(model, plan, images)
    assert [finding.name for finding in check.findings if not finding.ok] == ["merge = EP, maps disturbed"]


def test_equivalent_pruning_that_starts_elsewhere_shows(monkeypatch):
    forward = EquivalentModel.forward
    monkeypatch.setattr(EquivalentModel, "forward", lambda self, x: forward(self, x) * 1.001)
    model, images, plan = random_plan("residual")
    check = check_plan(model, plan, images)
    assert [finding.name for finding in check.findings if not finding.ok] == ["EP = naive"]


def test_wrong_costs_show():
    model, images, plan = random_plan("residual")
    other, _, _ = random_plan("residual")
    other.fc = nn.Linear(12, 7).double()
    check = check_plan(model, plan, images, costs=cost_model(other, images))
    assert [finding.name for finding in check.findings if not finding.ok] == ["costs predicted = counted"]
    assert check.error_of("costs predicted = counted") > 1e-4


def test_nothing_can_be_told_is_said():
    model, images, plan = random_plan("residual")
    with pytest.raises(CheckError, match="the same for all examples"):
        check_plan(model, plan, images[:1].expand(4, -1, -1, -1))
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.fc.bias[0] = float("nan")
    with pytest.raises(CheckError, match="output is not finite"):
        check_plan(broken, plan, images)
    broken.forward = lambda x: None
    with pytest.raises(CheckError, match="returns no floating-point tensor"):
        check_plan(broken, plan, images)
    with pytest.raises(PlanMismatchError, match="not in this model"):
        check_plan(nn.Sequential(nn.Conv2d(3, 4, 1)), plan, images)


def test_a_plan_that_removes_nothing_has_no_effect():
    model, images = network("residual")
    check = check_plan(model, PruningPlan.whole(find_groups(model, images)), images)
    assert check.ok and check.effect == 0 and "merge = EP, maps disturbed" not in repr(check)


def test_what_a_person_sees():
    model, images, plan = random_plan("residual")
    check = check_plan(model, plan, images)
    assert repr(check).startswith("Check: all checks passed; pruning changes the output by")
    assert "pruned = masked" in repr(check) and "<table" in check._repr_html_()
    assert list(check.to_frame()["ok"]) == [True] * 5
    failed = Check((Finding("a", 1.0, 0.5), Finding("b", 1.0, 0.5, differs=True)), 1.0)
    assert repr(failed).startswith("Check: 1 of 2 checks failed")


def test_errors_are_relative_to_what_differs_between_examples():
    outputs = torch.tensor([[1001.0, 0.0], [999.0, 0.0]])
    assert relative_error([outputs], [outputs + 0.5]) == 0.5
    assert relative_error([outputs], [outputs[:1]]) == math.inf
    assert relative_error([outputs], [outputs * float("nan")]) == math.inf
    assert relative_error([torch.tensor([[4.0]])], [torch.tensor([[5.0]])]) == 0.25


class RoundingRows(nn.Module):
    """Equal rows come out different in their last digits, as from kernels that work off a batch's end otherwise."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 12), nn.Linear(12, 3)

    def forward(self, x):
        rows = torch.arange(len(x), dtype=x.dtype, device=x.device)[:, None]
        return self.b(self.a(x).relu()) * (1 + rows * 2 * torch.finfo(x.dtype).eps)


@pytest.mark.parametrize("seed", range(3))
def test_equal_examples_are_so_but_for_rounding(seed, caplog):
    torch.manual_seed(seed)
    model, same = RoundingRows(), torch.ones(4, 5)
    plan = prune_to(model, same, criterion="l1", ratio=0.3, progress=False)
    assert "cannot tell whether the plan is right" in caplog.text
    with pytest.raises(CheckError, match="the same for all examples"):
        check_plan(model, plan, same)
    assert check_plan(model, plan, torch.randn(4, 5)).ok
    differing = torch.tensor([[1.0], [1.0 + 1e-6]], dtype=torch.float64)
    assert relative_error([differing], [differing + 1e-6]) > 1


def test_masking_leaves_the_model_alone_and_norms_over_what_is_alive():
    model, images, plan = random_plan("mlp_layernorm")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    masking = Masking(model, plan)
    with torch.no_grad(), masking:
        hidden = model[:3](images)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    kept = list(plan.selection(("1", "out")))
    assert hidden.shape == (4, 20) and len(kept) < 20
    normed = (hidden[:, kept] - model[2].bias[kept]) / model[2].weight[kept]
    assert normed.mean(1).abs().max() < 1e-12
    assert torch.equal(masking.living(hidden), hidden[:, kept].flatten())
    assert not masking.doubts


@pytest.mark.parametrize("counting", ["operations", "torch_pruning"])
@pytest.mark.parametrize("name", [*NETWORKS, "mlp_layernorm"])
def test_right_plans_are_proven(name, counting):
    model, images, plan = random_plan(name)
    prove(
        model.float(),
        plan,
        images.float(),
        cost(prune(model, plan), images.float(), counting=counting),
        counting=counting,
    )
    assert model.state_dict()[next(iter(model.state_dict()))].dtype == torch.float32


FIRST = {
    "a consumer's inputs reversed": "conv3",
    "a consumer's inputs rotated": "last",
    "a norm rotated": "bn2",
    "one branch of a sum rotated": "project.1",
    "a depthwise convolution reversed": "depthwise.0",
    "a flattened axis rotated": "11",
    "a transposed convolution reversed": "up",
    "one position of a layer norm swapped": "2",
}


@pytest.mark.parametrize("wrong", COUPLINGS)
def test_a_wrong_coupling_is_refused_with_the_layer(wrong):
    name, axis, positions = COUPLINGS[wrong]
    model, images, plan = random_plan(name)
    broken = mutated(plan, axis, positions)
    with pytest.raises(ProofError, match=rf"pruned = masked: .*; first differs layer '{FIRST[wrong]}'") as raised:
        prove(model, broken, images, cost_model(model, images).of(plan))
    assert raised.value.plan is broken


def test_a_pruned_network_that_does_not_run_is_refused_with_the_layer():
    model, images, plan = random_plan("residual")
    groups = tuple(replace(g, members=tuple(m for m in g.members if m.axis != ("conv2", "in"))) for g in plan.groups)
    with pytest.raises(ProofError, match=r"the pruned network does not run: RuntimeError.*; it ends at layer 'conv2'"):
        prove(model, PruningPlan(groups, plan.kept), images, cost_model(model, images).original)


def test_wrong_costs_are_refused():
    model, images, plan = random_plan("residual")
    found = cost_model(model, images).of(plan)
    prove(model, plan, images, found)
    for wrong in (Cost(found.macs + 1, found.params), Cost(found.macs, found.params - 1)):
        with pytest.raises(ProofError, match="the pruned network costs .*, and .* was predicted"):
            prove(model, plan, images, wrong)


class Choosy(nn.Module):
    """Does more while it is as wide as it was built."""

    def __init__(self, refuses: bool = False):
        super().__init__()
        self.first, self.more, self.last, self.refuses = nn.Linear(6, 8), nn.Linear(6, 4), nn.Linear(8, 4), refuses

    def forward(self, x):
        made = self.first(x)
        wide = operator.index(made.shape[1]) == 8
        if self.refuses and not wide:
            raise RuntimeError("too narrow")
        return self.last(made) + (self.more(x) if wide else 0)


def test_a_network_that_runs_differently_once_pruned_is_refused_by_prune_to():
    inputs = torch.randn(2, 6)
    options = {"criterion": "l1", "ratio": 0.5, "steps": 1, "progress": False}
    with pytest.raises(ProofError, match=r"costs .* was predicted; first differs layer 'more': .0.0, 28.0.") as raised:
        prune_to(Choosy(), inputs, **options)
    assert (
        prune_to(Choosy(), inputs, verify=False, **options).channels_removed == raised.value.plan.channels_removed == 4
    )
    with pytest.raises(ProofError, match=r"does not run: RuntimeError: too narrow; it ends at layer"):
        prune_to(Choosy(refuses=True), inputs, **options)


class Selecting(nn.Module):
    """Works on the rows that come out positive: how many depends on the data."""

    def __init__(self):
        super().__init__()
        self.first, self.last, self.rows = nn.Linear(6, 8), nn.Linear(8, 4), nn.Linear(4, 3)

    def forward(self, x):
        x = self.last(self.first(x).relu())
        return self.rows(x[x.sum(1) > 0])


def test_work_that_depends_on_data_is_not_compared():
    torch.manual_seed(0)
    model, inputs = Selecting(), torch.randn(64, 6)
    groups = find_groups(model, inputs)
    plan = make_plan({group: torch.arange(group.width).double() for group in groups}, ratio=0.5)
    predicted = cost_model(model, inputs).of(plan)
    assert predicted.macs != cost(prune(model, plan), inputs).macs
    prove(model, plan, inputs, predicted)


def test_a_network_that_insists_on_single_precision_is_proven_in_it():
    class Single(nn.Linear):
        def forward(self, x):
            assert x.dtype == torch.float32
            return super().forward(x)

    torch.manual_seed(0)
    model, inputs = nn.Sequential(Single(6, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(3, 6)
    plan = make_plan({group: torch.rand(group.width) for group in find_groups(model, inputs)}, ratio=0.5)
    prove(model, plan, inputs, cost_model(model, inputs).of(plan))


def dead_network():
    """Return a network with a single living unit, its input, and a plan that removes just this one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
    with torch.no_grad():
        model[0].bias[1:], model[0].bias[0] = -90, 10
    x = torch.randn(4, 5)
    return model, x, PruningPlan.whole(find_groups(model, x)).choose(("0", "out"), remove=[0])


def zero_branches():
    """Return a residual network whose branches are multiplied by zero, its input, and a plan of their hidden units."""

    class Branch(nn.Module):
        def __init__(self, scale):
            super().__init__()
            self.up, self.down, self.scale = nn.Linear(6, 12), nn.Linear(12, 6), nn.Parameter(torch.full((6,), scale))

        def forward(self, x):
            return x + self.scale * self.down(F.gelu(self.up(x)))

    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(5, 6), Branch(0.0), Branch(1e-6), nn.Linear(6, 3)), torch.randn(4, 5)
    groups = find_groups(model, x, only="mlp")
    plan = make_plan({group: torch.rand(group.width) for group in groups}, ratio=0.3, scope="local")
    return model, x, plan


HIDING = {"a dead network": dead_network, "branches that start at zero": zero_branches}


@pytest.mark.parametrize("name", HIDING)
def test_what_weights_hide_is_shown_by_others(name, monkeypatch, caplog):
    model, x, plan = HIDING[name]()
    before = copy.deepcopy(model.state_dict())
    check = check_plan(model, plan, x)
    assert check.ok and check.probe and check.effect > 1e-3 and "with random weights" in repr(check)
    prove(model, plan, x, cost_model(model, x).of(plan))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items()) and not caplog.text

    def wrong(model, plan):
        pruned = prune(model, plan)
        widest = max(pruned.parameters(), key=torch.Tensor.numel)
        widest.data = widest.data.roll(1, 1)
        return pruned

    monkeypatch.setattr("obc_tools.pruning.check.shrink", wrong)
    assert check_plan(model, plan, x).verdict == WRONG
    with pytest.raises(ProofError, match="pruned = masked: .*; first differs layer"):
        prove(model, plan, x, cost_model(model, x).of(plan))


class Constant(nn.Module):
    """Gives zeros, whatever it is made of."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.last(self.first(x)).clamp(-1e-300, 1e-300).float().double()


def test_a_third_verdict_says_why_and_what_to_pass(caplog):
    model, x = Constant().double(), torch.randn(4, 5, dtype=torch.float64)
    plan = PruningPlan.whole(find_groups(model, x)).choose(("first", "out"), remove=[0])
    check = check_plan(model, plan, x)
    assert check.verdict == CANNOT_TELL and not check.ok
    assert repr(check).startswith("Check: 4 of 5 checks cannot tell; pruning changes")
    for shown in (repr(check), check._repr_html_(), check.to_frame().to_string()):
        assert "cannot tell" in shown and "Forward(run, inputs)" in shown
    assert list(check.to_frame()["verdict"]) == [CANNOT_TELL] * 4 + ["right"]
    assert "failed" not in repr(check)
    check.raise_if_failed()
    assert "pruned = masked: cannot tell: the output does not show what goes" in caplog.text
    caplog.clear()
    prove(model, plan, x, cost_model(model, x).of(plan))
    assert "cannot tell whether the plan is right: the output does not show what goes" in caplog.text


class Sorted(nn.Module):
    """Orders its channels, which no mask can follow."""

    def forward(self, x):
        return x.sort(-1).values


def test_an_operation_that_cannot_be_followed_is_named_not_blamed(caplog):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), Sorted(), nn.Linear(6, 3)).double()
    x = torch.randn(4, 5, dtype=torch.float64)
    groups = [replace(g, kept_whole=None) if g.root.layer == "0" else g for g in find_groups(model, x)]
    plan = PruningPlan.whole(groups).choose(("0", "out"), remove=[0, 1])
    found = check_plan(model, plan, x).findings[0]
    assert found.verdict == CANNOT_TELL and "what sort does with channels that go is not known" in found.unclear
    prove(model, plan, x, cost(prune(model, plan), x))
    assert "cannot tell whether the plan is right: what sort does" in caplog.text


@pytest.mark.parametrize("options", [{}, {"enable_nested_tensor": False}])
def test_padding_masks_are_proven_without_nested_tensors(options):
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.embed, self.encode = nn.Embedding(11, 8), nn.TransformerEncoder(layer, 2, **options)
            self.last = nn.Linear(8, 3)

        def forward(self, tokens):
            return self.last(self.encode(self.embed(tokens), src_key_padding_mask=tokens == 0)[:, 0])

    torch.manual_seed(0)
    model, tokens = Encoder().eval(), torch.randint(1, 11, (4, 6))
    tokens[1, 4:], tokens[2, 3:] = 0, 0
    scores = {group: torch.rand(group.width) for group in find_groups(model, tokens)}
    plan = make_plan(scores, ratio=0.3, scope="local")
    check = check_plan(model, plan, tokens)
    assert plan.channels_removed and check.ok and check.error_of("pruned = masked") < 1e-12


def test_single_precision_takes_no_double(monkeypatch):
    model, images, plan = random_plan("residual")
    model, images = model.float(), images.float()
    seen = set()
    model.register_forward_pre_hook(lambda module, args: seen.add(args[0].dtype))
    prove(model, plan, images, cost_model(model, images).of(plan), single=True)
    assert seen == {torch.float32}
    prove(model, plan, images, cost_model(model, images).of(plan))
    assert seen == {torch.float32, torch.float64}
    seen.clear()
    monkeypatch.setattr("obc_tools.pruning.check.DOUBLE_BYTES", 8)
    prove(model, plan, images, cost_model(model, images).of(plan))
    assert seen == {torch.float32}
    axis = LayerAxis("conv3", "in")
    with pytest.raises(ProofError, match="pruned = masked: .*, must be at most 0.001; first differs layer 'conv3'"):
        prove(model, mutated(plan, axis, lambda p: p[::-1]), images, cost_model(model, images).of(plan))


class OfSixteen(nn.Module):
    """Runs on sixteen examples only, where it is told to."""

    def __init__(self, fixed: bool):
        super().__init__()
        self.first, self.last, self.fixed = nn.Linear(6, 8), nn.Linear(8, 4), fixed

    def forward(self, x):
        return self.last(self.first(x.view(16, 6) if self.fixed else x).relu())


@pytest.mark.parametrize("fixed", [False, True])
def test_of_a_batch_as_example_the_first_few_are_compared_where_they_run_alone(fixed):
    model, inputs, seen = OfSixteen(fixed), torch.randn(16, 6), set()
    plan = prune_to(model, inputs, criterion="l1", ratio=0.5, steps=1, progress=False, verify=False)
    model.register_forward_hook(lambda module, args, output: seen.add((len(output), output.dtype)))
    prove(model, plan, inputs, cost_model(model, inputs).of(plan))
    assert (8, torch.float64) not in seen if fixed else (16, torch.float64) not in seen
    assert (16 if fixed else 8, torch.float64) in seen
