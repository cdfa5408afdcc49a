"""Figures: numbers, names and labels in, a plotly figure out."""

from .curves import accuracy_over_macs, criteria_curves, criteria_panels, plot_histories, scoring_seconds
from .jtj import filter_image, group_jtj_heatmap, interactions_heatmap, jtj_grid, jtj_heatmap, jtj_pair, spectrum
from .looks import save_html, save_png
from .plans import coupling_graph, mixing_heatmaps, plot_groups, plot_plan, plot_removed_shares

__all__ = [
    "accuracy_over_macs",
    "coupling_graph",
    "criteria_curves",
    "criteria_panels",
    "filter_image",
    "group_jtj_heatmap",
    "interactions_heatmap",
    "jtj_grid",
    "jtj_heatmap",
    "jtj_pair",
    "mixing_heatmaps",
    "plot_groups",
    "plot_histories",
    "plot_plan",
    "plot_removed_shares",
    "save_html",
    "save_png",
    "scoring_seconds",
    "spectrum",
]
