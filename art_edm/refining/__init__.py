"""A grid moved through the solver in use."""
