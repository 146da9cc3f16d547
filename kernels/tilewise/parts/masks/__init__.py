"""Which pairs count? A mask a file: mask.py says what a mask is, causal.py is the one to copy."""
