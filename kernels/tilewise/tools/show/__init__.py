"""Which tiles does a mask skip, cut and leave full? show.py finds them, command.py draws them."""
