"""Triton kernels: one file per kernel, each a `_kernel` and its `launch`.

Kernels import triton, torch and `formats` only. A `launch` writes into tensors that it is given:
allocation, choice of backend and checks of user input are elsewhere.
"""
