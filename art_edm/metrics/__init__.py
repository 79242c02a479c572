"""Detectors, moments, FID and its relatives, references, standard errors."""
