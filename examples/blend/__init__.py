"""Two fine-tunes of the embedded base, merged."""
