"""The ground floor: ids, spec, errors, clock, settings, events. Knows no I/O."""
