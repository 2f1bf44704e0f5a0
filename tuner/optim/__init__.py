"""Optimizers, one file each; learning-rate schedules in `schedules`."""
