"""PyTorch operations for any device. Attention follows the plan: one matrix product a shared segment."""
