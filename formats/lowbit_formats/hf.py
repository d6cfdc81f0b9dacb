"""A module in the making."""
