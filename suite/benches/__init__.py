"""What suite.bench measures of norms: kernels, fusions, steps; and how a result is kept."""
