"""Commands that are more than one call: `plan` and `compare`."""
