"""One call of the real kernels, recorded statement by statement, and the page that plays it."""
