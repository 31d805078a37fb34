"""Triton kernels, one operation a file, named as in `forktree.ops`. Import as `forktree.triton_kernels`."""
