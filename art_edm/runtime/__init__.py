"""Files, store, download, processes, memory and terminal; knows nothing of diffusion."""
