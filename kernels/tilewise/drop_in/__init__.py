"""tilewise behind the calls that PyTorch's users make already: docs/drop_in.md."""
