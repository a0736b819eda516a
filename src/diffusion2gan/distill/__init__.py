"""Distillation: training a one-step student on a teacher's pairs."""
