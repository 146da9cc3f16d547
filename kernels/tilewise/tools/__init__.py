"""What explains, compiles, checks and tunes the kernels from outside; no call to `attention` comes here."""
