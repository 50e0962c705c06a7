"""Preference tuning: language models, their data, DPO and RLOO."""
