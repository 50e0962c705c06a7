"""The machinery of a fit whose last stage trains coefficients of snapshots."""
