"""The machinery of a fit whose weights a rule averages."""
