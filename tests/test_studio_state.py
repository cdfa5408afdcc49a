"""The choices of interactive pruning as values: changed, undone, compared, and written as Python of the same plan."""

from dataclasses import replace
from functools import partial

import pytest
from networks import network

import obc_tools as obc
from obc_tools.models.networks import load_model
from obc_tools.pruning.choices import Limits, Scoring, Selection, Target
from obc_tools.pruning.plan import PlanMismatchError, PruningPlan
from obc_tools.structure.layers import LayerAxis
from obc_tools.studio import (
    STEPS_BACK,
    Choices,
    Setup,
    StudioState,
    change,
    lock,
    plan_changes,
    redo,
    remember,
    set_limit,
    to_code,
    toggle_channel,
    undo,
    unlock,
)

RATIOS = [Choices(target=Target(ratio=ratio)) for ratio in (0.1, 0.2, 0.4)]
CONV = LayerAxis("0", "out")


@pytest.fixture(scope="module")
def made():
    """A small network's scores, cost model, and what plans choices lead to."""
    model, images = network("small_vgg")
    scores = obc.score_groups(model, obc.find_groups(model, images[:1]), "l1")
    costs = obc.cost_model(model, images[:1])
    return partial(lambda choices, scores, costs: choices.plan(choices.rank(scores), costs), scores=scores, costs=costs)


def test_undo_and_redo_walk_the_changes():
    state = StudioState()
    for choices in RATIOS:
        state = change(state, choices)
    assert [undo(state).choices, undo(undo(state)).choices] == [RATIOS[1], RATIOS[0]]
    assert undo(undo(undo(undo(state)))).choices == Choices() == undo(StudioState()).choices
    assert redo(undo(state)) == state == redo(state)
    assert redo(redo(undo(undo(state)))) == state
    assert change(undo(state), RATIOS[0]).future == ()
    assert change(state, state.choices) is state


def test_a_drag_is_one_step_and_old_steps_are_forgotten():
    state = change(StudioState(), RATIOS[0])
    state = change(change(state, RATIOS[1], merge=True), RATIOS[2], merge=True)
    assert state.choices == RATIOS[2]
    assert undo(state).choices == Choices()
    for number in range(STEPS_BACK + 5):
        state = change(state, Choices(limits=Limits(min_channels=number + 1)))
    assert len(state.past) == STEPS_BACK


def test_plans_are_remembered_by_name():
    state = remember(change(StudioState(), RATIOS[0]), "first")
    state = remember(change(state, RATIOS[1]), "second")
    assert dict(state.remembered) == {"first": RATIOS[0], "second": RATIOS[1]}
    state = remember(change(state, RATIOS[0]), "second")
    assert dict(state.remembered) == {"first": RATIOS[0], "second": RATIOS[0]}
    with pytest.raises(ValueError, match="needs a name"):
        remember(state, " ")


def test_a_toggled_channel_is_counted_into_the_target(made):
    """Kept by hand, its place is taken by the next in order; taken back, the plan is the one before."""
    choices = RATIOS[2]
    plan = made(choices)
    gone = next(c for c in range(8) if c not in plan.kept_of(CONV))
    more = toggle_channel(choices, plan, CONV, gone)
    frame = plan_changes(plan, made(more)).set_index("group")
    assert gone in frame.loc[str(CONV), "restored"]
    assert made(more).channels_removed == plan.channels_removed
    again = toggle_channel(more, made(more), CONV, gone)
    assert again.by_hand == ((CONV, gone, False),)
    assert made(again) == plan


@pytest.mark.parametrize("target", [Target(ratio=0.4), Target(speedup=1.8), Target(params=900.0)], ids=str)
def test_targets_are_met_with_choices_by_hand(made, target):
    """As closely as without: one unit less would miss the target, or one more pass the ratio."""
    choices = Choices(target=target)
    for channel in range(4):
        choices = toggle_channel(choices, made(choices), CONV, channel)
    plan, costs = made(choices), made.keywords["costs"]
    keep, remove = choices.hands[CONV]
    assert set(keep) <= set(plan.kept_of(CONV)) and not set(remove) & set(plan.kept_of(CONV))
    order = choices.rank(made.keywords["scores"]).by_hand(choices.hands)
    units = next(units for units in range(len(order) + 1) if order.plan(units) == plan)
    if target.ratio is not None:
        further = next(order.plan(n) for n in range(units, len(order)) if order.plan(n) != plan)
        width = sum(group.width for group in plan.groups if group.prunable)
        assert plan.channels_removed / width <= target.ratio < further.channels_removed / width
    else:
        assert order.meets(units, target, costs) and not order.meets(units - 1, target, costs)


