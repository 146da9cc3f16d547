"""What PyTorch sees: its ops, autograd, traced requests, nested tensors, and the plain path."""
