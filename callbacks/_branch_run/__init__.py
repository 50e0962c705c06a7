"""The machinery of a fit that trains branches."""
