"""The algebra of LoRAs: as differences that need not be formed, taken out of checkpoints, resized, combined."""
