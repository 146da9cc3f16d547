"""The walks over tiles: forward.py first, then prepare.py and backward.py, parameters.py, hopper/."""
