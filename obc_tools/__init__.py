"""Structural pruning after Optimal Brain Connection (Chen et al. 2025, arXiv 2508.05521).

The main job: `load_model`, `load_data` -> `prune_to` a target -> `prune` or `EquivalentModel` -> `fit` -> `merge` ->
`save_pruned`. Everything is a function on values that a script, a notebook or a widget calls alike.
"""

from importlib import import_module

_NAMES = {
    "check": ("Check", "check_plan"),
    "compare": ("compare_criteria",),
    "comparison": ("Comparison", "read_comparison"),
    "criteria": ("CRITERIA", "Criterion"),
    "augment": ("Augmentation",),
    "data": ("hold_out", "load_data", "take"),
    "dense": ("dense_jtj", "filter_interactions", "group_jtj"),
    "equivalent": ("EquivalentModel",),
    "explain": ("explain",),
    "export": ("export_onnx", "export_program"),
    "experiments": ("EXPERIMENTS", "Experiment"),
    "grid": ("Grid", "GridJob", "launch_grid", "paper_grid"),
    "groups": ("ChannelGroup", "Member", "find_groups"),
    "jacobian": ("JacobianProducts", "jacobian_products"),
    "job": ("PruningJob",),
    "launching": ("Run", "launch", "run_experiment"),
    "layers": ("LayerAxis",),
    "measure": ("Cost", "Metrics", "cost", "cost_model", "evaluate", "latency"),
    "models": ("load_model",),
    "one_shot": ("one_shot_plan",),
    "order": ("make_plan",),
    "pipeline": ("find_plan", "prepare"),
    "plan": ("PruningPlan",),
    "pruning": ("Target", "prune", "prune_to"),
    "scores": ("Scores", "score_groups"),
    "sparse": ("sparse_train",),
    "state": ("Forward",),
    "store": ("load_pruned", "save_pruned"),
    "tables": ("find_runs", "results_table"),
    "training": ("History", "Recipe", "fit"),
    "widgets": ("InteractionExplorer", "JTJExplorer", "PruningStudio", "RunMonitor"),
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