def test_toggles_that_cannot_be_are_refused(made):
    plan = made(RATIOS[0])
    with pytest.raises(ValueError, match="unknown group 'x.out'"):
        toggle_channel(RATIOS[0], plan, LayerAxis("x", "out"), 0)
    with pytest.raises(PlanMismatchError, match="no channel 99 in a group of width 8"):
        toggle_channel(RATIOS[0], plan, CONV, 99)
    all_but_one = replace(RATIOS[0], by_hand=tuple((CONV, channel, False) for channel in range(7)))
    with pytest.raises(PlanMismatchError, match="no channel is kept"):
        toggle_channel(all_but_one, made(all_but_one), CONV, 7)
    with pytest.raises(PlanMismatchError, match="kept whole"):
        toggle_channel(RATIOS[0], plan, LayerAxis("13", "out"), 0)


def test_the_last_channel_of_a_group_goes_by_hand_for_another(made):
    """At the end of a target one is left: removed by hand, the best of the others comes back, and limits hold."""
    for limits, left in ((Limits(), 1), (Limits(min_channels=3), 3), (Limits(round_to=4), 4)):
        choices = Choices(target=Target(ratio=0.999), limits=limits)
        kept = made(choices).kept_of(CONV)
        assert len(kept) == left
        choices = toggle_channel(choices, made(choices), CONV, kept[0])
        assert kept[0] not in made(choices).kept_of(CONV) and len(made(choices).kept_of(CONV)) == left


@pytest.mark.parametrize(
    "target", [Target(ratio=0.9), Target(speedup=6), Target(macs=15e3), Target(params=200)], ids=str
)
def test_a_target_that_hands_keep_from_being_met_leads_to_the_nearest_plan(made, target):
    """All goes that may, and the plan says how far that gets."""
    costs = made.keywords["costs"]
    assert made(Choices(target=target)).reached.met
    choices = Choices(target=target, by_hand=tuple((CONV, channel, True) for channel in range(8)))
    plan = made(choices)
    least = made(replace(choices, target=Target(speedup=1e9)))
    assert plan == least and plan.kept_of(CONV) == tuple(range(8)) and not plan.reached.met
    speedup = costs.original.macs / costs.of(plan).macs
    said = {
        "speedup": f"{speedup:.2f}x of 6.00x asked",
        "macs": f"{speedup:.2f}x fewer (operations that run), parameters ",
        "params": "; 200 parameters asked",
        "ratio": f"; {plan.channels_removed / plan.channels:.1%} of 90.0% of channels asked",
    }
    assert said[target.given[0]] in repr(plan)
    scores, (kind, value) = made.keywords["scores"], target.given
    hands = {"by_hand": {CONV: (range(8), ())}, kind: value}
    assert obc.one_shot_plan(scores, costs, nearest=True, **hands) == plan
    with pytest.raises(ValueError, match="cannot be met: the best that can be had is"):
        obc.one_shot_plan(scores, costs, **hands)


def test_what_is_kept_by_hand_takes_the_place_of_the_best(made):
    """No more stays than the limits ask for: the nearest plan is the smallest, and what it reaches can be asked for."""
    costs = made.keywords["costs"]
    scores = next(score for group, score in made.keywords["scores"].items() if group.root == CONV)
    for fewest, pinned in ((1, 1), (1, 3), (2, 1), (4, 2)):
        weakest = scores.argsort()[:pinned].tolist()
        hands = tuple(sorted((CONV, channel, True) for channel in weakest))
        choices = Choices(target=Target(speedup=1e6), limits=Limits(min_channels=fewest), by_hand=hands)
        plan = made(choices)
        best = scores.argsort(descending=True)[: max(0, fewest - pinned)].tolist()
        assert plan.kept_of(CONV) == tuple(sorted({*weakest, *best})) and not plan.reached.met
        speedup = costs.original.macs / costs.of(plan).macs
        assert made(replace(choices, target=Target(speedup=speedup))).kept == plan.kept


def test_toggles_go_with_all_blocks():
    model, images = network("grouped")
    groups = obc.find_groups(model, images[:1])
    group = next(g for g in groups if g.prunable and g.blocks > 1)
    size = group.width // group.blocks
    choices = toggle_channel(Choices(), PruningPlan.whole(groups), group.root, size + 1)
    assert choices.by_hand == ((group.root, 1, False),)


def test_a_lock_holds_what_there_is(made):
    choices = RATIOS[2]
    choices = toggle_channel(choices, made(choices), CONV, 0)
    locked = lock(choices, made(choices), CONV)
    assert locked.by_hand == ()
    assert locked.locked == ((CONV, made(choices).kept_of(CONV)),)
    other = replace(locked, target=Target(ratio=0.7))
    assert made(other).kept_of(CONV) == made(choices).kept_of(CONV)
    assert unlock(locked, CONV).locked == ()


