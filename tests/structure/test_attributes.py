"""Attributes that hold widths and that no forward pass reads: they follow pruning, and change nothing."""

import pytest
import timm
import torch
from torch import Tensor, nn

from obc_tools import PruningPlan, check_plan, find_groups, make_plan, prune, score_groups


class Branches(nn.Module):
    """Two branches of convolutions that another method sums to one, by the sizes that the module keeps."""

    def __init__(self, in_chs: int, out_chs: int, groups: int = 1):
        super().__init__()
        self.in_chs, self.out_chs, self.groups = in_chs, out_chs, groups
        self.a = nn.Conv2d(in_chs, out_chs, 3, padding=1, groups=groups)
        self.b = nn.Conv2d(in_chs, out_chs, 1, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x)

    def fused(self) -> nn.Conv2d:
        weight = self.a.weight + nn.functional.pad(self.b.weight, [1, 1, 1, 1])
        conv = nn.Conv2d(self.in_chs, self.out_chs, 3, padding=1, groups=self.groups, dtype=weight.dtype)
        conv.load_state_dict({"weight": weight, "bias": self.a.bias + self.b.bias})
        return conv


class Network(nn.Module):
    """Blocks in sequence with a head that can be built anew."""

    def __init__(self, *blocks: nn.Module, width: int = 12, classes: int = 3):
        super().__init__()
        self.stages, self.num_features, self.head_hidden_size = nn.Sequential(*blocks), width, width
        self.fc = nn.Linear(width, classes)
        self.feature_info = [{"module": f"stages.{i}", "num_chs": block.out_chs} for i, block in enumerate(blocks)]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.stages(x).relu().mean((2, 3)))

    def reset(self, classes: int) -> None:
        self.fc = nn.Linear(self.num_features, classes, dtype=self.fc.weight.dtype)


IMAGES = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def pruned_half(model: nn.Module, x: Tensor = IMAGES) -> tuple[nn.Module, PruningPlan]:
    groups = find_groups(model, x)
    plan = make_plan(score_groups(model, groups, "l1"), ratio=0.4, scope="local")
    return prune(model, plan), plan


def depthwise() -> Network:
    torch.manual_seed(0)
    return Network(Branches(3, 10), Branches(10, 10, groups=10), Branches(10, 12)).double().eval()


def doubling() -> Network:
    torch.manual_seed(1)
    return Network(Branches(3, 8), Branches(8, 16, groups=8), Branches(16, 16, groups=4), width=16).double().eval()


@pytest.mark.parametrize("build", [depthwise, doubling])
def test_what_other_methods_build_fits_the_pruned_network(build):
    model = build()
    pruned, plan = pruned_half(model)
    expected = pruned(IMAGES)
    assert pruned.num_features == pruned.head_hidden_size == pruned.fc.in_features < model.num_features
    for stage, info in zip(pruned.stages, pruned.feature_info, strict=True):
        assert info["num_chs"] == stage.out_chs == stage.a.out_channels
        assert (stage.in_chs, stage.groups) == (stage.a.in_channels, stage.a.groups)
    pruned.stages = nn.Sequential(*(stage.fused() for stage in pruned.stages))
    torch.testing.assert_close(pruned(IMAGES), expected, rtol=0, atol=1e-10)
    pruned.reset(7)
    assert pruned(IMAGES).shape == (2, 7)
    assert [info["num_chs"] for info in model.feature_info] == [stage.a.out_channels for stage in model.stages]


@pytest.mark.parametrize("build", [depthwise, doubling])
def test_plans_keep_attributes_in_json_and_in_sequence(build):
    model = build()
    pruned, plan = pruned_half(model)
    assert PruningPlan.from_json(plan.to_json()) == plan
    assert plan.pruned_groups() == find_groups(pruned, IMAGES)
    again, second = pruned_half(pruned)
    both = prune(model, plan.then(second))
    assert both.feature_info == again.feature_info and both.num_features == again.num_features
    assert [vars(one)["in_chs"] for one in both.stages] == [vars(one)["in_chs"] for one in again.stages]


def test_a_number_of_groups_that_is_no_width_stays():
    pruned, _ = pruned_half(doubling())
    assert pruned.stages[2].groups == pruned.stages[2].a.groups == 4


class Asking(Branches):
    """A block that does something else where its sizes are equal."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x) if self.same() else super().forward(x)

    def same(self) -> bool:
        return self.in_chs == self.out_chs


class Training(Branches):
    """A block that reads its sizes only while it is trained."""

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        return out * self.in_chs / self.out_chs if self.training else out


class Assigning(Branches):
    """A block that notes the width of its input."""

    def forward(self, x: Tensor) -> Tensor:
        self.in_chs = x.shape[1]
        return super().forward(x)


class Outside(nn.Module):
    """A block whose sizes the module around it reads, by another way than the forward function's name."""

    def __init__(self, *sizes: int):
        super().__init__()
        self.block, self.kind = Branches(*sizes), "in_chs"
        self.ask = lambda block: getattr(block, "in_" + "chs") == getattr(block, "out_" + "chs")
        self.in_chs = self.out_chs = sizes[1]

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x) * (2 if self.ask(self.block) else 1)


class Looking(Branches):
    """A block that reads its sizes from its dictionary."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (2 if vars(self)["in_chs"] == self.__dict__["out_chs"] else 1)


class Delegating(Branches):
    """A block that answers for attributes itself."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (2 if self.asked == self.out_chs else 1)

    def __getattr__(self, name: str):
        return self.in_chs if name == "asked" else super().__getattr__(name)


