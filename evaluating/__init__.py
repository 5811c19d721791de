"""What evaluate.py is made of: a benchmark a module."""
