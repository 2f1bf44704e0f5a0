"""The embedded base model `pocket`: its data, its training, its evaluation."""
