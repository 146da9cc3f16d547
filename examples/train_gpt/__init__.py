"""A character-level GPT on `tilewise.nn`, trained twice: with tilewise's attention and with PyTorch's."""
