"""The machinery of a report on a fit."""
