"""Triton kernels: one family over a `Format` constexpr. Only `@triton.jit` functions; no allocation, no torch.

A tensor is seen as [batch, N, K] with strides for the input; outputs are contiguous. A tile is BLOCK_M x BLOCK_N
elements; "group" means elements that share a scale.
"""
