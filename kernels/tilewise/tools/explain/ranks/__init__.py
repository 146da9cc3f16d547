"""What does a call cost when several GPUs share its sequence? Counted, without running it."""
