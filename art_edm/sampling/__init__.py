"""Solvers on a given grid, noise, and the hand-made rules as baselines."""
