"""Everything that watches or joins: evaluation, metrics, tables, figures, run records."""
