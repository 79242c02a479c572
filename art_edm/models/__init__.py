"""The one contract of a denoiser, and everything that fulfils it."""
