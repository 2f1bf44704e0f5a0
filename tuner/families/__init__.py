"""Model families: how each kind of checkpoint is opened, called and sampled. diffusers is imported here."""
