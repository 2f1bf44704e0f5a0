"""Pictures and captions, from files to global batches."""
