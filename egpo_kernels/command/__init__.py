"""The console script `egpo-kernels`: what is installed here, and whether the kernels are right."""
