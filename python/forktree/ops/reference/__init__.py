"""Dense PyTorch in fp32 or fp64: the specification of every operation."""
