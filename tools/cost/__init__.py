"""What a run costs: the benchmark's parts."""
