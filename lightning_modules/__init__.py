"""One file for each method; ``losses`` and ``scores`` hold what methods share."""
