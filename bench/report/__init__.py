"""What result files say: tables, ratios, pictures, and what changed between two of them. Needs no GPU."""
