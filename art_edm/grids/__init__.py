"""The grid type, its rules, clocks, and other programs' lists of noise levels."""
