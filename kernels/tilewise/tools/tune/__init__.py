"""`tilewise tune`: faster tiles for this GPU."""
