"""No member: its name starts with an underscore."""

raise AssertionError("imported, though no config names it")
