"""Attention: `api` is the one call, `reference` its plain twin, `sdpa` torch's fused kernels."""
