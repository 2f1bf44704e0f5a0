"""`make demo`: teach the embedded base model one subject from six pictures, and show what changed."""
