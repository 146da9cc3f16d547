"""What is in a compiled kernel? Compiled without a GPU, and read: registers, spills, the main loop."""
