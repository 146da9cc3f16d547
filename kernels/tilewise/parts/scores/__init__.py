"""What is a score? A modifier a file: score.py says what a modifier is, softcap.py is the one to copy."""
