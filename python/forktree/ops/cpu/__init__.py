"""The compiled kernels of `forktree._core` for the CPU: fp32, bf16 and fp16; as many threads as PyTorch uses."""
