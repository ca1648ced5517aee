"""AdaCorrection on models of other libraries."""
