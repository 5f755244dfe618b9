"""When two arrays are the same: bit for bit, or as far as rounding explains."""
