"""Very small models of the field's own classes, trained on scenes this package renders itself."""
