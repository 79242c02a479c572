"""What is measured along dense paths, and the exact optimum."""
