"""Attention: `api` is the one call, `reference` its plain twin, `sdpa` torch's fused kernels.

The name `interlace.kernels.attention` is the function; reach the modules in here with
`from interlace.kernels.attention.reference import ...`.
"""
