"""Behind PyTorch's own call: code that nobody rewrites is answered by tilewise. docs/drop_in.md."""
