"""Structural pruning after Optimal Brain Connection (Chen et al. 2025)."""
