"""What benchmarks share: workloads, baselines, measuring, and what a machine could do at best."""
