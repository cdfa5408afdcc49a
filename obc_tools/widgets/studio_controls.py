"""The controls of `PruningStudio`, and what they say."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import ipywidgets as W

from ..measure.costs import CostModel
from ..pruning.order import SCOPES, Target
from ..pruning.plan import PruningPlan
from ..scoring.criteria import CRITERIA
from ..scoring.scores import NORMALIZERS, REDUCTIONS
from ..studio.bars import BARS, MILLION
from ..studio.session import StudioSession
from ..studio.state import Choices, Scoring, StudioState, limit_of, set_limit
from .controls import FITTING, WRAPPING, code_area, dropdown, integer, note, set_slider, slider, stands_at, text

NONE = "none"
"""Stands for None, which a choice of a widget cannot have."""

KINDS = {
    "share of channels removed": "ratio",
    "speed-up (times fewer MACs)": "speedup",
    "MACs of one image (millions)": "macs",
    "parameters (millions)": "params",
}


def none_or(value: str) -> str | None:
    """Return what a choice stands for."""
    return None if value == NONE else value


def target_of(kind: str, value: float) -> Target:
    """Return the target that the slider stands for."""
    return Target(**{kind: value * MILLION if kind in ("macs", "params") else value})


def shown_value(target: Target) -> tuple[str, float]:
    """Return a target's kind, and its value as the slider shows it."""
    ((kind, value),) = ((key, value) for key, value in vars(target).items() if value is not None)
    return kind, value / MILLION if kind in ("macs", "params") else value


def slider_range(kind: str, costs: CostModel) -> tuple[float, float, float]:
    """Return the least and largest value of the slider, and its step."""
    if kind == "ratio":
        return 0.01, 0.99, 0.01
    if kind == "speedup":
        return 1.02, 10.0, 0.02
    whole = getattr(costs.original, kind) / MILLION
    return 0.02 * whole, 0.99 * whole, whole / 200


def target_near(kind: str, plan: PruningPlan, costs: CostModel) -> Target:
    """Return the target of a kind that a plan just meets, within what the slider can say."""
    cost, whole = costs.of(plan), costs.original
    # Rounded to the side on which the plan still meets it.
    here = {
        "ratio": math.ceil(MILLION * plan.channels_removed / plan.channels) / MILLION,
        "speedup": math.floor(MILLION * whole.macs / cost.macs) / MILLION,
        "macs": float(cost.macs),
        "params": float(cost.params),
    }[kind]
    low, high = (target_of(kind, end) for end in slider_range(kind, costs)[:2])
    return Target(**{kind: min(max(here, getattr(low, kind)), getattr(high, kind))})


