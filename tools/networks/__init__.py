"""Training and judging the bundled networks."""
