"""The mathematics of diffusion training: schedules, predictions, weightings and the loss. No files, no devices."""
