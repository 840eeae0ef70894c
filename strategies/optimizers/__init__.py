"""Optimizers with state that matters across tasks; torch's own are named by their import path."""