def test_limits_of_groups_come_and_go(made):
    choices = set_limit(Choices(target=Target(ratio=0.7)), CONV, 0.0)
    assert len(made(choices).kept_of(CONV)) == 8
    assert set_limit(set_limit(choices, CONV, 0.5), CONV, None) == Choices(target=Target(ratio=0.7))


def test_wrong_choices_are_refused():
    for wrong, message in (
        (lambda: Limits(scope="universal"), "unknown scope 'universal'"),
        (lambda: Limits(max_ratio=2), "max_ratio=2"),
        (lambda: Scoring("jacobean"), "closest: jacobian"),
        (lambda: Scoring(group_reduction="least"), "unknown group_reduction"),
        (lambda: Scoring(normalizer="most"), "unknown normalizer"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()


def test_a_ranking_serves_all_targets_and_hands():
    one, other = Choices(target=Target(speedup=2), by_hand=((CONV, 1, True),)), Choices()
    assert one.ranking_key == other.ranking_key
    assert Choices(limits=Limits(scope="local")).ranking_key != other.ranking_key
    assert set_limit(other, CONV, 0.5).ranking_key != other.ranking_key


def test_plans_of_different_networks_are_not_compared():
    plans = [PruningPlan.whole(obc.find_groups(*network(name))) for name in ("grouped", "small_vgg")]
    with pytest.raises(PlanMismatchError, match="different groups"):
        plan_changes(*plans)


CODED = {
    "plain": Choices(),
    "weights": Choices(Scoring("l1"), Target(speedup=1.5)),
    "rows": Choices(Scoring("jacobian", rows=("expected", 8)), Target(ratio=0.4)),
    "scaled": Choices(Scoring("taylor", "mean", "max"), Target(params=0.6), Limits(scope="isomorphic")),
    "limited": Choices(Scoring("jacobian"), Target(macs=0.7), Limits(2, 0.9, 2, scope="local")),
}


@pytest.mark.parametrize("name", CODED)
def test_the_code_makes_the_same_plan(name):
    data = obc.load_data("digits")
    model = load_model("resnet8", 10, in_channels=1, width=8)
    selection = Selection(("conv1",) if name == "limited" else ())
    setup = Setup(data.image_shape, selection, batches=2, batch_size=16, seed=3)
    groups = obc.find_groups(model, next(iter(data.batches("val", 1)))[0], ignore=selection.ignore)
    costs = obc.cost_model(model, next(iter(data.batches("val", 1)))[0])
    batches = list(obc.take(data.batches("train", 16, seed=3), 2))
    choices = CODED[name]
    for key in ("macs", "params"):
        share = getattr(choices.target, key)
        if share is not None:
            choices = replace(choices, target=Target(**{key: share * getattr(costs.original, key)}))
    scoring = choices.scoring
    scores = obc.score_groups(
        model,
        groups,
        scoring.resolved,
        batches,
        group_reduction=scoring.group_reduction,
        normalizer=scoring.normalizer,
    )

    def made(choices):
        return choices.plan(choices.rank(scores), costs)

    free = [group.root for group in groups if group.prunable]
    choices = set_limit(choices, free[0], 0.25)
    choices = lock(choices, made(choices), free[1])
    choices = toggle_channel(choices, made(choices), free[-1], 1)
    choices = toggle_channel(choices, made(choices), free[-1], 2)
    namespace = {"model": model, "data": data}
    exec(to_code(choices, setup), namespace)
    assert namespace["plan"] == made(choices)
    assert namespace["plan"] != made(Choices(scoring, choices.target))
    widths = {name: tuple(p.shape) for name, p in namespace["pruned"].named_parameters()}
    assert widths == {name: tuple(p.shape) for name, p in obc.prune(model, made(choices)).named_parameters()}


def test_code_leaves_out_what_is_usual():
    code = to_code(Choices(Scoring("l2")), Setup((3, 32, 32)))
    assert code.splitlines() == [
        "# out of model",
        "import torch",
        "",
        "import obc_tools as obc",
        "",
        "example = torch.zeros(1, 3, 32, 32)",
        "groups = obc.find_groups(model, example)",
        "scores = obc.score_groups(model, groups, 'l2')",
        "costs = obc.cost_model(model, example)",
        "plan = obc.one_shot_plan(scores, costs, ratio=0.3)",
        "pruned = obc.prune(model, plan)",
    ]
    heads = Setup((3, 32, 32), Selection(("conv1",), whole_heads=True, only="attention"))
    code = to_code(Choices(Scoring("l2")), heads).splitlines()
    assert code[6] == "groups = obc.find_groups(model, example, ignore=['conv1'], whole_heads=True, only='attention')"
    assert code[8] == "costs = obc.cost_model(model, example, whole_heads=True)"
    assert "device='cuda:1'" in to_code(Choices(), Setup((3, 32, 32), device="cuda:1"))
