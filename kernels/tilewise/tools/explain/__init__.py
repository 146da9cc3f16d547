"""`tilewise explain`: what a call will do, and what bounds it."""
