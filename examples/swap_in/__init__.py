"""Models of Transformers with tilewise behind their attention, beside their own."""
