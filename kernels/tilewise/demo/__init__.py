"""`tilewise demo`: how alike sentences are, by a real pretrained encoder on the fused kernel."""
