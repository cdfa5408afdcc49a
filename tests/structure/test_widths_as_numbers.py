"""Widths that a network computes with, tables kept by shapes, inputs written into, and axes that keep two channels."""

import functools
import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import own_layers
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from obc_tools import check_plan, cost, find_groups, make_plan, prune_to, score_groups


class Between(nn.Module):
    """Two layers with a function between them."""

    def __init__(self, function, width: int = 12):
        super().__init__()
        self.a, self.b, self.o, self.function = nn.Linear(5, width), nn.Linear(width, 8), nn.Linear(8, 3), function

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.b(self.function(self.a(x))).relu())


class Halving(nn.Module):
    """A method that spells out a float."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.width = nn.Linear(5, 12), nn.Linear(12, 3), 12

    def halved(self, x: Tensor) -> Tensor:
        return 0.5 * x

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.halved(self.a(x)).view(-1, self.width))


class OwnAttention(nn.Module):
    """Attention whose scale is computed in the forward pass from a width that shapes nothing."""

    def __init__(self, attend):
        super().__init__()
        self.heads, self.head_dim, self.attend = 2, 6, attend
        self.q, self.k, self.v, self.o = nn.Linear(5, 12), nn.Linear(5, 12), nn.Linear(5, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).view(*x.shape[:2], self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.o(self.attend(q, k, v, self.head_dim).transpose(1, 2).flatten(2))


@pytest.mark.parametrize(
    "attend",
    [
        lambda q, k, v, d: (q @ k.mT / math.sqrt(d)).softmax(-1) @ v,
        lambda q, k, v, d: ((q * d**-0.5) @ k.mT).softmax(-1) @ v,
        lambda q, k, v, d: F.scaled_dot_product_attention(q, k, v, scale=1 / math.sqrt(d)),
        lambda q, k, v, d: ((q @ k.mT) * k.shape[-1] ** -0.5).softmax(-1) @ v,
        lambda q, k, v, d: torch.einsum("bhnm,bhmd->bhnd", torch.einsum("bhnd,bhmd->bhnm", q, k).softmax(-1), v),
    ],
)
def test_the_scale_of_an_attention(attend):
    torch.manual_seed(0)
    model, x = OwnAttention(attend).double(), torch.randn(2, 4, 5).double()
    plan = make_plan(score_groups(model, find_groups(model, x), "random"), ratio=0.8, scope="local")
    assert plan.channels_removed >= 16 and check_plan(model, plan, x).ok


def reason(function) -> str | None:
    torch.manual_seed(0)
    return find_groups(Between(function).double(), torch.randn(4, 5).double())[0].kept_whole


NUMBERS = {
    "truediv": lambda x: x / x.shape[1],
    "float": lambda x: x / math.sqrt(x.size(-1)),
    "root": lambda x: x * np.sqrt(x.shape[1]),
    "comparison": lambda x: 2 * x if x.shape[-1] >= 7 else x,
    "pow": lambda x: x * x.shape[1] ** 2 / 9,
    "mul": lambda x: x * (x.shape[1] * 0.5),
    "int": lambda x: x / int(x.shape[1]),
    "range": lambda x: x + sum(0.1 * i for i in range(x.shape[1])),
    "log2": lambda x: x * math.log2(x.shape[1]),
    "gcd": lambda x: x * math.gcd(6, x.shape[1]),
    "sub": lambda x: x / -x.shape[1],
    "abs": lambda x: x * abs(-x.shape[1]),
    "len": lambda x: x * len(x[0]),
    "format": lambda x: x * float(f"{x.shape[1]}"),
    "full": lambda x: x * torch.full((1,), x.shape[1]),
    "stride": lambda x: x * x.stride(0),
    "comparison of other": lambda x: x * 2 if x.shape[1] != 6 else x,
    "str": lambda x: x * float(str(x.shape[1])),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_a_width_to_compute_with_stays(name):
    found = reason(NUMBERS[name])
    assert found is not None and "number in" in found and "layer ''" in found


class Spelled(Between):
    """What a float asks no width for: literals on the left, and numbers that modules keep."""

    def __init__(self, way: int):
        super().__init__(lambda x: x)
        self.num_features, self.gain, self.way = 12, 2.0, (way,)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).view(len(x), self.num_features)
        if self.way == (0,):
            return self.o(self.b(x * (1.0 / x.shape[1])))
        if self.way == (1,):
            return self.o(self.b(x * (self.gain / x.size(1))))
        if self.way == (2,) and self.num_features == 12:
            x = 2 * x
        if self.way == (3,) and self.num_features != 6:
            x = 2 * x
        return self.o(self.b(x))


class Methods(Between):
    """Numbers in methods that take no module, and in another of the user's modules."""

    def __init__(self, way: str):
        super().__init__(lambda x: x)
        self.way = way

    @staticmethod
    def alone(width: int) -> float:
        return 1.0 / width

    @classmethod
    def of_class(cls, width: int) -> float:
        return 1.0 / width

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        share = own_layers.share_of(x.shape[1]) if self.way == "module" else getattr(self, self.way)(x.shape[1])
        return self.o(self.b(x * share))


