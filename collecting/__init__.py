"""What collect_candidates.py is made of."""
