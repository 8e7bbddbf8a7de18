"""A compressed model made faster to run, its function kept."""
