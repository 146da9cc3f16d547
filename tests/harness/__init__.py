"""Test tools: interpreter sanitizer, planted bugs, inspection of compiled kernels."""
