"""State-space duality, the mixer of Mamba-2: `api` is the one call, `reference` its plain twin.

The name `interlace.kernels.ssd` is the function; reach the modules in here with
`from interlace.kernels.ssd.reference import ...`.
"""
