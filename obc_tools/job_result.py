"""What a job led to: its models, what was measured of them, and the table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import pandas as pd
from torch import nn

from .dense import DenseJTJ
from .history import History
from .job import PruningJob
from .measure import Cost, Latency, Metrics
from .plan import PruningPlan

ORIGINAL, SPARSE, PRUNED, NAIVE, MERGED = "original", "sparse", "pruned", "naive", "merged"
TITLES: Mapping[str, str] = MappingProxyType(
    {
        ORIGINAL: "original",
        SPARSE: "after sparse training",
        PRUNED: "pruned, no fine-tuning",
        NAIVE: "naive fine-tuning",
        MERGED: "Equivalent Pruning, merged",
    }
)
"""The models of a job, in the order of its table."""

PLAN = "plan.json"
WEIGHTS: Mapping[str, str] = MappingProxyType({key: f"{key}.safetensors" for key in (ORIGINAL, SPARSE)})
"""Files of the weights of unpruned networks that a job trained."""


@dataclass(frozen=True)
class Measured:
    """What was measured of one model: metrics on all held-out images, MACs and CPU latency of one image."""

    metrics: Metrics
    cost: Cost
    latency: Latency


@dataclass(frozen=True)
class Equivalence:
    """How far Equivalent Pruning kept its promises: largest differences of logits on a batch of held-out images.

    Differences are over the largest logit where that is above 1, for float32 rounds relative to it.

    Attributes:
        start_from_naive: EP before training against the naively pruned network; at most `TOLERANCE`.
        merged_from_trained: The merged network against the trained EP; at most `TOLERANCE`.
        merged_from_naive: The merged network against the naively fine-tuned one; above 0, or EP did nothing.
        merged_loads_into_naive: The merged state dict was loaded, strictly, into the naively pruned network.
    """

    start_from_naive: float
    merged_from_trained: float
    merged_from_naive: float
    merged_loads_into_naive: bool


@dataclass(frozen=True, eq=False, repr=False)
class JobResult:
    """What a job led to.

    Attributes:
        job: What was asked for.
        plan: Which channels stay.
        models: Key -> model, in the order of `TITLES`; those that the job asked for.
        measured: Key -> what was measured of that model.
        histories: Key -> its training.
        equivalence: None without Equivalent Pruning.
        filters: JᵀJ of some channels of the first layer of the original; None where a channel is too large to show.
        seconds: Stage -> duration.
    """

    job: PruningJob
    plan: PruningPlan
    models: Mapping[str, nn.Module]
    measured: Mapping[str, Measured]
    histories: Mapping[str, History]
    equivalence: Equivalence | None
    filters: DenseJTJ | None
    seconds: Mapping[str, float]

    def to_frame(self) -> pd.DataFrame:
        """Return one row a model: accuracy, loss, MACs, MACs of the original over its own, parameters, CPU latency."""
        whole = self.measured[ORIGINAL].cost.macs
        rows = [
            {
                "model": TITLES[key],
                "test accuracy": measured.metrics.accuracy,
                "test loss": measured.metrics.loss,
                "MACs": round(measured.cost.macs),
                "speed-up": whole / measured.cost.macs,
                "parameters": measured.cost.params,
                "CPU latency (ms)": measured.latency.median_ms,
            }
            for key, measured in self.measured.items()
        ]
        return pd.DataFrame(rows)

    def table(self) -> pd.DataFrame:
        """Return `to_frame` as text, each number with as many digits as a reader wants."""
        digits = {
            "test accuracy": "{:.2%}",
            "test loss": "{:.4f}",
            "MACs": "{:,}",
            "speed-up": "{:.2f}x",
            "parameters": "{:,}",
            "CPU latency (ms)": "{:.2f}",
        }
        frame = self.to_frame()
        return frame.assign(**{name: frame[name].map(text.format) for name, text in digits.items()})

    def __repr__(self) -> str:
        return self.table().to_string(index=False)

    def _repr_html_(self) -> str:
        return self.table().to_html(index=False)