@pytest.mark.parametrize("way", ["alone", "of_class", "module"])
def test_a_width_in_other_functions_than_methods_stays(way):
    assert "number in truediv" in find_groups(Methods(way), torch.randn(4, 5))[0].kept_whole


@pytest.mark.parametrize("way", range(5))
def test_a_width_on_the_right_of_a_float_or_compared_stays(way):
    found = find_groups(Spelled(way), torch.randn(4, 5))[0]
    expected = {0: "number in truediv", 1: "number in truediv", 2: "number in comparison", 3: "number in comparison"}
    assert found.prunable if way == 4 else expected[way] in found.kept_whole


HALF = 0.5
TENTHS = [0.1 * number for number in range(20)]
KNOWN = {12: 1.5, 6: 2.0}


def halved(x: Tensor) -> Tensor:
    return x * (0.5 * x.shape[1])


def by_global(x: Tensor, width: int) -> Tensor:
    return x * (HALF / width)


def by_default(x: Tensor, *, gain: float = 0.25) -> Tensor:
    return x * (gain * x.shape[1])


def decorated(function):
    """Return a function around another one, which computes with a float that it closes over."""
    share = 0.25

    @functools.wraps(function)
    def call(x: Tensor) -> Tensor:
        return function(x) * (share * x.shape[1])

    return call


