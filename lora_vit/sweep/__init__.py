"""Sweeps: many trials at once over one frozen backbone, resumed and shared through claims."""
