"""A conversion as a whole: prepared, executed, read back, put in its place in one step."""
