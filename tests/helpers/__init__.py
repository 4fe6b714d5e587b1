"""What tests share: small models, batches, media, records, runs. Tests import from here, not from one another."""
