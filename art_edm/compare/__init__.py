"""Scores of grids that are sampled here, or of folders that were sampled elsewhere."""
