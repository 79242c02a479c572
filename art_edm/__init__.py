"""art_edm: better timestep grids for EDM and EDM2 samplers, learned by ART-RL (arXiv 2607.02137)."""

__version__ = "0.1.0"
