"""Network pickles as inert data; only `network` is public."""
