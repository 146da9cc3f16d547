"""Which tiles does a model of the chip like best? What tuning tries first."""
