"""Commands of `varkit.cli` that have a file of their own."""
