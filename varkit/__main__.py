"""`python -m varkit` is the `varkit` command."""

from varkit.cli import main

main()
