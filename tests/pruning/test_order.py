import pytest
import torch
from networks import network

from obc_tools import LayerAxis, find_groups, make_plan
from obc_tools.pruning.choices import Limits
from obc_tools.pruning.order import removal_order


def groups_of(name="small_vgg"):
    return find_groups(*network(name))


def ascending(groups):
    """Return scores that grow with the channel's number, and from group to group."""
    return {group: torch.arange(group.width) + 100.0 * index for index, group in enumerate(groups)}


def kept_counts(plan):
    return [len(kept) for kept in plan.kept]


def test_global_takes_the_lowest_of_all():
    groups = groups_of()
    assert kept_counts(make_plan(ascending(groups), channels=10)) == [1, 9, 16, 24, 10]
    assert kept_counts(make_plan(ascending(groups), ratio=0.5)) == [1, 1, 4, 24, 10]


def test_local_takes_the_same_share_of_each_group():
    groups = groups_of()
    plan = make_plan(ascending(groups), ratio=0.5, scope="local")
    assert kept_counts(plan) == [4, 6, 8, 12, 10]
    assert plan.kept[0] == (4, 5, 6, 7)


def test_isomorphic_ranks_groups_of_the_same_structure_together():
    groups = groups_of()
    assert groups[0].kind == groups[1].kind != groups[2].kind
    assert kept_counts(make_plan(ascending(groups), ratio=0.5, scope="isomorphic")) == [1, 9, 8, 12, 10]


def test_blocks_lose_the_same_positions_by_their_mean_score():
    groups = groups_of("grouped")
    scores = {group: torch.full((group.width,), 100.0) for group in groups}
    conv1 = next(group for group in groups if group.root == LayerAxis("conv1", "out"))
    scores[conv1] = torch.tensor([9.0, 1, 9, 9, 9.0, 1, 9, 0, 9.0, 1, 9, 9, 9.0, 1, 9, 9])
    assert make_plan(scores, channels=4).kept_of(conv1) == (0, 2, 3, 4, 6, 7, 8, 10, 11, 12, 14, 15)
    assert make_plan(scores, channels=3).channels_removed == 0


def test_a_convolution_group_never_becomes_one_channel():
    groups = groups_of("grouped")
    plan = make_plan(ascending(groups), ratio=0.99)
    assert [len(kept) / group.blocks for group, kept in zip(groups, plan.kept, strict=True)] == [2, 2, 1, 5]


def test_a_later_step_counts_what_is_gone():
    groups = groups_of()
    scores = ascending(groups)
    for scope in ("global", "local", "isomorphic"):
        first = make_plan(scores, ratio=0.25, scope=scope)
        rest = first.pruned_groups()
        left = {g: scores[old][list(kept)] for g, old, kept in zip(rest, groups, first.kept, strict=True)}
        order = removal_order(left, Limits(scope=scope), after=first)
        assert order.plan(order.up_to(0.5)) == make_plan(scores, ratio=0.5, scope=scope)
        assert order.plan(0) == first
    with pytest.raises(ValueError, match="not those of the groups that the earlier plan leaves"):
        removal_order(dict(reversed(left.items())), after=first)


def test_rounding_keeps_more_never_less():
    groups = groups_of()
    plan = make_plan(ascending(groups), ratio=0.5, scope="local", round_to=8)
    assert kept_counts(plan) == [8, 8, 8, 16, 10]


def test_protected_channels_pass_their_turn_to_others():
    groups = groups_of()
    order = removal_order(ascending(groups), Limits(min_channels=6, max_ratio=0.5))
    assert kept_counts(order.plan(len(order))) == [6, 6, 8, 12, 10]
    assert make_plan(ascending(groups), channels=9, min_channels=6).channels_removed == 9


def test_ties_are_broken_by_position():
    groups = groups_of()
    plan = make_plan({group: torch.zeros(group.width) for group in groups}, channels=9)
    assert plan.kept[0] == (7,) and plan.kept[1] == tuple(range(2, 12))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give one target"),
        ({"ratio": 0.5, "channels": 3}, "give one target"),
        ({"ratio": 1.0}, r"ratio=1.0: expected a share of channels in \(0, 1\)"),
        ({"channels": 57}, "channels=57: from 0 to 56 channels can be removed"),
        ({"ratio": 0.5, "scope": "locla"}, "unknown scope 'locla'; closest: local"),
        ({"ratio": 0.5, "min_channels": 0}, "min_channels=0"),
        ({"ratio": 0.5, "max_ratio": 1.5}, "max_ratio=1.5"),
        ({"ratio": 0.5, "round_to": 0}, "round_to=0"),
        ({"ratio": 0.5, "round_to": float("nan")}, "round_to=nan: expected at least 1, or None"),
        ({"ratio": 0.5, "round_to": 2.5}, "round_to=2.5"),
        ({"ratio": 0.5, "min_channels": float("nan")}, "min_channels=nan"),
        ({"ratio": 0.5, "min_channels": 1.5}, "min_channels=1.5: expected at least 1 \\(a whole number"),
        ({"ratio": 0.5, "max_ratio": float("nan")}, "max_ratio=nan"),
    ],
)
def test_bad_requests_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_plan(ascending(groups_of()), **options)


def test_bad_scores_are_refused():
    scores = ascending(groups_of())
    first = next(iter(scores))
    with pytest.raises(ValueError, match=r"group 0\.out: scores of shape \(3,\) for 8 channels"):
        make_plan(scores | {first: torch.zeros(3)}, ratio=0.5)
    scores[first][5] = float("nan")
    with pytest.raises(ValueError, match=r"group 0\.out: the score of channel 5 is nan"):
        make_plan(scores, ratio=0.5)
