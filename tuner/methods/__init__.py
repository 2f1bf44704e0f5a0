"""Training methods: what of a model learns, one file each."""