SIZES = ("in_chs", "out_chs")
READ = {
    Asking: SIZES, Training: SIZES, Assigning: SIZES[:1], Looking: SIZES, Delegating: SIZES,
    Outside: ("block.in_chs", "block.out_chs"),
}  # fmt: skip


@pytest.mark.parametrize("kind", READ)
def test_what_a_forward_pass_reads_stays(kind):
    torch.manual_seed(0)
    model = Network(Branches(3, 12), kind(12, 12), Branches(12, 8), width=8).double().eval()
    groups = find_groups(model, IMAGES)
    followed = {".".join((m.axis.layer, m.axis.axis[1:])) for group in groups for m in group.attributes}
    assert followed.isdisjoint(f"stages.1.{name}" for name in READ[kind])
    assert {"stages.0.out_chs", "stages.2.in_chs"} <= followed
    assert check_plan(model, make_plan(score_groups(model, groups, "l1"), ratio=0.4), IMAGES).ok


def test_a_width_read_by_another_method_is_no_number_in_a_comparison():
    class Shaping(Branches):
        def __init__(self, *sizes: int):
            super().__init__(*sizes)
            self.cut = lambda x, block: x.reshape(x.shape[0], block.out_chs, -1)

        def forward(self, x: Tensor) -> Tensor:
            return self.cut(super().forward(x), self).reshape(x.shape[0], -1, *x.shape[2:])

    torch.manual_seed(0)
    model = Network(Shaping(3, 12), Branches(12, 8), width=8).double().eval()
    pruned, _ = pruned_half(model)
    assert pruned.stages[0].out_chs == pruned.stages[0].a.out_channels < 12
    assert pruned(IMAGES).shape == (2, 3)


def test_features_as_many_as_classes_follow_what_the_classifier_reads():
    torch.manual_seed(0)
    pruned, _ = pruned_half(Network(Branches(3, 12), classes=12).double().eval())
    assert pruned.num_features == pruned.fc.in_features < 12


class OfMatrices(nn.Module):
    def forward(self, weight):
        return torch.matrix_exp(weight)


def test_a_convolution_that_is_not_understood_leaves_its_groups():
    torch.manual_seed(0)
    model = Network(Branches(3, 10), Branches(10, 10, groups=10), width=10).double().eval()
    for layer in (model.stages[1].a, model.stages[1].b):
        nn.utils.parametrize.register_parametrization(layer, "weight", OfMatrices())
    pruned, _ = pruned_half(model)
    assert pruned.stages[1].groups == 10


def test_tracing_leaves_the_attributes_where_they_are():
    model = depthwise()
    before = {name: (dict(vars(module)), type(module._buffers)) for name, module in model.named_modules()}
    find_groups(model, IMAGES)
    after = {name: (dict(vars(module)), type(module._buffers)) for name, module in model.named_modules()}
    assert before.keys() == after.keys()
    assert all(before[name][0].keys() == after[name][0].keys() and after[name][1] is dict for name in before)


def timm_pruned(name: str, **options) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model, x = timm.create_model(name, num_classes=5, **options).eval(), torch.randn(1, 3, 64, 64)
    return pruned_half(model, x)[0].eval(), x


@pytest.mark.parametrize("name", ["repvgg_a0", "mobileone_s0", "fastvit_t8"])
def test_a_pruned_network_of_branches_is_fused(name):
    pruned, x = timm_pruned(name)
    with torch.no_grad():
        expected = pruned(x)
        fused = timm.utils.reparameterize_model(pruned)(x)
    assert (fused - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    ("name", "options"),
    [("resnet18", {}), ("mobilenetv3_small_050", {}), ("convnext_atto", {}),
     ("vit_tiny_patch16_224", {"img_size": 64, "depth": 3})],
)  # fmt: skip
def test_a_pruned_network_takes_a_new_classifier(name, options):
    pruned, x = timm_pruned(name, **options)
    with torch.no_grad():
        features = pruned.forward_features(x)
        pruned.reset_classifier(10)
        assert pruned(x).shape == (1, 10)
    assert pruned.num_features in features.shape
    for info in pruned.feature_info:
        found = {}
        handle = pruned.get_submodule(info["module"]).register_forward_hook(
            lambda module, args, out, found=found: found.update(shape=tuple(out.shape))
        )
        with torch.no_grad():
            pruned(x)
        handle.remove()
        assert info["num_chs"] in found["shape"][1:]


class Anchored(nn.Module):
    """Makes positions anew where the shape of its features is not that of the last pass, as detectors do."""

    shape = None

    def __init__(self, cached=tuple):
        super().__init__()
        self.body, self.head, self.cached = nn.Conv2d(3, 10, 3), nn.Conv2d(10, 4, 1), cached

    def forward(self, x):
        x = self.body(x).relu()
        if self.shape != self.cached(x.shape):
            self.shape = self.cached(x.shape)
            self.positions = torch.arange(x.shape[-1], dtype=x.dtype)
        return self.head(x + self.positions)


@pytest.mark.parametrize("cached", [tuple, list, torch.Size])
def test_a_shape_that_a_model_remembers_changes_nothing(cached):
    torch.manual_seed(0)
    model = Anchored(cached).double().eval()
    before, expected = find_groups(model, IMAGES), pruned_half(model)[0](IMAGES)
    model(IMAGES)
    after = find_groups(model, IMAGES)
    assert [(g.members, g.kept_whole) for g in after] == [(g.members, g.kept_whole) for g in before]
    assert before[0].prunable
    pruned, plan = pruned_half(model)
    assert torch.equal(pruned(IMAGES), expected) and pruned(IMAGES[..., 1:]).shape[1] == 4
    assert check_plan(model, plan, IMAGES).ok
