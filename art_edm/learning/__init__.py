"""Algorithm 1 of the paper: ART-RL."""
