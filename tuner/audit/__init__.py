"""What is wrong with a data set, and what the model will see of it: found before a run, and shown."""
