"""`tilewise inspect`: the compiled kernels in a table."""
