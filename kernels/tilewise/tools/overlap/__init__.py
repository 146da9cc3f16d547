"""Who waits for whom on a Hopper multiprocessor? A simulation of the loops, clock by clock."""
