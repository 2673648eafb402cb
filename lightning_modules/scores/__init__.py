"""Post-hoc OOD scores: one pass's evidence in, one number for each image out, higher = more OOD."""