FREE = {
    "mul": lambda x: halved(x),
    "truediv": lambda x: by_global(x, x.shape[-1]),
    "mul by a default": lambda x: by_default(x),
    "mul of an inner function": lambda x: (lambda width: x * (0.3 * width))(x.shape[1]),
    "mul of a closure": lambda x: decorated(torch.relu)(x),
    "mul of a sum": lambda x: x * ((HALF + 0.1) * x.shape[1]),
    "sub": lambda x: x * (-HALF - x.shape[1]),
    "lookup in a list": lambda x: x * TENTHS[x.shape[1]],
    "lookup in a tuple": lambda x: x * (0.1, 0.2, 0.3, 0.4)[x.shape[1] // 4],
    "lookup in a dict": lambda x: x * KNOWN[x.shape[1]],
    "lookup in a dict or not": lambda x: x * KNOWN.get(x.shape[1], 1.0),
    "lookup among keys": lambda x: 2 * x if x.shape[1] in KNOWN else x,
    "lookup in a set": lambda x: 2 * x if x.shape[1] in {12, 16} else x,
    "mul of pi": lambda x: x * (math.pi * x.shape[1]),
    "truediv of math": lambda x: x * (math.exp(0.5) / x.shape[1]),
    "mul of a partial function": lambda x: x * functools.partial(lambda share, width: share * width, 0.5)(x.shape[1]),
    "numerator": lambda x: x * float(Fraction(1, x.shape[1])),
}


@pytest.mark.parametrize("name", FREE)
def test_a_width_that_meets_numbers_of_functions_and_tables_stays(name):
    assert f"number in {name.split()[0]}" in reason(FREE[name])
    assert KNOWN == {12: 1.5, 6: 2.0} and type(HALF) is float and type(TENTHS) is list
    assert torch.equal(halved(torch.ones(2, 4)), torch.full((2, 4), 2.0)) and halved.__globals__ is globals()


def test_functions_that_are_made_anew_keep_what_they_share():
    """Closures that several functions write into, functions that call themselves, and what they write globally."""
    counts = []

    def counter():
        count = 0

        def add() -> int:
            nonlocal count
            count += 1
            return count

        def read() -> int:
            return count

        return add, read

    add, read = counter()

    def deep(x: Tensor, left: int) -> Tensor:
        add()
        return deep(x * 1.5, left - 1) if left else x

    def call(x: Tensor) -> Tensor:
        x = deep(x, 3)
        counts.append(read())
        return x

    assert reason(call) is None
    assert counts == [4] and read() == 0


@pytest.mark.parametrize("other", [12, 8])
def test_widths_that_are_found_equal_stay_equal(other):
    class Compared(Between):
        def __init__(self):
            super().__init__(lambda x: x)
            self.first, self.second, self.b, self.o = 12, other, nn.Linear(12, other), nn.Linear(other, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x).reshape(-1, self.first)
            y = self.b(x).reshape(-1, self.second)
            return self.o(y if self.first == self.second else 2 * y)

    groups = find_groups(Compared(), torch.randn(4, 5))
    assert [group.prunable for group in groups[:2]] == [False, False]


def test_a_width_that_a_table_does_not_know_is_refused():
    with pytest.raises(ValueError, match="cannot trace this Between"):
        find_groups(Between(lambda x: x * {12: 2.0, 6: 3.0}[x.shape[1]]), torch.randn(4, 5))


def test_a_list_as_long_as_a_width_stays():
    assert "number in mul" in reason(lambda x: x * sum([0.5] * x.shape[1]))


@pytest.mark.parametrize(
    "compute",
    [lambda c: torch.tensor(float(c)), lambda c: math.log(c), lambda c: c / 2, lambda c: 2.0 if c >= 12 else 1.0],
)
def test_a_width_that_a_layer_keeps_stays_where_it_is_computed_with(compute):
    model = Between(lambda x: x)
    model.a.register_forward_hook(lambda layer, args, out: out * compute(layer.out_features))
    found = find_groups(model, torch.randn(4, 5))
    assert found[0].kept_whole is not None and found[1].prunable


@pytest.mark.parametrize(
    "cut", [lambda x, c: x.view(len(x), c // 4, 4).amax(2), lambda x, c: torch.mul(*x.split(c // 2, -1))]
)
def test_a_share_of_a_width_that_a_layer_keeps_may_shrink(cut):
    model = nn.Sequential(nn.Linear(5, 24), nn.LazyLinear(3))
    model[0].register_forward_hook(lambda layer, args, out: cut(out, layer.out_features))
    x = torch.randn(4, 5)
    model(x)
    plan = prune_to(model, x, criterion="l1", ratio=0.4, progress=False)
    assert plan.groups[0].prunable and check_plan(model, plan, x).ok


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x if x.shape[1] > 0 else -x,
        lambda x: x.reshape(-1, x.shape[1]),
        lambda x: torch.cat([x, x], 1)[:, -x.shape[1] :],
        lambda x: x.view(len(x), math.ceil(x.shape[1])) * len(range(len(x))),
    ],
)
def test_a_width_that_only_shapes_may_shrink(function):
    assert reason(function) is None


def test_ranges_are_ranges_while_and_after_a_model_is_traced():
    seen = []
    reason(lambda x: x * (seen.append((isinstance(range(1, 7, 2), range), range(1, 7, 2))) or 1))
    assert set(seen) == {(True, range(1, 7, 2))}
    with pytest.raises(ValueError, match="no matter"):
        reason(lambda x: _raise(ValueError("no matter")))
    assert type(range(3)) is range and (range.__module__, math.log.__name__) == ("builtins", "log")
    assert not hasattr(math.log, "__wrapped__")


def _raise(error: Exception) -> None:
    raise error


@functools.lru_cache
def halves(rows: int, width: int) -> tuple[int, int]:
    return rows, width


TABLE: dict[tuple[int, int], tuple[int, int]] = {}


@pytest.mark.parametrize(
    "function", [lambda x: x.reshape(halves(*x.shape)), lambda x: x.reshape(TABLE.setdefault(tuple(x.shape), x.shape))]
)
def test_tables_kept_by_shapes_do_not_mislead(function):
    halves.cache_clear()
    TABLE.clear()
    model, x = Between(function), torch.randn(4, 5)
    first = find_groups(model, x)
    model(x)
    assert find_groups(model, x) == first and first[0].prunable
    assert find_groups(nn.Sequential(nn.Linear(5, 5), model), x)[1:] != ()


def test_the_users_input_is_not_written_into():
    model, x = Between(lambda x: x), torch.ones(4, 5)
    model.register_forward_pre_hook(lambda module, args: (args[0].sub_(0.5),))
    for run in (find_groups, cost):
        run(model, x)
        assert (x == 1).all()
    prune_to(model, x, criterion="l1", ratio=0.3, progress=False)
    assert (x == 1).all()


@pytest.mark.parametrize("squeeze", [lambda x: x.squeeze(), lambda x: x.squeeze(3).squeeze(2).squeeze()])
def test_a_width_that_may_be_squeezed_keeps_two(squeeze):
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.o = nn.Conv2d(3, 4, 1), nn.Linear(4, 3)

        def forward(self, x):
            return self.o(squeeze(F.adaptive_avg_pool2d(self.a(x).relu(), 1)))

    model, x = Pooled(), torch.randn(4, 3, 6, 6)
    plan = make_plan(score_groups(model, find_groups(model, x), "l1"), ratio=0.9, scope="local")
    assert len(plan.kept[0]) == 2 and check_plan(model, plan, x).ok


class Reshaped(nn.Module):
    """Operations that change a tensor's shape in place."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.o = nn.Conv2d(3, 6, 1), nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x).flatten(2).transpose_(1, 2))
        return self.o(x.unsqueeze_(1).squeeze_(1).mean(1).t_().t())


def test_shapes_that_change_in_place():
    torch.manual_seed(0)
    model, x = Reshaped().double(), torch.randn(3, 3, 4, 4).double()
    plan = prune_to(model, x, criterion="l1", ratio=0.5, scope="local", progress=False)
    assert plan.channels_removed == 7 and check_plan(model, plan, x).ok


def test_a_norm_of_one_channel_a_group_keeps_all():
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.GroupNorm(16, 16), nn.ReLU(), nn.Conv2d(16, 3, 1))
    assert "group_norm in layer '1'" in find_groups(model, torch.randn(2, 3, 8, 8))[0].kept_whole


@pytest.mark.parametrize("groups", [4, 8])
def test_a_norm_may_be_left_with_one_channel_a_group(groups):
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.GroupNorm(groups, 16), nn.ReLU(), nn.Conv2d(16, 3, 1))
    x = torch.randn(2, 3, 8, 8)
    plan = make_plan(score_groups(model, find_groups(model, x), "l1"), ratio=0.9, scope="local")
    assert len(plan.kept[0]) == groups and check_plan(model, plan, x).ok
    assert type(plan).from_json(plan.to_json()) == plan


def test_a_function_in_place_of_a_method_stays_one():
    """Methods that spell out floats are remade for the trace; what somebody put in the place of one takes no self."""
    model = Halving()
    model.halved = lambda x: 0.25 * x
    x = torch.randn(4, 5)
    assert find_groups(model, x)[0].prunable and torch.equal(model(x), model.b(0.25 * model.a(x)))


@pytest.mark.parametrize("share", [lambda c: c // 4, lambda c: -1])
def test_a_view_by_a_share_of_the_width(share):
    model = nn.Sequential(nn.Linear(5, 24), nn.Linear(6, 3))
    model[0].register_forward_hook(lambda m, args, out: out.view(len(out), share(out.shape[1]), 4).amax(2))
    assert find_groups(model, torch.randn(4, 5))[0].prunable


def test_outputs_without_tensors_and_wrapped_models_are_refused():
    @dataclass
    class Result:
        logits: Tensor

    model, x = Between(lambda x: x), torch.randn(4, 5)
    with pytest.raises(ValueError, match=r"wrapped in a DataParallel: give the model itself, model\.module"):
        find_groups(nn.DataParallel(model), x)
    model.register_forward_hook(lambda module, args, out: Result(out))
    with pytest.raises(ValueError, match=r"returns a Result.*Forward"):
        find_groups(model, x)


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("kind", ["scripted", "dynamic", "whole numbers"])
def test_compiled_and_quantised_models_are_refused_in_one_sentence(kind):
    model, x = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(4, 5)
    if kind == "scripted":
        model = torch.jit.script(model)
    elif kind == "dynamic":
        model[0].__class__ = type("Linear", (nn.Linear,), {"__module__": "torch.ao.nn.quantized.dynamic"})
    else:
        model[0].weight = nn.Parameter(model[0].weight.to(torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match=r"give the model before (it was scripted|that, and quantise what is pruned)"):
        find_groups(model, x)


def test_a_model_without_numbers_is_not_scored():
    with torch.device("meta"):
        model, x = nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 3)), torch.randn(4, 5)
    with pytest.raises(ValueError, match="meta device"):
        score_groups(model, find_groups(model, x), "l1")