@dataclass(frozen=True)
class StudioControls:
    """All controls by name."""

    criterion: W.Dropdown
    reduction: W.Dropdown
    normalizer: W.Dropdown
    scope: W.Dropdown
    kind: W.Dropdown
    targets: dict[str, W.FloatSlider]
    place: W.Box
    round_to: W.BoundedIntText
    bars: W.Dropdown
    group: W.Dropdown
    limit: W.FloatSlider
    locked: W.ToggleButton
    undo: W.Button
    redo: W.Button
    measure: W.Button
    cancel: W.Button
    name: W.Text
    remember: W.Button
    compared: W.Dropdown
    path: W.Text
    save_plan: W.Button
    save_model: W.Button
    save_code: W.Button
    progress: W.FloatProgress
    status: W.HTML
    table: W.HTML
    changes: W.HTML
    code: W.Textarea

    @classmethod
    def build(cls, session: StudioSession, choices: Choices) -> StudioControls:
        """Make the controls for a session."""
        roots = [(str(group.root), group.root) for group in session.groups if group.prunable]
        if not roots:
            raise ValueError("nothing can be pruned: every group of this network is kept whole")
        kind, value = shown_value(choices.target)
        targets = {each: slider("to", *slider_range(each, session.costs)) for each in KINDS.values()}
        targets[kind].value = value
        normalizers = [name or NONE for name in NORMALIZERS]
        return cls(
            criterion=dropdown("criterion", CRITERIA, choices.scoring.criterion, "what a channel is scored by"),
            reduction=dropdown("reduction", REDUCTIONS, choices.scoring.group_reduction, "over a group's members"),
            normalizer=dropdown("normalizer", normalizers, choices.scoring.normalizer or NONE, "within each group"),
            scope=dropdown("scope", SCOPES, choices.scope, "which channels are ranked together"),
            kind=dropdown("target", KINDS.items(), kind),
            targets=targets,
            place=W.Box([targets[kind]]),
            round_to=integer("multiple of", choices.round_to or 1, 1, 1024, "of the channels that a group keeps"),
            bars=dropdown("bars", BARS, BARS[0], "what the upper bars show: channels of groups, or costs of layers"),
            group=dropdown("group", roots, roots[0][1], "whose channels are shown below"),
            limit=slider("at most goes", 0.0, 1.0, 0.01, 1.0, "the share of this group's channels"),
            locked=W.ToggleButton(description="lock this group", icon="lock", tooltip="hold it as it is now"),
            undo=W.Button(description="undo", icon="undo", layout=FITTING),
            redo=W.Button(description="redo", icon="repeat", layout=FITTING),
            measure=W.Button(
                description="measure", icon="tachometer", tooltip="latency, accuracy and loss", layout=FITTING
            ),
            cancel=W.Button(description="cancel", icon="times", tooltip="what is being computed", layout=FITTING),
            name=text("name", "plan 1", width="210px"),
            remember=W.Button(description="remember", tooltip="to compare other plans with this one", layout=FITTING),
            compared=dropdown("compare with", [NONE], NONE, width="270px"),
            path=text("write to", "runs/studio", "without the ending"),
            save_plan=W.Button(description="plan (JSON)", icon="download", layout=FITTING),
            save_model=W.Button(description="pruned model", icon="download", layout=FITTING),
            save_code=W.Button(description="Python", icon="download", layout=FITTING),
            progress=W.FloatProgress(value=0.0, min=0.0, max=1.0, layout={"width": "160px"}),
            status=W.HTML(),
            table=W.HTML(),
            changes=W.HTML(),
            code=code_area(),
        )

    @property
    def target(self) -> W.FloatSlider:
        """The slider of the kind of target that is chosen.

        Each kind has its own: told another range and another value, a page may take the value first, clip it to the
        range that it still has, and tell that back as if it were somebody's choice.
        """
        return self.targets[self.kind.value]

    @property
    def scoring_box(self) -> W.VBox:
        """What scores depend on."""
        return W.VBox([self.criterion, self.reduction, self.normalizer])

    @property
    def target_box(self) -> W.VBox:
        """What a plan is to meet."""
        return W.VBox([self.scope, self.kind, self.place, self.round_to])

    @property
    def group_box(self) -> W.VBox:
        """What is shown, and what is said of a single group."""
        return W.VBox([self.bars, self.group, self.limit, self.locked])

    @property
    def action_box(self) -> W.HBox:
        """Going back and forth, measuring, comparing."""
        controls = [self.undo, self.redo, self.measure, self.cancel, self.name, self.remember, self.compared]
        return W.HBox(controls, layout=WRAPPING)

    @property
    def keep_box(self) -> W.HBox:
        """Taking the outcome away."""
        return W.HBox([self.path, self.save_plan, self.save_model, self.save_code], layout=WRAPPING)

    @property
    def status_box(self) -> W.HBox:
        """What is going on."""
        return W.HBox([self.progress, self.status])

    def say(self, words: str, *, bad: bool = False) -> None:
        """Show a line of words."""
        self.status.value = note(words, bad=bad)

    def read(self, choices: Choices) -> Choices:
        """Return choices with what the controls say in their place."""
        return replace(
            choices,
            scoring=Scoring(self.criterion.value, self.reduction.value, none_or(self.normalizer.value)),
            target=self._read_target(choices.target),
            scope=self.scope.value,
            round_to=None if self.round_to.value == 1 else self.round_to.value,
        )

    def _read_target(self, target: Target) -> Target:
        kind, value = shown_value(target)
        stays = kind == self.kind.value and stands_at(self.target, value)
        return target if stays else target_of(self.kind.value, round(self.target.value, 6))

    def read_limit(self, choices: Choices) -> Choices:
        """Return choices with the limit of the group that is shown in their place."""
        root, share = self.group.value, self.limit.value
        if stands_at(self.limit, limit_of(choices, root)):
            return choices
        return set_limit(choices, root, None if share == 1 else round(share, 6))

    def show(self, state: StudioState) -> None:
        """Set every control to the choices of a state."""
        choices = state.choices
        for scoring, control in zip(fields(Scoring), (self.criterion, self.reduction, self.normalizer), strict=True):
            control.value = getattr(choices.scoring, scoring.name) or NONE
        self.scope.value, self.round_to.value = choices.scope, choices.round_to or 1
        self.show_target(choices.target)
        self.show_group(choices)
        self.undo.disabled, self.redo.disabled = not state.past, not state.future

    def show_group(self, choices: Choices) -> None:
        """Set limit and lock to those of the group that is shown."""
        root = self.group.value
        set_slider(self.limit, limit_of(choices, root))
        self.locked.value = root in dict(choices.locked)

    def show_target(self, target: Target) -> None:
        """Show the slider of a target's kind, and on it the target."""
        kind, value = shown_value(target)
        set_slider(self.targets[kind], value)
        self.place.children, self.kind.value = (self.targets[kind],), kind
