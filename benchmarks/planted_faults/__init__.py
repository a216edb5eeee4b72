"""Faults planted into trainings, and what monitor and diagnosis say of them."""
