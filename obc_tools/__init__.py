"""Structural pruning after Optimal Brain Connection (Chen et al. 2025, arXiv 2508.05521).

The main job: `load_model`, `load_data` -> `prune_to` a target -> `prune` or `EquivalentModel` -> `fit` -> `merge` ->
`save_pruned`. Everything is a function on values that a script, a notebook or a widget calls alike.
"""

from importlib import import_module

_NAMES = {
    "comparing.compare": ("Comparison", "compare_criteria", "read_comparison"),
    "comparing.sensitivity": ("Sensitivity", "sensitivity"),
    "comparing.sweep": ("Sweep", "sweep"),
    "data.batches": ("Augmentation", "take"),
    "data.data": ("as_data", "hold_out", "load_data"),
    "measure.costs": ("Cost", "analyse", "cost", "cost_model", "layers_table"),
    "measure.latency": ("latency",),
    "measure.metrics": ("Metrics",),
    "models.adapters": ("task_of",),
    "models.networks": ("load_model",),
    "models.runtimes": ("export_onnx", "export_program", "speed_table"),
    "models.store": ("load_pruned", "save_pruned"),
    "pruning.check": ("Check", "check_plan"),
    "pruning.choices": ("Target",),
    "pruning.compensation": ("compensate", "recalibrate"),
    "pruning.equivalent": ("EquivalentModel",),
    "pruning.layer_check": ("check_layer",),
    "pruning.order": ("make_plan", "one_shot_plan", "reachable"),
    "pruning.plan": ("PruningPlan", "prune"),
    "pruning.prune": ("prune_to",),
    "runs.experiments": ("EXPERIMENTS", "Experiment"),
    "runs.grid": ("Grid", "GridJob", "launch_grid", "paper_grid"),
    "runs.job": ("PruningJob",),
    "runs.pipeline": ("Stages", "find_plan", "prepare"),
    "runs.run": ("Run", "find_runs", "launch", "results_table", "run_experiment"),
    "scoring.criteria": ("CRITERIA", "Criterion"),
    "scoring.jacobian": ("JacobianProducts", "jacobian_products"),
    "scoring.jtj": ("dense_jtj", "filter_interactions", "group_jtj"),
    "scoring.scores": ("Scores", "score_groups"),
    "scoring.tasks": ("TASKS", "Task", "evaluate"),
    "state": ("Forward",),
    "structure.groups": ("ChannelGroup", "Member", "explain", "find_groups"),
    "structure.layers": ("LayerAxis", "LayerType", "register_layer"),
    "training.fit": ("fit",),
    "training.folder": ("History",),
    "training.recipe": ("Recipe",),
    "training.sparse": ("sparse_train",),
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
