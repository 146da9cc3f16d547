"""From the arguments of a call to launches: request, checks, implementation, tiles, passes."""
